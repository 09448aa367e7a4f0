"""From settings, as a configuration holds them, to the pipeline and its calls."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from turbojax.config import changed, check_ranges
from turbojax.diffusion import RCM, expert_split
from turbojax.errors import UserError
from turbojax.files import check_file
from turbojax.kernels.int8 import QuantConfig
from turbojax.media.image import check_colour, read_image
from turbojax.media.video import check_fps, check_path, video_size
from turbojax.memory.planner import Plan, parse
from turbojax.models.image_condition import takes_images
from turbojax.models.published import known_network
from turbojax.models.tokenizer import Tokenizer
from turbojax.models.vae import VAEConfig
from turbojax.models.wan import WanConfig
from turbojax.pipeline.decode import check_tiling
from turbojax.pipeline.denoise import check_sample_index, check_seed, latent_shape, make_sampler
from turbojax.pipeline.pipeline import TurboVideoPipeline, VideoOutput, check_number
from turbojax.pipeline.plan import find_configs, plan_unloaded
from turbojax.pipeline.timing import Progress, untold
from turbojax.shapes import WORDS
from turbojax.shapes.demo import DEMOS, demo_folder
from turbojax.shapes.prompts import remark
from turbojax.text_files import check_text
from turbojax.weights.load import with_options
from turbojax.weights.lora import Expert, LoRA

# Settings that the pipeline's call takes by the same names; height and width may come from elsewhere.
CALL_SETTINGS = (
    *("prompt", "negative_prompt", "num_samples", "seed", "sample_index", "num_frames", "sampler"),
    *(
        "num_inference_steps",
        "sigma_max",
        "ode",
        "guidance_scale",
        "shift",
        "vae_tiling",
        "background",
        "adaptive_size",
    ),
)

# Settings that loading takes by the same names.
NETWORK_SETTINGS = ("quant_linear", "quant_scheme", "attention_type", "sla_topk", "sage_values", "memory")

# All that another pipeline has to be loaded for; a call takes any sla_topk.
LOAD_SETTINGS = (
    *(name for name in NETWORK_SETTINGS if name != "sla_topk"),
    *("model", "weights", "vae", "text_encoder", "tokenizer", "image_encoder", "dtype", "cache_prompts"),
    *("lora", "lora_high", "lora_low", "lora_strength", "boundary"),
)


def plan(config: ConfigDict, *, exact: bool | None = True) -> Plan:
    """What the call would need of the device's memory; of weights, names and shapes are read.

    exact: as `turbojax.pipeline.compile.plan_call` takes it.
    """
    options = network_options(config)
    return plan_unloaded(weights_of(config), call_settings(config), exact=exact, **components(config), **options)


def makes_from_images(config: ConfigDict) -> bool:
    """Whether the network takes an image; of weights, names and shapes are read."""
    options = {name: value for name, value in network_options(config).items() if name != "memory"}
    return takes_images(find_configs(weights_of(config), **components(config), **options).transformer)


def components(config: ConfigDict) -> dict[str, Any]:
    return {name: config[name] for name in ("model", "vae", "text_encoder")}


def generate(config: ConfigDict) -> list[Path]:
    """Loads the pipeline, makes the videos and returns the files written."""
    check_file(check_path(config.output))
    settings = call_settings(config)
    tell_limits(config)
    return call(load_pipeline(config, prepare=settings), settings, output=config.output, fps=config.fps).files


def call(
    pipe: TurboVideoPipeline,
    settings: dict[str, Any],
    *,
    output: str | Path,
    fps: int,
    progress: Progress = untold,
) -> VideoOutput:
    """A call of the pipeline that tells what it makes and writes."""
    logging.info("Making {num_frames} frames, seed {seed}: {prompt}".format(**settings))
    result = pipe(**settings, output=output, fps=fps, progress=progress)
    shown = ", ".join(str(path) for path in result.files[:4])
    logging.info("Wrote %s", shown + (" ..." if len(result.files) > 4 else ""))
    return result


class Studio:
    """Makes videos of changing settings with one pipeline, loaded when it is needed.

    It is loaded again where one of LOAD_SETTINGS has changed.
    """

    def __init__(self) -> None:
        self._pipe: TurboVideoPipeline | None = None
        self._prompt: str | None = None
        self._loaded: dict[str, Any] = {}

    def make(self, config: ConfigDict, output: str | Path, progress: Progress = untold) -> VideoOutput:
        """One call; raises UserError for what it cannot be given, as the pipeline does.

        progress: as the pipeline's call takes it; the stage before is "load".
        """
        settings = call_settings(config) | {"sla_topk": config.sla_topk}
        if config.prompt != self._prompt:  # of a grid's many videos of one prompt once
            tell_limits(config)
            self._prompt = config.prompt
        progress("load", 0.0)
        pipe = self.pipeline(config, settings)
        return call(pipe, settings, output=output, fps=config.fps, progress=progress)

    def pipeline(self, config: ConfigDict, settings: dict[str, Any]) -> TurboVideoPipeline:
        """The pipeline for these settings, the one that is there if it can be."""
        wanted = {name: config[name] for name in LOAD_SETTINGS}
        if self._pipe is None or wanted != self._loaded:
            self._pipe = None  # its memory is needed
            self._pipe = load_pipeline(changed(config, sla_topk=None), prepare=settings)
            self._loaded = wanted
        return self._pipe


def call_settings(config: ConfigDict) -> dict[str, Any]:
    """What the pipeline's call takes; raises UserError for what can be told before minutes of loading."""
    width, height = check_settings(config)
    return {name: config[name] for name in CALL_SETTINGS} | {"width": width, "height": height} | read_pictures(config)


