"""The three recipes: what a network learns from a batch, with all that is random drawn from the batch's keys.

B batch. A recipe has the structure of its networks from when it is made; recipe.loss(params, batch, schedule) gives the
mean over the samples, and metrics. Each sample has a random key of its own, so that a loss does not depend on how a
batch is cut into micro-batches or spread over devices.
"""

import dataclasses
import functools
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from turbojax import diffusion
from turbojax.models.wan import WanConfig
from turbojax.train import losses
from turbojax.train.losses import Tangent
from turbojax.train.schedule import Phases, StepSchedule
from turbojax.train.state import Params, in_compute_dtype
from turbojax.train.times import Times, UniformShift, discrete_times, drawn_simulation_times, fixed_simulation_times
from turbojax.train.trigflow import Velocity, guided
from turbojax.weights.skeleton import Skeleton, wan_skeleton

Batch = dict[str, jax.Array]  # latents [B, t, h, w, c], text [B, S, D], or of an autoencoder video; and key [B]
Metrics = dict[str, jax.Array]  # float32 []
Loss = tuple[jax.Array, Metrics]


class Networks(NamedTuple):
    """Structure of the networks, in the dtypes they compute with.

    student: also rCM's fake score's. tangent: the student with an attention that has a JVP. teacher: of SLA and rCM.
    """

    student: Skeleton
    tangent: Skeleton
    teacher: Skeleton

    @classmethod
    def of(cls, student: WanConfig, teacher: WanConfig) -> "Networks":
        tangent = dataclasses.replace(student, attention_implementation="reference")
        return cls(wan_skeleton(student), wan_skeleton(tangent), wan_skeleton(teacher))


class NetworkParams(NamedTuple):
    """Parameters that a loss may need, empty where a recipe has no such network.

    critic: rCM's fake score. negative: the negative prompt's embedding, [S, D].
    """

    student: Params
    critic: Params
    teacher: Params
    negative: jax.Array | None = None


class Recipe(Protocol):
    """A loss, by which the schedule's learner learns, and when which network does."""

    @property
    def phases(self) -> Phases: ...

    @property
    def ema_rate(self) -> float: ...

    def loss(self, params: NetworkParams, batch: Batch, schedule: StepSchedule, /) -> Loss: ...


STUDENT_ALONE = Phases(tangent_warmup=0, fake=False)
PUBLISHED_PHASES = Phases()
PUBLISHED_SCORE_TIMES = UniformShift(5.0)
UNIFORM = UniformShift(0.0)


@dataclasses.dataclass(frozen=True)
class FlowMatching:
    """A teacher learns from data. text_dropout: fraction of samples that see the negative prompt in place of theirs."""

    networks: Networks
    times: Times
    text_dropout: float = 0.1
    ema_rate: float = 0.1
    phases: Phases = STUDENT_ALONE

    def loss(self, params: NetworkParams, batch: Batch, schedule: StepSchedule) -> Loss:
        assert params.negative is not None
        noise_key, time_key, dropout_key = split_keys(batch["key"], 3)
        x0, eps = with_noise(batch, noise_key)
        s = self.times.rf(standard(self.times, time_key))
        dropped = jax.vmap(lambda key: jax.random.bernoulli(key, self.text_dropout))(dropout_key)
        text = jnp.where(dropped[:, None, None], params.negative[None], batch["text"])
        _, aux = losses.flow_matching(network(self.networks.student, params.student), x0, eps, s, text)
        return summary(loss=aux["loss"])


@dataclasses.dataclass(frozen=True)
class SLA:
    """A network with sparse-linear attention learns the velocities of the dense one."""

    networks: Networks
    times: Times
    ema_rate: float = 0.1
    phases: Phases = STUDENT_ALONE

    def loss(self, params: NetworkParams, batch: Batch, schedule: StepSchedule) -> Loss:
        noise_key, time_key = split_keys(batch["key"], 2)
        x0, eps = with_noise(batch, noise_key)
        s = self.times.rf(standard(self.times, time_key))
        student = network(self.networks.student, params.student)
        teacher = network(self.networks.teacher, params.teacher)
        _, aux = losses.white_box(student, teacher, x0, eps, s, batch["text"])
        return summary(loss=aux["loss"])


