"""The three recipes: what a network learns from a batch, with all that is random drawn from the batch's keys.

B batch. Each sample has a random key of its own, so that a loss does not depend on how a batch is cut into
micro-batches or spread over devices. A loss is (networks, weights, batch, phase, numbers) -> (mean over the samples,
metrics).
"""

import dataclasses
import functools
from typing import Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from turbojax import diffusion
from turbojax.models.wan import WanConfig
from turbojax.train import losses
from turbojax.train.losses import Tangent
from turbojax.train.schedule import Phases
from turbojax.train.state import Params, in_compute_dtype
from turbojax.train.times import Times, UniformShift, drawn_simulation_times, fixed_simulation_times
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


class Weights(NamedTuple):
    """All that a loss may need, empty where a recipe has no such network.

    critic: rCM's fake score. negative: the negative prompt's embedding, [S, D].
    """

    student: Params
    critic: Params
    teacher: Params
    negative: jax.Array


class Phase(NamedTuple):
    """What an iteration does: who learns, from which losses. Each combination is compiled once."""

    learner: Literal["student", "critic"]
    consistency: bool
    matching: bool


class Numbers(NamedTuple):
    """What else depends on the iteration: r of the consistency loss, and steps of the student's own samples."""

    warmup: jax.Array
    simulation_steps: jax.Array


class Recipe(Protocol):
    """Has besides student_loss, where its phases need it critic_loss."""

    @property
    def phases(self) -> Phases: ...

    @property
    def ema_rate(self) -> float: ...

    def student_loss(
        self, networks: Networks, weights: Weights, batch: Batch, phase: Phase, numbers: Numbers, /
    ) -> Loss: ...


STUDENT_ALONE = Phases(tangent_warmup=0, fake=False)
PUBLISHED_PHASES = Phases()
PUBLISHED_SCORE_TIMES = UniformShift(5.0)


@dataclasses.dataclass(frozen=True)
class FlowMatching:
    """A teacher learns from data. text_dropout: share of samples that see the negative prompt in place of theirs."""

    times: Times
    text_dropout: float = 0.1
    ema_rate: float = 0.1
    phases: Phases = STUDENT_ALONE

    def student_loss(self, networks: Networks, weights: Weights, batch: Batch, phase: Phase, numbers: Numbers) -> Loss:
        noise_key, time_key, dropout_key = streams(batch["key"], 3)
        x0, eps = with_noise(batch, noise_key)
        s = self.times.rf(standard(self.times, time_key))
        dropped = jax.vmap(lambda key: jax.random.bernoulli(key, self.text_dropout))(dropout_key)
        text = jnp.where(dropped[:, None, None], weights.negative[None], batch["text"])
        _, aux = losses.flow_matching(network(networks.student, weights.student), x0, eps, s, text)
        return summary(loss=aux["loss"])


@dataclasses.dataclass(frozen=True)
class SLA:
    """A network with sparse-linear attention learns the velocities of the dense one."""

    times: Times
    ema_rate: float = 0.1
    phases: Phases = STUDENT_ALONE

    def student_loss(self, networks: Networks, weights: Weights, batch: Batch, phase: Phase, numbers: Numbers) -> Loss:
        noise_key, time_key = streams(batch["key"], 2)
        x0, eps = with_noise(batch, noise_key)
        s = self.times.rf(standard(self.times, time_key))
        student, teacher = network(networks.student, weights.student), network(networks.teacher, weights.teacher)
        _, aux = losses.white_box(student, teacher, x0, eps, s, batch["text"])
        return summary(loss=aux["loss"])


