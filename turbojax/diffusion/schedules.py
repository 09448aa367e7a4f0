"""Times of the samplers: the one home of the rCM times and of the maps between rectified flow and TrigFlow.

Rectified flow (RF): x_s = (1 - s) x0 + s eps, s in [0, 1], velocity v = dx/ds = eps - x0.
TrigFlow:            x_t = cos(t) x0 + sin(t) eps, t in [0, pi/2].
Noise level:         sigma = s / (1 - s) = tan(t).

A schedule is a handful of numbers. It is computed on the host in float64, and always ends with time 0.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from turbojax.errors import UserError

# TrigFlow times after the first one (TurboDiffusion, inference scripts: `mid_t`).
RCM_MID_TIMES = (1.5, 1.4, 1.0)


def rf_from_trig(t: Any) -> Any:
    """Returns RF time s = sin t / (sin t + cos t). JAX arrays stay JAX arrays (traceable); else float64."""
    xp, t = _namespace(t)
    return xp.sin(t) / (xp.sin(t) + xp.cos(t))


def trig_from_rf(s: Any) -> Any:
    """Returns TrigFlow t = atan(s / (1 - s)), pi/2 at s = 1. JAX arrays stay JAX arrays (traceable); else float64."""
    xp, s = _namespace(s)
    return xp.arctan2(s, 1 - s)


def shift_time(s: Any, shift: float) -> Any:
    """Moves RF times towards noise: shift s / (1 + (shift - 1) s), which multiplies sigma by shift."""
    return shift * s / (1 + (shift - 1) * s)


def unshift_time(s: Any, shift: float) -> Any:
    """Inverts `shift_time`: s / (shift - (shift - 1) s)."""
    return s / (shift - (shift - 1) * s)


def rcm_times(num_steps: int, sigma_max: float) -> np.ndarray:
    """Returns RF times of an rCM student: TrigFlow [atan(sigma_max), 1.5, 1.4, 1.0][:num_steps] + [0].

    Args:
      num_steps: 1 to 4.
      sigma_max: noise level tan t of the first step (80 for text to video, 200 for Wan2.2 image to video).

    Returns:
      float64 [num_steps + 1], decreasing, in RF time.

    Raises:
      UserError: num_steps is not 1 to 4, or the times would not decrease.

    Source: TurboDiffusion, inference/wan2.1_t2v_infer.py.
    """
    most = len(RCM_MID_TIMES) + 1
    if _not_int(num_steps) or not 1 <= num_steps <= most:
        raise UserError(f"{num_steps=} is not a number of rCM steps; use 1 to {most}")
    lowest = math.tan(RCM_MID_TIMES[0]) if num_steps > 1 else 0.0
    if not lowest < sigma_max < math.inf:
        raise UserError(f"{sigma_max=} must be finite and above {lowest:.4g} for {num_steps=}, or times rise; use 80")
    trig = [math.atan(sigma_max), *RCM_MID_TIMES[: num_steps - 1], 0.0]
    return rf_from_trig(np.array(trig, np.float64))


def flow_sigmas(num_steps: int, shift: float, sigma_max: float = 5000.0) -> np.ndarray:
    """Returns RF times ("sigmas" in Wan's samplers) of Euler and UniPC: a linear ramp from `sigma_max` to 0, shifted.

        s_0 = unshift(sigma_max / (sigma_max + 1));  s_i = shift((1 - i / num_steps) s_0),  i = 0..num_steps

    Returns float64 [num_steps + 1], decreasing; the last one is 0. Raises UserError for values out of range.
    Source: TurboDiffusion, rcm/samplers.
    """
    if _not_int(num_steps) or num_steps < 1:
        raise UserError(f"{num_steps=} is not a number of steps; use a whole number from 1 on, for example 50")
    if not 0 < shift < math.inf:
        raise UserError(f"{shift=} must be a positive number; use 3 for 480p or 5 for 720p")
    if not 0 < sigma_max < math.inf:
        raise UserError(f"{sigma_max=} must be a positive number; use 5000")
    ramp = np.linspace(unshift_time(sigma_max / (sigma_max + 1), shift), 0.0, num_steps + 1, dtype=np.float64)
    return shift_time(ramp, shift)


def timesteps(times: np.ndarray, *, rounded: bool = True) -> np.ndarray:
    """Returns the timesteps that the network takes: 1000 float32(s), rounded to bfloat16.

    The reference rounds before the network sees them, in training and in inference (987.65 becomes 988,
    933.78 becomes 932): its videos need the rounding.

    Returns float32 holding bfloat16 values; float64 without the last rounding for `rounded=False`.
    """
    exact = np.asarray(times, np.float32).astype(np.float64) * 1000.0
    return exact.astype(ml_dtypes.bfloat16).astype(np.float32) if rounded else exact


def expert_split(times: np.ndarray, boundary: float = 0.9) -> int:
    """Returns the first step k of Wan2.2's low-noise expert: the first whose RF time is below `boundary`.

    Steps [0, k) belong to the high-noise expert, [k, num_steps) to the low-noise one; either may be empty.
    `times` are [num_steps + 1]: the last one is the end, not a step.
    """
    if not 0 <= boundary <= 1:
        raise UserError(f"{boundary=} must be an RF time between 0 and 1; Wan2.2 uses 0.9")
    return int(np.sum(np.asarray(times)[:-1] >= boundary))


def _namespace(t: Any) -> tuple[Any, Any]:
    return (jnp, t) if isinstance(t, jax.Array) else (np, np.asarray(t, np.float64))


def _not_int(n: Any) -> bool:
    return isinstance(n, bool) or not isinstance(n, int | np.integer)
