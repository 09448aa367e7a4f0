"""The int8 linear layer's reference and its choice of implementation. The kernels: test_int8_*.py, tests/gpu."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.closeness import relative_error
from turbojax.errors import UserError
from turbojax.kernels import dispatch, int8
from turbojax.kernels.int8 import QUANT_SCHEMES, QuantConfig
from turbojax.kernels.norms import modulated_norm
from turbojax.models.layers import Dense, Int8Dense

SCHEMES = list(QUANT_SCHEMES)


def normal(seed: int, *shape: int, dtype=jnp.float32) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def layer(scheme: str, features_in: int = 256, features_out: int = 136, dtype=jnp.float32) -> tuple[Int8Dense, Dense]:
    """An int8 layer and the dense one whose weight it quantizes."""
    dense = Dense(features_in, features_out, dtype=jnp.float32, rngs=nnx.Rngs(0))
    dense.bias.set_value(normal(9, features_out))
    quant = QUANT_SCHEMES[scheme]
    quantized = Int8Dense(features_in, features_out, quant=quant, dtype=dtype, rngs=nnx.Rngs(0))
    q, scale = int8.quantize_weight(dense.weight[...], quant.scheme)
    quantized.weight.set_value(q)
    quantized.scale.set_value(scale)
    quantized.bias.set_value(dense.bias[...])
    return quantized, dense


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", [(1, 256), (127, 256), (129, 256), (2, 65, 256)])
def test_layer_is_close_to_dense(scheme, shape):
    quantized, dense = layer(scheme)
    x = normal(1, *shape)
    y = quantized(x)
    assert y.shape == (*shape[:-1], 136)
    assert relative_error(y, dense(x)) < 1.5e-2


def test_finer_activations_are_closer():
    x = normal(1, 256, 512) * jnp.exp(normal(2, 256, 1))  # tokens of different size
    errors = {}
    for scheme in ("block128", "block128_rows", "block128_weights"):
        quantized, dense = layer(scheme, 512)
        errors[scheme] = relative_error(quantized(x), dense(x))
    assert errors["block128_weights"] < errors["block128_rows"] < errors["block128"]


@pytest.mark.parametrize("scheme", ["block128", "channel"])
def test_dequantized_weight_is_within_half_a_step(scheme):
    weight = normal(3, 200, 256)
    q, scale = int8.quantize_weight(weight, scheme)
    step = 1.0 if scheme == "channel" else np.repeat(np.repeat(scale, 128, 0), 128, 1)[:200]
    step = scale[:, None] if scheme == "channel" else step
    # The positive extreme saturates at 127, a whole step away.
    assert np.all(np.abs(int8.dequantize_weight(q, scale) - weight) <= 1.001 * step)
    assert q.min() >= -128
    assert q.dtype == jnp.int8


@pytest.mark.parametrize("scheme", ["block128", "block128_rows", "channel"])
def test_nan_in_gives_nan_out(scheme):
    quantized, _ = layer(scheme)
    y = quantized(normal(1, 140, 256).at[2, 7].set(jnp.nan))
    assert bool(jnp.isnan(y[2]).all())
    assert not bool(jnp.isnan(y[139]).any())


def test_zeros_stay_zeros():
    x = int8.quantize(jnp.zeros((130, 256)), QUANT_SCHEMES["block128"])
    assert not x.q.any()
    assert np.all(np.asarray(x.scale) == np.float32(1e-8) / 128)


@pytest.mark.parametrize("scheme", ["block128", "channel"])
def test_prepared_input_and_fused_forms_equal_the_plain_ones(scheme):
    quantized, _ = layer(scheme, 256, 256)
    x, gain, shift = normal(1, 2, 70, 256), 1 + normal(2, 2, 1, 256), normal(3, 2, 1, 256)
    np.testing.assert_array_equal(quantized(quantized.prepare(x)), quantized(x))
    normed = modulated_norm(x, gain, shift, eps=1e-6)
    prepared = quantized.prepare_normed(x, gain, shift, eps=1e-6)
    assert relative_error(quantized(prepared), quantized(normed)) < 1e-3
    assert relative_error(quantized(quantized.gelu(x)), quantized(jax.nn.gelu(quantized(x)))) < 1e-3


def test_features_that_are_no_multiple_of_128_are_refused():
    with pytest.raises(UserError, match="multiple of 128, not 200"):
        int8.quantize(jnp.zeros((4, 200)), QuantConfig())


def test_unknown_scheme_is_refused():
    with pytest.raises(UserError, match="quant_scheme='int4' is unknown"):
        int8.quant_scheme("int4")


@pytest.mark.parametrize(
    ("capability", "dtype", "scheme", "sizes", "expected"),
    [
        (None, jnp.bfloat16, "block128", (128, 256, 1536), "reference"),
        ((7, 5), jnp.bfloat16, "block128", (128, 256, 1536), "reference"),
        ((8, 0), jnp.bfloat16, "block128", (128, 256, 1536), "triton"),
        ((8, 9), jnp.bfloat16, "block128", (128, 256, 1536), "triton"),
        ((12, 0), jnp.bfloat16, "block128", (128, 256, 1536), "triton"),
        ((9, 0), jnp.bfloat16, "block128", (75600, 5120, 13824), "mosaic"),
        ((9, 0), jnp.bfloat16, "block128", (257, 5120, 5120), "triton"),
        ((9, 0), jnp.bfloat16, "block128", (128, 264, 1536), "triton"),
        ((9, 0), jnp.bfloat16, "block128", (128, 256, 512), "triton"),  # the small model's
        ((9, 0), jnp.bfloat16, "block128_rows", (75600, 5120, 13824), "triton"),
        ((9, 0), jnp.bfloat16, "channel", (75600, 5120, 13824), "mosaic"),
        ((9, 0), jnp.float32, "block128", (128, 256, 1536), "reference"),
    ],
)
def test_choice_of_implementation(monkeypatch, capability, dtype, scheme, sizes, expected):
    monkeypatch.setattr(dispatch, "compute_capability", lambda: capability)
    assert int8.api.choose_matmul(None, dtype, QUANT_SCHEMES[scheme], sizes) == expected
    for name in ("mosaic", "triton"):
        if expected in ("mosaic", name):  # where the Hopper kernel runs, Triton does, too
            assert int8.api.choose_matmul(name, dtype, QUANT_SCHEMES[scheme], sizes) == name
        else:
            with pytest.raises(UserError, match=f"implementation='{name}' of the int8 matmul takes"):
                int8.api.choose_matmul(name, dtype, QUANT_SCHEMES[scheme], sizes)