@dataclasses.dataclass(frozen=True)
class RCM:
    """Distillation to 1 to 4 steps: consistency with the teacher's trajectory and matching of its distribution.

    times: of the consistency loss. score_times: of the noise at which teacher and fake score judge samples.
    simulation_times: between the student's own steps; None takes those of sampling.
    guidance: the teacher's. tangent, tangent_step: see `losses.velocity_tangent`.
    """

    times: Times
    score_times: Times = PUBLISHED_SCORE_TIMES
    simulation_times: Times | None = None
    guidance: float = 5.0
    tangent: Tangent = "exact"
    tangent_step: float = 1e-4
    ema_rate: float = 0.1
    phases: Phases = PUBLISHED_PHASES

    def student_loss(self, networks: Networks, weights: Weights, batch: Batch, phase: Phase, numbers: Numbers) -> Loss:
        noise_key, time_key, simulation_key, score_key = streams(batch["key"], 4)
        student, teacher = network(networks.student, weights.student), self.guided_teacher(networks, weights, batch)
        parts = {}
        if phase.consistency:
            x0, eps = with_noise(batch, noise_key)
            t = self.times.trig(standard(self.times, time_key))
            skeleton = networks.student if self.tangent == "difference" else networks.tangent
            _, aux = losses.consistency(
                student,
                network(skeleton, lax.stop_gradient(weights.student)),
                teacher,
                x0,
                eps,
                t,
                batch["text"],
                warmup=numbers.warmup,
                tangent=self.tangent,
                step=self.tangent_step,
                scale=self.phases.loss_scale,
            )
            parts["consistency"] = aux["loss"]
        if phase.matching:
            sample = self.simulate(networks, weights, batch, simulation_key, numbers)
            eps, t = self.score_noise(batch, score_key)
            fake = network(networks.student, weights.critic)
            _, aux = losses.distribution_matching(sample, fake, teacher, eps, t, batch["text"])
            parts["distribution_matching"] = self.phases.loss_scale_dmd * aux["loss"]
        return summary(loss=jnp.stack(list(parts.values())).sum(axis=0), **parts)

    def critic_loss(self, networks: Networks, weights: Weights, batch: Batch, phase: Phase, numbers: Numbers) -> Loss:
        """The fake score learns what the student makes."""
        simulation_key, score_key = streams(batch["key"], 2)
        sample = self.simulate(networks, weights, batch, simulation_key, numbers)
        eps, t = self.score_noise(batch, score_key)
        _, aux = losses.fake_score(sample, network(networks.student, weights.critic), eps, t, batch["text"])
        return summary(fake_score=aux["loss"])

    def guided_teacher(self, networks: Networks, weights: Weights, batch: Batch) -> Velocity:
        negative = jnp.broadcast_to(weights.negative[None], batch["text"].shape)
        return guided(network(networks.teacher, weights.teacher), negative, self.guidance)

    def simulate(
        self, networks: Networks, weights: Weights, batch: Batch, key: jax.Array, numbers: Numbers
    ) -> jax.Array:
        """The student's own samples, `[B, t, h, w, c]`; the gradient goes through the last of their steps."""
        most = self.phases.max_simulation_steps
        noise_key, time_key = streams(key, 2)
        noise = normal(noise_key, (most, *batch["latents"].shape[1:])).swapaxes(0, 1)
        if self.simulation_times is None:
            times = fixed_simulation_times(len(key))
        else:
            draws = standard(self.simulation_times, time_key, (most - 1,))
            times = drawn_simulation_times(self.simulation_times.trig(draws).T)
        return losses.simulate(
            network(networks.student, weights.student),
            network(networks.student, lax.stop_gradient(weights.student)),
            noise,
            times,
            batch["text"],
            num_steps=numbers.simulation_steps,
        )

    def score_noise(self, batch: Batch, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Noise `[B, t, h, w, c]` and TrigFlow times `[B]` at which samples are judged."""
        noise_key, time_key = streams(key, 2)
        t = self.score_times.trig(standard(self.score_times, time_key))
        return normal(noise_key, batch["latents"].shape[1:]), t


def network(skeleton: Skeleton, params: Params) -> Velocity:
    """The network with these parameters, cast to the dtypes it computes in.

    A bfloat16 network gets bfloat16 timesteps, as the reference has them in training and sampling.
    """
    module = skeleton.fill(in_compute_dtype(skeleton, params))
    if module.config.dtype != jnp.bfloat16:
        return module
    rounded = functools.partial(lax.reduce_precision, exponent_bits=8, mantissa_bits=7)
    return lambda x, timesteps, text: module(x, rounded(timesteps), text)


def summary(**parts: jax.Array) -> Loss:
    """Means of losses `[B]`: the first is what is minimized, all are metrics."""
    means = {name: jnp.mean(loss) for name, loss in parts.items()}
    return next(iter(means.values())), means


def with_noise(batch: Batch, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The data in float32 and as much noise."""
    x0 = batch["latents"].astype(jnp.float32)
    return x0, normal(keys, x0.shape[1:])


# Randomness, a sample at a time; keys `[B]`.


def sample_keys(seed: int, step: jax.Array, count: int) -> jax.Array:
    """A key for each sample of a step's batch."""
    return jax.random.split(jax.random.fold_in(jax.random.key(seed), step), count)


def streams(keys: jax.Array, count: int) -> jax.Array:
    """Independent keys `[count, B]`."""
    return jax.vmap(functools.partial(jax.random.split, num=count), out_axes=1)(keys)


def normal(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal `[B, *shape]`."""
    return jax.vmap(lambda key: diffusion.normal(key, shape))(keys)


def standard(times: Times, keys: jax.Array, shape: tuple[int, ...] = ()) -> jax.Array:
    """Draws `[B, *shape]` for a distribution of times."""
    return jax.vmap(lambda key: times.standard(key, shape))(keys)