def limits(config: ConfigDict) -> str | None:
    """Of the small model, what the prompt asks for that it does not know, in a friendly line."""
    return remark(config.prompt) if config.weights == "demo" else None


def tell_limits(config: ConfigDict) -> None:
    if line := limits(config):
        logging.warning("%s", line)


def check_settings(config: ConfigDict) -> tuple[int, int]:
    """Width and height; raises UserError for what can be told before minutes of loading."""
    check_ranges(config)
    width, height = video_size(config.resolution, config.aspect_ratio)
    width = width if config.width is None else config.width
    height = height if config.height is None else config.height
    shape = latent_shape(VAEConfig.wan2_1(), config.num_frames, height, width)
    sigma_max = RCM.sigma_max if config.sigma_max is None else config.sigma_max
    steps = {"num_steps": config.num_inference_steps, "sigma_max": sigma_max, "shift": config.shift}
    expert_split(make_sampler(config.sampler, **steps).times, config.boundary)
    RCM(num_steps=1, sigma_max=sigma_max)  # other samplers do not look at it
    known_network(config.model)  # likewise, where there are weights
    check_colour(config.background)
    check_network(config)
    check_text("prompt", config.prompt)
    check_text("negative prompt", config.negative_prompt)
    check_number([config.prompt], config.num_samples)
    check_seed(config.seed)
    check_sample_index(config.sample_index, (config.num_samples, *shape))
    check_tiling(config.vae_tiling)
    check_fps(config.fps)
    return width, height


def check_network(config: ConfigDict) -> None:
    """Tries the options on a network that may have all of them; raises UserError for what none can have."""
    options = network_options(config)
    parse(options.pop("memory"), None)
    network = known_network(config.model) if config.weights == "random" else WanConfig.t2v_1_3b()
    with_options(dataclasses.replace(network, quant=QuantConfig()), **options)


def read_pictures(config: ConfigDict) -> dict[str, np.ndarray]:
    """The images that are given, read before the weights are: a bad file shows at once."""
    if config.last_image and not config.image:
        raise UserError("last_image needs an image to start from; give --config.image=FILE")
    named = {name: config[name] for name in ("image", "last_image") if config[name]}
    paths = {name: demo_folder() / "image.png" if path == "demo" else path for name, path in named.items()}
    return {name: read_image(path, background=config.background) for name, path in paths.items()}


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


def load_pipeline(config: ConfigDict, *, prepare: dict[str, Any] | None = None) -> TurboVideoPipeline:
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
