"""Measurements on the CPU of what follows the transformer: settings of x264, errors of the VAE's tiles."""

import os
import resource
import time
from pathlib import Path
from typing import Any
from unittest import mock

import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx

from turbojax.media import ffmpeg
from turbojax.media.video import open_video, save_video
from turbojax.models import tiling
from turbojax.models import vae as vae_model
from turbojax.models.tiling import Tiling
from turbojax.models.vae import VAEConfig, WanVAE

CANDIDATES = (
    *(("medium", 10), ("veryfast", 10), ("veryfast", 14), ("superfast", 10), ("superfast", 12)),
    *(("superfast", 14), ("ultrafast", 10), ("ultrafast", 14)),
)
PACE = 0.04  # seconds between pieces of 4 frames, as the VAE gives them at 480p


def video_writing(folder: Path, *, num_frames: int, height: int, width: int) -> dict[str, Any]:
    """Presets and qualities of x264 for moving shapes with mild noise, and for noise alone.

    `seconds`: everything appended at once; `processor_seconds`: of ffmpeg meanwhile; `tail_seconds`: from the last of
    the pieces, which come at the VAE's pace, to the closed file. `psnr`: of luma, decibels.
    """
    chosen = ffmpeg.X264
    result: dict[str, Any] = {"cpus": os.cpu_count(), "chosen": " ".join(chosen)}
    shape = (num_frames, height, width, 3)
    for name, clip in (("shapes", moving_shapes(*shape[:3])), ("noise", noise(*shape[:3]))):
        for preset, crf in CANDIDATES:
            ffmpeg.X264 = ("-preset", preset, "-crf", str(crf))
            try:
                file = folder / "video.mp4"
                start, used = time.perf_counter(), processor_seconds()
                save_video(clip, file)
                row = {
                    "seconds": time.perf_counter() - start,
                    "processor_seconds": processor_seconds() - used,
                    "bytes": file.stat().st_size,
                    "psnr": psnr(clip, file),
                }
                result[f"{name} {preset} crf {crf}"] = row | {"tail_seconds": tail_seconds(clip, file)}
            finally:
                ffmpeg.X264 = chosen
            logging.info("%s, %s, crf %d: %s", name, preset, crf, result[f"{name} {preset} crf {crf}"])
    return result


def processor_seconds() -> float:
    """Of ffmpeg, over all cores: what a busy machine does not change much."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def tail_seconds(clip: np.ndarray, file: Path) -> float:
    with open_video(file, clip.shape) as append:
        append(clip[:1])
        for start in range(1, len(clip), 4):
            time.sleep(PACE)
            append(clip[start : start + 4])
        last = time.perf_counter()
    return time.perf_counter() - last


def moving_shapes(frames: int, height: int, width: int) -> np.ndarray:
    """Soft discs that move over a gradient with a fine texture, and noise of 2 levels: uint8 `[T, H, W, 3]`."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    ground = np.stack((96 + 64 * x / width, 80 + 96 * y / height, 150 - 60 * x / width), axis=-1)
    ground += (12 * np.sin(x / 3 + np.sin(y / 17) * 4))[..., None]
    place, speed = rng.uniform(0, 1, (12, 2)) * (height, width), rng.uniform(-4, 4, (12, 2))
    radius, colour = rng.uniform(20, 80, 12), rng.uniform(20, 235, (12, 3))
    video = np.empty((frames, height, width, 3), np.uint8)
    for t in range(frames):
        frame = np.roll(ground, t, axis=1)
        for (row, column), r, c in zip(place + t * speed, radius, colour, strict=True):
            inside = np.clip(r - np.hypot(y - row, x - column), 0, 1)[..., None]
            frame = frame * (1 - inside) + c * inside
        video[t] = np.clip(frame + rng.normal(0, 2, frame.shape), 0, 255).round()
    return video


def noise(frames: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), np.uint8)


def psnr(clip: np.ndarray, file: Path) -> float:
    luma = np.asarray([0.299, 0.587, 0.114], np.float32)
    read = ffmpeg.read_frames(file, fps=16)
    errors = [float(np.mean(((a.astype(np.float32) - b) @ luma) ** 2)) for a, b in zip(clip, read, strict=True)]
    return 10 * float(np.log10(255**2 / np.mean(errors)))


def tiling_errors() -> dict[str, dict[str, float]]:
    """Tiles of a random autoencoder of width 8 in float32 beside whole frames, smooth content: parts of the range.

    By overlap in latents, and by whether weights change along its middle half or, `whole`, all along it.
    """
    vae = WanVAE(VAEConfig(dim=8, dtype=jnp.float32), rngs=nnx.Rngs(0))
    latents, video = waves(2, 24, 80, 16, length=8), waves(5, 64, 640, 3, length=64)
    frames, encoded = np.asarray(vae_model.decode(vae, latents)), np.asarray(vae_model.encode(vae, video))
    result = {}
    for overlap in (8, 16):
        tiles = Tiling(48, overlap)
        result[f"decoding, {overlap}"] = difference(tiling.decode_tiled(vae, latents, tiling=tiles), frames)
        result[f"encoding, {overlap}"] = difference(tiling.encode_tiled(vae, video, tiling=tiles), encoded)
        with mock.patch.object(tiling, "passing", lambda n: (np.arange(n, dtype=np.float32) + 0.5) / n):
            whole = tiling.decode_tiled(vae, latents, tiling=tiles)
        result[f"decoding, {overlap}, whole"] = difference(whole, frames)
    return result


def waves(frames: int, height: int, width: int, channels: int, *, length: float) -> np.ndarray:
    """Smooth content, float32 `[1, t, h, w, c]`."""
    t, y, x = np.ogrid[:frames, :height, :width]
    each = [np.sin((x * (1 + 0.1 * i) + 0.7 * y) / length + i + 0.4 * t) for i in range(channels)]
    return np.stack(each, axis=-1)[None].astype(np.float32)


def difference(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    scale = np.ptp(b)
    return {"largest": float(np.abs(a - b).max() / scale), "rms": float(np.sqrt(np.mean((a - b) ** 2)) / scale)}
