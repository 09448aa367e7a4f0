"""The Hopper kernel of sparse-linear attention without a GPU: its schedules emulated, and lowered for one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.kernels import emulator
from turbojax.kernels import mosaic, sla
from turbojax.kernels.sizes import cdiv
from turbojax.kernels.sla import mosaic_forward
from turbojax.kernels.sla.reference import SparseInputs

BF16 = jnp.bfloat16


def operands(length: int, heads: int, dim: int, block_k: int, count: int):
    """`SparseInputs` but for the bounds, with a random table, and the result of the reference."""
    keys = jax.random.split(jax.random.key(length + count), 6)
    q, k, v = (jax.random.normal(key, (1, length, heads, dim), BF16) for key in keys[:3])
    weight, bias = jax.random.normal(keys[3], (dim, dim)) * dim**-0.5, jax.random.normal(keys[4], (dim,))
    order = jax.random.uniform(keys[5], (1, heads, cdiv(length, 128), cdiv(length, block_k)))
    table = jnp.sort(jnp.argsort(order)[..., :count]).astype(jnp.int32)
    phi = jax.nn.softmax(k.astype(jnp.float32))
    state = jnp.einsum("bsnh,bsnd->bnhd", phi, v.astype(jnp.float32))
    projected = jnp.einsum("bnhe,de->bnhd", state, weight).astype(BF16)
    f = [x.astype(jnp.float32) for x in (q, k, v)]
    sparse = sla.sparse_softmax(*f, table, block_q=128, block_k=block_k)
    expected = sparse + sla.linear_branch(*f, weight, bias)
    return (q, k, v, table, projected, phi.sum(axis=1), bias), expected


@pytest.mark.parametrize(
    ("dim", "block_k", "count"),
    [(64, 64, 1), (64, 64, 2), (128, 64, 3), (64, 64, 4), (64, 64, 5), (128, 64, 6), (64, 128, 1), (128, 128, 3)],
)
def test_emulated(monkeypatch, dim, block_k, count):
    """Three tiles in one program, steps whole and shorter, rings at every phase: barriers, slots, results."""
    arrays, expected = operands(384, 1, dim, block_k, count)
    emulator.emulate(monkeypatch, mosaic)
    bounds = jnp.array([[[9.0, 99.0, 59.0]]])  # some tiles look for a maximum, others do not
    got = mosaic_forward.sparse_forward(SparseInputs(*arrays, bounds), block_k=block_k, num_sms=1)
    np.testing.assert_allclose(np.asarray(got, np.float32), expected, atol=2e-2)


@pytest.mark.parametrize(
    ("length", "dim", "block_k", "count"),
    [
        (75600, 128, 64, 118),
        (32760, 128, 64, 51),
        (1560, 128, 64, 2),
        (1560, 64, 64, 1),
        (1560, 64, 64, 3),
        (384, 128, 128, 2),
        (1560, 64, 128, 3),
    ],
)
def test_lowers_for_a_gpu(length, dim, block_k, count):
    spec = jax.ShapeDtypeStruct
    x = spec((2, length, 3, dim), BF16)
    inputs = SparseInputs(
        *(x, x, x),
        spec((2, 3, cdiv(length, 128), count), jnp.int32),
        spec((2, 3, dim, dim), BF16),
        spec((2, 3, dim), jnp.float32),
        spec((dim,), jnp.float32),
        spec((2, 3, cdiv(length, 128)), jnp.float32),
    )
    call = functools.partial(mosaic_forward.sparse_forward, block_k=block_k, num_sms=132)
    exported = jax.export.export(jax.jit(call), platforms=["cuda"])(inputs)
    assert exported.out_avals[0].shape == x.shape
