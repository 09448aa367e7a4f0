"""The rotary norm's kernel on a GPU, against the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from turbojax.kernels.norms import rms_norm_rotate
from turbojax.models.layers import rotary_table

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")


@pytest.mark.parametrize(("batch", "heads", "head_dim"), [(1, 40, 128), (2, 12, 128), (2, 5, 64)])
@pytest.mark.parametrize("grid", [(1, 1, 1), (21, 30, 52)])
def test_rms_norm_rotate(grid, batch, heads, head_dim):
    keys = jax.random.split(jax.random.key(heads), 2)
    x = 3 * jax.random.normal(keys[0], (batch, grid[0] * grid[1] * grid[2], heads * head_dim), jnp.bfloat16)
    weight, table = 1 + 0.1 * jax.random.normal(keys[1], (heads * head_dim,)), rotary_table(grid, head_dim)
    got, expected, again = (
        np.asarray(rms_norm_rotate(x, weight, table, eps=1e-6, implementation=i), np.float32)
        for i in ("triton", "reference", "triton")
    )
    np.testing.assert_array_equal(got, again)
    np.testing.assert_allclose(got, expected, rtol=2**-7, atol=2**-6)
    assert (got == expected).mean() > 0.99
