"""Makes a video from a prompt.

    python scripts/generate.py --config=configs/demo.py
    python scripts/generate.py --config=configs/wan1_3b.py --config.prompt="A cat surfing a wave" --config.seed=1

Every setting of a configuration can be changed as --config.NAME=VALUE:
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from turbojax import TurboVideoPipeline, UserError, cli
from turbojax.config import SETTINGS, describe_settings
from turbojax.demo import demo_folder
from turbojax.models.tokenizer import Tokenizer
from turbojax.models.vae import VAEConfig
from turbojax.pipeline import check_seed, check_tiling, latent_shape, make_sampler
from turbojax.video import check_fps, check_path, make_parent, video_size

CONFIG = config_flags.DEFINE_config_file("config", None, "file of settings, see configs/", lock_config=True)


# Settings that the pipeline's call takes by the same names; height and width may come from elsewhere.
CALL_SETTINGS = (
    *("prompt", "negative_prompt", "num_samples", "seed", "num_frames", "sampler", "num_inference_steps"),
    *("sigma_max", "ode", "guidance_scale", "shift", "vae_tiling"),
)


def main() -> None:
    if not CONFIG.present:
        raise UserError("no settings; give --config=configs/NAME.py, for instance configs/demo.py")
    try:
        missing = [setting.name for setting in SETTINGS if setting.name not in CONFIG.value]
    except (OSError, TypeError) as error:  # get_config() could not read a file, or returned something else
        raise UserError(f"the settings cannot be read, {error}") from error
    if missing:
        raise UserError(f"get_config() must return turbojax.config.base_config(...); missing: {', '.join(missing)}")
    generate(CONFIG.value)


def generate(config: ConfigDict) -> list[Path]:
    """Loads the pipeline, makes the videos and returns the files written."""
    make_parent(check_path(config.output))
    width, height = check_settings(config)
    settings = {name: config[name] for name in CALL_SETTINGS} | {"width": width, "height": height}
    pipe = load_pipeline(config, prepare=settings)
    logging.info("Making %d x %d, %d frames, seed %d: %s", width, height, config.num_frames, config.seed, config.prompt)
    written = pipe(**settings, output=config.output, fps=config.fps).files
    logging.info("Wrote %s", ", ".join(str(path) for path in written[:4]) + (" ..." if len(written) > 4 else ""))
    return written


def check_settings(config: ConfigDict) -> tuple[int, int]:
    """Width and height; raises UserError for what can be told before minutes of loading."""
    width, height = video_size(config.resolution, config.aspect_ratio)
    width = width if config.width is None else config.width
    height = height if config.height is None else config.height
    latent_shape(VAEConfig.wan2_1(), config.num_frames, height, width)
    make_sampler(config.sampler, num_steps=config.num_inference_steps, sigma_max=config.sigma_max, shift=config.shift)
    check_seed(config.seed)
    check_tiling(config.vae_tiling)
    check_fps(config.fps)
    return width, height


def load_pipeline(config: ConfigDict, *, prepare: dict[str, Any] | None = None) -> TurboVideoPipeline:
    if config.dtype not in ("bfloat16", "float32"):
        raise UserError(f"dtype={config.dtype!r} is unknown; choose bfloat16 or float32")
    options = {
        "quant_linear": config.quant_linear,
        "quant_scheme": config.quant_scheme,
        "attention_type": config.attention_type,
        "sla_topk": config.sla_topk,
        "sage_values": config.sage_values,
        "dtype": jnp.dtype(config.dtype),
        "prepare": prepare,
    }
    if config.weights == "random":
        tokenizer = Tokenizer.from_path(config.tokenizer or demo_folder() / "google" / "umt5-xxl")
        return TurboVideoPipeline.random(config.model, tokenizer, **options)
    if not config.weights:
        raise UserError("no weights; give --config.weights= a file, a folder, a Hugging Face repository, or random")
    weights = str(demo_folder()) if config.weights == "demo" else config.weights
    if jax.default_backend() == "cpu" and config.weights != "demo":
        logging.warning("No GPU was found; a real model takes hours on a CPU (pip install turbojax[cuda12])")
    return TurboVideoPipeline.from_pretrained(
        weights,
        vae=config.vae,
        text_encoder=config.text_encoder,
        tokenizer=config.tokenizer,
        cache_prompts=config.cache_prompts,
        **options,
    )


if __name__ == "__main__":
    flags.adopt_module_key_flags(cli)
    cli.run(main, help_text=(__doc__ or "") + "\n" + describe_settings())
