"""Samplers: from noise to latents in a few network calls, along rectified flow x_t = (1 - t) x0 + t eps.

A sampler is a frozen, hashable dataclass: settings and nothing else. `sample` is one `lax.scan` over the
steps with an explicit carry; it is a pure function, made to be called under `jax.jit`. A network that cannot be
traced takes the same steps in a Python loop, `scan=False`.

    sampler = RCM(num_steps=4, sigma_max=200.0)
    x = sampler.initial(noise)
    k = expert_split(sampler.times)
    x = sampler.sample(high_noise_velocity, x, key=key, stop=k)
    x = sampler.sample(low_noise_velocity, x, key=key, start=k)

Let B denote batch size. Latents are [B, ...]: all else is the model's matter.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from turbojax.diffusion import schedules
from turbojax.errors import UserError

# velocity(x, timestep) -> v = eps - x0. x, v: [B, ...], x in the state's dtype; timestep: float32 [], 0..1000, or what
# embed makes of it.
Velocity = Callable[[jax.Array, Any], jax.Array]
Embed = Callable[[jax.Array], Any]
Schedule = tuple[Any, tuple[Any, ...]]  # timesteps [num_steps] and coefficients [num_steps, ...]
Carry = tuple[jax.Array, ...]  # what a step hands to the next; the first is the state


class Rows(NamedTuple):
    """Inputs of the steps, a row each: the network's timestep, and what the sampler's `advance` takes."""

    timestep: Any
    per_step: tuple[jax.Array | None, ...]


def unembedded(timesteps: jax.Array) -> jax.Array:
    """Returns the timesteps themselves, for networks that embed them."""
    return timesteps


def normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Draws standard normal float32 of this shape; flat, since XLA takes four times as long to compile several axes."""
    return jax.random.normal(key, (math.prod(shape),), jnp.float32).reshape(shape)


def guide(v_cond: jax.Array, v_uncond: jax.Array, scale: float | jax.Array) -> jax.Array:
    """Returns classifier-free guidance v_u + w (v_c - v_u): w = 1 is the prompt alone."""
    return v_uncond + scale * (v_cond - v_uncond)


class Sampler:
    """Base of the samplers: `num_steps` network calls lead from noise to data along `times`.

    A sampler of one's own is a frozen dataclass with `num_steps`, `times` and `advance`, which is one step; the rest
    has defaults.
    """

    num_steps: int
    round_timesteps: bool = True

    @property
    def times(self) -> np.ndarray:
        """RF times, float64 [num_steps + 1], decreasing to 0."""
        raise NotImplementedError

    def advance(self, carry: Carry, per_step: tuple, v: jax.Array) -> Carry:
        """Makes one step, given the network's v at the state `carry[0]`.

        per_step: the step's `coefficients` in the state's dtype, behind them its `step_noise`.
        """
        raise NotImplementedError

    def coefficients(self) -> tuple[np.ndarray, ...]:
        """Returns constants of the steps, float64 [num_steps, ...] each; by default their times t and t'."""
        return self.times[:-1], self.times[1:]

    def initial(self, noise: jax.Array) -> jax.Array:
        """Returns the state before the first step, from standard normal noise [B, ...]; by default the noise itself."""
        return _state(noise)

    def init_carry(self, state: jax.Array) -> Carry:
        """Returns the carry before the first step; more than the state if a step looks back on those before it."""
        return (state,)

    def step_noise(
        self, state: jax.Array, steps: slice, key: jax.Array | None, noise: jax.Array | None
    ) -> tuple[jax.Array | None, ...]:
        """Returns rows of what these steps draw at random; none by default."""
        return ()

    @property
    def canonical(self) -> "Sampler":
        """Sampler with default times, which with this one's `schedule` takes this one's steps: they share a program."""
        return self

    @property
    def timesteps(self) -> np.ndarray:
        """Timesteps that the network takes, float32 [num_steps], 0..1000; bfloat16 values if `round_timesteps`."""
        return schedules.timesteps(self.times[:-1], rounded=self.round_timesteps).astype(np.float32)

    def schedule(self) -> Schedule:
        """Returns all that the times decide: arguments of the program that samplers with the same `canonical` share."""
        return self.timesteps, self.coefficients()

    def sample(
        self,
        velocity: Velocity,
        latents: jax.Array,
        *,
        key: jax.Array | None = None,
        noise: jax.Array | None = None,
        schedule: Schedule | None = None,
        start: int = 0,
        stop: int | None = None,
        trajectory: bool = False,
        embed: Embed = unembedded,
        scan: bool = True,
    ) -> jax.Array:
        """Runs steps [start, stop) from the state before step `start`.

        Args:
          velocity: the network, `velocity(x, timestep) -> v`; called once in the trace.
          latents: [B, ...], state before step `start`; `initial(noise)` for step 0.
          key: random key of the run; step i draws from `fold_in(key, i)`, so parts of a run equal the whole.
          noise: [num_steps, B, ...], standard normal, in place of the key's draws. Deterministic samplers
            need neither and ignore both.
          schedule: of a sampler with the same `canonical`, in place of this one's own; may be traced.
          start, stop: part of the steps; all by default.
          trajectory: return the states before step `start` and after each step, [stop - start + 1, B, ...].
          embed: timesteps float32 [steps] to a pytree of [steps, ...], whose rows velocity gets in their place:
            computed once, before the steps.
          scan: False for a velocity that cannot be traced: it is called once a step, with arrays.

        Returns:
          [B, ...], the state after the last step; float64 if `latents` are, else float32.

        Raises:
          UserError: the steps, the noise or the velocity's shape do not fit, or there is no source of noise.
        """
        state, steps = _state(latents), self._steps(start, stop)
        carry = self.init_carry(state)
        if len(carry) > 1 and steps != slice(0, self.num_steps):
            name = type(self).__name__
            raise UserError(f"{start=}, {stop=}: {name}'s history spans its steps; sample all of them, or use Euler")
        drawn = self.step_noise(state, steps, key, noise)
        timesteps, coefficients = self.schedule() if schedule is None else schedule
        per_step = *(jnp.asarray(a[steps], state.dtype) for a in coefficients), *drawn
        rows = Rows(embed(jnp.asarray(timesteps[steps])), per_step)

        def step(carry: Carry, row: Rows) -> tuple[Carry, jax.Array | None]:
            x = carry[0]
            v = velocity(x, row.timestep)
            if v.shape != x.shape:
                raise UserError(f"velocity returned {v.shape=} for {x.shape=}; it must keep the shape of the latents")
            carry = _advance(self, carry, row.per_step, v.astype(x.dtype))
            return carry, carry[0] if trajectory else None

        if scan:
            carry, states = jax.lax.scan(step, carry, rows)
            return carry[0] if states is None else jnp.concatenate([state[None], states])
        passed = [state]
        for i in range(steps.stop - steps.start):
            carry, _ = step(carry, jax.tree.map(lambda a, i=i: a[i], rows))
            passed.append(carry[0])
        return jnp.stack(passed) if trajectory else carry[0]

    def _steps(self, start: int, stop: int | None) -> slice:
        stop = self.num_steps if stop is None else stop
        if not 0 <= start <= stop <= self.num_steps:
            raise UserError(
                f"{start=}, {stop=} is no part of {self.num_steps} steps; use 0 <= start <= stop <= num_steps"
            )
        return slice(start, stop)


