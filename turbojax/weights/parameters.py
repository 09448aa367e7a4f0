"""From the tensors of a file to the parameters of a network, one layer at a time.

Each tensor goes from the memory-mapped file to the device. A stacked parameter `[layers, ...]` is filled in place, so
that neither the host nor the device ever holds the model twice. For a streamed model (`turbojax.models.offload`) each
layer's large tensors go on to pinned host memory, one after the other.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from turbojax.errors import CheckpointError
from turbojax.models.offload import is_streamed, to_pinned_host
from turbojax.models.sizes import size_of, tree_bytes
from turbojax.weights.mapped import release
from turbojax.weights.rules import TensorKey, describe, shorten
from turbojax.weights.skeleton import Skeleton, is_stacked, layer_of


@functools.partial(jax.jit, donate_argnums=0)
def write_layer(stack: jax.Array, layer: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, layer.astype(stack.dtype), index, 0)


@jax.jit
def all_finite(x: jax.Array) -> jax.Array:
    return jnp.isfinite(x).all()


def progress_bar(specs: Mapping[str, Any], text: str) -> tqdm:
    """A bar in bytes for the arrays of these shapes and dtypes; on a terminal only."""
    return tqdm(total=tree_bytes(specs), unit="B", unit_scale=True, desc=text, disable=None, leave=False)


def progress(specs: Mapping[str, Any], text: str) -> Iterator[tuple[str, Any]]:
    """Yields the items of `specs` beside a bar in bytes, which counts each when the next one is asked for."""
    with progress_bar(specs, text) as bar:
        for name, spec in specs.items():
            yield name, spec
            bar.update(size_of(spec))


SMALL_BYTES = 2**22  # parameters up to this size are put together by numpy: compiling for each shape takes longer


def load_parameters(
    skeleton: Skeleton, tensor: Callable[[TensorKey], Any], *, what: str, streamed: bool = False
) -> dict[str, jax.Array | list[jax.Array]]:
    """Puts every parameter on the device, one tensor of the checkpoint at a time, with a progress bar in bytes.

    streamed: large parameters of the blocks become lists of arrays in host memory, one a layer.

    Raises CheckpointError naming the parameters that hold NaN or infinity.
    """
    arrays: dict[str, jax.Array | list[jax.Array]] = {}
    finite = {}
    with progress_bar(skeleton.specs, f"Loading {what}") as bar:

        def values(name: str, spec: jax.ShapeDtypeStruct, small: bool) -> Iterator[tuple[int | None, Any]]:
            """Yields the parameter's layers, or (None, the whole of it); each is read when it is asked for."""
            layers = range(spec.shape[0]) if is_stacked(name) else [None]
            for layer in layers:
                stored = tensor(TensorKey(name, layer))
                # jnp.asarray would compile a program for each shape.
                value = np.asarray(stored) if small else jax.device_put(stored, may_alias=False)
                if jnp.issubdtype(value.dtype, jnp.floating):
                    finite[TensorKey(name, layer)] = np.isfinite(value).all() if small else all_finite(value)
                yield layer, value
                if isinstance(stored, np.ndarray):
                    release(stored)
                bar.update(size_of(spec) // len(layers))

        for name, spec in skeleton.specs.items():
            if streamed and is_stacked(name) and is_streamed(layer_of(spec)):
                arrays[name] = layers_on_host(spec, values(name, spec, small=False))
                continue
            small = size_of(spec) <= SMALL_BYTES
            arrays[name] = (stack_on_host if small else stack_on_device)(spec, values(name, spec, small))
    bad = [describe(key) for key, ok in finite.items() if not ok]
    if bad:
        raise CheckpointError(f"{what} holds NaN or infinity in {shorten(bad)}; download it again")
    return arrays


def layers_on_host(spec: jax.ShapeDtypeStruct, values: Iterator[tuple[int | None, jax.Array]]) -> list[jax.Array]:
    """Copies each layer to pinned host memory and waits for it, so that the device holds one at a time."""
    return [jax.block_until_ready(to_pinned_host(value.astype(spec.dtype))) for _, value in values]


def stack_on_host(spec: jax.ShapeDtypeStruct, values: Iterator[tuple[int | None, np.ndarray]]) -> jax.Array:
    array = np.empty(spec.shape, spec.dtype)
    for layer, value in values:
        array[... if layer is None else layer] = value
    return jax.device_put(array)


def stack_on_device(spec: jax.ShapeDtypeStruct, values: Iterator[tuple[int | None, jax.Array]]) -> jax.Array:
    array = None
    for layer, value in values:
        if layer is None:
            array = value.astype(spec.dtype)
        else:
            array = write_layer(jnp.zeros(spec.shape, spec.dtype) if array is None else array, value, layer)
    assert array is not None
    return array
