"""One optimizer step of each recipe: teacher (flow matching), SLA fine-tuning, rCM's student and its fake score.

    step = make_step(recipe, networks, optimizers, accumulation=4, seed=0)
    state, metrics = step(iteration, state, fixed, batch)

B batch. Every sample has a random key of its own, made from the seed, the iteration and its place in the batch: a step
does not depend on how the batch is cut into micro-batches or spread over devices, nor on the steps before.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from turbojax.errors import UserError
from turbojax.models.wan import WanConfig
from turbojax.sharding import as_sharded
from turbojax.train import losses
from turbojax.train.losses import Tangent
from turbojax.train.schedule import LearningRate, Phases, ema_beta, ema_update
from turbojax.train.state import Params, Trained, TrainState, in_compute_dtype
from turbojax.train.times import (
    LogNormal,
    Times,
    UniformShift,
    drawn_simulation_times,
    fixed_simulation_times,
)
from turbojax.train.trigflow import Velocity, guided
from turbojax.weights.load import Skeleton, wan_skeleton

Batch = dict[str, jax.Array]  # latents [B, t, h, w, c], text [B, 512, D]
Metrics = dict[str, jax.Array]  # float32 []
Step = Callable[[int, TrainState, "Fixed", Batch], tuple[TrainState, Metrics]]


@dataclasses.dataclass(frozen=True)
class Teacher:
    """Flow matching on data. text_dropout: share of samples that see the negative prompt in place of theirs."""

    times: Times = LogNormal(0.0, 1.0)
    text_dropout: float = 0.1
    ema_rate: float = 0.1
    phases: Phases = Phases(tangent_warmup=0, fake=False)


@dataclasses.dataclass(frozen=True)
class SLA:
    """Fine-tuning of a network with sparse-linear attention to the velocities of the dense one."""

    times: Times = LogNormal(1.5)
    ema_rate: float = 0.1
    phases: Phases = Phases(tangent_warmup=0, fake=False)


@dataclasses.dataclass(frozen=True)
class RCM:
    """Distillation to 1 to 4 steps: consistency with the teacher's trajectory and matching of its distribution.

    times: of the consistency loss; score_times: of the noise on the student's samples, for DMD and fake score.
    simulation_times: between the student's own steps; None takes those of sampling.
    guidance: the teacher's. tangent, tangent_step: see `losses.velocity_tangent`.
    """

    times: Times = LogNormal(0.7)
    score_times: Times = UniformShift(5.0)
    simulation_times: Times | None = None
    guidance: float = 5.0
    tangent: Tangent = "exact"
    tangent_step: float = 1e-2
    ema_rate: float = 0.1
    phases: Phases = Phases()


Recipe = Teacher | SLA | RCM


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


class Fixed(NamedTuple):
    """What no step changes: the teacher's parameters (None for flow matching), the negative prompt [512, D]."""

    teacher: Params | None
    negative: jax.Array


class Weights(NamedTuple):
    """All that a loss may need; it is differentiated with respect to one of the first two."""

    student: Params
    fake: Params | None
    teacher: Params | None
    negative: jax.Array


class Phase(NamedTuple):
    """What an iteration does; each combination is compiled once."""

    is_student: bool
    consistency: bool
    matching: bool


class Numbers(NamedTuple):
    """What else depends on the iteration: r of the consistency loss, steps of the simulation, what the EMA keeps."""

    warmup: jax.Array
    simulation_steps: jax.Array
    ema_beta: jax.Array


class Optimizer(NamedTuple):
    """AdamW and the learning rate that is part of it."""

    rate: LearningRate
    transform: optax.GradientTransformation


def adamw(rate: LearningRate, *, betas: tuple[float, float], weight_decay: float, clip_norm: float = 0.0) -> Optimizer:
    """AdamW with decay of all parameters; clip_norm: the largest norm of all gradients together, 0 for any."""
    transform = optax.adamw(rate, *betas, weight_decay=weight_decay)
    if clip_norm:
        transform = optax.chain(optax.clip_by_global_norm(clip_norm), transform)
    return Optimizer(rate, transform)