@dataclasses.dataclass(frozen=True)
class RCM:
    """Distillation to 1 to 4 steps: consistency with the teacher's trajectory and matching of its distribution.

    times: of the consistency loss. score_times: of the noise at which teacher and fake score judge samples.
    simulation_times: between the student's own steps; None takes those of sampling.
    guidance: the teacher's. tangent, tangent_step: see `losses.velocity_tangent`.
    discrete_steps: the teacher's Euler steps in discrete-time consistency; 0 for continuous time.
    """

    networks: Networks
    times: Times
    score_times: Times = PUBLISHED_SCORE_TIMES
    simulation_times: Times | None = None
    guidance: float = 5.0
    tangent: Tangent = "exact"
    tangent_step: float = 1e-4
    discrete_steps: int = 0
    ema_rate: float = 0.1
    phases: Phases = PUBLISHED_PHASES

    def loss(self, params: NetworkParams, batch: Batch, schedule: StepSchedule) -> Loss:
        return (self.student_loss if schedule.learner == "student" else self.critic_loss)(params, batch, schedule)

    def student_loss(self, params: NetworkParams, batch: Batch, schedule: StepSchedule) -> Loss:
        """Consistency and distribution matching, as the schedule says."""
        noise_key, time_key, simulation_key, score_key = split_keys(batch["key"], 4)
        student, teacher = network(self.networks.student, params.student), self.guided_teacher(params, batch)
        parts = {}
        if schedule.consistency:
            x0, eps = with_noise(batch, noise_key)
            scale = self.phases.loss_scale
            if self.discrete_steps:
                frozen = network(self.networks.student, lax.stop_gradient(params.student))
                times = discrete_times(standard(UNIFORM, time_key), self.discrete_steps)
                _, aux = losses.discrete_consistency(
                    student, frozen, teacher, x0, eps, times, batch["text"], scale=scale
                )
            else:
                skeleton = self.networks.student if self.tangent == "difference" else self.networks.tangent
                frozen = network(skeleton, lax.stop_gradient(params.student))
                t = self.times.trig(standard(self.times, time_key))
                how: dict[str, Any] = dict(tangent=self.tangent, step=self.tangent_step, warmup=schedule.warmup)
                _, aux = losses.consistency(student, frozen, teacher, x0, eps, t, batch["text"], scale=scale, **how)
            parts["consistency"] = aux["loss"]
        if schedule.matching:
            sample = self.simulate(params, batch, simulation_key, schedule)
            eps, t = self.score_noise(batch, score_key)
            fake = network(self.networks.student, params.critic)
            _, aux = losses.distribution_matching(sample, fake, teacher, eps, t, batch["text"])
            parts["distribution_matching"] = self.phases.loss_scale_dmd * aux["loss"]
        return summary(loss=jnp.stack(list(parts.values())).sum(axis=0), **parts)

    def critic_loss(self, params: NetworkParams, batch: Batch, schedule: StepSchedule) -> Loss:
        """Loss of the fake score on what the student makes."""
        simulation_key, score_key = split_keys(batch["key"], 2)
        sample = self.simulate(params, batch, simulation_key, schedule)
        eps, t = self.score_noise(batch, score_key)
        _, aux = losses.fake_score(sample, network(self.networks.student, params.critic), eps, t, batch["text"])
        return summary(fake_score=aux["loss"])

    def guided_teacher(self, params: NetworkParams, batch: Batch) -> Velocity:
        """Returns the teacher under guidance by the negative prompt."""
        assert params.negative is not None
        negative = jnp.broadcast_to(params.negative[None], batch["text"].shape)
        return guided(network(self.networks.teacher, params.teacher), negative, self.guidance)

    def simulate(self, params: NetworkParams, batch: Batch, key: jax.Array, schedule: StepSchedule) -> jax.Array:
        """Draws the student's own samples, `[B, t, h, w, c]`; the gradient goes through the last of their steps."""
        most = self.phases.max_simulation_steps
        noise_key, time_key = split_keys(key, 2)
        noise = normal(noise_key, (most, *batch["latents"].shape[1:])).swapaxes(0, 1)
        if self.simulation_times is None:
            times = fixed_simulation_times(len(key))
        else:
            draws = standard(self.simulation_times, time_key, (most - 1,))
            times = drawn_simulation_times(self.simulation_times.trig(draws).T)
        return losses.simulate(
            network(self.networks.student, params.student),
            network(self.networks.student, lax.stop_gradient(params.student)),
            noise,
            times,
            batch["text"],
            num_steps=schedule.simulation_steps,
        )

    def score_noise(self, batch: Batch, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Draws noise `[B, t, h, w, c]` and TrigFlow times `[B]` at which samples are judged."""
        noise_key, time_key = split_keys(key, 2)
        t = self.score_times.trig(standard(self.score_times, time_key))
        return normal(noise_key, batch["latents"].shape[1:]), t


def network(skeleton: Skeleton, params: Params) -> Velocity:
    """Fills the network with these parameters, cast to the dtypes it computes in.

    A bfloat16 network gets bfloat16 timesteps, as the reference has them in training and sampling.
    """
    module = skeleton.fill(in_compute_dtype(skeleton, params))
    if module.config.dtype != jnp.bfloat16:
        return module
    rounded = functools.partial(lax.reduce_precision, exponent_bits=8, mantissa_bits=7)
    return lambda x, timesteps, text: module(x, rounded(timesteps), text)


def summary(**parts: jax.Array) -> Loss:
    """Returns means of losses `[B]`: the first is what is minimized, all are metrics."""
    means = {name: jnp.mean(loss) for name, loss in parts.items()}
    return next(iter(means.values())), means


def with_noise(batch: Batch, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the data in float32, and as much noise."""
    x0 = batch["latents"].astype(jnp.float32)
    return x0, normal(keys, x0.shape[1:])


# Randomness, a sample at a time; keys `[B]`.


def sample_keys(seed: int, step: jax.Array, count: int) -> jax.Array:
    """Makes a key for each sample of a step's batch."""
    return jax.random.split(jax.random.fold_in(jax.random.key(seed), step), count)


def split_keys(keys: jax.Array, count: int) -> jax.Array:
    """Makes independent keys `[count, B]`."""
    return jax.vmap(functools.partial(jax.random.split, num=count), out_axes=1)(keys)


def normal(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Draws standard normal `[B, *shape]`."""
    return jax.vmap(lambda key: diffusion.normal(key, shape))(keys)


def standard(times: Times, keys: jax.Array, shape: tuple[int, ...] = ()) -> jax.Array:
    """Draws `[B, *shape]` for a distribution of times."""
    return jax.vmap(lambda key: times.standard(key, shape))(keys)
