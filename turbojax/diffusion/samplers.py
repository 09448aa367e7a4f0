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
Schedule = tuple[Any, tuple[Any, ...]]  # timesteps [num_steps] and numbers [num_steps, ...] of all steps
Carry = tuple[jax.Array, ...]  # what a step hands to the next; the first is the state


class Rows(NamedTuple):
    """What the steps differ in, a row each: the network's timestep, and what else the sampler's `advance` takes."""

    timestep: Any
    own: tuple[jax.Array | None, ...]


def unembedded(timesteps: jax.Array) -> jax.Array:
    """What networks that embed timesteps themselves take."""
    return timesteps


def normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal float32 of this shape; drawn flat, since XLA takes four times as long to compile several axes."""
    return jax.random.normal(key, (math.prod(shape),), jnp.float32).reshape(shape)


def guide(v_cond: jax.Array, v_uncond: jax.Array, scale: float | jax.Array) -> jax.Array:
    """Classifier-free guidance v_u + w (v_c - v_u): w = 1 is the prompt alone."""
    return v_uncond + scale * (v_cond - v_uncond)


class Sampler:
    """What the samplers share: `num_steps` network calls lead from noise to data along `times`."""

    num_steps: int
    round_timesteps: bool

    @property
    def times(self) -> np.ndarray:
        """RF times, float64 [num_steps + 1], decreasing to 0."""
        raise NotImplementedError

    @property
    def timesteps(self) -> np.ndarray:
        """What the network is told, float32 [num_steps], 0..1000; bfloat16 values if `round_timesteps`."""
        return schedules.timesteps(self.times[:-1], rounded=self.round_timesteps).astype(np.float32)

    @property
    def kind(self) -> "Sampler":
        """The sampler with the default times, which with this one's `schedule` takes this one's steps."""
        raise NotImplementedError

    def initial(self, noise: jax.Array) -> jax.Array:
        """The state before the first step, from standard normal noise [B, ...]."""
        raise NotImplementedError

    def numbers(self) -> tuple[np.ndarray, ...]:
        """What the steps multiply with, float64 [num_steps, ...] each."""
        raise NotImplementedError

    def schedule(self) -> Schedule:
        """All that the times decide, so that one compiled program can take those of any sampler of its `kind`."""
        return self.timesteps, self.numbers()

    def begin(
        self,
        latents: jax.Array,
        schedule: Schedule,
        *,
        key: jax.Array | None,
        noise: jax.Array | None,
        start: int,
        stop: int | None,
    ) -> tuple[Carry, Rows]:
        """What the first step starts from, and the rows of steps [start, stop)."""
        raise NotImplementedError

    def advance(self, carry: Carry, own: tuple, v: jax.Array) -> Carry:
        """One step, given the network's v at `carry[0]`."""
        raise NotImplementedError

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
          schedule: of a sampler of this `kind`, in place of this one's own; may be traced.
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
        schedule = self.schedule() if schedule is None else schedule
        carry, rows = self.begin(latents, schedule, key=key, noise=noise, start=start, stop=stop)
        first, count = carry[0], len(rows.timestep)
        rows = rows._replace(timestep=embed(rows.timestep))

        def step(carry: Carry, row: Rows) -> tuple[Carry, jax.Array | None]:
            carry = _advance(self, carry, row.own, _evaluate(velocity, carry[0], row.timestep))
            return carry, carry[0] if trajectory else None

        if scan:
            carry, states = jax.lax.scan(step, carry, rows)
            return carry[0] if states is None else jnp.concatenate([first[None], states])
        passed = [first]
        for i in range(count):
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
    def kind(self):
        return dataclasses.replace(self, sigma_max=RCM.sigma_max)

    def initial(self, noise):
        noise = _state(noise)
        return noise * jnp.asarray(self.times[0], noise.dtype)

    def numbers(self):
        return self.times[:-1], self.times[1:]

    def begin(self, latents, schedule, *, key, noise, start, stop):
        x = _state(latents)
        steps = self._steps(start, stop)
        keys = None
        if self.ode or steps.start >= min(steps.stop, self.num_steps - 1):  # at t' = 0 both forms are the same
            noise = None
        elif noise is not None:
            if noise.shape != (self.num_steps, *x.shape):
                raise UserError(f"{noise.shape=} must be {(self.num_steps, *x.shape)}: one draw for each step")
            noise = noise[steps].astype(x.dtype)
        elif key is not None:
            keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(steps.start, steps.stop))
        else:
            raise UserError("RCM with ode=False draws noise between its steps; give key= or noise=, or set ode=True")
        timesteps, numbers = schedule
        own = *(jnp.asarray(a[steps], x.dtype) for a in numbers), keys, noise
        return (x,), Rows(jnp.asarray(timesteps[steps]), own)

    def advance(self, carry, own, v):
        (x,), (t, t_next, key, eps) = carry, own
        if key is None and eps is None:
            return (x - (t - t_next) * v,)
        if eps is None:
            eps = normal(key, x.shape).astype(x.dtype)
        return ((1 - t_next) * (x - t * v) + t_next * eps,)


