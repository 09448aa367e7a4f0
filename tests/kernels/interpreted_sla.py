"""The Triton kernels of sparse-linear attention in the interpreter, against the reference.

Collected by test_sla_triton.py in a process of its own, with TRITON_INTERPRET=1.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import triton
from jax import lax

from tests.golden_io import GOLDEN, load
from tests.kernels import interpreter
from tests.marks import slow
from turbojax.kernels import sla, triton_call
from turbojax.kernels.sizes import cdiv
from turbojax.kernels.sla import fused, triton_backward, triton_forward, triton_summary

BF16 = jnp.bfloat16


@pytest.fixture(autouse=True)
def launcher(monkeypatch):
    monkeypatch.setattr(triton_call, "override", interpreter.launch)


def arrays(length: int, *, batch: int = 1, heads: int = 2, dim: int = 64) -> list[jax.Array]:
    """q, k, v, proj_weight, proj_bias; k with an offset, as trained networks have one."""
    keys = jax.random.split(jax.random.key(length + dim), 5)
    shapes = [(batch, length, heads, dim)] * 3 + [(dim, dim), (dim,)]
    q, k, v, weight, bias = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    return [q.astype(BF16), (k + 0.5).astype(BF16), v.astype(BF16), weight * 0.2, bias]


def errors(got, expected) -> tuple[float, float]:
    """Root mean square and maximum of the difference."""
    difference = np.asarray(got, np.float32) - np.asarray(expected, np.float32)
    return float(np.sqrt(np.mean(difference**2))), float(np.abs(difference).max())


def assert_gradients_close(got, expected):
    """Relative root mean square, and the largest difference beside the largest value, of each gradient."""
    for name, g, e in zip(("q", "k", "v", "proj_weight", "proj_bias"), got, expected, strict=True):
        rms, largest = errors(g, e)
        assert rms < 1e-2 * float(np.sqrt(np.mean(np.square(e)))), name
        assert largest < 3e-2 * float(np.abs(e).max()), name


def as_float32(values):
    return [value.astype(jnp.float32) for value in values]


@pytest.mark.parametrize(("length", "block", "dim"), [slow(64, 64, 64), (150, 64, 128), (130, 128, 64)])
def test_block_means_and_key_summary(length, block, dim):
    _, k, v, _, _ = arrays(length, batch=2, heads=3, dim=dim)
    means, state, normalizer, norm = triton_summary.key_summary(k, v, block, norms=True)
    expected = sla.reference.block_means(k, block)
    np.testing.assert_allclose(means, expected, atol=1e-6)
    again, norms = triton_summary.block_means(k, block)
    np.testing.assert_allclose(again, expected, atol=1e-6)
    of_rows = jnp.linalg.norm(k.astype(jnp.float32), axis=-1).transpose(0, 2, 1)
    np.testing.assert_allclose(norm, of_rows.max(axis=2), rtol=1e-6)
    padded = jnp.pad(of_rows, ((0, 0), (0, 0), (0, -length % block)))
    np.testing.assert_allclose(norms, padded.reshape(*norms.shape, block).max(axis=3), rtol=1e-6)
    phi = jax.nn.softmax(k.astype(jnp.float32), axis=-1)
    np.testing.assert_allclose(normalizer, phi.sum(axis=1), rtol=2e-3)  # phi is bfloat16 in both sums
    exact = jnp.einsum("bsnh,bsnd->bnhd", phi, v.astype(jnp.float32))
    assert errors(state, exact)[0] < 3e-3 * float(jnp.sqrt(jnp.mean(exact**2)))


def test_key_summary_in_shares(monkeypatch):
    """The sequence in several parts, the last one short, is the sequence in one."""
    _, k, v, _, _ = arrays(300, dim=64)
    whole = triton_summary.key_summary(k, v, 64)
    monkeypatch.setattr(triton_summary, "SUMMARY_PROGRAMS", 4)
    for got, expected in zip(triton_summary.key_summary(k, v, 64)[:3], whole[:3], strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("blocks", "count"), [(1, 1), (2, 1), (5, 5), (37, 3), (300, 30)])
def test_choose_blocks_is_top_k(blocks, count):
    scores = jax.random.normal(jax.random.key(blocks), (2, 1, 3, blocks))
    coarse = jnp.round(scores * 2) / 2 * jnp.where(scores > 1, 0.0, 1.0)  # many ties, and zeros of either sign
    for s in (scores, coarse, -jnp.abs(scores), jnp.zeros_like(scores), jnp.full_like(scores, -jnp.inf)):
        expected = jnp.sort(lax.top_k(s, count)[1], axis=-1)
        np.testing.assert_array_equal(triton_summary.choose_blocks(s, count), expected)


def run_fused(inputs, topk: float, block_q: int, block_k: int) -> jax.Array:
    length, dim = inputs[0].shape[1], inputs[0].shape[3]
    count = sla.num_selected(topk, cdiv(length, block_k))
    return fused.attention(*inputs, fused.settings("triton", count, block_q=block_q, block_k=block_k, dim=dim))


@pytest.mark.parametrize(
    ("length", "batch", "dim", "topk", "block_q", "block_k"),
    [
        (300, 2, 64, 0.4, 128, 64),
        slow(300, 1, 128, 0.7, 128, 64),
        (257, 1, 64, 1e-6, 64, 64),
        (256, 1, 64, 1.0, 64, 128),
        slow(330, 1, 64, 1.0, 64, 128),
        (5, 1, 64, 1.0, 128, 64),
    ],
)
def test_attention(length, batch, dim, topk, block_q, block_k):
    """Against float32 on the same bfloat16 inputs, within the golden files' measure for a bfloat16 kernel."""
    inputs = arrays(length, batch=batch, dim=dim)
    reference = jax.jit(functools.partial(sla.sparse_linear_attention, topk=topk, block_q=block_q, block_k=block_k))
    rms, largest = errors(run_fused(inputs, topk, block_q, block_k), reference(*as_float32(inputs)))
    assert rms < 4e-3
    assert largest < 3e-2


