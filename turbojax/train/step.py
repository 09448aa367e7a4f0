"""One optimizer step: gradients over micro-batches, AdamW or Muon, and the average of the weights.

    step = make_step(recipe, {"student": adamw(...)}, accumulation=4, seed=0)
    state, metrics = step(iteration, state, frozen, batch)

Master weights, their gradients and their average are float32. A step depends on its state, batch and seed alone.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from optax.contrib import MuonDimensionNumbers

from turbojax.errors import UserError
from turbojax.sharding import as_sharded
from turbojax.train.recipes import Batch, Loss, Metrics, NetworkParams, Recipe, sample_keys
from turbojax.train.schedule import StepSchedule, ema_update
from turbojax.train.state import Params, Trained, TrainState


class Frozen(NamedTuple):
    """Arrays that no step changes: the teacher's parameters (none for flow matching), the negative prompt [S, D]."""

    teacher: Params
    negative: jax.Array | None = None


class Optimizer(NamedTuple):
    """A transform of gradients and the learning rate that is part of it."""

    rate: optax.Schedule
    transform: optax.GradientTransformation


# Layers at a network's ends, whose rows stand for single inputs or outputs.
FIRST_OR_LAST = re.compile(r"(encoder|decoder)\.conv_(in|out)|quant|post_quant|patch_embedding|head\.proj")

Step = Callable[[int, TrainState, Frozen, Batch], tuple[TrainState, Metrics]]


def adamw(
    rate: optax.Schedule, *, betas: tuple[float, float], weight_decay: float, clip_norm: float = 0.0
) -> Optimizer:
    """Makes AdamW with decay of all parameters; clip_norm: the largest norm of all gradients together, 0 for any."""
    return Optimizer(rate, clipped(optax.adamw(rate, *betas, weight_decay=weight_decay), clip_norm))


def muon(rate: optax.Schedule, *, betas: tuple[float, float], weight_decay: float, clip_norm: float = 0.0) -> Optimizer:
    """Makes Muon for the matrices inside a network, `adamw` for the rest: `matrices` tells them apart.

    A matrix moves by the nearest orthogonal one to its gradients' average, scaled to the size of AdamW's steps, so that
    AdamW's learning rates hold (arXiv 2502.16982).
    """
    transform = optax.contrib.muon(
        rate,
        adam_b1=betas[0],
        adam_b2=betas[1],
        weight_decay=weight_decay,
        adam_weight_decay=weight_decay,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=matrices,
    )
    return Optimizer(rate, clipped(transform, clip_norm))


def clipped(transform: optax.GradientTransformation, clip_norm: float) -> optax.GradientTransformation:
    """Puts clipping before a transform; without it the state has one structure, so that a run may go on with it."""
    return optax.chain(optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity(), transform)


def matrices(params: Mapping[str, Any]) -> dict[str, MuonDimensionNumbers | None]:
    """Returns axes in and out of matrices: weights `[layers, out, in]`, kernels `[time, height, width, in, out]`."""

    def axes(name: str, value: Any) -> MuonDimensionNumbers | None:
        layer, _, kind = name.rpartition(".")
        if isinstance(value, optax.MaskedNode) or FIRST_OR_LAST.fullmatch(layer) or "norm" in layer:
            return None
        if kind == "kernel":
            return MuonDimensionNumbers(tuple(range(value.ndim - 1)), value.ndim - 1)
        return MuonDimensionNumbers(-1, -2) if kind == "weight" else None

    return {name: axes(name, value) for name, value in params.items()}


def make_step(recipe: Recipe, optimizers: Mapping[str, Optimizer], *, accumulation: int = 1, seed: int = 0) -> Step:
    """Makes step(iteration, state, frozen, batch) -> (state, metrics); the state that goes in is used up.

    iteration: `state.step` as the host counts it, which decides whether the student or rCM's critic learns.
    optimizers: by "student" and "critic". accumulation: micro-batches of a batch; their gradients are averaged.
    """

    @functools.partial(jax.jit, donate_argnums=0)
    def run(state: TrainState, frozen: Frozen, batch: Batch, schedule: StepSchedule) -> tuple[TrainState, Metrics]:
        learner: str = schedule.learner
        params: Any = NetworkParams(state.student.params, state.critic.params if state.critic else {}, *frozen)
        batch = batch | {"key": sample_keys(seed, state.step, batch_size(batch))}

        def loss(own: Params, batch: Batch) -> Loss:
            return recipe.loss(params._replace(**{learner: own}), batch, schedule)

        grads, metrics = mean_gradients(loss, getattr(params, learner), batch, accumulation=accumulation)
        trained, norms = updated(getattr(state, learner), grads, optimizers[learner])
        changes: dict[str, Any] = {"step": state.step + 1, learner: trained}
        if learner == "student":
            changes["ema"] = ema_update(state.ema, trained.params, schedule.ema_beta)
        metrics |= {f"{learner}_{name}": value for name, value in norms.items()}
        return as_sharded(dataclasses.replace(state, **changes)), metrics

    def step(iteration: int, state: TrainState, frozen: Frozen, batch: Batch) -> tuple[TrainState, Metrics]:
        return run(state, frozen, batch, recipe.phases.at(iteration, ema_rate=recipe.ema_rate))

    return step


def batch_size(batch: Batch) -> int:
    """Counts the samples of a batch."""
    return len(next(iter(batch.values())))


def mean_gradients(
    loss: Callable[[Params, Batch], Loss], params: Params, batch: Batch, *, accumulation: int
) -> tuple[Params, Metrics]:
    """Returns gradients and metrics of a loss, averaged over the micro-batches of a batch.

    Every micro-batch takes each accumulation-th sample, so that it spreads over all devices as the batch does.
    Raises UserError for a batch that does not divide.
    """
    size = batch_size(batch)
    if size % accumulation:
        raise UserError(f"a batch of {size} does not divide into accumulation={accumulation} micro-batches")

    def one(batch: Batch) -> tuple[Params, Metrics]:
        (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params, batch)
        return as_sharded(grads), metrics

    if accumulation == 1:  # in a loop a CPU's convolutions take thirty times as long
        return one(batch)
    micro = jax.tree.map(lambda a: a.reshape(-1, accumulation, *a.shape[1:]).swapaxes(0, 1), batch)

    def add(total: Any, batch: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, one(batch)), None

    shapes = jax.eval_shape(one, jax.tree.map(lambda a: a[0], micro))
    zeros = jax.tree.map(lambda spec: jnp.zeros(spec.shape, spec.dtype), shapes)
    return jax.tree.map(lambda total: total / accumulation, lax.scan(add, zeros, micro)[0])


def updated(trained: Trained, grads: Params, optimizer: Optimizer) -> tuple[Trained, Metrics]:
    """Returns the network after the optimizer's step; NaN and infinite gradients count as zero, as in the reference."""
    (_, schedule), *_ = optax.tree_utils.tree_get_all_with_path(trained.optimizer, "ScaleByScheduleState")
    finite = jax.tree.map(lambda g: jnp.where(jnp.isfinite(g), g, 0), grads)
    with jax.numpy_dtype_promotion("standard"):  # Optax raises floats to whole numbers
        changes, state = optimizer.transform.update(finite, trained.optimizer, trained.params)
        metrics = {"gradient_norm": optax.tree.norm(grads), "learning_rate": optimizer.rate(schedule.count)}
    return Trained(optax.apply_updates(trained.params, changes), state), metrics
