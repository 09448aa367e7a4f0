"""Generated parameters: the full-size network without a download, for benchmarks and for the demo's files."""

import functools
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from turbojax.weights.parameters import load_parameters
from turbojax.weights.rules import TensorKey, describe
from turbojax.weights.skeleton import Skeleton


def random_module(skeleton: Skeleton, *, seed: int = 0, what: str = "random weights", streamed: bool = False) -> Any:
    """Makes a module with generated parameters, on the device a layer at a time; a seed gives the same values always.

    streamed: leave the blocks in host memory, see `turbojax.models.offload`.
    """
    specs = skeleton.tensor_specs()
    key = jax.random.key(seed)

    def generate(entry: TensorKey) -> jax.Array:
        spec = specs[entry]
        own_key = jax.random.fold_in(key, zlib.crc32(describe(entry).encode()))
        if spec.dtype == jnp.int8:
            return jax.random.randint(own_key, spec.shape, -127, 128, jnp.int8)
        if entry.target.endswith(".scale"):  # of an int8 weight of uniform values, whose rms is 127 / sqrt(3)
            features_in = specs[TensorKey(entry.target.removesuffix("scale") + "weight", entry.layer)].shape[1]
            return jnp.full(spec.shape, 3**0.5 / 127 / features_in**0.5, spec.dtype)
        return normal(own_key, *center_and_spread(entry.target, spec.shape), spec.shape, spec.dtype)

    return skeleton.fill(load_parameters(skeleton, generate, what=what, streamed=streamed), streamed=streamed)


def center_and_spread(entry: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation that keep activations near unit size: norm scales near 1, fan-in scaled weights.

    Linear weights are [out, in], convolutions [..., in, out], modulation [n, D].
    """
    if entry.endswith(("gamma", "norm.weight")) or ("norm" in entry and entry.endswith("weight")):
        return 1.0, 0.1
    if len(shape) < 2:
        return 0.0, 0.02
    return 0.0, math.prod(shape[:-1] if len(shape) > 2 else shape[1:]) ** -0.5


@functools.partial(jax.jit, static_argnums=(3, 4))
def normal(key: jax.Array, center: float, spread: float, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return (center + spread * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


def random_token_table(vocab: int, dim: int, dtype: Any, *, seed: int = 0) -> np.ndarray:
    """A token table `[vocab, dim]` on the host."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((vocab, dim), np.float32).astype(dtype)
