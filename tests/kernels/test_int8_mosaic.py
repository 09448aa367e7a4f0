"""The Hopper kernel of the int8 linear layer without a GPU: emulated, and lowered for one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.kernels import emulator
from turbojax.errors import UserError
from turbojax.kernels import int8, mosaic
from turbojax.kernels.int8 import QUANT_SCHEMES, mosaic_matmul
from turbojax.kernels.norms import Residual

BF16 = jnp.bfloat16


@pytest.mark.parametrize(
    ("scheme", "samples", "gated"), [("block128", 4, True), ("block128", 1, False), ("channel", 1, True)]
)
def test_emulated_residual(monkeypatch, scheme, samples, gated):
    """Three tiles in one program; of four samples, tiles hold rows of two."""
    emulator.emulate(monkeypatch, mosaic)
    m, n, k, quant = 384, 128, 256, QUANT_SCHEMES[scheme]
    keys = jax.random.split(jax.random.key(0), 5)
    x = jax.random.normal(keys[0], (samples, m // samples, k), BF16)
    x_q = int8.quantize(x, quant, implementation="reference")
    weight = int8.quantize_weight(jax.random.normal(keys[1], (n, k)), scheme)
    bias = jax.random.normal(keys[2], (n,), BF16)
    add_to = Residual(
        jax.random.normal(keys[3], (samples, m // samples, n), BF16),
        jax.random.normal(keys[4], (samples, 1, n)) if gated else None,
    )
    expected = int8.matmul(x_q, *weight, bias, quant, add_to=add_to, implementation="reference")
    tiles = mosaic_matmul.Tiles(rows=64, columns=128, stages=2)
    arrays = x_q.q.reshape(m, k), x_q.scale, *weight, bias
    (got,) = mosaic_matmul.matmul(*arrays, quant, add_to=add_to, tiles=tiles, num_sms=1)
    got, expected = (np.asarray(a, np.float32).reshape(m, n) for a in (got, expected))
    np.testing.assert_allclose(got, expected, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("form", ["block128", "channel", "requantize", "residual", "residual of two"])
def test_lowers_for_a_gpu(form):
    m, n, k = 1000, 1536, 1536
    scales = ((m,), (n,)) if form == "channel" else ((8, k // 128), (n // 128, k // 128))
    samples = 2 if "two" in form else 1

    def call(*arrays, x, gate):
        add_to = Residual(x, gate) if "residual" in form else None
        options = {"gelu": add_to is None, "requantize": form == "requantize", "add_to": add_to, "num_sms": 132}
        return mosaic_matmul.matmul(*arrays, QUANT_SCHEMES["channel" if form == "channel" else "block128"], **options)

    spec = jax.ShapeDtypeStruct
    arrays = spec((m, k), jnp.int8), spec(scales[0], jnp.float32), spec((n, k), jnp.int8), spec(scales[1], jnp.float32)
    x, gate = spec((samples, m // samples, n), BF16), spec((samples, 1, n), jnp.float32)
    exported = jax.export.export(jax.jit(call), platforms=["cuda"])(*arrays, spec((n,), BF16), x=x, gate=gate)
    assert [tuple(out.shape) for out in exported.out_avals] == [(m, n), *([(8, 12)] if form == "requantize" else [])]


def test_rows_that_it_would_drop_are_refused():
    arrays = jnp.zeros((127, 256), jnp.int8), jnp.ones((1, 2)), jnp.zeros((128, 256), jnp.int8), jnp.ones((1, 2))
    with pytest.raises(UserError, match="rows in eights"):
        mosaic_matmul.matmul(*arrays, None, QUANT_SCHEMES["block128"], num_sms=132)