@dataclasses.dataclass(frozen=True)
class RCM(Sampler):
    """Few-step sampler of a distilled (rCM) student.

        SDE:  x <- (1 - t') (x - t v) + t' eps      predict x0, then noise it again to the next time t'
        ODE:  x <- x - (t - t') v

    The initial state is t_0 eps. The SDE form adds fresh noise in every step but the last.

    num_steps 1 to 4; sigma_max is the first noise level. Source: TurboDiffusion, inference scripts; rCM,
    arXiv 2510.08431.
    """

    num_steps: int = 4
    sigma_max: float = 80.0
    ode: bool = False
    round_timesteps: bool = True

    def __post_init__(self):
        schedules.rcm_times(self.num_steps, self.sigma_max)

    @property
    def times(self) -> np.ndarray:
        return schedules.rcm_times(self.num_steps, self.sigma_max)

    @property
    def canonical(self):
        return dataclasses.replace(self, sigma_max=RCM.sigma_max)

    def initial(self, noise):
        noise = _state(noise)
        return noise * jnp.asarray(self.times[0], noise.dtype)

    def step_noise(self, state, steps, key, noise):
        """Keys of the draws, or the noise itself; neither for deterministic steps."""
        if self.ode or steps.start >= min(steps.stop, self.num_steps - 1):  # at t' = 0 both forms are the same
            return None, None
        if noise is not None:
            if noise.shape != (self.num_steps, *state.shape):
                raise UserError(f"{noise.shape=} must be {(self.num_steps, *state.shape)}: one draw for each step")
            return None, noise[steps].astype(state.dtype)
        if key is None:
            raise UserError("RCM with ode=False draws noise between its steps; give key= or noise=, or set ode=True")
        return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(steps.start, steps.stop)), None

    def advance(self, carry, per_step, v):
        (x,), (t, t_next, key, eps) = carry, per_step
        if key is None and eps is None:
            return (x - (t - t_next) * v,)
        if eps is None:
            eps = normal(key, x.shape).astype(x.dtype)
        return ((1 - t_next) * (x - t * v) + t_next * eps,)


@dataclasses.dataclass(frozen=True)
class FlowSampler(Sampler):
    """Base of samplers for undistilled models, along `flow_sigmas`; the initial state is the noise itself.

    shift moves the times towards noise, sigma_max is the noise level of the first step.
    """

    num_steps: int = 50
    shift: float = 5.0
    sigma_max: float = 5000.0
    round_timesteps: bool = True

    def __post_init__(self):
        schedules.flow_sigmas(self.num_steps, self.shift, self.sigma_max)

    @property
    def times(self) -> np.ndarray:
        return schedules.flow_sigmas(self.num_steps, self.shift, self.sigma_max)

    @property
    def canonical(self):
        return dataclasses.replace(self, shift=FlowSampler.shift, sigma_max=FlowSampler.sigma_max)


