"""The int8 kernels on a GPU, every implementation against the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.closeness import assert_bfloat16_close, assert_requantized
from tests.golden_io import GOLDEN, load
from turbojax.kernels import int8
from turbojax.kernels.int8 import QUANT_SCHEMES
from turbojax.kernels.norms import Residual

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")

BF16 = jnp.bfloat16
SHAPES = [
    (1, 1536, 1536),
    (127, 1536, 1536),
    (129, 256, 640),
    (136, 256, 640),
    (136, 256, 256),
    (2 * 1560, 8960, 1536),
    (75600, 5120, 1536),
]


def implementations(quant: int8.QuantConfig, m: int, n: int, k: int) -> list[str]:
    return ["triton"] if int8.api.mosaic_unsupported(quant, m, n, k) else ["triton", "mosaic"]


def arrays(m: int, n: int, k: int):
    keys = jax.random.split(jax.random.key(m + n + k), 3)
    shapes = ((m, k), (n, k), (n,))
    return [jax.random.normal(key, shape, BF16) for key, shape in zip(keys, shapes, strict=True)]


@pytest.mark.parametrize("scheme", ["block128", "block128_rows", "channel"])
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_quantize_and_matmul(scheme, m, n, k):
    quant = QUANT_SCHEMES[scheme]
    x, w, bias = arrays(m, n, k)
    x_q, reference = (int8.quantize(x, quant, implementation=i) for i in ("triton", "reference"))
    assert bool((x_q.q == reference.q).all())
    assert bool((x_q.scale == reference.scale).all())
    weight = int8.quantize_weight(w, quant.scheme)
    last = 128 * (max(0, m - 256) // 128)
    tail = int8.quantize(x[last:], quant, implementation="reference")
    for gelu in (False, True):
        expected = int8.matmul(tail, *weight, bias, quant, gelu=gelu, implementation="reference")
        for implementation in implementations(quant, m, n, k):
            got = int8.matmul(x_q, *weight, bias, quant, gelu=gelu, implementation=implementation)
            assert got.shape == (m, n)
            assert bool(jnp.isfinite(got).all())
            assert_bfloat16_close(got[last:], expected)
            again = int8.matmul(x_q, *weight, bias, quant, gelu=gelu, implementation=implementation)
            assert bool((got == again).all())


@pytest.mark.parametrize(
    ("m", "n", "k"),
    [(127, 1536, 1536), (200, 1536, 1536), (200, 1024, 256), (2 * 1560, 8960, 1536), (75600, 1536, 1536)],
)
def test_requantizing_epilogue(m, n, k):
    quant = QUANT_SCHEMES["block128"]
    x, w, bias = arrays(m, n, k)
    x_q, weight = int8.quantize(x, quant), int8.quantize_weight(w, "block128")
    for implementation in implementations(quant, m, n, k):
        y = int8.matmul(x_q, *weight, bias, quant, gelu=True, implementation=implementation)
        expected = int8.quantize(y, quant, implementation="triton")
        got = int8.matmul_requantize(x_q, *weight, bias, quant, gelu=True, implementation=implementation)
        assert_requantized(got, expected, y)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("scheme", "samples"), [("block128", 1), ("block128", 2), ("block128_rows", 1), ("channel", 1)]
)
@pytest.mark.parametrize(("m", "n", "k"), [(272, 256, 640), (2 * 1560, 1536, 8960), (75600, 5120, 1536)])
def test_residual_epilogue(m, n, k, scheme, samples, gated):
    """Two samples do not end with tiles: a tile holds rows of both."""
    quant = QUANT_SCHEMES[scheme]
    x, w, bias = arrays(m, n, k)
    x_q, weight = int8.quantize(x.reshape(samples, -1, k), quant), int8.quantize_weight(w, quant.scheme)
    residual = jax.random.normal(jax.random.key(1), (samples, m // samples, n), BF16)
    gate = jax.random.normal(jax.random.key(2), (samples, 1, n)) if gated else None
    add_to = Residual(residual, gate)
    for implementation in implementations(quant, m, n, k):
        expected = add_to.plus(int8.matmul(x_q, *weight, bias, quant, implementation=implementation))
        got = int8.matmul(x_q, *weight, bias, quant, add_to=add_to, implementation=implementation)
        assert_bfloat16_close(got, expected)


def test_fixture():
    _, t = load(GOLDEN / "int8_linear.safetensors")
    quant = QUANT_SCHEMES["block128"]
    x, w, bias = (jnp.asarray(t[f"in.{name}"], BF16) for name in ("x", "w", "bias"))
    x_q = int8.quantize(x, quant, implementation="triton")
    weight = int8.quantize_weight(w, "block128")
    np.testing.assert_array_equal(x_q.q, t["out.x_q"])
    np.testing.assert_array_equal(x_q.scale, t["out.x_s"])
    np.testing.assert_array_equal(weight[0], t["out.w_q"])
    np.testing.assert_array_equal(weight[1], t["out.w_s"])
    y = int8.matmul(x_q, *weight, bias, quant, implementation="triton")
    assert_bfloat16_close(y, t["out.y"])


@pytest.mark.parametrize("scheme", ["block128", "channel"])
def test_nan_in_gives_nan_out(scheme):
    quant = QUANT_SCHEMES[scheme]
    x, w, bias = arrays(304, 256, 1536)
    for implementation in implementations(quant, 304, 256, 1536):
        x_q = int8.quantize(x.at[3, 5].set(jnp.nan), quant)
        y = int8.matmul(x_q, *int8.quantize_weight(w, quant.scheme), bias, quant, implementation=implementation)
        assert bool(jnp.isnan(y[3]).all())
        assert not bool(jnp.isnan(y[303]).any())
        if scheme == "block128":
            z = int8.matmul_requantize(
                x_q, *int8.quantize_weight(w, "block128"), bias, quant, implementation=implementation
            )
            assert bool(jnp.isnan(z.scale[0]).all())
            assert not bool(jnp.isnan(z.scale[2]).any())


@pytest.mark.parametrize("scheme", ["block128_weights", "channel_weights"])
@pytest.mark.parametrize("m", [1, 129, 3120])
def test_dequantizing_matmul(scheme, m):
    quant = QUANT_SCHEMES[scheme]
    x, w, bias = arrays(m, 1536, 1536)
    weight = int8.quantize_weight(w, quant.scheme)
    with jax.default_matmul_precision("highest"):
        expected = int8.dequantizing_matmul(x, *weight, bias, quant, implementation="reference")
    assert_bfloat16_close(int8.dequantizing_matmul(x, *weight, bias, quant, implementation="triton"), expected)


@pytest.mark.parametrize("scheme", ["block128", "block128_rows"])
def test_norm_quantize(scheme):
    x = arrays(2 * 1560, 8, 1536)[0].reshape(2, 1560, 1536) * 3 + 1
    gain, shift = (jax.random.normal(jax.random.key(i), (2, 1, 1536)) for i in (1, 2))
    got, expected = (
        int8.norm_quantize(x, gain, shift, QUANT_SCHEMES[scheme], eps=1e-6, implementation=i)
        for i in ("triton", "reference")
    )
    np.testing.assert_allclose(got.scale, expected.scale, rtol=1e-2)
    difference = jnp.abs(got.q.astype(jnp.int32) - expected.q.astype(jnp.int32))
    assert int(difference.max()) <= 2
    assert float((difference == 0).mean()) > 0.99
