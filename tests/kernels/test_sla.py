"""Sparse-linear attention and its Sage form: odd lengths, extremes of topk, and how near the forms are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.closeness import relative_error
from turbojax.errors import UserError
from turbojax.kernels import sage, sla, triton_call
from turbojax.kernels.attention import attention_reference


def arrays(length: int, *, batch: int = 2, heads: int = 2, dim: int = 64, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(length), 3)
    return [jax.random.normal(key, (batch, length, heads, dim), jnp.float32).astype(dtype) for key in keys]


def projection(dim: int = 64):
    return jnp.eye(dim) * 0.5, jnp.full(dim, 0.1)


FORMS = {
    "sla": (sla.sparse_linear_attention, {}),
    "sagesla": (sage.sage_sparse_linear_attention, {}),
    "sagesla_exact": (sage.sage_sparse_linear_attention, {"values": "exact"}),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("topk", [1e-6, 0.3, 1.0])
@pytest.mark.parametrize("length", [1, 63, 128, 300])
def test_any_length_and_topk_is_finite(form, topk, length):
    attention, options = FORMS[form]
    out = attention(*arrays(length), *projection(), topk=topk, **options)
    assert out.shape == (2, length, 2, 64)
    assert bool(jnp.isfinite(out).all())


@pytest.mark.parametrize("form", ["sla", "sagesla", "sagesla_exact"])
def test_all_blocks_equal_dense_attention_plus_the_linear_branch(form):
    q, k, v = arrays(300)
    attention, options = FORMS[form]
    expected = attention_reference(q, k, v) + sla.linear_branch(q, k, v, *projection())
    error = relative_error(attention(q, k, v, *projection(), topk=1.0, **options), expected)
    assert error < {"sla": 1e-5, "sagesla": 3e-2, "sagesla_exact": 1e-2}[form]


def test_sage_on_video_like_inputs():
    """Smooth q and k with a common offset and an outlier channel: what subtracting the mean of k is for."""
    q, k, v = arrays(512)
    drift = jnp.sin(jnp.arange(512) / 40)[None, :, None, None]
    offset = jnp.zeros(64).at[7].set(8.0)[None, None, None]
    q, k = q * 0.3 + drift, k * 0.3 + drift + offset
    sizes = {"topk": 0.5, "block_q": 64, "block_k": 128}
    exact = sla.sparse_linear_attention(q, k, v, *projection(), **sizes)
    for values, bound in (("exact", 1e-2), ("float8_values", 3e-2), ("float8", 4e-2)):
        got = sage.sage_sparse_linear_attention(q, k, v, *projection(), values=values, **sizes)
        assert relative_error(got, exact) < bound


def test_block_map_takes_no_gradient_and_the_rest_is_finite():
    q, k, v = arrays(200, dtype=jnp.float32)
    gradients = jax.grad(lambda *a: sla.sparse_linear_attention(*a, *projection(), topk=0.4).sum(), (0, 1, 2))(q, k, v)
    assert all(bool(jnp.isfinite(g).all()) and bool(g.any()) for g in gradients)
    scores = jax.grad(lambda q: sla.block_table(q, k, topk=0.4, block_q=64, block_k=64).astype(jnp.float32).sum())(q)
    assert not scores.any()


def test_a_channel_of_zeros_stays_zero():
    code, scale = sage.reference.quantize_values(jnp.zeros((1, 8, 1, 4)))
    assert not np.asarray(code, np.float32).any()
    assert bool(jnp.isfinite(scale).all())


def test_named_implementations_run_or_raise(monkeypatch):
    inputs = [*arrays(100, dtype=jnp.bfloat16), *projection()]
    expected = sla.sparse_linear_attention(*inputs, topk=0.5, implementation="reference")
    np.testing.assert_array_equal(sla.sparse_linear_attention(*inputs, topk=0.5), expected)  # no GPU here
    with pytest.raises(UserError, match=r"compute capability 8\.0"):
        sla.sparse_linear_attention(*inputs, topk=0.5, implementation="triton")
    with pytest.raises(UserError, match="unknown"):
        sla.sparse_linear_attention(*inputs, topk=0.5, implementation="cuda")
    monkeypatch.setattr(triton_call, "override", print)  # as if there were one

    def choose(shape=(1, 100, 2, 64), dtype=jnp.bfloat16, block_q=128, block_k=64, name="triton"):
        return sla.api.choose(name, jax.ShapeDtypeStruct(shape, dtype), block_q=block_q, block_k=block_k)

    assert choose() == choose(name=None) == "triton"
    assert choose(name=None, dtype=jnp.float32) == "reference"
    cases = {
        "bfloat16": {"dtype": jnp.float32},
        "head dim": {"shape": (1, 100, 2, 96)},
        "block_q": {"block_q": 32},
        "262144 tokens": {"shape": (1, 262145, 2, 64)},
    }
    for words, case in cases.items():
        with pytest.raises(UserError, match=words):
            choose(**case)
