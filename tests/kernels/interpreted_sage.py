"""The Triton kernels of SageSLA in the interpreter, against the reference and the golden fixture.

Collected by test_sage_triton.py in a process of its own, with TRITON_INTERPRET=1.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.closeness import relative_error
from tests.golden_io import GOLDEN, load
from tests.kernels import interpreter
from tests.marks import slow
from tests.parity.sage import FORMS, as_rows, operand_order
from turbojax.errors import UserError
from turbojax.kernels import sage, sla, triton_call
from turbojax.kernels.sage import triton_quantize

BF16 = jnp.bfloat16


@pytest.fixture(autouse=True)
def launcher(monkeypatch):
    monkeypatch.setattr(triton_call, "override", interpreter.launch)


def arrays(length: int, *, batch: int = 1, heads: int = 2, dim: int = 64):
    """q, k, v in bfloat16; k with an offset, which its mean takes away."""
    keys = jax.random.split(jax.random.key(length + dim), 4)
    q, k, v = (jax.random.normal(key, (batch, length, heads, dim)) for key in keys[:3])
    return q.astype(BF16), (k + jax.random.normal(keys[3], (1, 1, heads, dim))).astype(BF16), v.astype(BF16)


@pytest.mark.parametrize(("block", "dim"), [(64, 128), (128, 64)])
@pytest.mark.parametrize("centred", [False, True])
def test_quantize_rows(block, dim, centred):
    x = arrays(200, batch=2, dim=dim)[1]
    mean = jnp.mean(x.astype(jnp.float32), axis=1) if centred else None
    code, scale, means = triton_quantize.quantize_rows(x, block, mean=mean, means=True)
    subtracted = x if mean is None else x.astype(jnp.float32) - mean[:, None]
    expected, expected_scale = sage.reference.quantize_rows(subtracted, block)
    np.testing.assert_array_equal(code, as_rows(expected, code.shape[1]))
    np.testing.assert_allclose(scale, expected_scale, rtol=2e-7)
    np.testing.assert_allclose(means, sla.reference.block_means(x, block), atol=1e-6)


def test_quantize_rows_beside_halves():
    """A block whose scale is 1 + 1e-7, with elements in steps of a half: one rounding too many shows. One of zeros."""
    x = (jnp.arange(64 * 64) % 509 - 254).astype(BF16).reshape(1, 64, 1, 64) / 2
    x = jnp.concatenate((x, jnp.zeros_like(x)), axis=1)
    code, scale, _ = triton_quantize.quantize_rows(x, 64)
    expected, expected_scale = sage.reference.quantize_rows(x, 64)
    np.testing.assert_array_equal(code, as_rows(expected, 128))
    np.testing.assert_allclose(scale, expected_scale, rtol=2e-7)


@pytest.mark.parametrize("dim", [64, 128])
def test_quantize_values(dim):
    v = arrays(300, batch=2, dim=dim)[2].at[:, :, 0, 3].set(0)
    code, scale = triton_quantize.quantize_values(v)
    expected, expected_scale = sage.reference.quantize_values(v)
    np.testing.assert_allclose(scale, expected_scale, rtol=2e-7)
    np.testing.assert_array_equal(code, operand_order(expected))


def projection(dim: int):
    return jax.random.normal(jax.random.key(7), (dim, dim)) * dim**-0.5, jnp.full(dim, 0.1)


def attend(*inputs, **options):
    """Compiled as a whole, which takes less time than piece by piece."""
    return jax.jit(functools.partial(sage.sage_sparse_linear_attention, **options))(*inputs)


def both(q, k, v, **options):
    weights = projection(q.shape[-1])
    return [attend(q, k, v, *weights, implementation=name, **options) for name in ("triton", "reference")]


@pytest.mark.parametrize("values", ["float8", slow("float8_values"), "exact"])
@pytest.mark.parametrize(("block_q", "block_k"), sla.api.BLOCKS[::2])
def test_forward(block_q, block_k, values):
    """Of two samples, with partial blocks. The reference rounds each branch to bfloat16, the kernel P of two forms."""
    options = {"topk": 0.7, "block_q": block_q, "block_k": block_k, "values": values, "overwrite_q": True}
    got, expected = both(*arrays(200, batch=2, heads=1), **options)
    assert got.dtype == BF16
    assert relative_error(got, expected) < 6e-3
    assert np.abs(np.asarray(got, np.float32) - np.asarray(expected, np.float32)).max() < 4e-2


@pytest.mark.parametrize("values", ["float8", "exact"])
@pytest.mark.parametrize("length", [200, slow(256)])
def test_all_blocks(length, values):
    got, expected = both(*arrays(length, heads=1, dim=128), topk=1.0, values=values)
    assert relative_error(got, expected) < 6e-3


@pytest.mark.parametrize("values", ["float8", "exact"])
@pytest.mark.parametrize("length", [1, 130])
def test_one_block_a_query_block(length, values):
    got, expected = both(*arrays(length, heads=1), topk=1e-6, values=values)
    assert relative_error(got, expected) < 6e-3


@pytest.mark.parametrize("values", ["float8", "exact"])
def test_what_pads_the_partial_block_counts_nowhere(values):
    """Neither beside scores that are all zero nor above those of a query that are all far below zero."""
    _, k, v = arrays(168, heads=1)
    k += jnp.where(jnp.arange(168) < 128, -2, 2).astype(BF16)[None, :, None, None]
    alone = jnp.ones_like(k).at[:, 3::64].set(-1)  # of each block one query that cares least for the block chosen
    for q in (jnp.full_like(k, 1e-9), alone):  # the former's codes are zeros
        got, expected = both(q, k, v, topk=1e-6, values=values)
        assert relative_error(got, expected) < 6e-3
        assert relative_error(got[:, 3::64], expected[:, 3::64]) < 1e-2


def test_nan_in_gives_nan_out():
    q, k, v = arrays(130)
    for bad in ((q.at[0, 3, 0, 5].set(jnp.nan), k, v), (q, k.at[0, 3, 0, 5].set(jnp.nan), v)):
        out = attend(*bad, *projection(64), topk=1.0, implementation="triton")
        assert bool(jnp.isnan(out[0, 3, 0]).all())
        assert not bool(jnp.isnan(out[0, :, 1]).any())


def test_nan_of_a_sample_stays_there():
    """Behind the last key of a sample lie the next one's values."""
    q, k, v = arrays(1, batch=2, heads=1)
    out = attend(q, k, v.at[1].set(jnp.nan), *projection(64), topk=1.0, values="exact", implementation="triton")
    np.testing.assert_array_equal(jnp.isnan(out).all(axis=(1, 2, 3)), [False, True])
    assert not bool(jnp.isnan(out[0]).any())


