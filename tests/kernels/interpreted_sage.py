"""The Triton kernels of SageSLA in the interpreter, against the reference and the golden fixture.

Collected by test_sage_triton.py in a process of its own, with TRITON_INTERPRET=1.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden_io import GOLDEN, load
from tests.kernels import interpreter
from tests.parity_sage import as_rows
from turbojax.kernels import sage, sage_triton, sla, triton_call

BF16 = jnp.bfloat16


@pytest.fixture(autouse=True)
def launcher(monkeypatch):
    monkeypatch.setattr(triton_call, "override", interpreter.launch)


def arrays(length: int, *, batch: int = 1, heads: int = 2, dim: int = 64):
    """q, k, v in bfloat16; k with an offset, which its mean takes away."""
    keys = jax.random.split(jax.random.key(length + dim), 4)
    q, k, v = (jax.random.normal(key, (batch, length, heads, dim)) for key in keys[:3])
    return q.astype(BF16), (k + jax.random.normal(keys[3], (1, 1, heads, dim))).astype(BF16), v.astype(BF16)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("centred", [False, True])
def test_quantize_rows(block, dim, centred):
    x = arrays(200, batch=2, dim=dim)[1]
    mean = jnp.mean(x.astype(jnp.float32), axis=1) if centred else None
    code, scale, means = sage_triton.quantize_rows(x, block, mean=mean, means=True)
    subtracted = x if mean is None else x.astype(jnp.float32) - mean[:, None]
    expected, expected_scale = sage.quantize_rows(subtracted, block)
    np.testing.assert_array_equal(code, as_rows(expected, code.shape[1]))
    np.testing.assert_allclose(scale, expected_scale, rtol=2e-7)
    np.testing.assert_allclose(means, sla.block_means(x, block), atol=1e-6)


def test_quantize_rows_beside_halves():
    """A block whose scale is 1 + 1e-7, with elements in steps of a half: one rounding too many shows. One of zeros."""
    x = (jnp.arange(64 * 64) % 509 - 254).astype(BF16).reshape(1, 64, 1, 64) / 2
    x = jnp.concatenate((x, jnp.zeros_like(x)), axis=1)
    code, scale, _ = sage_triton.quantize_rows(x, 64)
    expected, expected_scale = sage.quantize_rows(x, 64)
    np.testing.assert_array_equal(code, as_rows(expected, 128))
    np.testing.assert_allclose(scale, expected_scale, rtol=2e-7)


@pytest.mark.parametrize("dim", [64, 128])
def test_quantize_values(dim):
    v = arrays(300, batch=2, dim=dim)[2].at[:, :, 0, 3].set(0)
    code, scale = sage_triton.quantize_values(v, largest=sage.E4M3_OF_V)
    expected, expected_scale = sage.quantize_values(v)
    assert code.shape == (2, 2, dim, 384)
    np.testing.assert_allclose(scale, expected_scale, rtol=2e-7)
    rows = np.asarray(code, np.float32).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(rows[:, :300], np.asarray(expected, np.float32))
    assert not rows[:, 300:].any()
