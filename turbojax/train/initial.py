"""A random autoencoder from which training starts: one that lets pictures through, coarsely.

With random kernels everywhere, all that comes through is what the many layers in a row happen to agree on, which is the
background, and training spends hundreds of steps before a thing appears. Here residual branches begin at zero, and the
layers that are left on the way from pixels to pixels keep all directions apart, as orthogonal matrices do (arXiv
1312.6120), and pixels in their places: what is halved is averaged, what is doubled repeated.
"""

import re
from collections.abc import Mapping

import numpy as np

LOG_VARIANCE = -6.0  # of mu
RANDOM = 0.2  # fraction of a random kernel that is added

# A kernel's weights over time, or rows and columns: of a frame or pixel alone, and the mean of those joined.
LAST, BOTH = np.array([[0, 0, 1], [0, 0.5, 0.5]]).reshape(2, 3, 1, 1)
CENTRE, FOUR = np.pad([[1.0]], 1), np.pad(np.full((2, 2), 0.25), (0, 1))
THROUGH = (
    (r"encoder\.conv_out|decoder\.conv_(in|out)", LAST * CENTRE),
    (r"encoder\.downsamples\.\d+\.conv", FOUR),
    (r"encoder\.downsamples\.\d+\.time_conv", BOTH),
    (r"decoder\.upsamples\.\d+\.conv", CENTRE),
    (r"decoder\.upsamples\.\d+\.time_conv", LAST),
)


def transparent(params: Mapping[str, np.ndarray], *, seed: int = 0) -> dict[str, np.ndarray]:
    """Changes a random autoencoder's parameters as said above, with little noise in its latents."""
    rng, out = np.random.default_rng(seed), dict(params)
    for name, value in params.items():
        layer, _, kind = name.rpartition(".")
        if layer.endswith((".conv2", ".proj")) and kind != "bias":
            new = np.zeros_like(value)
        elif layer.endswith(("shortcut", "quant")) and kind == "weight":
            new = orthogonal(rng, *value.shape[::-1]).T
        elif kind == "kernel" and (taps := [taps for pattern, taps in THROUGH if re.fullmatch(pattern, layer)]):
            features_in, features_out = value.shape[-2:]
            frames = 2 if layer.startswith("decoder") and layer.endswith("time_conv") else 1  # joined on channels
            matrix = np.tile(orthogonal(rng, features_in, features_out // frames), frames)
            new = taps[0][..., None, None] * matrix + RANDOM * value
        else:
            continue
        out[name] = new.astype(value.dtype)
    variance = np.arange(len(out["quant.bias"])) >= len(out["quant.bias"]) // 2
    out["quant.bias"] = out["quant.bias"] + LOG_VARIANCE * variance.astype(out["quant.bias"].dtype)
    return out


def orthogonal(rng: np.random.Generator, features_in: int, features_out: int) -> np.ndarray:
    """Draws an `[in, out]` with orthogonal rows or columns that keeps the root mean square of what it multiplies."""
    small, large = sorted((features_in, features_out))
    matrix = np.linalg.qr(rng.standard_normal((large, small))).Q
    return matrix if features_in > features_out else matrix.T * (large / small) ** 0.5
