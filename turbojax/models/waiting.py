"""Weights that only some stages of a video need, in host memory while the others run.

The VAE and the image encoder lie there as numpy arrays and come to the device for their own stage. The transformer's
embeddings of text and time run before its steps: they lie in pinned host memory, and the compiled sampler begins with
a copy of them, whose place its steps use again. Results are the same.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from flax import nnx

from turbojax.models.streaming import to_host
from turbojax.models.wan import EMBEDDINGS, WanModel

Module = TypeVar("Module", bound=nnx.Module)


def away(model: Module) -> Module:
    """The module with its parameters as numpy arrays."""
    graph, state = nnx.split(model)
    return nnx.merge(graph, jax.device_get(state))


def here(model: Module) -> Module:
    """The module with its parameters on the device; copies of those that were away are freed with it."""
    graph, state = nnx.split(model)
    return nnx.merge(graph, jax.device_put(state))


def embeddings_away(network: WanModel) -> WanModel:
    """The network, which may be abstract, with its embeddings in pinned host memory."""
    graph, state = nnx.split(network)
    return nnx.merge(graph, of_embeddings(to_host, state))


def embeddings_here(state: Any) -> Any:
    """A network's state under a trace, with its embeddings on the device wherever they come from."""
    return of_embeddings(lambda array: jax.device_put(array, jax.memory.Space.Device), state)


def of_embeddings(change: Callable[[Any], Any], state: Any) -> Any:
    """A network's state with its embeddings changed."""
    changed = lambda path, leaf: change(leaf) if path[0].key in EMBEDDINGS else leaf  # noqa: E731
    return jax.tree_util.tree_map_with_path(changed, state)
