"""Measurements of writing mp4: presets and qualities of x264, on the CPU."""

import os
import resource
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from absl import logging

from turbojax.media import ffmpeg
from turbojax.media.quality import psnr
from turbojax.media.video import open_video, save_video

CANDIDATES = (
    *(("medium", 10), ("veryfast", 10), ("veryfast", 14), ("superfast", 10), ("superfast", 12)),
    *(("superfast", 14), ("ultrafast", 10), ("ultrafast", 14)),
)
LUMA = np.asarray([0.299, 0.587, 0.114], np.float32)  # of BT.601
PACE = 0.04  # seconds between pieces of 4 frames, as the VAE gives them at 480p


def measure_writing(folder: Path, *, num_frames: int, height: int, width: int) -> dict[str, Any]:
    """Measures presets and qualities of x264 for moving shapes with mild noise, and for noise alone.

    `seconds`: everything appended at once; `processor_seconds`: of ffmpeg meanwhile; `tail_seconds`: from the last of
    the pieces, which come at the VAE's pace, to the closed file. `psnr`: of luma, decibels.
    """
    result: dict[str, Any] = {"cpus": os.cpu_count(), "chosen": " ".join(ffmpeg.X264)}
    size = (num_frames, height, width)
    for name, clip in (("shapes", moving_shapes(*size)), ("noise", noise(*size))):
        for preset, crf in CANDIDATES:
            with mock.patch.object(ffmpeg, "X264", ("-preset", preset, "-crf", str(crf))):
                row = result[f"{name} {preset} crf {crf}"] = measure_file(clip, folder / "video.mp4")
            logging.info("%s, %s, crf %d: %s", name, preset, crf, row)
    return result


def measure_file(clip: np.ndarray, file: Path) -> dict[str, float]:
    """Returns the figures of `measure_writing` for one clip."""
    start, used = time.perf_counter(), processor_seconds()
    save_video(clip, file)
    return {
        "seconds": time.perf_counter() - start,
        "processor_seconds": processor_seconds() - used,
        "bytes": file.stat().st_size,
        "psnr": luma_psnr(clip, file),
        "tail_seconds": tail_seconds(clip, file),
    }


def processor_seconds() -> float:
    """Returns the seconds of ffmpeg over all cores, which a busy machine does not change much."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def tail_seconds(clip: np.ndarray, file: Path) -> float:
    """Returns the seconds from the last piece of a clip that comes at the VAE's pace to the closed file."""
    with open_video(file, clip.shape) as append:
        append(clip[:1])
        for start in range(1, len(clip), 4):
            time.sleep(PACE)
            append(clip[start : start + 4])
        last = time.perf_counter()
    return time.perf_counter() - last


def moving_shapes(frames: int, height: int, width: int) -> np.ndarray:
    """Draws soft discs that move over a gradient with a fine texture, and noise of 2 levels: uint8 `[T, H, W, 3]`."""
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
    """Returns noise alone: uint8 `[T, H, W, 3]`."""
    return np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), np.uint8)


def luma_psnr(clip: np.ndarray, file: Path) -> float:
    """Returns the peak signal-to-noise ratio of the luma of a file beside the clip it was written from."""
    frames = ffmpeg.read_frames(file, fps=16)
    return psnr((frame @ LUMA for frame in clip), (frame @ LUMA for frame in frames))