def test_differentiating_says_what_to_do():
    q, k, v = arrays(64)
    with pytest.raises(UserError, match='attention_type="sla"'):
        jax.grad(
            lambda q: (
                sage.sage_sparse_linear_attention(q, k, v, *projection(64), topk=1.0, implementation="triton")
                .astype(jnp.float32)
                .sum()
            )
        )(q)


CONFIG, FIXTURE = load(GOLDEN / "sagesla.safetensors")


@pytest.mark.parametrize("blocks", ["q128_k64", "q64_k128"])
@pytest.mark.parametrize("name", ["a", slow("b")])
def test_golden(name, blocks):
    """Codes as recorded; the sparse branch as near to what is recorded as bfloat16 is, to 5 %."""
    topk = CONFIG["cases"][name][blocks]["topk"]
    block_q, block_k = map(int, re.findall(r"\d+", blocks))
    q, k, v = (jnp.asarray(FIXTURE[f"in.{name}.{key}"]).astype(BF16) for key in ("q", "k", "v"))
    recorded = {
        key: FIXTURE[f"out.{name}.{blocks}.{key}"] for key in ("q_int8", "q_scale", "k_int8", "k_scale", *FORMS)
    }
    k_mean = jnp.mean(k.astype(jnp.float32), axis=1)
    for key, x, block, mean in (("q", q, block_q, None), ("k", k, block_k, k_mean)):
        code, scale, _ = triton_quantize.quantize_rows(x, block, mean=mean)
        np.testing.assert_array_equal(code[:, : x.shape[1]], recorded[f"{key}_int8"])
        np.testing.assert_allclose(scale, recorded[f"{key}_scale"], atol=5e-8)
    no_linear_branch = jnp.zeros((q.shape[-1], q.shape[-1])), jnp.zeros(q.shape[-1])
    options = {"topk": topk, "block_q": block_q, "block_k": block_k, "implementation": "triton"}
    for form, values in FORMS.items():
        expected = recorded[form]
        got = attend(q, k, v, *no_linear_branch, values=values, **options)
        rounding = np.linalg.norm(expected - expected.astype(BF16).astype(np.float32))
        assert np.linalg.norm(np.asarray(got, np.float32) - expected) < 1.05 * rounding
