"""The Triton kernels of the int8 linear layer in the interpreter, against the reference.

Collected by test_int8_triton.py in a process of its own, with TRITON_INTERPRET=1.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.closeness import assert_bfloat16_close, assert_requantized
from tests.kernels import interpreter
from tests.marks import slow
from turbojax.kernels import int8, triton_call
from turbojax.kernels.int8 import QUANT_SCHEMES
from turbojax.kernels.norms import Residual

BF16 = jnp.bfloat16
SCHEMES = ["block128", "block128_rows", "channel"]


@pytest.fixture(autouse=True)
def launcher(monkeypatch):
    monkeypatch.setattr(triton_call, "override", interpreter.launch)


def arrays(m: int, n: int, k: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(m + n + k), 3)
    x, w, bias = (jax.random.normal(key, shape, BF16) for key, shape in zip(keys, ((m, k), (n, k), (n,)), strict=True))
    return x, w, bias


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("m", [1, slow(127), 129])
def test_quantize(scheme, m):
    x = arrays(m, 8, 256)[0]
    got = int8.quantize(x, QUANT_SCHEMES[scheme], implementation="triton")
    expected = int8.quantize(x, QUANT_SCHEMES[scheme], implementation="reference")
    np.testing.assert_array_equal(got.q, expected.q)
    np.testing.assert_array_equal(got.scale, expected.scale)


def test_quantize_ties_and_extremes():
    """Ties round to even, the positive extreme saturates to 127, the negative one is -128, zeros stay zeros."""
    x = (jnp.arange(128 * 128) % 256 - 128).reshape(128, 128).astype(BF16) / 2
    x = jnp.concatenate((x.at[0, 0].set(64.0), jnp.zeros((128, 128), BF16)), axis=1)
    got, expected = (int8.quantize(x, QUANT_SCHEMES["block128"], implementation=i) for i in ("triton", "reference"))
    np.testing.assert_array_equal(got.q, expected.q)
    assert got.q[0, 0] == 127
    assert got.q.min() == -128
    assert not got.q[:, 128:].any()


@pytest.mark.parametrize("gelu", [False, slow(True)])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 128, 128), (129, 136, 256)])
def test_matmul(scheme, gelu, m, n, k):
    quant = QUANT_SCHEMES[scheme]
    x, w, bias = arrays(m, n, k)
    x_q = int8.quantize(x, quant, implementation="reference")
    weight = int8.quantize_weight(w, quant.scheme)
    got, expected = (
        int8.matmul(x_q, *weight, bias, quant, gelu=gelu, implementation=i) for i in ("triton", "reference")
    )
    assert_bfloat16_close(got, expected)


def test_matmul_without_bias_and_with_leading_axes():
    quant = QUANT_SCHEMES["block128"]
    x, w, _ = arrays(2 * 67, 128, 128)
    x_q = int8.quantize(x.reshape(2, 67, 128), quant, implementation="triton")
    got, expected = (
        int8.matmul(x_q, *int8.quantize_weight(w, "block128"), None, quant, implementation=i)
        for i in ("triton", "reference")
    )
    assert got.shape == (2, 67, 128)
    assert_bfloat16_close(got, expected)


@pytest.mark.parametrize(
    ("scheme", "samples", "gated"), [("block128", 1, False), ("block128", 2, True), ("channel", 1, True)]
)
def test_residual_epilogue(scheme, samples, gated):
    """Two samples of 150 tokens, so that a tile holds rows of both."""
    quant = QUANT_SCHEMES[scheme]
    x, w, bias = arrays(300, 128, 128)
    x_q = int8.quantize(x.reshape(samples, -1, 128), quant, implementation="reference")
    weight = int8.quantize_weight(w, quant.scheme)
    keys = jax.random.split(jax.random.key(5))
    residual = jax.random.normal(keys[0], (samples, 300 // samples, 128), BF16)
    gate = jax.random.normal(keys[1], (samples, 1, 128)) if gated else None
    got, expected = (
        int8.matmul(x_q, *weight, bias, quant, add_to=Residual(residual, gate), implementation=i)
        for i in ("triton", "reference")
    )
    assert got.shape == residual.shape
    assert_bfloat16_close(got, expected)


@pytest.mark.parametrize("m", [100, 200])
def test_requantizing_epilogue(m):
    quant = QUANT_SCHEMES["block128"]
    x, w, bias = arrays(m, 256, 128)
    x_q = int8.quantize(x, quant, implementation="reference")
    weight = int8.quantize_weight(w, "block128")
    y = int8.matmul(x_q, *weight, bias, quant, gelu=True, implementation="triton")
    got = int8.matmul_requantize(x_q, *weight, bias, quant, gelu=True, implementation="triton")
    assert_requantized(got, int8.quantize(y, quant, implementation="reference"), y)


@pytest.mark.parametrize("scheme", ["block128", "channel"])
@pytest.mark.parametrize("m", [1, 129])
def test_dequantizing_matmul(scheme, m):
    quant = QUANT_SCHEMES[scheme + "_weights"]
    x, w, bias = arrays(m, 136, 256)
    weight = int8.quantize_weight(w, quant.scheme)
    got, expected = (
        int8.dequantizing_matmul(x, *weight, bias, quant, implementation=i) for i in ("triton", "reference")
    )
    assert_bfloat16_close(got, expected)


@pytest.mark.parametrize("scheme", ["block128", "block128_rows"])
def test_norm_quantize(scheme):
    """Two samples of 150 tokens, so that a block holds rows of both."""
    x = arrays(300, 8, 384)[0].reshape(2, 150, 384) * 3 + 1
    gain, shift = (jax.random.normal(jax.random.key(i), (2, 1, 384)) for i in (1, 2))
    got, expected = (
        int8.norm_quantize(x, gain, shift, QUANT_SCHEMES[scheme], eps=1e-6, implementation=i)
        for i in ("triton", "reference")
    )
    np.testing.assert_allclose(got.scale, expected.scale, rtol=1e-2)
    difference = np.abs(np.asarray(got.q, np.int32) - np.asarray(expected.q, np.int32))
    assert difference.max() <= 1
    assert (difference == 0).mean() > 0.99


@pytest.mark.parametrize("scheme", SCHEMES)
def test_nan_in_gives_nan_out(scheme):
    quant = QUANT_SCHEMES[scheme]
    x, w, bias = arrays(130, 128, 128)
    x_q = int8.quantize(x.at[3, 5].set(jnp.nan), quant, implementation="triton")
    y = int8.matmul(x_q, *int8.quantize_weight(w, quant.scheme), bias, quant, implementation="triton")
    assert bool(jnp.isnan(y[3]).all())
    assert not bool(jnp.isnan(y[129]).any())
