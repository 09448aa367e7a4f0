"""Predicted against measured peaks of device memory, stage by stage, and what a step takes."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from turbojax.bench.measure import peak_bytes
from turbojax.models.image_condition import takes_images
from turbojax.models.published import MODELS
from turbojax.models.tokenizer import Tokenizer
from turbojax.pipeline.pipeline import TurboVideoPipeline
from turbojax.pipeline.timing import Stopwatch
from turbojax.shapes.demo import demo_picture


class PeakWatch(Stopwatch):
    """A stopwatch that also notes the device's peak when a stage ends."""

    def __init__(self):
        super().__init__()
        self.peaks: dict[str, int | None] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        with super().stage(name):
            yield
        self.peaks[name] = peak_bytes()


def measure_memory(
    tokenizer: Tokenizer, *, model: str, memory: str, num_inference_steps: int, options: dict[str, Any], **size: int
) -> dict[str, Any]:
    """Measures the peaks of random weights at full size; one setting a process, since a peak has no reset.

    A stage's `predicted_bytes` and `measured_bytes` are the largest so far. Seconds a step are those of a second call.
    """
    call: dict[str, Any] = {"num_inference_steps": num_inference_steps, **size}
    if takes_images(MODELS[model]()):
        call |= {"image": demo_picture(), "adaptive_size": False}
    pipe = TurboVideoPipeline.random(model, tokenizer, memory=memory, prepare=call, **options)
    loaded = peak_bytes()
    watch = pipe._clock = PeakWatch()
    pipe("A cat surfing a wave at sunset", seed=0, **call)
    measured = {"load": loaded, **watch.peaks}
    warm = pipe("A dog surfing a wave at sunset", seed=1, **call).timings
    plan = pipe.plan(**call)
    result: dict[str, Any] = {}
    predicted = 0
    for stage in plan.stages:
        predicted, peak = max(predicted, stage.total), measured[stage.name]
        result[stage.name] = {
            "predicted_bytes": predicted,
            "measured_bytes": peak,
            "predicted_over_measured": predicted / peak if peak else None,
        }
    return {
        "residency": dataclasses.asdict(plan.residency),
        "limit_bytes": plan.limit,
        "exact": plan.exact,
        "stages": result,
        "seconds_a_step": warm["diffusion"] / num_inference_steps,
        "seconds": warm,
    }
