"""Recomputes the fixture of the int8 linear layer."""

import jax.numpy as jnp
import numpy as np

from tests.closeness import bfloat16_step
from tests.golden_io import only
from turbojax.kernels import int8


def recompute(config: dict, t: dict[str, np.ndarray]) -> dict[str, tuple[np.ndarray, float]]:
    """Every `out.*` key with our own value and its absolute tolerance; quantized values and scales are exact.

    Rows of x are all its axes but the last. The float32 sum is not fused here: a rounding of it to bfloat16 may differ
    by one step, which the tolerance allows.
    """
    only(config, "block", int8.BLOCK)
    x, w, bias = (jnp.asarray(t[f"in.{name}"], jnp.bfloat16) for name in ("x", "w", "bias"))
    x = x.reshape(-1, x.shape[-1])
    quant = int8.QuantConfig()
    x_q = int8.quantize(x, quant, implementation="reference")
    w_q, w_scale = int8.quantize_weight(w, quant.scheme)
    y_f32 = int8.reference.matmul_blocks(x_q.q, x_q.scale, w_q, w_scale)
    y_bf16, y = (
        int8.matmul(x_q, w_q, w_scale, b, quant, implementation="reference").astype(jnp.float32) for b in (None, bias)
    )
    out = {
        "out.w_q": (w_q, 0.0),
        "out.w_s": (w_scale, 0.0),
        "out.x_q": (x_q.q, 0.0),
        "out.x_s": (x_q.scale, 0.0),
        "out.y_f32": (y_f32, 5e-5),
        "out.y_bf16": (y_bf16, bfloat16_step(np.abs(t["out.y_bf16"]).max())),
        "out.y": (y, bfloat16_step(np.abs(t["out.y"]).max())),
    }
    return {name: (as_recorded(value, t[name]), tolerance) for name, (value, tolerance) in out.items() if name in t}


def as_recorded(value, expected: np.ndarray) -> np.ndarray:
    """Rows as the fixture has them: in one axis, or in those of x."""
    value = np.asarray(value)
    return value.reshape(expected.shape) if value.size == expected.size else value
