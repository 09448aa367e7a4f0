"""Bytes of arrays and of abstract ones."""

import jax
import jax.numpy as jnp
import numpy as np

from turbojax.models.sizes import size_of, tree_bytes


def test_bytes():
    tree = {"array": jnp.ones((2, 3), jnp.bfloat16), "host": [np.ones(5, np.int8)], "none": None}
    assert size_of(jax.ShapeDtypeStruct((4, 5), jnp.float32)) == 80
    assert tree_bytes(tree) == 2 * 6 + 5 == tree_bytes(jax.eval_shape(lambda: tree))
