"""Models that run on any machine without a download, by the names that settings give them.

"demo" is the small model of the world of shapes. "demo-i2v" and what tests use are tiny models with random weights, as
checkpoint files in the official layout: they make noise, and show that the whole way (read, check, encode, sample,
decode, write) works.
"""

from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from absl import logging
from PIL import Image

from turbojax.errors import UserError
from turbojax.files import user_cache, whole_folder
from turbojax.models.umt5 import UMT5Config
from turbojax.models.vae import VAEConfig
from turbojax.models.wan import WanConfig
from turbojax.shapes import MODEL
from turbojax.shapes.words import unigram_tokenizer
from turbojax.weights.io import write_pth
from turbojax.weights.layouts import generated, umt5_layout, vae_layout, wan_layout

VERSION = 1  # part of the folder's name; raise it when the files change
VOCABULARY = "a the of in on at to and with is are red green blue yellow cat dog bird car street city sea sky sun rain"


def demo_configs(*, image: bool = False) -> tuple[WanConfig, VAEConfig, UMT5Config]:
    wan = WanConfig(dim=256, ffn_dim=512, num_heads=2, num_layers=2, text_dim=64, in_channels=36 if image else 16)
    vae = VAEConfig.wan2_1(dim=8)
    t5 = UMT5Config(vocab_size=512, dim=64, attention_dim=64, ffn_dim=128, num_heads=4, num_layers=2)
    return wan, vae, t5


def demo_folder() -> Path:
    """Returns the folder of the demo of image to video, in the user's cache: two experts, and a picture, `image.png`.

    Written on the first call, whole or not at all.
    """
    folder = user_cache() / f"demo-i2v-{VERSION}"
    if not folder.is_dir():
        logging.info("Writing the demo's random checkpoint to %s", folder)
        try:
            with whole_folder(folder) as temporary:
                write_demo(temporary, image=True)
        except UserError as error:
            if not folder.is_dir():  # another process may have been first
                raise UserError(f"{error}; name another cache, XDG_CACHE_HOME") from error
    return folder


def write_demo(folder: Path, *, image: bool = False) -> None:
    """Writes transformers, VAE, text encoder and tokenizer under their published names.

    image: for image to video, two experts, with a picture.
    """
    wan, vae, t5 = demo_configs(image=image)
    for seed, name in enumerate(("-high", "-low") if image else ("",)):
        write_pth(folder / f"TurboWan-demo{name}.pth", generated(wan_layout(wan), jnp.bfloat16, seed=seed))
    write_encoders(folder, vae, t5)
    if image:
        Image.fromarray(demo_picture()).save(folder / "image.png")


def write_encoders(folder: Path, vae: VAEConfig, t5: UMT5Config) -> None:
    """Writes what stands around a transformer, with generated values, under the published names."""
    for name, layout in (("Wan2.1_VAE.pth", vae_layout(vae)), ("models_t5_umt5-xxl-enc-bf16.pth", umt5_layout(t5))):
        write_pth(folder / name, generated(layout, jnp.bfloat16))
    (folder / "google" / "umt5-xxl").mkdir(parents=True)
    unigram_tokenizer(VOCABULARY.split()).save(str(folder / "google" / "umt5-xxl" / "tokenizer.json"))


# Names of weights, and where their files are.
DEMOS: dict[str, Callable[[], Path]] = {"demo": lambda: MODEL, "demo-i2v": demo_folder}


def demo_picture() -> np.ndarray:
    """Draws a sun over the sea, uint8 `[120, 200, 3]`."""
    y, x = np.mgrid[:120, :200]
    sky = np.array([120, 170, 230]) + y[..., None] // 2
    sea = np.array([20, 60, 120]) + (np.sin(x / 5 + y) * 12)[..., None]
    picture = np.where((y < 80)[..., None], sky, sea)
    picture[np.hypot(y - 50, x - 140) < 18] = (250, 210, 90)
    return picture.astype(np.uint8)
