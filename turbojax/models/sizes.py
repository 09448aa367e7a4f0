"""Bytes of arrays, and of arrays that are only shapes and dtypes so far."""

from typing import Any

import jax


def size_of(array: Any) -> int:
    """Returns the bytes of an array, or of what has its shape and dtype."""
    return array.size * array.dtype.itemsize


def tree_bytes(tree: Any) -> int:
    """Returns the bytes of all arrays of a pytree."""
    return sum(map(size_of, jax.tree.leaves(tree)))
