"""Times that training visits: from standard draws `[B]` to rectified-flow (RF) or TrigFlow times, float32.

Randomness stays outside: `standard(key, shape)` gives the draws that a distribution's methods take.
Source: rCM (arXiv 2510.08431), rcm/utils/timestep_utils.py.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from turbojax.diffusion import schedules
from turbojax.errors import UserError


@dataclasses.dataclass(frozen=True)
class LogNormal:
    """log(sigma) normal with this mean and standard deviation, sigma = tan t = s / (1 - s); draws are normal.

    Published: SLA 1.5, 1.6; distillation 0.7, 1.6 (1.3B) and 1.5, 1.6 (14B).
    """

    mean: float
    std: float = 1.6

    def __post_init__(self):
        if not self.std > 0:
            raise UserError(f"std={self.std} of a log-normal distribution must be positive; 1.6 is usual")

    def standard(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Draws standard normal numbers."""
        return jax.random.normal(key, shape, jnp.float32)

    def rf(self, draw: jax.Array) -> jax.Array:
        """Returns RF times sigma / (1 + sigma) of normal draws."""
        return jax.nn.sigmoid(self.std * draw + self.mean)

    def trig(self, draw: jax.Array) -> jax.Array:
        """Returns TrigFlow times atan(sigma) of normal draws."""
        return jnp.arctan(jnp.exp(self.std * draw + self.mean))


@dataclasses.dataclass(frozen=True)
class UniformShift:
    """RF times uniform in [0, 1), shifted towards noise (`schedules.shift_time`); draws are uniform.

    shift <= 0 leaves them as they are. Published: 5.
    """

    shift: float = 5.0

    def standard(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Draws uniform numbers in [0, 1)."""
        return jax.random.uniform(key, shape, jnp.float32)

    def rf(self, draw: jax.Array) -> jax.Array:
        """Returns RF times of uniform draws."""
        return schedules.shift_time(draw, self.shift) if self.shift > 0 else draw

    def trig(self, draw: jax.Array) -> jax.Array:
        """Returns TrigFlow times of uniform draws."""
        return schedules.trig_from_rf(self.rf(draw))


Times = LogNormal | UniformShift


def fixed_simulation_times(batch: int) -> jax.Array:
    """Returns TrigFlow times of a backward simulation as in sampling: pi/2, 1.5, 1.4, 1.0, float32 `[4, batch]`."""
    times = jnp.asarray([math.pi / 2, *schedules.RCM_MID_TIMES], jnp.float32)
    return jnp.broadcast_to(times[:, None], (len(times), batch))


def drawn_simulation_times(drawn: jax.Array) -> jax.Array:
    """Returns pi/2 and then min(drawn_i, the time before), per sample; TrigFlow times `[n - 1, B]` to `[n, B]`."""
    start = jnp.full_like(drawn, math.pi / 2, shape=(1, *drawn.shape[1:]))
    return jax.lax.cummin(jnp.concatenate((start, drawn)), axis=0)


def discrete_times(u: jax.Array, skip: int, *, total: int = 48, shift: float = 5.0) -> jax.Array:
    """Returns TrigFlow times t_0 > ... > t_skip, neighbours on a grid of `total` at a drawn offset, `[skip + 1, B]`.

        q_k = 1 - (u (1 - skip / total) + k / total);   t_k = trig(shift(q_k)),   k = 0..skip

    u: uniform draws `[B]`. Raises UserError for a skip outside 1..total.
    """
    if not 1 <= skip <= total:
        raise UserError(f"{skip=} of a discrete consistency step must be from 1 to {total}")
    k = jnp.arange(skip + 1, dtype=jnp.float32)[:, None]
    q = 1 - ((u * (1 - skip / total))[None] + k / total)
    return schedules.trig_from_rf(schedules.shift_time(q, shift))
