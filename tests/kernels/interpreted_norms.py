"""The Triton kernel of the rotary norm in the interpreter, against the reference.

Collected by test_norms.py in a process of its own, with TRITON_INTERPRET=1.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.kernels import interpreter
from tests.marks import slow
from turbojax.kernels import triton_call
from turbojax.kernels.norms import rms_norm_rotate
from turbojax.models.layers import rotary_table

BF16 = jnp.bfloat16


@pytest.fixture(autouse=True)
def launcher(monkeypatch):
    monkeypatch.setattr(triton_call, "override", interpreter.launch)


class Recorded:
    """In a kernel's place: notes that it ran."""

    def __init__(self):
        self.launches = 0

    def __getitem__(self, grid):
        return self

    def __call__(self, *tensors):
        self.launches += 1


def test_a_kernel_has_run_when_its_call_returns():
    """Also one whose argument took long: what is changed afterwards, it has not seen."""
    kernel = Recorded()
    settings = dict(out_shape=(jax.ShapeDtypeStruct((8,), jnp.float32),), grid=(1,), num_warps=1, num_stages=1)
    slow = jax.jit(lambda x: jax.lax.fori_loop(0, 300, lambda _, x: jnp.tanh(x @ x), x)[0, :8])
    launch = jax.jit(lambda x: triton_call.triton_call(kernel, x, **settings))
    outputs = [launch(slow(jnp.ones((256, 256)))) for _ in range(2)]
    assert kernel.launches == 2
    jax.block_until_ready(outputs)


def arrays(batch: int, grid: tuple[int, int, int], heads: int, head_dim: int):
    keys = jax.random.split(jax.random.key(heads), 2)
    length, width = grid[0] * grid[1] * grid[2], heads * head_dim
    x = 3 * jax.random.normal(keys[0], (batch, length, width), BF16)
    return x, 1 + 0.1 * jax.random.normal(keys[1], (width,)), rotary_table(grid, head_dim)


@pytest.mark.parametrize(("batch", "heads", "head_dim"), [(2, 3, 128), slow(1, 4, 64)])
def test_rms_norm_rotate(batch, heads, head_dim):
    x, weight, table = arrays(batch, (2, 3, 2), heads, head_dim)
    got, expected = (rms_norm_rotate(x, weight, table, eps=1e-6, implementation=i) for i in ("triton", "reference"))
    assert (got.shape, got.dtype) == ((batch, 12, heads, head_dim), BF16)
    np.testing.assert_allclose(*(np.asarray(a, np.float32) for a in (got, expected)), rtol=2**-7, atol=2**-8)
    assert (got == expected).mean() > 0.99


def test_gradients_are_those_of_the_reference():
    """By `jax.vjp` and by `jax.jvp`."""
    x, weight, table = arrays(1, (2, 1, 2), 2, 64)
    direction = jax.random.normal(jax.random.key(7), x.shape, BF16)
    results = []
    for implementation in ("triton", "reference"):

        def loss(x, weight, implementation=implementation):
            y = rms_norm_rotate(x, weight, table, eps=1e-6, implementation=implementation)
            return jnp.sum(jnp.sin(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape) * y.astype(jnp.float32))

        _, tangent = jax.jvp(loss, (x, weight), (direction, jnp.ones_like(weight)))
        results.append((*jax.grad(loss, argnums=(0, 1))(x, weight), tangent))
    for got, expected in zip(*results, strict=True):
        np.testing.assert_array_equal(got, expected)
