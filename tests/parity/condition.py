"""Recomputes the image-to-video condition: sizes, the resized image, mask and latents. The VAE lies beside it."""

import re
from pathlib import Path

import numpy as np

from tests.golden_io import Incomplete, load
from tests.parity.vae import channels_first, fixture_vae
from turbojax.media.image import adaptive_size, resize, to_unit
from turbojax.media.video import SIZES
from turbojax.models.image_condition import condition

LEVELS, LATENTS = 1, 2e-5
MASK = 4  # channels in front of the latents


def recompute(config: dict, t: dict[str, np.ndarray]) -> dict[str, tuple[np.ndarray, float]]:
    """Every `out.*` of the fixture: our value and the absolute tolerance."""
    out: dict[str, tuple[np.ndarray, float]] = {}
    images = [(int(width), int(height)) for width, height in t["in.sizes_wh"]]
    for resolution, aspect in config["settings"]:
        check_sizes(config, resolution, aspect)
        sizes = np.array([adaptive_size(image, SIZES[resolution][aspect]) for image in images])
        out[f"out.adaptive_wh.{resolution}.{aspect.replace(':', 'x')}"] = sizes, 0
    vae = fixture_vae(load(file_beside(config))[1])
    for name, case in config["cases"].items():
        height, width = case["target_hw"]
        levels = resize((t[f"in.{name}.image"].astype(np.int16) + 128).astype(np.uint8), width, height)
        out[f"out.{name}.image_tensor"] = levels.transpose(2, 0, 1)[None].astype(np.int16) - 128, LEVELS
        # The recorded levels go to the VAE: ours differ by one in a few places, which is no error of the condition.
        recorded = (t[f"out.{name}.image_tensor"][0].transpose(1, 2, 0).astype(np.int16) + 128).astype(np.uint8)
        y = channels_first(condition(vae, to_unit(recorded), num_frames=case["frames"]))
        out[f"out.{name}.latents"] = y[:, MASK:], LATENTS
        out[f"out.{name}.y"] = np.repeat(y, case["num_samples"], axis=0), LATENTS
    return out


def check_sizes(config: dict, resolution: str, aspect: str) -> None:
    """Raises Incomplete where turbojax has another area for this resolution."""
    base = config.get("base_wh", SIZES)[resolution][aspect]
    if SIZES.get(resolution, {}).get(aspect) != tuple(base):
        raise Incomplete(f"its {resolution} {aspect} is {base}, which turbojax does not have")


def file_beside(config: dict) -> Path:
    """The fixture whose VAE this one was made with, as its `vae` names it."""
    named = re.search(r"[\w.-]+\.safetensors", config["vae"])
    path = Path(config["folder"]) / named[0] if named else None
    if path is None or not path.is_file():
        raise Incomplete(f"its VAE, {config['vae']!r}, is no file beside it")
    return path
