"""Triton kernel of sparse-linear attention, forward; the equations are in `reference`.

B batch, L tokens, N heads, H head dim (64 or 128); q, k, v bfloat16 `[B, L, N, H]`, read in place.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from turbojax.kernels.sla import reference
from turbojax.kernels.sla.triton_summary import LOG2_E
from turbojax.kernels.triton_call import output, sizes_of, triton_call

SparseKernel = Literal["mosaic", "triton"]

BOUND = tl.constexpr(reference.BOUND)


class Tiles(NamedTuple):
    """Rows of a step of the loop, warps, stages of loads in flight; deferred_pv: P V is computed a step later."""

    step: int
    warps: int
    stages: int
    deferred_pv: bool = False


@dataclasses.dataclass(frozen=True)
class Settings:
    """Constants that the kernels are compiled with.

    count: key blocks a query block attends to. sparse_kernel, tiles: kernel of the sparse forward pass, and its tiles;
    backward_tiles: those of dq, and of dk and dv.
    """

    count: int
    block_q: int
    block_k: int
    sparse_kernel: SparseKernel
    tiles: Tiles
    backward_tiles: tuple[Tiles, Tiles]


def tiles(capability: tuple[int, int] | None, *, block_q: int, block_k: int, dim: int) -> Tiles:
    """The sparse loop's tiles: the most stages that fit a compute capability and spill no registers (tests/kernels)."""
    few = (capability == (8, 0) and dim == 128) or (capability == (8, 9) and (block_q, dim) == (64, 64))
    hopper = capability == (9, 0)  # its products run beside other instructions
    return Tiles(64, warps=block_q // 16, stages=4 if hopper else 2 if few else 3, deferred_pv=hopper)


@triton.jit
def softmax_step(s, row_max, row_sum, SCALE: tl.constexpr, BOUNDED: tl.constexpr):
    """Weights of scores in base 2, the factor that rescales earlier sums, the new maximum and row sum.

    BOUNDED: row_max is zero, and stays; nothing is rescaled.
    """
    if BOUNDED:
        new_max, rescale = row_max, row_max
        p = tl.exp2(s * SCALE)
        row_sum += tl.sum(p, axis=1)
    else:
        new_max = tl.maximum(row_max, tl.max(s, axis=1) * SCALE)
        p = tl.exp2(s * SCALE - new_max[:, None])
        rescale = tl.exp2(row_max - new_max)
        row_sum = row_sum * rescale + tl.sum(p, axis=1)
    return p, rescale, new_max, row_sum


@triton.jit
def add_values(p, v, acc, rescale, BOUNDED: tl.constexpr):
    """Adds P V to the rescaled accumulator; BOUNDED as in `softmax_step`."""
    if not BOUNDED:
        acc *= rescale[:, None]
    return tl.dot(p.to(tl.bfloat16), v, acc)


@triton.jit
def attend_masked(queries, k, v, left, row_max, row_sum, acc, KEYS: tl.constexpr, ROW: tl.constexpr, H: tl.constexpr,
                  SCALE: tl.constexpr):  # fmt: skip
    """One step of softmax attention over KEYS rows at k and v, ROW elements apart, of which `left` exist.

    row_max, row_sum and acc are the running maximum, denominator and sum. Rows past the end repeat the last one.
    """
    keys = tl.arange(0, KEYS)
    rows = tl.minimum(keys, tl.maximum(left - 1, 0))
    offsets = rows[:, None] * ROW + tl.arange(0, H)[None, :]
    s = tl.where((keys < left)[None, :], tl.dot(queries, tl.load(k + offsets).T), -float("inf"))
    p, rescale, row_max, row_sum = softmax_step(s, row_max, row_sum, SCALE, False)
    return row_max, row_sum, add_values(p, tl.load(v + offsets), acc, rescale, False)


@triton.jit
def attend(queries, k, v, table, row_max, row_sum, acc, COUNT: tl.constexpr, BLOCK_K: tl.constexpr, KEYS: tl.constexpr,
           ROW: tl.constexpr, H: tl.constexpr, SCALE: tl.constexpr, DEFERRED_PV: tl.constexpr,
           BOUNDED: tl.constexpr):  # fmt: skip
    """Attention over COUNT whole blocks; BOUNDED as in `softmax_step`.

    DEFERRED_PV: P V is computed a step later, by tensor cores that have nothing else to do during the next softmax.
    """
    steps: tl.constexpr = BLOCK_K // KEYS
    offsets = tl.arange(0, KEYS)[:, None] * ROW + tl.arange(0, H)[None, :]
    # Table entries are read ahead: loads whose address comes from a load of the same step are fetched less early.
    block = (tl.load(table) * BLOCK_K).to(tl.int64) * ROW
    chosen = tl.load(table + min(1 // steps, COUNT - 1))
    if DEFERRED_PV:
        s = tl.dot(queries, tl.load(k + block + offsets).T)
        p, rescale, row_max, row_sum = softmax_step(s, row_max, row_sum, SCALE, BOUNDED)
    for step in range(COUNT * steps - DEFERRED_PV):
        here = block
        block = (chosen * BLOCK_K + ((step + 1) % steps) * KEYS).to(tl.int64) * ROW
        chosen = tl.load(table + tl.minimum((step + 2) // steps, COUNT - 1))
        if DEFERRED_PV:
            s = tl.dot(queries, tl.load(k + block + offsets).T)
            acc = add_values(p, tl.load(v + here + offsets), acc, rescale, BOUNDED)
            p, rescale, row_max, row_sum = softmax_step(s, row_max, row_sum, SCALE, BOUNDED)
        else:
            s = tl.dot(queries, tl.load(k + here + offsets).T)
            p, rescale, row_max, row_sum = softmax_step(s, row_max, row_sum, SCALE, BOUNDED)
            acc = add_values(p, tl.load(v + here + offsets), acc, rescale, BOUNDED)
    if DEFERRED_PV:
        acc = add_values(p, tl.load(v + block + offsets), acc, rescale, BOUNDED)
    return row_max, row_sum, acc


@triton.jit
def sparse_forward_kernel(q, k, v, table, projected, normalizer, bias, bounds, out, sparse, lse,
                          L: tl.constexpr, N: tl.constexpr, H: tl.constexpr, BLOCK_Q: tl.constexpr,
                          BLOCK_K: tl.constexpr, KEYS: tl.constexpr, COUNT: tl.constexpr, SCALE: tl.constexpr,
                          RESIDUALS: tl.constexpr, DEFERRED_PV: tl.constexpr):  # fmt: skip
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
    row_max = tl.full((BLOCK_Q,), -float("inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_Q,), tl.float32)
    acc = tl.zeros((BLOCK_Q, H), tl.float32)
    whole: tl.constexpr = COUNT - (L % BLOCK_K > 0)
    if partial:  # ascending order puts the partial block last: it goes first, so that the loop needs no mask
        last = tl.load(table + COUNT - 1) * BLOCK_K
        for step in tl.range(steps, num_stages=1):
            first = tl.minimum(last + step * KEYS, L - 1)
            block = first.to(tl.int64) * (N * H)
            left = L - last - step * KEYS
            row_max, row_sum, acc = attend_masked(
                queries, k + block, v + block, left, row_max, row_sum, acc, KEYS, N * H, H, SCALE
            )
    if whole:
        # Buffers of the loops share memory behind two ifs; behind if and else they do not.
        within = tl.load(bounds + head * tl.cdiv(L, BLOCK_Q) + i) <= BOUND
        if within:
            unit = tl.exp2(row_max)
            row_sum, acc, row_max = row_sum * unit, acc * unit[:, None], tl.zeros((BLOCK_Q,), tl.float32)
            row_max, row_sum, acc = attend(
                queries, k, v, table, row_max, row_sum, acc, whole, BLOCK_K, KEYS, N * H, H, SCALE, DEFERRED_PV, True
            )
        if within == 0:
            row_max, row_sum, acc = attend(
                queries, k, v, table, row_max, row_sum, acc, whole, BLOCK_K, KEYS, N * H, H, SCALE, DEFERRED_PV, False
            )
    acc = acc / row_sum[:, None]
    inside = (rows < L)[:, None]
    if RESIDUALS:
        tl.store(sparse + first_row + q_offsets, acc.to(tl.bfloat16), mask=inside)
        tl.store(lse + head.to(tl.int64) * L + rows, row_max + tl.log2(row_sum), mask=rows < L)
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


def sparse_forward(
    inputs: reference.SparseInputs, settings: Settings, *, residuals: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Softmax over the chosen key blocks plus the linear branch, bfloat16 `[B, L, N, H]`.

    With residuals also the softmax branch alone, bfloat16 `[B, L, N, H]`, and its log2-sum-exp2, float32 `[B, N, L]`;
    without, both `[1]` and undefined.
    """
    q, table, tiles = inputs.q, inputs.table, settings.tiles
    batch, length, heads, dim = q.shape
    out, sparse, lse = triton_call(
        sparse_forward_kernel,
        *inputs,
        out_shape=(
            output(jnp.bfloat16, *q.shape),
            output(jnp.bfloat16, *(q.shape if residuals else (1,))),
            output(jnp.float32, *((batch, heads, length) if residuals else (1,))),
        ),
        grid=(table.shape[2], batch * heads),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        **sizes_of(q),
        BLOCK_Q=settings.block_q,
        BLOCK_K=settings.block_k,
        KEYS=tiles.step,
        COUNT=table.shape[3],
        SCALE=dim**-0.5 * LOG2_E.value,
        RESIDUALS=residuals,
        DEFERRED_PV=tiles.deferred_pv,
    )
    return out, sparse, lse
