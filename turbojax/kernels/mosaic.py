"""Layouts, loads and broadcasts that the Pallas Mosaic GPU kernels share."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu


def in_tiles(dtype: Any) -> tuple[Any, ...]:
    """Shared memory as warp groups multiply from it: 8 rows of 128 bytes a tile, swizzled."""
    transforms: Any = plgpu  # which jax 0.12 declares as abstract
    return transforms.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize)), transforms.SwizzleTransform(128)


def load(ref: Any, *, layout: Any = None) -> jax.Array:
    """Loads an array to registers, in the layout given or in that of whatever it meets."""
    index = ((),) if jax.__version_info__ < (0, 11) else ()  # jax 0.11 warns of one, 0.10 wants it
    return plgpu.load(ref, *index, layout=layout, optimized=False)


def per_row(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Broadcasts one value a row to a tile."""
    return lax.broadcast_in_dim(x, shape, [0])


def per_column(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Broadcasts one value a column to a tile."""
    return lax.broadcast_in_dim(x, shape, [1])
