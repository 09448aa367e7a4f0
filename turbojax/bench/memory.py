"""Predicted against measured peaks of device memory, stage by stage, and what a step takes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

from turbojax.bench.measure import peak_bytes
from turbojax.models.tokenizer import Tokenizer
from turbojax.pipeline.options import LoadOptions
from turbojax.pipeline.pipeline import TurboVideoPipeline
from turbojax.pipeline.request import Request
from turbojax.pipeline.timing import Stopwatch


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


def measure_memory(options: LoadOptions, tokenizer: Tokenizer, request: Request) -> dict[str, Any]:
    """Measures the peaks of random weights at full size; one setting a process, since a peak has no reset.

    A stage's `predicted_bytes` and `measured_bytes` are the largest so far. Seconds a step are those of a second call.
    """
    pipe = TurboVideoPipeline.load(options, prepare=request, tokenizer=tokenizer)
    loaded = peak_bytes()
    watch = pipe._clock = PeakWatch()
    pipe.generate(replace(request, prompt="A cat surfing a wave at sunset"))
    measured = {"load": loaded, **watch.peaks}
    warm = pipe.generate(replace(request, prompt="A dog surfing a wave at sunset", seed=1)).timings
    plan = pipe.plan(request)
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
        "residency": asdict(plan.residency),
        "limit_bytes": plan.limit,
        "exact": plan.exact,
        "stages": result,
        "seconds_a_step": warm["diffusion"] / request.num_inference_steps,
        "seconds": warm,
    }