@pytest.mark.parametrize(("length", "count", "block_k"), [(300, 3, 64), (256, 4, 64), (330, 2, 128), (40, 1, 64)])
def test_values_a_step_late_change_nothing(length, count, block_k):
    inputs = arrays(length, dim=64)
    settings = fused.settings("triton", count, block_q=64, block_k=block_k, dim=64)
    assert not settings.tiles.deferred_pv
    deferred = dataclasses.replace(settings, tiles=settings.tiles._replace(deferred_pv=True))
    np.testing.assert_array_equal(fused.attention(*inputs, deferred), fused.attention(*inputs, settings))


@pytest.mark.parametrize("deferred_pv", [False, slow(True)])
@pytest.mark.parametrize(("length", "count", "block_k"), [(300, 3, 64), (256, 4, 64), (330, 2, 128), (40, 1, 64)])
def test_bounded_scores_need_no_maximum(monkeypatch, length, count, block_k, deferred_pv):
    inputs = arrays(length, dim=64)
    settings = fused.settings("triton", count, block_q=64, block_k=block_k, dim=64)
    settings = dataclasses.replace(settings, tiles=settings.tiles._replace(deferred_pv=deferred_pv))
    got, (*_, lse) = jax.block_until_ready(fused.forward(*inputs, settings))  # kernels read BOUND when they run
    monkeypatch.setattr(triton_forward, "BOUND", triton.language.constexpr(0.0))
    expected, (*_, expected_lse) = jax.block_until_ready(fused.forward(*inputs, settings))
    assert (got != expected).any() or length < block_k  # no whole block, no loop
    assert errors(got, expected)[1] < 2e-2
    np.testing.assert_allclose(lse, expected_lse, atol=1e-4)


def test_large_scores():
    """Of 9 times normal q and k, hundreds from zero: without a maximum their weights would be infinite."""
    q, k, *others = arrays(300, dim=64)
    inputs = [(q * 9).astype(BF16), (k * 9).astype(BF16), *others]
    rms, _ = errors(
        run_fused(inputs, 0.6, 64, 64), sla.sparse_linear_attention(*as_float32(inputs), topk=0.6, block_q=64)
    )
    assert rms < 4e-3


@pytest.mark.parametrize("name", ["a", slow("b"), slow("c"), "d"])
def test_golden_files(name):
    """Numbers of the public PyTorch code in float32; inputs are rounded to bfloat16 here."""
    config, t = load(GOLDEN / "sla.safetensors")
    case = config["cases"][name]
    q, k, v = (jnp.asarray(t[f"in.{name}.{key}"]).astype(BF16) for key in "qkv")
    inputs = [q, k, v, *(jnp.asarray(t[f"w.{name}.proj_l.{key}"]) for key in ("weight", "bias"))]
    table = jnp.asarray(t[f"out.{name}.lut_sorted"])
    settings = fused.settings("triton", table.shape[-1], block_q=case["BLKQ"], block_k=case["BLKK"], dim=q.shape[-1])
    k_means = triton_summary.key_summary(k, v, case["BLKK"]).means
    np.testing.assert_array_equal(fused.block_table(q, k_means, settings)[0], table)
    out, gradient = jax.vjp(lambda *inputs: fused.attention(*inputs, settings), *inputs)
    rms, largest = errors(out, t[f"out.{name}.o"])
    assert rms < 2e-3
    assert largest < 1.3e-2
    gradients = ("dq", "dk", "dv", "dproj_weight", "dproj_bias")
    expected = [t[f"out.{name}.{gradient}"] for gradient in gradients]
    assert_gradients_close(gradient(jnp.asarray(t[f"in.{name}.do"]).astype(BF16)), expected)


@pytest.mark.parametrize(
    ("length", "batch", "dim", "topk", "block_q", "block_k"),
    [(300, 2, 64, 0.4, 128, 64), slow(200, 1, 128, 0.7, 64, 64), (200, 1, 64, 1.0, 64, 128)],
)
def test_gradients(length, batch, dim, topk, block_q, block_k):
    inputs = arrays(length, batch=batch, dim=dim)
    weight = jax.random.normal(jax.random.key(1), inputs[0].shape).astype(BF16)
    sizes = {"topk": topk, "block_q": block_q, "block_k": block_k}

    def loss(inputs, implementation):
        out = sla.sparse_linear_attention(*inputs, **sizes, implementation=implementation)
        return jnp.sum(out.astype(jnp.float32) * weight.astype(jnp.float32))

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    got = gradient(inputs, "triton")
    assert [g.dtype for g in got] == [i.dtype for i in inputs]
    assert_gradients_close(got, gradient(as_float32(inputs), "reference"))


def test_inverted_table():
    """Every pair once, by key block, query blocks in order; a key block that nobody chose has none."""
    chosen = np.random.default_rng(0).random((2, 3, 5, 9)) < 0.5
    table = np.argsort(~chosen[..., :8], axis=-1, kind="stable")[..., :3]
    queries, begins = triton_backward.invert_table(jnp.sort(jnp.asarray(table, jnp.int32), axis=-1), 9)
    for b, n in np.ndindex(2, 3):
        for j in range(9):
            expected = [i for i in range(5) if j in table[b, n, i]]
            assert queries[b, n, begins[b, n, j] : begins[b, n, j + 1]].tolist() == expected
