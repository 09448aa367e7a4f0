"""Recomputes the image-to-video condition: sizes, the resized image, mask and latents. The VAE is vae.safetensors'."""

import numpy as np

from tests.golden_io import GOLDEN, load
from tests.parity_vae import channels_first, fixture_vae
from turbojax.condition import condition
from turbojax.image import adaptive_size, resize, to_unit
from turbojax.video import SIZES

LEVELS, LATENTS = 1, {"resize": 2e-5, "same": 1e-5}


def recompute(config: dict, t: dict[str, np.ndarray]) -> dict[str, tuple[np.ndarray, float]]:
    """Every `out.*` of the fixture: our value and the absolute tolerance."""
    out: dict[str, tuple[np.ndarray, float]] = {}
    images = [(int(width), int(height)) for width, height in t["in.sizes_wh"]]
    for resolution, aspect in config["settings"]:
        sizes = np.array([adaptive_size(image, SIZES[resolution][aspect]) for image in images])
        out[f"out.adaptive_wh.{resolution}.{aspect.replace(':', 'x')}"] = sizes, 0
    vae = fixture_vae(load(GOLDEN / "vae.safetensors")[1])
    for name, case in config["cases"].items():
        height, width = case["target_hw"]
        levels = resize((t[f"in.{name}.image"].astype(np.int16) + 128).astype(np.uint8), width, height)
        out[f"out.{name}.image_tensor"] = levels.transpose(2, 0, 1)[None].astype(np.int16) - 128, LEVELS
        # The recorded levels go to the VAE: ours differ by one in a few places, which is no error of the condition.
        recorded = (t[f"out.{name}.image_tensor"][0].transpose(1, 2, 0).astype(np.int16) + 128).astype(np.uint8)
        y = channels_first(condition(vae, to_unit(recorded), num_frames=case["frames"]))
        out[f"out.{name}.latents"] = y[:, 4:], LATENTS[name]
        out[f"out.{name}.y"] = np.repeat(y, case["num_samples"], axis=0), LATENTS[name]
    return out
