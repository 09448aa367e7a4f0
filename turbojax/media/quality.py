"""How close videos are."""

import math
from collections.abc import Iterable

import numpy as np


def psnr(frames: Iterable[np.ndarray], reference: Iterable[np.ndarray], *, most: float = math.inf) -> float:
    """Returns the peak signal-to-noise ratio in dB of frames with levels 0 to 255; `most` where they are equal.

    Frames, or videos, of one size; the errors of all their pixels count alike.
    """
    pairs = zip(frames, reference, strict=True)
    error = float(np.mean([np.mean((a.astype(np.float64) - b) ** 2) for a, b in pairs]))
    return most if error == 0 else min(most, 10 * math.log10(255**2 / error))
