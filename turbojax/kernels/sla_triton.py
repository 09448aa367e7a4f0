"""Triton kernels of sparse-linear attention, forward; the equations are in `turbojax.kernels.sla`.

B batch, L tokens, N heads, H head dim (64 or 128); q, k, v bfloat16 `[B, L, N, H]`, read in place. Nothing is summed by
atomics: results are the same from run to run.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from turbojax.kernels import sla, triton_call

LOG2_E = tl.constexpr(math.log2(math.e))
BOUND = tl.constexpr(sla.BOUND)
SUMMARY_PROGRAMS = 528  # about: four for each multiprocessor of an H100
KEY_ROWS = 32  # keys of a step of `key_summary`: the most that leave a multiprocessor two programs of eight warps


class Tiles(NamedTuple):
    """Rows that a step of the loop takes, warps, stages of loads in flight; late: values are added a step late."""

    step: int
    warps: int
    stages: int
    late: bool = False


def tiles(capability: tuple[int, int] | None, *, block_q: int, block_k: int, dim: int) -> Tiles:
    """The sparse loop's tiles: the most stages that fit a compute capability and spill no registers (tests/kernels)."""
    few = (capability == (8, 0) and dim == 128) or (capability == (8, 9) and (block_q, dim) == (64, 64))
    hopper = capability == (9, 0)  # its products run beside other instructions
    return Tiles(64, warps=block_q // 16, stages=4 if hopper else 2 if few else 3, late=hopper)


@triton.jit
def softmax_rows(x):
    """phi: softmax over the last axis of a float32 tile."""
    e = tl.exp(x - tl.max(x, axis=1)[:, None])
    return e / tl.sum(e, axis=1)[:, None]


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
def key_summary_kernel(
    k,
    v,
    means,
    states,
    normalizers,
    norms,
    L: tl.constexpr,
    N: tl.constexpr,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    SHARE: tl.constexpr,
    SHARES: tl.constexpr,
    NORMS: tl.constexpr,
):
    """One program SHARE groups of ROWS keys of a head: their means, and phi(k)^T v and the sum of phi(k) over all.

    NORMS: also the largest norm of a key.
    """
    n, share, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
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
    for j in range(share * SHARE, tl.minimum((share + 1) * SHARE, groups)):
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
    part = head * SHARES + share
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


@triton.jit
def soften(s, top, total, SCALE: tl.constexpr, BOUNDED: tl.constexpr):
    """Weights of scores in base 2, and the decay of what came before; the new maximum and denominator.

    BOUNDED: top is zero, and stays; there is no decay.
    """
    if BOUNDED:
        higher, decay = top, top
        p = tl.exp2(s * SCALE)
        total += tl.sum(p, axis=1)
    else:
        higher = tl.maximum(top, tl.max(s, axis=1) * SCALE)
        p = tl.exp2(s * SCALE - higher[:, None])
        decay = tl.exp2(top - higher)
        total = total * decay + tl.sum(p, axis=1)
    return p, decay, higher, total


@triton.jit
def add_values(p, v, acc, decay, BOUNDED: tl.constexpr):
    """The decayed sum and the product of weights with values; as `soften`, BOUNDED."""
    if not BOUNDED:
        acc *= decay[:, None]
    return tl.dot(p.to(tl.bfloat16), v, acc)


@triton.jit
def attend_masked(queries, k, v, left, top, total, acc, KEYS: tl.constexpr, ROW: tl.constexpr, H: tl.constexpr,
                  SCALE: tl.constexpr):  # fmt: skip
    """One step of softmax attention over KEYS rows at k and v, ROW elements apart, of which `left` exist.

    top, total and acc are the running maximum, denominator and sum. Rows past the end repeat the last one.
    """
    keys = tl.arange(0, KEYS)
    rows = tl.minimum(keys, tl.maximum(left - 1, 0))
    offsets = rows[:, None] * ROW + tl.arange(0, H)[None, :]
    s = tl.where((keys < left)[None, :], tl.dot(queries, tl.load(k + offsets).T), -float("inf"))
    p, decay, top, total = soften(s, top, total, SCALE, False)
    return top, total, add_values(p, tl.load(v + offsets), acc, decay, False)


@triton.jit
def attend(queries, k, v, table, top, total, acc, COUNT: tl.constexpr, BLOCK_K: tl.constexpr, KEYS: tl.constexpr,
           ROW: tl.constexpr, H: tl.constexpr, SCALE: tl.constexpr, LATE: tl.constexpr,
           BOUNDED: tl.constexpr):  # fmt: skip
    """Attention over COUNT whole blocks; BOUNDED as `soften`.

    LATE: values are added a step late, by tensor cores that have nothing else to do during the next softmax.
    """
    steps: tl.constexpr = BLOCK_K // KEYS
    offsets = tl.arange(0, KEYS)[:, None] * ROW + tl.arange(0, H)[None, :]
    # Table entries are read ahead: loads whose address comes from a load of the same step are fetched less early.
    block = (tl.load(table) * BLOCK_K).to(tl.int64) * ROW
    chosen = tl.load(table + min(1 // steps, COUNT - 1))
    if LATE:
        s = tl.dot(queries, tl.load(k + block + offsets).T)
        p, decay, top, total = soften(s, top, total, SCALE, BOUNDED)
    for step in range(COUNT * steps - LATE):
        here = block
        block = (chosen * BLOCK_K + ((step + 1) % steps) * KEYS).to(tl.int64) * ROW
        chosen = tl.load(table + tl.minimum((step + 2) // steps, COUNT - 1))
        if LATE:
            s = tl.dot(queries, tl.load(k + block + offsets).T)
            acc = add_values(p, tl.load(v + here + offsets), acc, decay, BOUNDED)
            p, decay, top, total = soften(s, top, total, SCALE, BOUNDED)
        else:
            s = tl.dot(queries, tl.load(k + here + offsets).T)
            p, decay, top, total = soften(s, top, total, SCALE, BOUNDED)
            acc = add_values(p, tl.load(v + here + offsets), acc, decay, BOUNDED)
    if LATE:
        acc = add_values(p, tl.load(v + block + offsets), acc, decay, BOUNDED)
    return top, total, acc


@triton.jit
def sparse_forward_kernel(
    q,
    k,
    v,
    table,
    projected,
    normalizer,
    bias,
    bounds,
    out,
    sparse,
    lse,
    L: tl.constexpr,
    N: tl.constexpr,
    H: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    KEYS: tl.constexpr,
    COUNT: tl.constexpr,
    SCALE: tl.constexpr,
    RESIDUALS: tl.constexpr,
    LATE: tl.constexpr,
):
    """One program a query block of a head: softmax over its COUNT key blocks, KEYS at a time, plus the linear branch.

    RESIDUALS: also stores the softmax's own result and log2 of its denominators.
    """
    i, head = tl.program_id(0), tl.program_id(1)
    sample = (head // N).to(tl.int64) * L * N * H + (head % N) * H
    columns = tl.arange(0, H)
    rows = i * BLOCK_Q + tl.arange(0, BLOCK_Q)
    # Rows past the end repeat the last one: loads need no mask, and nothing of them is stored.
    first_row = sample + i.to(tl.int64) * (BLOCK_Q * N * H)
    q_rows = (tl.minimum(rows, L - 1) - i * BLOCK_Q)[:, None] * (N * H)
    q_offsets = q_rows + columns[None, :]
    q += first_row
    queries = tl.load(q + q_offsets)
    steps: tl.constexpr = BLOCK_K // KEYS
    partial: tl.constexpr = L % BLOCK_K
    k += sample
    v += sample
    table += (head * tl.cdiv(L, BLOCK_Q) + i).to(tl.int64) * COUNT
    top = tl.full((BLOCK_Q,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    acc = tl.zeros((BLOCK_Q, H), tl.float32)
    whole: tl.constexpr = COUNT - (L % BLOCK_K > 0)
    if partial:  # ascending order puts the partial block last: it goes first, so that the loop needs no mask
        last = tl.load(table + COUNT - 1) * BLOCK_K
        for step in tl.range(steps, num_stages=1):
            first = tl.minimum(last + step * KEYS, L - 1)
            block = first.to(tl.int64) * (N * H)
            left = L - last - step * KEYS
            top, total, acc = attend_masked(queries, k + block, v + block, left, top, total, acc, KEYS, N * H, H, SCALE)
    if whole:
        # Buffers of the loops share memory behind two ifs; behind if and else they do not.
        within = tl.load(bounds + head * tl.cdiv(L, BLOCK_Q) + i) <= BOUND
        if within:
            unit = tl.exp2(top)
            total, acc, top = total * unit, acc * unit[:, None], tl.zeros((BLOCK_Q,), tl.float32)
            top, total, acc = attend(
                queries, k, v, table, top, total, acc, whole, BLOCK_K, KEYS, N * H, H, SCALE, LATE, True
            )
        if within == 0:
            top, total, acc = attend(
                queries, k, v, table, top, total, acc, whole, BLOCK_K, KEYS, N * H, H, SCALE, LATE, False
            )
    acc = acc / total[:, None]
    inside = (rows < L)[:, None]
    if RESIDUALS:
        tl.store(sparse + first_row + q_offsets, acc.to(tl.bfloat16), mask=inside)
        tl.store(lse + head.to(tl.int64) * L + rows, top + tl.log2(total), mask=rows < L)
    # The linear branch, e(q) P / e(q) (z + 1e-5) with e the numerators of phi, in parts: fewer registers. The sum of
    # the softmax takes the factor that the product is divided by, so that the product can add to it.
    part: tl.constexpr = 64
    largest = tl.full((BLOCK_Q,), -float("inf"), tl.float32)
    for start in tl.static_range(0, H, part):
        x = tl.load(q + q_rows + (start + tl.arange(0, part))[None, :]).to(tl.float32)
        largest = tl.maximum(largest, tl.max(x, axis=1))
    divisor = tl.zeros((BLOCK_Q,), tl.float32)
    for start in tl.static_range(0, H, part):
        some = start + tl.arange(0, part)
        e = tl.exp(tl.load(q + q_rows + some[None, :]).to(tl.float32) - largest[:, None])
        divisor += tl.sum(e * (tl.load(normalizer + head * H + some) + 1e-5)[None, :], axis=1)
    acc *= divisor[:, None]
    for start in tl.static_range(0, H, part):
        some = start + tl.arange(0, part)
        e = tl.exp(tl.load(q + q_rows + some[None, :]).to(tl.float32) - largest[:, None])
        state = tl.load(projected + head.to(tl.int64) * H * H + some[:, None] * H + columns[None, :])
        acc = tl.dot(e.to(tl.bfloat16), state, acc)
    acc = acc / divisor[:, None] + tl.load(bias + columns)[None, :]
    tl.store(out + first_row + q_offsets, acc.to(tl.bfloat16), mask=inside)


def block_means(x: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """As `sla.block_means`: x `[B, L, N, H]` to float32 `[B, N, ceil(L / block), H]`.

    Also the largest norm of a row of each block, float32 `[B, N, ceil(L / block)]`.
    """
    batch, length, heads, dim = x.shape
    blocks = -(-length // block)
    means, largest = triton_call.triton_call(
        block_means_kernel,
        x,
        out_shape=(
            jax.ShapeDtypeStruct((batch, heads, blocks, dim), jnp.float32),
            jax.ShapeDtypeStruct((batch, heads, blocks), jnp.float32),
        ),
        grid=(heads, blocks, batch),
        num_warps=4,
        num_stages=1,
        L=length,
        N=heads,
        H=dim,
        BLOCK=block,
    )
    return means, largest


def shares_of(length: int, heads: int, rows: int) -> tuple[int, int]:
    """How a head's groups of `rows` rows are shared out to programs: groups a program, and programs."""
    groups = -(-length // rows)
    share = -(-groups // max(1, SUMMARY_PROGRAMS // heads))
    return share, -(-groups // share)


class KeySummary(NamedTuple):
    """What the block map and the linear branch need of k and v, float32.

    means: of blocks of k `[B, N, ceil(L / block), H]`. state: phi(k)^T v `[B, N, H, H]`. normalizer: the sum of phi(k)
    `[B, N, H]`. norm: the largest of a key `[B, N]`; where it was not asked for `[1, 1]` and undefined.
    """

    means: jax.Array
    state: jax.Array
    normalizer: jax.Array
    norm: jax.Array


def key_summary(k: jax.Array, v: jax.Array, block: int, *, norms: bool = False) -> KeySummary:
    """Reads k and v `[B, L, N, H]` once."""
    batch, length, heads, dim = k.shape
    groups = -(-length // KEY_ROWS)
    share, shares = shares_of(length, batch * heads, KEY_ROWS)
    means, states, normalizers, largest = triton_call.triton_call(
        key_summary_kernel,
        k,
        v,
        out_shape=(
            jax.ShapeDtypeStruct((batch, heads, groups, dim), jnp.float32),
            jax.ShapeDtypeStruct((batch, heads, shares, dim, dim), jnp.float32),
            jax.ShapeDtypeStruct((batch, heads, shares, dim), jnp.float32),
            jax.ShapeDtypeStruct((batch, heads, shares) if norms else (1, 1, 1), jnp.float32),
        ),
        grid=(heads, shares, batch),
        num_warps=8,
        num_stages=3,
        L=length,
        N=heads,
        H=dim,
        ROWS=KEY_ROWS,
        SHARE=share,
        SHARES=shares,
        NORMS=norms,
    )
    means = merge_means(means, length, block)
    return KeySummary(means, states.sum(axis=2), normalizers.sum(axis=2), largest.max(axis=2))


def block_rows(length: int, block: int) -> jax.Array:
    """Rows that each block has, float32 `[ceil(length / block)]`."""
    return jnp.minimum(block, length - block * jnp.arange(-(-length // block))).astype(jnp.float32)


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
    width = 1 << (blocks - 1).bit_length()
    (table,) = triton_call.triton_call(
        choose_blocks_kernel,
        scores,
        out_shape=(jax.ShapeDtypeStruct((*leading, count), jnp.int32),),
        grid=(math.prod(leading),),
        num_warps=max(1, width // 2048),  # one warp needs no barriers; more scores than that spill
        num_stages=1,
        BLOCKS=blocks,
        COUNT=count,
        WIDTH=width,
    )
    return table


def sparse_forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    table: jax.Array,
    projected: jax.Array,
    normalizer: jax.Array,
    bias: jax.Array,
    bounds: jax.Array,
    *,
    block_q: int,
    block_k: int,
    tiles: Tiles,
    residuals: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Softmax over the chosen key blocks plus the linear branch, bfloat16 `[B, L, N, H]`.

    q, k, v bfloat16 `[B, L, N, H]`; table int32 `[B, N, query blocks, chosen]`, ascending; projected = phi(k)^T v W^T
    bfloat16 `[B, N, H, H]`; normalizer = sum phi(k) float32 `[B, N, H]`; bias float32 `[H]`; bounds float32
    `[B, N, query blocks]`: how far from zero a block's scores can be; within BOUND no maximum is looked for, and
    nothing is rescaled for it. With residuals also the softmax branch alone, bfloat16 `[B, L, N, H]`, and its
    log2-sum-exp2, float32 `[B, N, L]`; without, both `[1]` and undefined.
    """
    batch, length, heads, dim = q.shape
    out, sparse, lse = triton_call.triton_call(
        sparse_forward_kernel,
        q,
        k,
        v,
        table,
        projected,
        normalizer,
        bias,
        bounds,
        out_shape=(
            jax.ShapeDtypeStruct(q.shape, jnp.bfloat16),
            jax.ShapeDtypeStruct(q.shape if residuals else (1,), jnp.bfloat16),
            jax.ShapeDtypeStruct((batch, heads, length) if residuals else (1,), jnp.float32),
        ),
        grid=(table.shape[2], batch * heads),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        L=length,
        N=heads,
        H=dim,
        BLOCK_Q=block_q,
        BLOCK_K=block_k,
        KEYS=tiles.step,
        COUNT=table.shape[3],
        SCALE=dim**-0.5 * LOG2_E.value,
        RESIDUALS=residuals,
        LATE=tiles.late,
    )
    return out, sparse, lse
