"""Generated parameters: the full-size network without a download, for benchmarks and for the demo's files."""

import functools
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from turbojax.weights.load import Skeleton, describe, place
from turbojax.weights.rules import Entry


def random_module(skeleton: Skeleton, *, seed: int = 0, what: str = "random weights") -> Any:
    """A module with generated parameters, made on the device a layer at a time; the same seed gives the same values."""
    specs = skeleton.entries()
    key = jax.random.key(seed)

    def generate(entry: Entry) -> jax.Array:
        spec = specs[entry]
        own_key = jax.random.fold_in(key, zlib.crc32(describe(entry).encode()))
        return random_parameter(own_key, entry.target, spec.shape, spec.dtype)

    return skeleton.fill(place(skeleton, generate, what=what))


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def random_parameter(key: jax.Array, name: str, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Values that keep activations near unit size: fan-in scaled weights, norm scales near 1, small biases."""
    if dtype == jnp.int8:
        return jax.random.randint(key, shape, -127, 128, jnp.int8)
    if name.endswith(".scale"):  # of an int8 weight of uniform values, whose rms is 127 / sqrt(3)
        return jnp.full(shape, 3**0.5 / 127 / (shape[-1] * 128) ** 0.5, dtype)
    normal = jax.random.normal(key, shape, jnp.float32)
    if name.endswith(("gamma", "norm.weight")) or ("norm" in name and name.endswith("weight")):
        return (1 + 0.1 * normal).astype(dtype)
    if len(shape) < 2:
        return (0.02 * normal).astype(dtype)
    return (normal * fan_in(name, shape) ** -0.5).astype(dtype)


def fan_in(name: str, shape: tuple[int, ...]) -> int:
    """Inputs of one output: linear weights are [out, in], convolutions [..., in, out], modulation [n, D]."""
    size = 1
    for n in shape[:-1] if len(shape) > 2 else shape[1:]:
        size *= n
    return size


def random_token_table(vocab: int, dim: int, dtype: Any, *, seed: int = 0) -> np.ndarray:
    """A token table `[vocab, dim]` on the host."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((vocab, dim), np.float32).astype(dtype)