@dataclasses.dataclass(frozen=True)
class Euler(Sampler):
    """Euler's method on dx/dt = v: x <- x - (t - t') v, for an undistilled model.

    The initial state is the noise itself. shift moves the times towards noise, sigma_max is the noise level
    of the first step. Source: TurboDiffusion, rcm/samplers/euler.py.
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
    def kind(self):
        return dataclasses.replace(self, shift=Euler.shift, sigma_max=Euler.sigma_max)

    def initial(self, noise):
        return _state(noise)

    def numbers(self):
        return (-np.diff(self.times),)

    def begin(self, latents, schedule, *, key, noise, start, stop):
        del key, noise
        x = _state(latents)
        steps = self._steps(start, stop)
        timesteps, (dt,) = schedule
        return (x,), Rows(jnp.asarray(timesteps[steps]), (jnp.asarray(dt[steps], x.dtype),))

    def advance(self, carry, own, v):
        (x,), (dt,) = carry, own
        return (x - dt * v,)


@dataclasses.dataclass(frozen=True)
class UniPC(Sampler):
    """UniPC of order 2, B(h) = e^h - 1 ("bh2"), data prediction, for an undistilled model (arXiv 2302.04867).

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

    The initial state is the noise itself. shift moves the times towards noise, sigma_max is the noise level
    of the first step. Source: the paper's multistep form; TurboDiffusion, rcm/samplers/unipc.py.
    """

    num_steps: int = 50
    shift: float = 5.0
    sigma_max: float = 5000.0
    round_timesteps: bool = True

    def __post_init__(self):
        if not np.float32(self.times[0]) < 1:
            raise UserError(f"sigma_max={self.sigma_max} starts UniPC at sigma 1, where log-SNR is infinite; use 5000")

    @property
    def times(self) -> np.ndarray:
        return schedules.flow_sigmas(self.num_steps, self.shift, self.sigma_max)

    @property
    def kind(self):
        return dataclasses.replace(self, shift=UniPC.shift, sigma_max=UniPC.sigma_max)

    def initial(self, noise):
        return _state(noise)

    def numbers(self):
        return *self.coefficients(), self.times[:-1]

    def coefficients(self) -> tuple[np.ndarray, np.ndarray]:
        """Corrector [num_steps, 5] on (x, x_s, m_t, m_s, m_r), predictor [num_steps, 3] on (x_s, m_s, m_r).

        Both float64. Row i of the corrector improves the state before step i (row 0 keeps it), row i of the
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
        return corrector, predictor

    def begin(self, latents, schedule, *, key, noise, start, stop):
        del key, noise
        x = _state(latents)
        if self._steps(start, stop) != slice(0, self.num_steps):
            raise UserError(f"{start=}, {stop=}: UniPC's history spans its steps; sample all of them, or use Euler")
        timesteps, numbers = schedule
        own = tuple(jnp.asarray(a, x.dtype) for a in numbers)
        return (x, *(jnp.zeros_like(x),) * 3), Rows(jnp.asarray(timesteps), own)

    def advance(self, carry, own, v):
        (x, x_s, m_s, m_r), (c, p, sigma) = carry, own
        m = x - sigma * v
        x = c[0] * x + c[1] * x_s + c[2] * m + c[3] * m_s + c[4] * m_r
        return p[0] * x + p[1] * m + p[2] * m_s, x, m, m_s


def _corrector_weights(h: float, q: float) -> tuple[float, float]:
    """a, b of UniPC's corrector: [[1, 1], [q, 1]] (a, b) = (g_1, 2 g_2) / g_0.

    g_0 = e^-h - 1, g_k = g_{k-1} / -h - 1 / k!, which is -h phi_{k+1}(-h) of the exponential integrators.
    """
    g0 = math.expm1(-h)
    g1 = g0 / -h - 1
    g2 = g1 / -h - 1 / 2
    a, b = np.linalg.solve([[1.0, 1.0], [q, 1.0]], [g1 / g0, 2 * g2 / g0])
    return float(a), float(b)


def _state(x: jax.Array) -> jax.Array:
    """float32 at least: the reference keeps its state in float64, which moves results by 1e-7."""
    x = jnp.asarray(x)
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def _evaluate(velocity: Velocity, x: jax.Array, timestep: Any) -> jax.Array:
    v = velocity(x, timestep)
    if v.shape != x.shape:
        raise UserError(f"velocity returned {v.shape=} for {x.shape=}; it must keep the shape of the latents")
    return v.astype(x.dtype)


@functools.partial(jax.jit, static_argnums=0)
def _advance(sampler: Sampler, carry: Carry, own: tuple, v: jax.Array) -> Carry:
    """Compiled in a loop as it is in a scan, so that both round alike."""
    return sampler.advance(carry, own, v)