def make_step(
    recipe: Recipe,
    networks: Networks,
    student: Optimizer,
    critic: Optimizer | None = None,
    *,
    accumulation: int = 1,
    seed: int = 0,
) -> Step:
    """step(iteration, state, fixed, batch) -> (state, metrics); the state that goes in is used up.

    iteration: `state.step` as the host counts it, which decides whether the student or rCM's critic learns.
    student, critic: the optimizers. accumulation: micro-batches of a batch; their gradients are averaged in float32.
    """

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
    def run(phase: Phase, state: TrainState, fixed: Fixed, batch: Batch, numbers: Numbers):
        weights = Weights(state.student.params, state.critic and state.critic.params, *fixed)
        batch = batch | {"key": sample_keys(seed, state.step, len(batch["latents"]))}

        def student_loss(params: Params, batch: Batch):
            return LOSSES[type(recipe)](recipe, networks, weights._replace(student=params), batch, phase, numbers)

        def critic_loss(params: Params, batch: Batch):
            return fake_score_loss(recipe, networks, weights._replace(fake=params), batch, phase, numbers)

        changes: dict[str, Any] = {"step": state.step + 1}
        if phase.is_student:
            grads, metrics = mean_gradients(student_loss, state.student.params, batch, accumulation=accumulation)
            changes["student"], norms = updated(state.student, grads, student)
            changes["ema"] = ema_update(state.ema, changes["student"].params, numbers.ema_beta)
        else:
            grads, metrics = mean_gradients(critic_loss, state.critic.params, batch, accumulation=accumulation)
            changes["critic"], norms = updated(state.critic, grads, critic)
            norms = {f"critic_{name}": value for name, value in norms.items()}
        return as_sharded(dataclasses.replace(state, **changes)), metrics | norms

    def step(iteration: int, state: TrainState, fixed: Fixed, batch: Batch) -> tuple[TrainState, Metrics]:
        phases = recipe.phases
        phase = Phase(
            phases.is_student(iteration),
            phases.has_consistency(iteration),
            phases.has_distribution_matching(iteration),
        )
        beta = ema_beta(phases.effective_iteration(iteration), rate=recipe.ema_rate)
        numbers = Numbers(
            np.float32(phases.warmup_ratio(iteration)), np.int32(phases.simulation_steps(iteration)), np.float32(beta)
        )
        return run(phase, state, fixed, batch, numbers)

    return step


def sample_keys(seed: int, step: jax.Array, count: int) -> jax.Array:
    """A random key for each sample of a batch, `[B]`."""
    return jax.random.split(jax.random.fold_in(jax.random.key(seed), step), count)


def mean_gradients(loss: Callable, params: Params, batch: Batch, *, accumulation: int) -> tuple[Params, Metrics]:
    """Gradients and metrics of loss(params, micro-batch) -> (value, metrics), averaged over the micro-batches.

    Every micro-batch takes each accumulation-th sample, so that it spreads over all devices as the batch does.
    Raises UserError for a batch that does not divide.
    """
    size = len(batch["latents"])
    if size % accumulation:
        raise UserError(f"a batch of {size} does not divide into accumulation={accumulation} micro-batches")
    micro = jax.tree.map(lambda a: a.reshape(-1, accumulation, *a.shape[1:]).swapaxes(0, 1), batch)

    def one(batch: Batch) -> tuple[Params, Metrics]:
        (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params, batch)
        return as_sharded(grads), metrics

    def add(total, batch: Batch):
        return jax.tree.map(jnp.add, total, one(batch)), None

    shapes = jax.eval_shape(one, jax.tree.map(lambda a: a[0], micro))
    zeros = jax.tree.map(lambda spec: jnp.zeros(spec.shape, spec.dtype), shapes)
    return jax.tree.map(lambda total: total / accumulation, lax.scan(add, zeros, micro)[0])


