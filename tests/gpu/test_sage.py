"""SageSLA's kernels on a GPU, against the reference."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.parity.sage import operand_order
from turbojax.kernels import sage, sla
from turbojax.kernels.dispatch import compute_capability

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")

BF16 = jnp.bfloat16
SHAPES = [(2, 300, 2, 64), (1, 1, 1, 128), (2, 3120, 3, 128), (1, 32760, 2, 128)]
VALUES = ["exact", "float8_values", "float8"]


def arrays(shape):
    keys = jax.random.split(jax.random.key(sum(shape)), 4)
    q, k, v = (jax.random.normal(key, shape) for key in keys[:3])
    weight = jax.random.normal(keys[3], (shape[-1], shape[-1])) * shape[-1] ** -0.5
    return [q.astype(BF16), (k + 0.5).astype(BF16), v.astype(BF16), weight, jnp.full(shape[-1], 0.1)]


def centre(x, mean):
    return x.astype(jnp.float32) - (0.0 if mean is None else mean[:, None])


def on_cpu(function, *inputs):
    """There XLA rounds quotients as the kernels do but for one code in a million, where a difference and a product may
    be contracted. On a GPU quotients are off by up to two units in the last place, and one code in 100,000 with them.
    """
    cpu = jax.devices("cpu")[0]
    return jax.tree.map(np.asarray, jax.jit(function)(*jax.device_put(inputs, cpu)))


def takes(values: str) -> bool:
    return values == "exact" or compute_capability() >= (8, 9)


def test_xla_keeps_the_rounding():
    x = np.linspace(-450, 450, 4000, dtype=np.float32)
    rounded = jax.jit(lambda x: sage.reference.to_e4m3(x).astype(jnp.float32))(x)
    np.testing.assert_array_equal(rounded, x.clip(-448, 448).astype(jnp.float8_e4m3fn).astype(np.float32))


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("shape", SHAPES)
def test_quantization_is_the_reference_s(shape, block):
    from turbojax.kernels.sage import triton_quantize

    x = arrays(shape)[1]
    mean = jnp.mean(x.astype(jnp.float32), axis=1)
    for centred, means in ((None, True), (mean, False)):
        code, scale, block_means = triton_quantize.quantize_rows(x, block, mean=centred, means=means)
        expected, expected_scale = on_cpu(
            lambda x, mean: sage.reference.quantize_rows(centre(x, mean), block), x, centred
        )
        rows = np.moveaxis(expected, 1, 3).reshape(code.shape)
        steps = np.abs(np.asarray(code[:, : shape[1]], np.int32) - rows[:, : shape[1]])
        assert steps.max() <= 1
        assert steps.mean() <= 1e-5
        np.testing.assert_allclose(scale, expected_scale, rtol=1e-6)
        if means:
            np.testing.assert_allclose(block_means, sla.reference.block_means(x, block), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_values_are_the_reference_s(shape):
    if not takes("float8"):
        pytest.skip("no float8 here")
    from turbojax.kernels.sage import triton_quantize

    v = arrays(shape)[2]
    code, scale = triton_quantize.quantize_values(v)
    expected, expected_scale = on_cpu(sage.reference.quantize_values, v)
    np.testing.assert_allclose(scale, expected_scale, rtol=1e-6)
    np.testing.assert_array_equal(np.asarray(code), operand_order(jnp.asarray(expected)))


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize(("shape", "blocks"), [*zip(SHAPES, [(128, 64), (64, 64), (64, 128), (64, 128)], strict=True)])
def test_forward(shape, blocks, values):
    """Near-equal block scores may be chosen differently: a few rows may be anything."""
    if not takes(values):
        pytest.skip("no float8 here")
    inputs = arrays(shape)
    options = {"topk": 0.2, "block_q": blocks[0], "block_k": blocks[1], "values": values}
    got = sage.sage_sparse_linear_attention(*inputs, implementation="triton", **options)
    with jax.default_matmul_precision("highest"):
        expected = sage.sage_sparse_linear_attention(*inputs, implementation="reference", **options)
    difference = np.abs(np.asarray(got, np.float32) - np.asarray(expected, np.float32))
    assert np.isfinite(difference).all()
    assert (difference <= 0.03).mean() > 0.998
    assert np.sqrt((difference**2).mean()) < 1e-2


@pytest.mark.parametrize(("warps", "stages"), [(4, 2), (4, 3), (4, 4), (8, 2), (8, 3)])
@pytest.mark.parametrize("values", VALUES)
def test_results_are_the_same_from_run_to_run_and_with_other_tiles(values, warps, stages):
    if not takes(values):
        pytest.skip("no float8 here")
    from turbojax.kernels.sage import fused, triton_forward

    inputs = arrays((1, 4000, 2, 128))
    settings = fused.settings(6, block_q=64, block_k=128, values=values)
    other = dataclasses.replace(settings, tiles=triton_forward.Tiles(warps, stages))
    first, again, third = (fused.attention(*inputs, s) for s in (settings, settings, other))
    assert bool((first == again).all())
    np.testing.assert_allclose(np.asarray(third, np.float32), np.asarray(first, np.float32), atol=2e-2)
