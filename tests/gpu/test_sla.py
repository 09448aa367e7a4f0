"""The sparse-linear attention kernels on a GPU against the reference: odd lengths, gradients, the same run to run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tests.closeness import relative_error
from tests.kernels.test_sla_mosaic import operands
from turbojax.kernels import sla
from turbojax.kernels.dispatch import compute_capability

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")

BF16 = jnp.bfloat16


def arrays(length: int, *, batch: int, heads: int, dim: int) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(length), 5)
    shapes = [(batch, length, heads, dim)] * 3 + [(dim, dim), (dim,)]
    q, k, v, weight, bias = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    return [q.astype(BF16), (k + 0.5).astype(BF16), v.astype(BF16), weight * 0.2, bias]


def implementations(length: int, blocks: tuple[int, int]) -> list[str]:
    hopper = compute_capability() == (9, 0) and length % 8 == 0 and blocks[0] == 128
    return ["triton", "mosaic"] if hopper else ["triton"]


@pytest.mark.parametrize(
    ("length", "batch", "heads", "dim", "topk", "blocks"),
    [
        (5, 1, 1, 64, 1.0, (128, 64)),
        (300, 2, 3, 128, 0.4, (64, 64)),
        (300, 2, 3, 64, 0.4, (64, 128)),
        (1560, 2, 12, 128, 1.0, (128, 64)),
        (1560, 1, 2, 64, 1e-6, (128, 64)),
        (1560, 2, 2, 64, 0.3, (128, 64)),
        (32760, 1, 4, 128, 0.1, (128, 64)),
        (32760, 1, 2, 128, 0.1, (64, 64)),
        (75600, 1, 4, 128, 0.15, (128, 64)),
    ],
)
def test_attention(length, batch, heads, dim, topk, blocks):
    inputs = arrays(length, batch=batch, heads=heads, dim=dim)
    settings = {"topk": topk, "block_q": blocks[0], "block_k": blocks[1]}
    run = jax.jit(functools.partial(sla.sparse_linear_attention, **settings), static_argnames="implementation")
    with jax.default_matmul_precision("highest"):  # the same scores, and so the same block map
        expected = run(*inputs, implementation="reference")
    for implementation in implementations(length, blocks):
        got = run(*inputs, implementation=implementation)
        assert bool(jnp.isfinite(got).all())
        assert bool((got == run(*inputs, implementation=implementation)).all())
        assert relative_error(got, expected) < 1e-2


@pytest.mark.skipif(compute_capability() != (9, 0), reason="needs a Hopper GPU")
@pytest.mark.parametrize(
    ("length", "dim", "block_k", "count"),
    [
        *((1000, 128, 64, count) for count in range(1, 8)),
        *((1000, 64, 64, count) for count in (1, 3, 5)),
        (1024, 128, 64, 6),
        (1024, 128, 128, 3),
        (1000, 128, 128, 3),
        *((1064, dim, 128, count) for dim in (64, 128) for count in (1, 9)),  # the last block's second half has no keys
    ],
)
def test_hopper_kernel(length, dim, block_k, count):
    """Two or three tiles a program; last steps whole and shorter, ended by the last key and not."""
    from turbojax.kernels.sla import mosaic_forward
    from turbojax.kernels.sla.reference import SparseInputs

    with jax.default_matmul_precision("highest"):
        inputs, expected = operands(length, 40, dim, block_k, count)
    run = jax.jit(functools.partial(mosaic_forward.sparse_forward, block_k=block_k))
    bounds = jnp.full(inputs[3].shape[:3], 30.0).at[:, :, 1].set(90.0)  # one of a head's tiles looks for a maximum
    got = run(SparseInputs(*inputs, bounds))
    assert bool((got == run(SparseInputs(*inputs, bounds))).all())
    assert relative_error(got, expected) < 1e-2


@pytest.mark.parametrize("size", [1.0, 9.0])
def test_large_scores(size):
    """Of 9 times normal q and k, hundreds from zero: without a maximum their weights would be infinite."""
    q, k, *others = arrays(1560, batch=2, heads=3, dim=128)
    inputs = [(q * size).astype(BF16), (k * size).astype(BF16), *others]
    run = jax.jit(functools.partial(sla.sparse_linear_attention, topk=0.3), static_argnames="implementation")
    with jax.default_matmul_precision("highest"):
        expected = run(*inputs, implementation="reference")
    for implementation in implementations(1560, (128, 64)):
        assert relative_error(run(*inputs, implementation=implementation), expected) < 1e-2


@pytest.mark.parametrize(("rows", "blocks", "count"), [(100, 5, 5), (1000, 1182, 118), (64, 4096, 600)])
def test_choose_blocks_is_top_k(rows, blocks, count):
    from turbojax.kernels.sla import triton_summary

    scores = jax.random.normal(jax.random.key(rows), (1, 1, rows, blocks))
    for s in (scores, jnp.round(scores * 4) / 4, jnp.zeros_like(scores)):
        expected = jnp.sort(lax.top_k(s, count)[1], axis=-1)
        np.testing.assert_array_equal(triton_summary.choose_blocks(s, count), expected)


@pytest.mark.parametrize(
    ("length", "dim", "topk", "blocks"),
    [(300, 128, 0.4, (64, 64)), (300, 128, 0.4, (64, 128)), (1560, 64, 1.0, (128, 64)), (4200, 128, 0.1, (128, 64))],
)
def test_gradients(length, dim, topk, blocks):
    inputs = arrays(length, batch=2, heads=3, dim=dim)
    weight = jax.random.normal(jax.random.key(1), inputs[0].shape)

    @functools.partial(jax.jit, static_argnames="implementation")
    @functools.partial(jax.grad, argnums=(0, 1, 2, 3, 4))
    def gradient(*inputs, implementation):
        options = {"topk": topk, "block_q": blocks[0], "block_k": blocks[1], "implementation": implementation}
        return jnp.sum(sla.sparse_linear_attention(*inputs, **options).astype(jnp.float32) * weight)

    with jax.default_matmul_precision("highest"):
        got = gradient(*inputs, implementation="triton")
        expected = gradient(*(x.astype(jnp.float32) for x in inputs), implementation="reference")
        again = gradient(*inputs, implementation="triton")
    for g, e, a in zip(got, expected, again, strict=True):
        assert relative_error(g, e) < 1e-2
        assert bool((g == a).all())
