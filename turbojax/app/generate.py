"""From settings, as a configuration holds them, to the pipeline and its calls."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from ml_collections import ConfigDict

from turbojax.config import changed, check_ranges
from turbojax.diffusion import expert_split
from turbojax.errors import UserError
from turbojax.kernels.int8 import QuantConfig
from turbojax.media.video import check_path, video_size
from turbojax.memory.planner import Plan, parse
from turbojax.models.image_condition import takes_images
from turbojax.models.published import known_network
from turbojax.models.tokenizer import Tokenizer
from turbojax.models.wan import WanConfig
from turbojax.pipeline.pipeline import TurboVideoPipeline, VideoOutput
from turbojax.pipeline.plan import find_configs, plan_unloaded
from turbojax.pipeline.request import Request
from turbojax.pipeline.timing import Progress, no_progress
from turbojax.shapes import WORDS
from turbojax.shapes.demo import DEMOS, demo_folder
from turbojax.shapes.prompts import remark
from turbojax.weights.load import with_options
from turbojax.weights.lora import Expert, LoRA

# Settings that loading takes by the same names.
NETWORK_SETTINGS = ("quant_linear", "quant_scheme", "attention_type", "sla_topk", "sage_values", "memory")

# All that another pipeline has to be loaded for; a call takes any sla_topk.
LOAD_SETTINGS = (
    *(name for name in NETWORK_SETTINGS if name != "sla_topk"),
    *("model", "weights", "vae", "text_encoder", "tokenizer", "image_encoder", "dtype", "cache_prompts"),
    *("lora", "lora_high", "lora_low", "lora_strength", "boundary"),
)


def plan(config: ConfigDict, *, exact: bool | None = True) -> Plan:
    """Plans what the call needs of the device's memory; of weights, names and shapes are read.

    exact: as `turbojax.pipeline.plan.plan_call` takes it.
    """
    options = network_options(config)
    return plan_unloaded(weights_of(config), make_request(config), exact=exact, **components(config), **options)


def makes_from_images(config: ConfigDict) -> bool:
    """Returns True if the network takes an image; of weights, names and shapes are read."""
    options = {name: value for name, value in network_options(config).items() if name != "memory"}
    return takes_images(find_configs(weights_of(config), **components(config), **options).transformer)


def components(config: ConfigDict) -> dict[str, Any]:
    return {name: config[name] for name in ("model", "vae", "text_encoder")}


def generate(config: ConfigDict) -> list[Path]:
    """Loads the pipeline, makes the videos and returns the files written."""
    check_path(config.output)
    request = dataclasses.replace(make_request(config), output=config.output)
    warn_of_limits(config)
    return make_videos(load_pipeline(config, prepare=request), request).files


def make_videos(pipe: TurboVideoPipeline, request: Request, progress: Progress = no_progress) -> VideoOutput:
    """Makes the videos of a request, and logs what is made and written."""
    logging.info("Making %d frames, seed %d: %s", request.num_frames, request.seed, request.prompt)
    result = pipe.generate(request, progress=progress)
    shown = ", ".join(str(path) for path in result.files[:4])
    logging.info("Wrote %s", shown + (" ..." if len(result.files) > 4 else ""))
    return result


class PipelineCache:
    """Makes videos of changing settings with one pipeline, loaded when it is needed.

    It is loaded again where one of LOAD_SETTINGS has changed.
    """

    def __init__(self) -> None:
        self._pipe: TurboVideoPipeline | None = None
        self._prompt: str | None = None
        self._loaded: dict[str, Any] = {}

    def make(self, config: ConfigDict, output: str | Path, progress: Progress = no_progress) -> VideoOutput:
        """Makes one call; raises UserError for what it cannot be given, as the pipeline does.

        progress: as the pipeline's call takes it; the stage before is "load".
        """
        request = dataclasses.replace(make_request(config), sla_topk=config.sla_topk, output=output)
        if config.prompt != self._prompt:  # of a grid's many videos of one prompt once
            warn_of_limits(config)
            self._prompt = config.prompt
        progress("load", 0.0)
        return make_videos(self.pipeline(config, request), request, progress)

    def pipeline(self, config: ConfigDict, request: Request) -> TurboVideoPipeline:
        """The pipeline for these settings, the one that is there if it can be."""
        wanted = {name: config[name] for name in LOAD_SETTINGS}
        if self._pipe is None or wanted != self._loaded:
            self._pipe = None  # its memory is needed
            self._pipe = load_pipeline(changed(config, sla_topk=None), prepare=request)
            self._loaded = wanted
        return self._pipe


def limits(config: ConfigDict) -> str | None:
    """Says what the prompt asks for that the small model does not know, in a friendly line."""
    return remark(config.prompt) if config.weights == "demo" else None


def warn_of_limits(config: ConfigDict) -> None:
    if line := limits(config):
        logging.warning("%s", line)


def make_request(config: ConfigDict) -> Request:
    """Makes the request of a configuration, without its output; images are read.

    Raises UserError for what can be told before minutes of loading.
    """
    check_ranges(config)
    check_network(config)
    width, height = video_size(config.resolution, config.aspect_ratio)
    if config.last_image and not config.image:
        raise UserError("last_image needs an image to start from; give --config.image=FILE")
    request = Request(
        config.prompt,
        image=image_path(config.image),
        last_image=image_path(config.last_image),
        background=config.background,
        adaptive_size=config.adaptive_size,
        negative_prompt=config.negative_prompt,
        num_frames=config.num_frames,
        height=height if config.height is None else config.height,
        width=width if config.width is None else config.width,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        sampler=config.sampler,
        sigma_max=config.sigma_max,
        ode=config.ode,
        shift=config.shift,
        seed=config.seed,
        num_samples=config.num_samples,
        sample_index=config.sample_index,
        fps=config.fps,
        vae_tiling=config.vae_tiling,
    )
    expert_split(request.sampler_for(WanConfig.t2v_1_3b()).times, config.boundary)
    return request


def image_path(name: str | None) -> str | Path | None:
    """The file of an image setting; "demo" is the demo's picture."""
    return demo_folder() / "image.png" if name == "demo" else name or None


