"""From settings, as a configuration holds them, to the pipeline and its calls."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import logging
from ml_collections import ConfigDict

from turbojax.config import check_ranges, fields_of
from turbojax.errors import UserError
from turbojax.media.video import check_path, video_size
from turbojax.memory.planner import Plan
from turbojax.models.image_condition import takes_images
from turbojax.models.tokenizer import Tokenizer
from turbojax.pipeline.options import LoadOptions
from turbojax.pipeline.pipeline import TurboVideoPipeline, VideoOutput
from turbojax.pipeline.plan import find_configs, plan_unloaded
from turbojax.pipeline.request import Request
from turbojax.pipeline.timing import Progress, no_progress
from turbojax.shapes import WORDS
from turbojax.shapes.demo import DEMOS, demo_folder
from turbojax.shapes.prompts import remark
from turbojax.weights.lora import Expert, LoRA


def plan(config: ConfigDict, *, exact: bool | None = True) -> Plan:
    """Plans what the call needs of the device's memory; of weights, names and shapes are read.

    exact: as `turbojax.pipeline.plan.plan_call` takes it.
    """
    request, options = read_settings(config)
    return plan_unloaded(with_demo_folder(options), request, exact=exact)


def makes_from_images(config: ConfigDict) -> bool:
    """Returns True if the network takes an image; of weights, names and shapes are read."""
    return takes_images(find_configs(with_demo_folder(load_options(config))).transformer)


def generate(config: ConfigDict) -> list[Path]:
    """Loads the pipeline, makes the videos and returns the files written."""
    check_path(config.output)
    request, options = read_settings(config)
    request = dataclasses.replace(request, output=config.output)
    warn_of_limits(config)
    return make_videos(load_pipeline(options, request), request).files


def make_videos(pipe: TurboVideoPipeline, request: Request, progress: Progress = no_progress) -> VideoOutput:
    """Makes the videos of a request, and logs what is made and written."""
    logging.info("Making %d frames, seed %d: %s", request.num_frames, request.seed, request.prompt)
    result = pipe.generate(request, progress=progress)
    shown = ", ".join(str(path) for path in result.files[:4])
    logging.info("Wrote %s", shown + (" ..." if len(result.files) > 4 else ""))
    return result


class PipelineCache:
    """Makes videos of changing settings with one pipeline, loaded when it is needed.

    It is loaded again where its options have changed; a call takes any sla_topk.
    """

    def __init__(self) -> None:
        self._pipe: TurboVideoPipeline | None = None
        self._prompt: str | None = None
        self._options: LoadOptions | None = None

    def make(self, config: ConfigDict, output: str | Path, progress: Progress = no_progress) -> VideoOutput:
        """Makes one call; raises UserError for what it cannot be given, as the pipeline does.

        progress: as the pipeline's call takes it; the stage before is "load".
        """
        request, options = read_settings(config)
        request = dataclasses.replace(request, sla_topk=options.sla_topk, output=output)
        if config.prompt != self._prompt:  # of a grid's many videos of one prompt once
            warn_of_limits(config)
            self._prompt = config.prompt
        progress("load", 0.0)
        return make_videos(self.pipeline(dataclasses.replace(options, sla_topk=None), request), request, progress)

    def pipeline(self, options: LoadOptions, request: Request) -> TurboVideoPipeline:
        """Returns the pipeline of these options, the one that is there if it can be; request: its first call."""
        if self._pipe is None or options != self._options:
            self._pipe = None  # its memory is needed
            self._pipe = load_pipeline(options, request)
            self._options = options
        return self._pipe


def limits(config: ConfigDict) -> str | None:
    """Says what the prompt asks for that the small model does not know, in a friendly line."""
    return remark(config.prompt) if config.weights == "demo" else None


def warn_of_limits(config: ConfigDict) -> None:
    """Logs what the small model does not know."""
    if line := limits(config):
        logging.warning("%s", line)


def read_settings(config: ConfigDict) -> tuple[Request, LoadOptions]:
    """Returns the request, without its output, and what the pipeline is loaded with; images are read.

    Raises UserError for what can be told before minutes of loading.
    """
    check_ranges(config)
    return make_request(config), load_options(config)


def make_request(config: ConfigDict) -> Request:
    """Makes the request of a configuration, whose ranges are checked; images are read."""
    width, height = video_size(config.resolution, config.aspect_ratio)
    if config.last_image and not config.image:
        raise UserError("last_image needs an image to start from; give --config.image=FILE")
    own = {
        "image": image_path(config.image),
        "last_image": image_path(config.last_image),
        "height": height if config.height is None else config.height,
        "width": width if config.width is None else config.width,
        "sla_topk": None,  # the network is loaded with it
        "output": None,
    }
    return Request(**fields_of(Request, config) | own)


def image_path(name: str | None) -> str | Path | None:
    """Returns the file of an image setting; "demo" is the demo's picture."""
    return demo_folder() / "image.png" if name == "demo" else name or None


def load_options(config: ConfigDict) -> LoadOptions:
    """Returns what the pipeline is loaded with; raises UserError for what no network can have."""
    if not config.weights:
        raise UserError("no weights; give --config.weights= a file, a folder, a Hugging Face repository, or random")
    if config.dtype not in ("bfloat16", "float32"):
        raise UserError(f"dtype={config.dtype!r} is unknown; choose bfloat16 or float32")
    own = {"loras": loras(config), "dtype": jnp.dtype(config.dtype)}
    return LoadOptions(**fields_of(LoadOptions, config) | own)


def loras(config: ConfigDict) -> tuple[LoRA, ...]:
    """Returns the LoRAs of a configuration: of both experts, of the one for high and of the one for low noise."""
    named: dict[Expert | None, str | None] = {None: config.lora, "high": config.lora_high, "low": config.lora_low}
    paths = [(path.strip(), expert) for expert, listed in named.items() for path in (listed or "").split(",")]
    return tuple(LoRA(path, config.lora_strength, expert) for path, expert in paths if path)


def with_demo_folder(options: LoadOptions) -> LoadOptions:
    """Replaces the name of a demo by its folder."""
    if options.weights not in DEMOS:
        return options
    return dataclasses.replace(options, weights=DEMOS[str(options.weights)]())


def load_pipeline(options: LoadOptions, prepare: Request | None = None) -> TurboVideoPipeline:
    """Loads a pipeline; random weights have the words of the small model unless a tokenizer is given."""
    random = options.weights == "random"
    if jax.default_backend() == "cpu" and not random and options.weights not in DEMOS:
        logging.warning("No GPU was found; a real model takes hours on a CPU (pip install turbojax[cuda12])")
    tokenizer = Tokenizer.from_path(options.tokenizer or WORDS) if random else None
    return TurboVideoPipeline.load(with_demo_folder(options), prepare=prepare, tokenizer=tokenizer)
