"""Triton kernels of sparse-linear attention's statistics of blocks and heads; equations are in `reference`.

Block means and the block map that comes of them, the state of the linear branch, and norms that bound the scores. B
batch, L tokens, N heads, H head dim (64 or 128); q, k, v bfloat16 `[B, L, N, H]`, read in place. Nothing is summed by
atomics: results are the same from run to run.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from turbojax.kernels.sizes import cdiv, next_power_of_2
from turbojax.kernels.sla import reference
from turbojax.kernels.triton_call import output, sizes_of, triton_call

LOG2_E = tl.constexpr(reference.LOG2_E)
SUMMARY_PROGRAMS = 528  # about: four for each multiprocessor of an H100
KEY_ROWS = 32  # keys of a step of `key_summary`: the most that leave a multiprocessor two programs, without norms


@triton.jit
def sum_rows(x, ROWS: tl.constexpr):
    """Sums over rows of a bfloat16 tile [ROWS, H], float32 [H]; as a product it takes fewer registers and barriers."""
    ones = tl.full((ROWS, 16), 1.0, tl.float32).to(tl.bfloat16)
    return tl.max(tl.dot(x.T, ones), axis=1)


@triton.jit
def square_norms(x):
    """Squared norms of the rows of a float32 tile."""
    return tl.sum(x * x, axis=1)


@triton.jit
def block_means_kernel(x, means, norms, L: tl.constexpr, N: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr):
    """One program BLOCK rows of a head: their mean and their largest norm; heads run fastest, as they lie in memory."""
    n, i, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows, columns = i * BLOCK + tl.arange(0, BLOCK), tl.arange(0, H)
    offsets = ((b.to(tl.int64) * L + rows) * N + n)[:, None] * H + columns[None, :]
    values = tl.load(x + offsets, mask=(rows < L)[:, None], other=0.0)
    mean = sum_rows(values, BLOCK) / tl.minimum(BLOCK, L - i * BLOCK).to(tl.float32)
    place = (b * N + n) * tl.cdiv(L, BLOCK) + i
    tl.store(means + place * H + columns, mean)
    tl.store(norms + place, tl.sqrt(tl.max(square_norms(values.to(tl.float32)), axis=0)))


@triton.jit
def key_summary_kernel(k, v, means, states, normalizers, norms,
                       L: tl.constexpr, N: tl.constexpr, H: tl.constexpr, ROWS: tl.constexpr,
                       GROUPS: tl.constexpr, SPLITS: tl.constexpr, NORMS: tl.constexpr):  # fmt: skip
    """One program GROUPS groups of ROWS keys of a head: their means, and phi(k)^T v and the sum of phi(k) over all.

    NORMS: also the largest norm of a key.
    """
    n, split, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    groups: tl.constexpr = (L + ROWS - 1) // ROWS
    columns, in_group = tl.arange(0, H), tl.arange(0, ROWS)
    head = b * N + n
    offsets = in_group[:, None] * (N * H) + columns[None, :]
    k += (b.to(tl.int64) * L * N + n) * H
    v += (b.to(tl.int64) * L * N + n) * H
    state = tl.zeros((H, H), tl.float32)
    normalizer = tl.zeros((H, 16), tl.float32)  # of equal columns, as in `sum_rows`
    squares = tl.zeros((ROWS,), tl.float32)
    ones = tl.full((ROWS, 16), 1.0, tl.float32).to(tl.bfloat16)
    for j in range(split * GROUPS, tl.minimum((split + 1) * GROUPS, groups)):
        first = j * (ROWS * N * H)
        left = L - j * ROWS
        inside = in_group < left
        keys = tl.load(k + first + offsets, mask=inside[:, None], other=0.0)
        values = tl.load(v + first + offsets, mask=inside[:, None], other=0.0)
        x = keys.to(tl.float32)
        e = tl.exp2(x * LOG2_E - (tl.max(x, axis=1) * LOG2_E)[:, None])
        phi = (e * tl.where(inside, 1.0 / tl.sum(e, axis=1), 0.0)[:, None]).to(tl.bfloat16)
        mean = sum_rows(keys, ROWS) / tl.minimum(ROWS, left).to(tl.float32)
        tl.store(means + (head * groups + j) * H + columns, mean)
        if NORMS:
            squares = tl.maximum(squares, square_norms(x))
        state = tl.dot(phi.T, values, state)
        normalizer = tl.dot(phi.T, ones, normalizer)
    part = head * SPLITS + split
    tl.store(states + part.to(tl.int64) * H * H + columns[:, None] * H + columns[None, :], state)
    tl.store(normalizers + part * H + columns, tl.max(normalizer, axis=1))
    if NORMS:
        tl.store(norms + part, tl.sqrt(tl.max(squares, axis=0)))


@triton.jit
def choose_blocks_kernel(scores, table, BLOCKS: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr):
    """One program a row: the places of its COUNT largest scores, ascending; of equal ones the first."""
    row = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, WIDTH)
    inside = places < BLOCKS
    bits = tl.load(scores + row * BLOCKS + places, mask=inside, other=0.0).to(tl.int32, bitcast=True)
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats
    smallest: tl.constexpr = -0x80000000
    order = tl.where(inside, order, smallest)
    # Becomes the largest that COUNT scores reach, bit by bit, until just so many do.
    threshold = tl.full((), smallest, tl.int32)
    reached, bit = tl.full((), BLOCKS, tl.int32), tl.full((), 31, tl.int32)
    while (reached != COUNT) & (bit >= 0):
        higher = threshold ^ (tl.full((), 1, tl.int32) << bit)
        count = tl.sum((order >= higher).to(tl.int32), axis=0)
        enough = count >= COUNT
        threshold = tl.where(enough, higher, threshold)
        reached = tl.where(enough, count, reached)
        bit -= 1
    above = (order > threshold).to(tl.int32)
    equal = (inside & (order == threshold)).to(tl.int32)
    wanted = COUNT - tl.sum(above, axis=0)
    chosen = above + equal * (tl.cumsum(equal, axis=0) <= wanted).to(tl.int32)
    tl.store(table + row * COUNT + tl.cumsum(chosen, axis=0) - 1, places, mask=chosen > 0)


def block_means(x: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """Launches `reference.block_means`: x `[B, L, N, H]` to float32 `[B, N, ceil(L / block), H]`.

    Also the largest norm of a row of each block, float32 `[B, N, ceil(L / block)]`.
    """
    batch, length, heads, dim = x.shape
    blocks = cdiv(length, block)
    out_shape = output(jnp.float32, batch, heads, blocks, dim), output(jnp.float32, batch, heads, blocks)
    grid = heads, blocks, batch
    means, largest = triton_call(
        block_means_kernel, x, out_shape=out_shape, grid=grid, num_warps=4, BLOCK=block, **sizes_of(x)
    )
    return means, largest


def split_groups(length: int, heads: int, rows: int) -> tuple[int, int]:
    """Splits a head's groups of `rows` rows among programs: groups a program, and programs."""
    groups = cdiv(length, rows)
    a_program = cdiv(groups, max(1, SUMMARY_PROGRAMS // heads))
    return a_program, cdiv(groups, a_program)


def launch_split(
    kernel: Any,
    x: jax.Array,
    *arrays: jax.Array,
    out_shape: Sequence[jax.ShapeDtypeStruct],
    rows: int,
    stages: int,
    partial_sums: bool = False,
    **constants: Any,
) -> tuple[jax.Array, ...]:
    """Launches a kernel over groups of `rows` rows of x `[B, L, N, H]`; partial_sums: each program has its own sums."""
    batch, length, heads, _ = x.shape
    a_program, splits = split_groups(length, batch * heads, rows)
    if partial_sums:
        constants["SPLITS"] = splits
    return triton_call(
        kernel,
        x,
        *arrays,
        out_shape=out_shape,
        grid=(heads, splits, batch),
        num_warps=8,
        num_stages=stages,
        ROWS=rows,
        GROUPS=a_program,
        **sizes_of(x),
        **constants,
    )


class KeySummary(NamedTuple):
    """Statistics of k and v for the block map and the linear branch, float32.

    means: of blocks of k `[B, N, ceil(L / block), H]`. state: phi(k)^T v `[B, N, H, H]`. normalizer: the sum of phi(k)
    `[B, N, H]`. norm: the largest of a key `[B, N]`; if not requested `[1, 1]` and undefined.
    """

    means: jax.Array
    state: jax.Array
    normalizer: jax.Array
    norm: jax.Array


def key_summary(k: jax.Array, v: jax.Array, block: int, *, norms: bool = False) -> KeySummary:
    """Reads k and v `[B, L, N, H]` once."""
    batch, length, heads, dim = k.shape
    groups = cdiv(length, KEY_ROWS)
    _, splits = split_groups(length, batch * heads, KEY_ROWS)
    means, states, normalizers, largest = launch_split(
        key_summary_kernel,
        *(k, v),
        out_shape=(
            output(jnp.float32, batch, heads, groups, dim),
            output(jnp.float32, batch, heads, splits, dim, dim),
            output(jnp.float32, batch, heads, splits, dim),
            output(jnp.float32, *((batch, heads, splits) if norms else (1, 1, 1))),
        ),
        rows=KEY_ROWS,
        stages=3,
        partial_sums=True,
        NORMS=norms,
    )
    means = merge_means(means, length, block)
    return KeySummary(means, states.sum(axis=2), normalizers.sum(axis=2), largest.max(axis=2))


def block_rows(length: int, block: int) -> jax.Array:
    """Rows that each block has, float32 `[ceil(length / block)]`."""
    return jnp.minimum(block, length - block * jnp.arange(cdiv(length, block))).astype(jnp.float32)


def mean_of_means(means: jax.Array, length: int, block: int) -> jax.Array:
    """The mean `[B, N, H]` of all `length` rows, from those of their blocks `[B, N, blocks, H]`."""
    return jnp.sum(means * (block_rows(length, block) / length)[None, None, :, None], axis=2)


def merge_means(means: jax.Array, length: int, block: int) -> jax.Array:
    """Means of groups of KEY_ROWS rows, `[B, N, groups, H]`, to those of blocks of `block` rows."""
    sums = means * block_rows(length, KEY_ROWS)[None, None, :, None]
    together = block // KEY_ROWS
    sums = jnp.pad(sums, ((0, 0), (0, 0), (0, -means.shape[2] % together), (0, 0)))
    blocks = sums.reshape(*means.shape[:2], -1, together, means.shape[3]).sum(axis=3)
    return blocks / block_rows(length, block)[None, None, :, None]


def choose_blocks(scores: jax.Array, count: int) -> jax.Array:
    """Places of the `count` largest scores of each row, ascending: float32 `[..., blocks]` to int32 `[..., count]`.

    The same as sorted `lax.top_k`, which takes the first of equal scores; up to 4096 blocks.
    """
    *leading, blocks = scores.shape
    width = next_power_of_2(blocks)
    (table,) = triton_call(
        choose_blocks_kernel,
        scores,
        out_shape=(output(jnp.int32, *leading, count),),
        grid=(math.prod(leading),),
        num_warps=max(1, width // 2048),  # one warp needs no barriers; more scores than that spill
        BLOCKS=blocks,
        COUNT=count,
        WIDTH=width,
    )
    return table
