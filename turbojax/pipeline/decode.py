"""From latents to frames: whole, or in tiles where whole frames would not fit."""

from collections.abc import Iterator

import numpy as np
from absl import logging
from tqdm import tqdm

from turbojax.memory.planner import memory_stats
from turbojax.models import vae as vae_model
from turbojax.models.tiling import decode_tiled
from turbojax.models.vae import WanVAE


def decode(vae: WanVAE, latents: np.ndarray, *, tiled: bool = False) -> Iterator[np.ndarray]:
    """Decodes one video's latents `[t, h, w, c]` to uint8 frames `[n, H, W, 3]` on the host, a chunk at a time.

    tiled: in tiles, see `turbojax.models.tiling`; then all frames come at once.
    """
    if tiled:
        yield decode_tiled(vae, latents[None], as_uint8=True)[0]
        return
    chunks = vae_model.decode_chunks(vae, latents[None], as_uint8=True)
    for part in tqdm(chunks, desc="Decoding", unit="chunk", disable=None, leave=False):
        yield np.asarray(part)[0]  # travels while the next chunk is computed


def needs_tiling(vae: WanVAE, height: int, width: int, tiling: str, *, limit: int | None = None) -> bool:
    """Returns True if latents of this size are decoded in tiles; "auto" compares with the memory that is free.

    limit: bytes to keep to where the device has more.
    """
    if tiling != "auto":
        return tiling == "on"
    memory = memory_stats()
    if "bytes_limit" not in memory:
        return False
    free = min(memory["bytes_limit"], limit or memory["bytes_limit"]) - memory["bytes_in_use"]
    needed = vae_model.decoding_bytes(vae, height, width)
    if needed > free:
        logging.info("Decoding in tiles: whole frames take %.1f GB, and %.1f GB are free", needed / 1e9, free / 1e9)
    return needed > free