class Euler(FlowSampler):
    """Euler's method on dx/dt = v: x <- x - (t - t') v. Source: TurboDiffusion, rcm/samplers/euler.py."""

    def coefficients(self):
        return (-np.diff(self.times),)

    def advance(self, carry, per_step, v):
        (x,), (dt,) = carry, per_step
        return (x - dt * v,)


class UniPC(FlowSampler):
    """UniPC of order 2, B(h) = e^h - 1 ("bh2"), data prediction (arXiv 2302.04867).

    With sigma = t, alpha = 1 - t, lambda = log(alpha / sigma), the step s -> t (r -> s before it) has
    h = lambda_t - lambda_s, and the network's estimates of x0 are m = x - sigma v:

        predictor  x_t = sigma_t / sigma_s x_s + alpha_t (1 - e^-h) (m_s + D / 2),    D = (m_r - m_s) / q
        corrector  x_t = sigma_t / sigma_s x_s + alpha_t (1 - e^-h) (m_s + a D + b (m_t - m_s))
        q = (lambda_r - lambda_s) / h < 0

    where `_corrector_weights` gives a, b. m_t comes from the predicted x_t and is kept: one call a step.
    Order 1 drops D, with b = 1/2: the first and the last predictor, and the corrector that follows the first.
    At the last time 0, h is infinite and the predictor gives m_s.

    Both are linear in (x, x_s, m_t, m_s, m_r), so their coefficients are precomputed on the host. A part of
    the steps cannot be sampled: the history (x_s, m_s, m_r) reaches across steps.

    Source: the paper's multistep form; TurboDiffusion, rcm/samplers/unipc.py.
    """

    def __post_init__(self):
        if not np.float32(self.times[0]) < 1:
            raise UserError(f"sigma_max={self.sigma_max} starts UniPC at sigma 1, where log-SNR is infinite; use 5000")

    def coefficients(self) -> tuple[np.ndarray, ...]:
        """Corrector [num_steps, 5] on (x, x_s, m_t, m_s, m_r), predictor [num_steps, 3] on (x_s, m_s, m_r), sigma.

        All float64. Row i of the corrector improves the state before step i (row 0 keeps it), row i of the
        predictor makes step i.
        """
        n, sigma = self.num_steps, self.times
        with np.errstate(divide="ignore"):
            lam = np.log1p(-sigma) - np.log(sigma)  # + infinity at the last one
        corrector, predictor = np.zeros((n, 5)), np.zeros((n, 3))
        corrector[0, 0] = 1.0
        for i in range(n):
            h = lam[i + 1] - lam[i]
            keep, gain = sigma[i + 1] / sigma[i], -(1 - sigma[i + 1]) * np.expm1(-h)
            first, last = i == 0, i == n - 1
            q = math.inf if first else (lam[i - 1] - lam[i]) / h
            d = 0.0 if first or last else 0.5 / q
            predictor[i] = keep, gain * (1 - d), gain * d
            if not last:
                a, b = (0.0, 0.5) if first else _corrector_weights(h, q)
                corrector[i + 1] = 0.0, keep, gain * b, gain * (1 - a / q - b), gain * a / q
        return corrector, predictor, sigma[:-1]

    def init_carry(self, state):
        return state, *(jnp.zeros_like(state),) * 3

    def advance(self, carry, per_step, v):
        (x, x_s, m_s, m_r), (c, p, sigma) = carry, per_step
        m = x - sigma * v
        x = c[0] * x + c[1] * x_s + c[2] * m + c[3] * m_s + c[4] * m_r
        return p[0] * x + p[1] * m + p[2] * m_s, x, m, m_s


def _corrector_weights(h: float, q: float) -> tuple[float, float]:
    """Returns a, b of UniPC's corrector: [[1, 1], [q, 1]] (a, b) = (g_1, 2 g_2) / g_0.

    g_0 = e^-h - 1, g_k = g_{k-1} / -h - 1 / k!, which is -h phi_{k+1}(-h) of the exponential integrators.
    """
    g0 = math.expm1(-h)
    g1 = g0 / -h - 1
    g2 = g1 / -h - 1 / 2
    a, b = np.linalg.solve([[1.0, 1.0], [q, 1.0]], [g1 / g0, 2 * g2 / g0])
    return float(a), float(b)


def _state(x: jax.Array) -> jax.Array:
    """Casts to float32 at least: the reference keeps its state in float64, which moves results by 1e-7."""
    x = jnp.asarray(x)
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def _advance(sampler: Sampler, carry: Carry, per_step: tuple, v: jax.Array) -> Carry:
    """Makes a step, compiled in a loop as it is in a scan, so that both round alike."""
    return sampler.advance(carry, per_step, v)