def check_network(config: ConfigDict) -> None:
    """Tries the options on a network that may have all of them; raises UserError for what none can have."""
    options = network_options(config)
    parse(options.pop("memory"), None)
    network = known_network(config.model)  # a name in any case
    network = network if config.weights == "random" else WanConfig.t2v_1_3b()
    with_options(dataclasses.replace(network, quant=QuantConfig()), **options)


def loras(config: ConfigDict) -> list[LoRA]:
    named: tuple[tuple[str | None, Expert | None], ...] = (
        *((config.lora, None), (config.lora_high, "high"), (config.lora_low, "low")),
    )
    return [
        LoRA(path.strip(), config.lora_strength, expert)
        for paths, expert in named
        for path in (paths or "").split(",")
        if path.strip()
    ]


def network_options(config: ConfigDict) -> dict[str, Any]:
    """What decides the networks and where they are."""
    if config.dtype not in ("bfloat16", "float32"):
        raise UserError(f"dtype={config.dtype!r} is unknown; choose bfloat16 or float32")
    return {name: config[name] for name in NETWORK_SETTINGS} | {"dtype": jnp.dtype(config.dtype)}


def weights_of(config: ConfigDict) -> str:
    if not config.weights:
        raise UserError("no weights; give --config.weights= a file, a folder, a Hugging Face repository, or random")
    return str(DEMOS[config.weights]()) if config.weights in DEMOS else config.weights


def load_pipeline(config: ConfigDict, *, prepare: Request | None = None) -> TurboVideoPipeline:
    options = network_options(config) | {"prepare": prepare}
    weights = weights_of(config)
    if weights == "random":
        tokenizer = Tokenizer.from_path(config.tokenizer or WORDS)
        return TurboVideoPipeline.random(config.model, tokenizer, **options)
    if jax.default_backend() == "cpu" and config.weights not in DEMOS:
        logging.warning("No GPU was found; a real model takes hours on a CPU (pip install turbojax[cuda12])")
    return TurboVideoPipeline.from_pretrained(
        weights,
        vae=config.vae,
        text_encoder=config.text_encoder,
        tokenizer=config.tokenizer,
        image_encoder=config.image_encoder,
        loras=loras(config),
        boundary=config.boundary,
        cache_prompts=config.cache_prompts,
        **options,
    )
