"""State of a training run at one step: everything that changes, as one pytree of arrays.

Random numbers come from `fold_in(key(seed), step)` and the data from a reader whose position is saved beside the state,
so a run that was killed and resumed equals one that was not, bit for bit.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from turbojax.weights.skeleton import Skeleton

# Parameters by dotted name, as `Skeleton` has them: `blocks.self_attn.q.weight` is `[layers, out, in]`.
Params = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trained:
    """A network in training: float32 master weights and its optimizer's state."""

    params: Params
    optimizer: optax.OptState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """step: int32 [], optimizer steps done; ema: float32 average of the student; critic: rCM's fake score or None."""

    step: jax.Array
    student: Trained
    ema: Params
    critic: Trained | None = None


def initial_state(
    params: Params, student: optax.GradientTransformation, critic: optax.GradientTransformation | None = None
) -> TrainState:
    """Makes the first state: student, average and, with an optimizer for it, critic, all from float32 parameters.

    Under `jax.jit` or not, they are copies: a step gives all buffers of its state back.
    """

    def start(optimizer: optax.GradientTransformation) -> Trained:
        return Trained(jax.tree.map(jnp.copy, params), optimizer.init(params))

    ema = jax.tree.map(jnp.copy, params)
    return TrainState(jnp.zeros((), jnp.int32), start(student), ema, None if critic is None else start(critic))


def parameters(module: nnx.Module) -> Params:
    """Returns a module's parameters by dotted name, as they are."""
    return {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(nnx.state(module))}


def in_compute_dtype(skeleton: Skeleton, params: Mapping[str, jax.Array]) -> Params:
    """Parameters in the dtypes that the network computes with: norms and modulation stay float32."""
    return {name: params[name].astype(spec.dtype) for name, spec in skeleton.specs.items()}