def updated(trained: Trained, grads: Params, optimizer: Optimizer) -> tuple[Trained, Metrics]:
    """The network after the optimizer's step; NaN and infinite gradients count as zero, as in the reference."""
    count = optax.tree_utils.tree_get(trained.optimizer, "ScaleByScheduleState").count
    finite = jax.tree.map(lambda g: jnp.where(jnp.isfinite(g), g, 0), grads)
    with jax.numpy_dtype_promotion("standard"):  # Optax raises floats to whole numbers
        changes, state = optimizer.transform.update(finite, trained.optimizer, trained.params)
    metrics = {"gradient_norm": optax.global_norm(grads), "learning_rate": optimizer.rate(count)}
    return Trained(optax.apply_updates(trained.params, changes), state), metrics


# Losses: (recipe, networks, weights, batch, phase, numbers) -> (mean over the samples, metrics).


def flow_matching_loss(recipe: Teacher, networks: Networks, weights: Weights, batch: Batch, phase, numbers):
    noise_key, time_key, dropout_key = streams(batch["key"], 3)
    x0, eps = with_noise(batch, noise_key)
    dropped = jax.vmap(lambda key: jax.random.uniform(key) < recipe.text_dropout)(dropout_key)
    text = jnp.where(dropped[:, None, None], weights.negative[None], batch["text"])
    s = recipe.times.rf(standard(recipe.times, time_key))
    _, aux = losses.flow_matching(network(networks.student, weights.student), x0, eps, s, text)
    return summary({"loss": aux["loss"]})


def sla_loss(recipe: SLA, networks: Networks, weights: Weights, batch: Batch, phase, numbers):
    noise_key, time_key = streams(batch["key"], 2)
    x0, eps = with_noise(batch, noise_key)
    student, teacher = network(networks.student, weights.student), network(networks.teacher, weights.teacher)
    s = recipe.times.rf(standard(recipe.times, time_key))
    _, aux = losses.white_box(student, teacher, x0, eps, s, batch["text"])
    return summary({"loss": aux["loss"]})


def consistency_and_matching_loss(
    recipe: RCM, networks: Networks, weights: Weights, batch: Batch, phase: Phase, numbers: Numbers
):
    """The student's: consistency with the teacher, and matching of distributions where the phase has it."""
    keys = streams(batch["key"], 4)
    student, teacher = network(networks.student, weights.student), guided_teacher(recipe, networks, weights, batch)
    parts = {}
    if phase.consistency:
        x0, eps = with_noise(batch, keys[0])
        t = recipe.times.trig(standard(recipe.times, keys[1]))
        exact = recipe.tangent != "difference"
        _, aux = losses.consistency(
            student,
            # Two rounded timesteps make no difference quotient.
            network(networks.tangent if exact else networks.student, lax.stop_gradient(weights.student), rounded=exact),
            teacher,
            x0,
            eps,
            t,
            batch["text"],
            warmup=numbers.warmup,
            tangent=recipe.tangent,
            step=recipe.tangent_step,
            scale=recipe.phases.loss_scale,
        )
        parts["consistency"] = aux["loss"]
    if phase.matching:
        sample = simulated(recipe, networks, weights, batch, keys[2], numbers)
        eps, t = score_noise(recipe, batch, keys[3])
        _, aux = losses.distribution_matching(
            sample, network(networks.student, weights.fake), teacher, eps, t, batch["text"]
        )
        parts["distribution_matching"] = recipe.phases.loss_scale_dmd * aux["loss"]
    return summary({"loss": sum(parts.values()), **parts})


