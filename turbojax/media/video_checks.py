"""Tells videos that show nothing, as broken weights and wrong settings make them."""

from collections.abc import Iterator

import numpy as np

DARK = 16  # level, 0 to 255, up to which a pixel is black
SAME = 8  # levels that a pixel may differ from the first frame's and count as still
ENOUGH = 128  # pixels of the shorter side that are looked at
FEW = 1e-3  # share of the pixels that may be otherwise

# Flaws, and what to do about them.
FLAWS: dict[str, str] = {
    "not finite": "the network or the VAE returned NaN or infinity; check the checkpoint, or try dtype float32",
    "black": "check that VAE and transformer belong together, and try dtype float32 or another seed",
    "static": "nothing moves; say in the prompt what moves, try another seed, more steps or a higher sla_topk",
}


def flaws(video: np.ndarray) -> tuple[str, ...]:
    """Names the FLAWS of a video, uint8 levels or floats in [-1, 1], `[T, H, W, 3]`. One frame is never static."""
    step = max(1, min(video.shape[1:3]) // ENOUGH)
    video = video[:, ::step, ::step]
    if video.dtype != np.uint8:
        if not np.isfinite(video).all():
            return ("not finite",)
        video = np.round((np.clip(video, -1, 1) + 1) * 127.5).astype(np.uint8)
    planes = np.ascontiguousarray(np.moveaxis(video, -1, 0))  # NumPy takes eight times as long over an axis of three
    first = planes[:, :1]
    bright = np.max((planes.max(axis=0) > DARK).mean(axis=(1, 2)))
    moving = (np.maximum(planes, first) - np.minimum(planes, first)).max(axis=0) > SAME
    moved = moving[1:].mean(axis=(1, 2)).max() if len(video) > 1 else 1.0
    return tuple(name for name, found in (("black", bright <= FEW), ("static", moved <= FEW)) if found)


def warnings(videos: np.ndarray) -> Iterator[str]:
    """Yields a line for each flaw of each video `[B, T, H, W, 3]`, with what to do."""
    for i, video in enumerate(videos):
        for name in flaws(video):
            yield f"{'The video' if len(videos) == 1 else f'Video {i}'} is {name}: {FLAWS[name]}"
