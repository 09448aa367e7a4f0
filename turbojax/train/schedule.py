"""Everything that depends on the iteration: EMA, the phases of distillation, learning rates. Host numbers are float64.

Source: rCM, arXiv 2510.08431; EMA exponents: Karras et al., arXiv 2312.02696; rcm/utils/lr_scheduler.py.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from turbojax.errors import UserError


def ema_exponent(rate: float) -> float:
    """Returns gamma of the power-function EMA of width `rate`: rate^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)).

    The positive root of gamma^3 + 7 gamma^2 + (16 - rate^-2) gamma + 12 - rate^-2; 6.94 for the usual 0.1.
    Raises UserError for a rate outside (0, 0.288).
    """
    if not 0 < rate < 12**-0.5:
        raise UserError(f"{rate=} of the EMA must be between 0 and 0.288, as a fraction of the run; 0.1 is usual")
    roots = np.roots([1.0, 7.0, 16 - rate**-2, 12 - rate**-2])
    return float(roots[roots.imag == 0].real.max())


def ema_beta(iteration: int, *, rate: float = 0.1, shift: int = 0) -> float:
    """Returns the weight of the EMA's old value, (1 - 1 / (i + 1))^(gamma + 1), i = iteration + shift, 0 for i < 1.

    iteration: effective iteration of the student; the first update is a copy.
    """
    i = iteration + shift
    return 0.0 if i < 1 else (1 - 1 / (i + 1)) ** (ema_exponent(rate) + 1)


def ema_update(ema: Any, weights: Any, beta: float | jax.Array) -> Any:
    """Returns beta ema + (1 - beta) weights over two trees of arrays; each keeps the dtype of the EMA."""
    beta = jnp.asarray(beta, jnp.float32)

    def mix(old: jax.Array, new: jax.Array) -> jax.Array:
        return (beta * old.astype(jnp.float32) + (1 - beta) * new.astype(jnp.float32)).astype(old.dtype)

    return jax.tree.map(mix, ema, weights)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepSchedule:
    """Plan of one step: who learns, from which losses (each combination is compiled once), and scalars.

    warmup: r of the consistency loss. simulation_steps: of the student's own samples. ema_beta: see `ema_update`.
    """

    learner: Literal["student", "critic"] = dataclasses.field(default="student", metadata={"static": True})
    consistency: bool = dataclasses.field(default=True, metadata={"static": True})
    matching: bool = dataclasses.field(default=False, metadata={"static": True})
    warmup: jax.Array | float = 1.0
    simulation_steps: jax.Array | int = 1
    ema_beta: jax.Array | float = 0.0


@dataclasses.dataclass(frozen=True)
class Phases:
    """Tells which network learns in which iteration, and from which losses.

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

    def at(self, iteration: int, *, ema_rate: float) -> StepSchedule:
        """Returns what an iteration does, the scalars as arrays."""
        student = self.is_student(iteration)
        return StepSchedule(
            learner="student" if student else "critic",
            consistency=student and self.loss_scale > 0,
            matching=student and self.fake and self.loss_scale_dmd > 0 and iteration >= self.tangent_warmup,
            warmup=jnp.float32(self.warmup_ratio(iteration)),
            simulation_steps=jnp.int32(self.simulation_steps(iteration)),
            ema_beta=jnp.float32(ema_beta(self.effective_iteration(iteration), rate=ema_rate)),
        )

    def is_student(self, iteration: int) -> bool:
        """Returns True if the student learns; else the fake score does."""
        past = iteration - self.tangent_warmup
        return not self.fake or self.loss_scale_dmd == 0 or past < 0 or past % self.student_freq == 0

    def effective_iteration(self, iteration: int) -> int:
        """Counts the student's iterations so far."""
        if not self.fake or iteration < self.tangent_warmup:
            return iteration
        return self.tangent_warmup + (iteration - self.tangent_warmup) // self.student_freq

    def effective_iteration_fake(self, iteration: int) -> int:
        """Counts the fake score's iterations so far, from -1."""
        return iteration - self.effective_iteration(iteration) - 1

    def simulation_steps(self, iteration: int) -> int:
        """Returns the backward simulation's steps: 1 to max_simulation_steps in turn, for both networks apart."""
        own = self.effective_iteration if self.is_student(iteration) else self.effective_iteration_fake
        return own(iteration) % self.max_simulation_steps + 1

    def warmup_ratio(self, iteration: int) -> float:
        """Returns r of `losses.consistency`: from 0 to 1 over tangent_warmup iterations, 1 without."""
        return min(1.0, iteration / self.tangent_warmup) if self.tangent_warmup else 1.0


def learning_rate(
    peak: float, *, warm_up: int = 100, start: float = 1e-6, end: float = 1.0, cycle: float = 1e13
) -> optax.Schedule:
    """Returns peak times a factor that rises from `start` to 1 in `warm_up` steps and then falls to `end`.

    The fall is linear and ends at step `cycle`; end = 1 keeps the rate constant. Steps count the optimizer's own.
    Published: peak 1e-5 (SLA); 2e-6 and 4e-7 for the fake score (1.3B); 1e-6 and 1e-7 (14B).
    """
    if not 0 <= warm_up < cycle:
        raise UserError(f"{warm_up=} must be a number of steps from 0 on, below {cycle=:g}")
    rise = optax.linear_schedule(start * peak, peak, max(warm_up, 1))
    fall = optax.linear_schedule(peak, end * peak, float(cycle - warm_up))
    return optax.join_schedules([rise, fall], [warm_up])
