"""Weights in host memory: blocks that are streamed through the device, and modules that only some stages need.

A layer's large arrays are in pinned host memory and are prefetched while the layer before is computed; all that is
small stays on the device, stacked over the layers. Results are those of the resident model.

The VAE and the image encoder are offloaded as numpy arrays and come to the device for their own stage. The
transformer's embeddings of text and time run before its steps: they are in pinned host memory, and the compiled sampler
begins with a copy of them, whose place its steps use again.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from turbojax.models.sizes import size_of
from turbojax.models.wan import EMBEDDINGS, WanModel

Module = TypeVar("Module", bound=nnx.Module)
STREAMED_BYTES = 2**16  # arrays of a layer from this size on are streamed: its matrices
LAYERS_ON_DEVICE = 3  # one that is computed, one that is prefetched for the next, one that arrives


def is_streamed(spec: Any) -> bool:
    """Returns True if one layer's array of this shape and dtype is streamed."""
    return size_of(spec) >= STREAMED_BYTES


def memory_sharding(kind: str | None) -> jax.sharding.Sharding:
    """Returns the sharding of a kind of memory of the first device; None for its default."""
    return jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind=kind)


def to_pinned_host(array: Any) -> Any:
    """Returns an array, or its shape and dtype, in pinned host memory, which the device's copy engine reads itself."""
    pinned = memory_sharding("pinned_host")
    if isinstance(array, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=pinned)
    return jax.device_put(array, pinned)


def in_host_memory(array: jax.Array | np.ndarray) -> bool:
    return isinstance(array, np.ndarray) or array.sharding.memory_kind == "pinned_host"


# Streamed blocks.


@dataclasses.dataclass(frozen=True)
class HostBlocks:
    """Stacked blocks, split: `graph` of one, `resident` stacked `[layers, ...]` on the device, `layers` on the host."""

    graph: nnx.GraphDef
    resident: nnx.State
    layers: tuple[nnx.State, ...]

    def __call__(self, x: jax.Array, context: tuple) -> jax.Array:
        """Runs x through the blocks, `block(x, *context)` each, in place of `scan_blocks`. Takes x's memory.

        The copy of a layer is asked for before the layer ahead of it is, because copies may wait for all computation
        asked for so far; a layer's memory is free for the next but two when it has been computed.
        """
        running: collections.deque[jax.Array] = collections.deque()
        arriving = self.prefetch(0)
        for i in range(len(self.layers)):
            if len(running) == LAYERS_ON_DEVICE - 1:
                running.popleft().block_until_ready()
            layer, arriving = arriving, self.prefetch(i + 1)
            x, done = run_block(self.graph, self.resident, layer, jnp.int32(i), x, context)
            running.append(done)
        while len(running) > LAYERS_ON_DEVICE - 2:
            running.popleft().block_until_ready()
        return x

    def prefetch(self, i: int) -> nnx.State | None:
        """Starts the copy of a layer to the device."""
        return jax.device_put(self.layers[i], memory_sharding(None)) if i < len(self.layers) else None


@dataclasses.dataclass(frozen=True)
class Streamed:
    """A model with streamed blocks; called like the model, but not under a trace.

    graph, state: the model without its blocks, split.
    """

    config: Any
    graph: nnx.GraphDef
    state: nnx.State
    blocks: HostBlocks

    def __call__(self, *inputs: jax.Array, **more: jax.Array) -> jax.Array:
        x, context, rest = embed(self.graph, self.state, inputs, more)
        return unembed(self.graph, self.state, self.blocks(x, context), rest)


@functools.partial(jax.jit, static_argnums=0)
def embed(graph: nnx.GraphDef, state: nnx.State, inputs: tuple, more: dict[str, jax.Array]) -> tuple:
    """Runs a split model's `embed`: what comes before its blocks."""
    return nnx.merge(graph, state).embed(*inputs, **more)


@functools.partial(jax.jit, static_argnums=0)
def unembed(graph: nnx.GraphDef, state: nnx.State, x: jax.Array, rest: tuple) -> jax.Array:
    """Runs a split model's `unembed`: what comes after its blocks."""
    return nnx.merge(graph, state).unembed(x, rest)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=4)
def run_block(
    graph: nnx.GraphDef, resident: nnx.State, layer: nnx.State, index: jax.Array, x: jax.Array, context: tuple
) -> tuple[jax.Array, jax.Array]:
    """Runs one block; the second result can be waited for when the first has been donated."""
    own = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, index, keepdims=False), resident)
    x = nnx.merge(graph, own, layer)(x, *context)
    return x, x[(0,) * x.ndim]


# Offloaded modules.


class ArraysByMemory(NamedTuple):
    """Arrays on the device and in host memory."""

    device: list[jax.Array]
    host: list[jax.Array | np.ndarray]

    @classmethod
    def of(cls, tree: Any) -> "ArraysByMemory":
        """Sorts the arrays of a pytree."""
        leaves = jax.tree.leaves(tree)
        return cls([a for a in leaves if not in_host_memory(a)], [a for a in leaves if in_host_memory(a)])


def arrays_by_memory(model: nnx.Module | Streamed) -> ArraysByMemory:
    """Returns a model's arrays on the device and in host memory."""
    if isinstance(model, Streamed):
        return ArraysByMemory.of((model.state, model.blocks.resident, model.blocks.layers))
    return ArraysByMemory.of(nnx.state(model))


def to_host(model: Module) -> Module:
    """Returns the module with its parameters as numpy arrays."""
    graph, state = nnx.split(model)
    return nnx.merge(graph, jax.device_get(state))


def to_device(model: Module) -> Module:
    """Returns the module with its parameters on the device; copies of offloaded ones are freed with it."""
    graph, state = nnx.split(model)
    return nnx.merge(graph, jax.device_put(state))


def offload_embeddings(network: WanModel) -> WanModel:
    """Returns the network, which may be abstract, with its embeddings in pinned host memory."""
    graph, state = nnx.split(network)
    return nnx.merge(graph, map_embeddings(to_pinned_host, state))


def embeddings_to_device(state: Any) -> Any:
    """Returns a network's state under a trace, with its embeddings on the device wherever they come from."""
    return map_embeddings(lambda array: jax.device_put(array, jax.memory.Space.Device), state)


def map_embeddings(change: Callable[[Any], Any], state: Any) -> Any:
    """Returns a network's state with its embeddings changed."""
    changed = lambda path, leaf: change(leaf) if path[0].key in EMBEDDINGS else leaf  # noqa: E731
    return jax.tree_util.tree_map_with_path(changed, state)
