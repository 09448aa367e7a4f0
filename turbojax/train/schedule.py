"""What depends on the iteration: EMA, the phases of distillation, learning rates. Host numbers are float64.

Source: rCM, arXiv 2510.08431; EMA exponents: Karras et al., arXiv 2312.02696; rcm/utils/lr_scheduler.py.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from turbojax.errors import UserError


def ema_exponent(rate: float) -> float:
    """gamma of the power-function EMA of width `rate`: rate^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)).

    The positive root of gamma^3 + 7 gamma^2 + (16 - rate^-2) gamma + 12 - rate^-2; 6.94 for the usual 0.1.
    Raises UserError for a rate outside (0, 0.288).
    """
    if not 0 < rate < 12**-0.5:
        raise UserError(f"{rate=} of the EMA must be between 0 and 0.288, as a share of the run; 0.1 is usual")
    roots = np.roots([1.0, 7.0, 16 - rate**-2, 12 - rate**-2])
    return float(roots[roots.imag == 0].real.max())


def ema_beta(iteration: int, *, rate: float = 0.1, shift: int = 0) -> float:
    """What the EMA keeps of itself: (1 - 1 / (i + 1))^(gamma + 1), i = iteration + shift, 0 for i < 1.

    iteration: effective iteration of the student; the first update is a copy.
    """
    i = iteration + shift
    return 0.0 if i < 1 else (1 - 1 / (i + 1)) ** (ema_exponent(rate) + 1)


def ema_update(ema: Any, weights: Any, beta: float | jax.Array) -> Any:
    """beta ema + (1 - beta) weights over two trees of arrays; each keeps the dtype of the EMA."""
    beta = jnp.asarray(beta, jnp.float32)

    def mix(old: jax.Array, new: jax.Array) -> jax.Array:
        return (beta * old.astype(jnp.float32) + (1 - beta) * new.astype(jnp.float32)).astype(old.dtype)

    return jax.tree.map(mix, ema, weights)


@dataclasses.dataclass(frozen=True)
class Phases:
    """Which network learns in which iteration, and from which losses.

    Before `tangent_warmup` every iteration is the student's, with the consistency loss alone. Afterwards every
    `student_freq`-th is the student's, with the DMD loss as well, and the others train the fake score.
    Without a fake score or with loss_scale_dmd = 0 all iterations are the student's.

    Published: tangent_warmup 1000, student_freq 5 for 1.3B; 0, 10 for 14B. Raises UserError where no loss is left.
    """

    tangent_warmup: int = 1000
    student_freq: int = 5
    fake: bool = True
    loss_scale: float = 100.0
    loss_scale_dmd: float = 1.0
    max_simulation_steps: int = 4

    def __post_init__(self):
        if self.tangent_warmup < 0 or self.student_freq < 1 or self.max_simulation_steps < 1:
            raise UserError(f"{self} counts backwards; use tangent_warmup from 0, the other two from 1 on")
        matching = self.fake and self.loss_scale_dmd > 0 and not self.tangent_warmup
        if self.loss_scale <= 0 and not matching:
            raise UserError(f"{self} has iterations without a loss; use a positive loss_scale, 100 is usual")

    def is_student(self, iteration: int) -> bool:
        """Whether the student learns; else the fake score does."""
        past = iteration - self.tangent_warmup
        return not self.fake or self.loss_scale_dmd == 0 or past < 0 or past % self.student_freq == 0

    def has_consistency(self, iteration: int) -> bool:
        """Whether the consistency loss is part of the iteration."""
        return self.is_student(iteration) and self.loss_scale > 0

    def has_distribution_matching(self, iteration: int) -> bool:
        """Whether the DMD loss is part of the iteration."""
        wanted = self.fake and self.loss_scale_dmd > 0 and iteration >= self.tangent_warmup
        return self.is_student(iteration) and wanted

    def effective_iteration(self, iteration: int) -> int:
        """Iterations of the student so far."""
        if not self.fake or iteration < self.tangent_warmup:
            return iteration
        return self.tangent_warmup + (iteration - self.tangent_warmup) // self.student_freq

    def effective_iteration_fake(self, iteration: int) -> int:
        """Iterations of the fake score so far, counted from -1."""
        return iteration - self.effective_iteration(iteration) - 1

    def simulation_steps(self, iteration: int) -> int:
        """Steps of the backward simulation: 1 to max_simulation_steps in turn, for student and fake score apart."""
        own = self.effective_iteration if self.is_student(iteration) else self.effective_iteration_fake
        return self.steps_in_turn(own(iteration))

    def steps_in_turn(self, effective_iteration: int) -> int:
        """1 to max_simulation_steps, and again from 1."""
        return effective_iteration % self.max_simulation_steps + 1

    def warmup_ratio(self, iteration: int) -> float:
        """r of `losses.consistency`: from 0 to 1 over tangent_warmup iterations, 1 without."""
        return min(1.0, iteration / self.tangent_warmup) if self.tangent_warmup else 1.0


@dataclasses.dataclass(frozen=True)
class LearningRate:
    """Optax schedule: peak times a factor that rises from `start` to 1 in `warm_up` steps and then falls to `end`.

    The fall is linear and ends at step `cycle`; end = 1 keeps the rate constant. Steps count the optimizer's own.
    Published: peak 1e-5 (SLA); 2e-6 and 4e-7 for the fake score (1.3B); 1e-6 and 1e-7 (14B).
    """

    peak: float
    warm_up: int = 100
    start: float = 1e-6
    end: float = 1.0
    cycle: float = 1e13

    def __post_init__(self):
        if not 0 <= self.warm_up < self.cycle:
            raise UserError(f"warm_up={self.warm_up} must be a number of steps from 0 on, below cycle={self.cycle:g}")

    def __call__(self, step: Any) -> Any:
        """The rate after `step` steps: float64 on the host, float32 where step is a JAX array."""
        xp, n = (jnp, step.astype(jnp.float32)) if isinstance(step, jax.Array) else (np, np.float64(step))
        rise = self.start + (1 - self.start) * n / max(self.warm_up, 1)
        fall = 1 + (self.end - 1) * xp.clip((n - self.warm_up) / (self.cycle - self.warm_up), 0, 1)
        return self.peak * xp.where(n < self.warm_up, rise, fall)