def fake_score_loss(recipe: RCM, networks: Networks, weights: Weights, batch: Batch, phase: Phase, numbers: Numbers):
    """The critic's: the fake score learns what the student makes."""
    simulation_key, score_key = streams(batch["key"], 2)
    sample = simulated(recipe, networks, weights, batch, simulation_key, numbers)
    eps, t = score_noise(recipe, batch, score_key)
    _, aux = losses.fake_score(sample, network(networks.student, weights.fake), eps, t, batch["text"])
    return summary({"fake_score": aux["loss"]})


LOSSES: dict[type, Callable] = {Teacher: flow_matching_loss, SLA: sla_loss, RCM: consistency_and_matching_loss}


def summary(parts: dict[str, jax.Array]) -> tuple[jax.Array, Metrics]:
    """Means of losses `[B]`: the first is what is minimized, all are metrics."""
    means = {name: jnp.mean(loss) for name, loss in parts.items()}
    return next(iter(means.values())), means


def network(skeleton: Skeleton, params: Params, *, rounded: bool = True) -> Velocity:
    """The network with these parameters, cast to the dtypes it computes in.

    rounded: timesteps in bfloat16 for a bfloat16 network, as the reference has them in training and sampling.
    """
    module = skeleton.fill(in_compute_dtype(skeleton, params))
    if not rounded or module.config.dtype != jnp.bfloat16:
        return module
    return lambda x, timesteps, text: module(x, lax.reduce_precision(timesteps, 8, 7), text)


def guided_teacher(recipe: RCM, networks: Networks, weights: Weights, batch: Batch) -> Velocity:
    assert weights.teacher is not None
    negative = jnp.broadcast_to(weights.negative[None], batch["text"].shape)
    return guided(network(networks.teacher, weights.teacher), negative, recipe.guidance)


def simulated(
    recipe: RCM, networks: Networks, weights: Weights, batch: Batch, keys: jax.Array, numbers: Numbers
) -> jax.Array:
    """The student's own samples, `[B, t, h, w, c]`; the gradient goes through the last of its steps."""
    most, size = recipe.phases.max_simulation_steps, len(keys)
    noise_key, time_key = streams(keys, 2)
    noise = normal(noise_key, (most, *batch["latents"].shape[1:])).swapaxes(0, 1)
    if recipe.simulation_times is None:
        times = fixed_simulation_times(size)
    else:
        drawn = recipe.simulation_times.trig(standard(recipe.simulation_times, time_key, (most - 1,)))
        times = drawn_simulation_times(drawn.T)
    return losses.simulate(
        network(networks.student, weights.student),
        network(networks.student, lax.stop_gradient(weights.student)),
        noise,
        times,
        batch["text"],
        num_steps=numbers.simulation_steps,
    )


def score_noise(recipe: RCM, batch: Batch, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Noise `[B, t, h, w, c]` and TrigFlow times `[B]` at which teacher and fake score judge the student's samples."""
    noise_key, time_key = streams(keys, 2)
    eps = normal(noise_key, batch["latents"].shape[1:])
    return eps, recipe.score_times.trig(standard(recipe.score_times, time_key))


def with_noise(batch: Batch, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The data in float32 and as much noise."""
    x0 = batch["latents"].astype(jnp.float32)
    return x0, normal(keys, x0.shape[1:])


# Randomness, from keys `[B]`, a sample at a time.


def streams(keys: jax.Array, count: int) -> jax.Array:
    """Independent keys `[count, B]`."""
    return jax.vmap(functools.partial(jax.random.split, num=count), out_axes=1)(keys)


def normal(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal `[B, *shape]`; drawn flat, because XLA compiles several axes under vmap ten times as long."""
    flat = jax.vmap(lambda key: jax.random.normal(key, (math.prod(shape),), jnp.float32))(keys)
    return flat.reshape(-1, *shape)


def standard(times: Times, keys: jax.Array, shape: tuple[int, ...] = ()) -> jax.Array:
    """Draws `[B, *shape]` for a distribution of times."""
    return jax.vmap(lambda key: times.standard(key, shape))(keys)
