"""Triton kernel of SageSLA, forward; the equations are in `reference`.

B batch, L tokens, N heads, H head dim. q, k and v come quantized and padded from `triton_quantize`.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jaxtyping import Array, Float, Float32, Int8

from turbojax.kernels.arrays import BlockTable, Tokens
from turbojax.kernels.sage.reference import P_OFFSET, Values
from turbojax.kernels.sage.triton_quantize import operand_order
from turbojax.kernels.sla.triton_summary import LOG2_E
from turbojax.kernels.triton_call import output, sizes_of, triton_call

OFFSET = tl.constexpr(P_OFFSET)
LEAST = tl.constexpr(-(2**30))  # below every product of codes


class Tiles(NamedTuple):
    """Warps a program and stages of loads in flight."""

    warps: int
    stages: int


@dataclasses.dataclass(frozen=True)
class Settings:
    """Constants that the kernels are compiled with.

    count: key blocks a query block attends to. tiles: how the sparse kernel runs. overwrite_q: the result takes q's
    memory.
    """

    count: int
    block_q: int
    block_k: int
    values: Values
    tiles: Tiles
    overwrite_q: bool = False


class SageInputs(NamedTuple):
    """Arrays that the kernel takes: codes, padded to whole blocks, with their scales, and for the linear branch q.

    v for values "float8": e4m3 `[B, N, H, L padded to 128]` in `operand_order`, else bfloat16 `[B, L, N, H]`.
    projected: (phi(k)^T v) W_l^T, bfloat16. normalizer: sum phi(k).
    """

    q_code: Int8[Array, "B q_rows N H"]
    q_scale: Float32[Array, "B N q_blocks"]
    k_code: Int8[Array, "B k_rows N H"]
    k_scale: Float32[Array, "B N k_blocks"]
    v: Float[Array, "..."]
    v_scale: Float32[Array, "B N H"]
    table: BlockTable
    q: Tokens
    projected: Float[Array, "B N H H"]
    normalizer: Float32[Array, "B N H"]
    bias: Float32[Array, "H"]


def forward_tiles(capability: tuple[int, int], *, block_q: int, block_k: int, values: Values) -> Tiles:
    """The sparse kernel's tiles that fit a compute capability and spill no registers (tests/kernels).

    One warp group of Hopper's takes 64 rows; elsewhere eight warps share the registers. Four stages of 64 keys or three
    of 128; of bfloat16 values one less, or there would be room for one program only.
    """
    warps = 4 if capability == (9, 0) and block_q == 64 else 8
    stages = 4 if block_k == 64 else 3
    return Tiles(warps, stages if values == "float8" else stages - 1)


@triton.jit
def keep_columns(x, left, other):
    """x with `other` in columns from `left` on. Most blocks have none: all threads pass by the masks together."""
    columns: tl.constexpr = x.shape[1]
    if left < columns:
        x = tl.where((tl.arange(0, columns) < left)[None, :], x, other)
    return x


@triton.jit
def attend(q, k, v, factor, left, row_max, row_sum, acc, VALUES: tl.constexpr, PARTIAL: tl.constexpr):
    """One key block of the online softmax in base 2; q, k int8 [q, H] and [k, H], v [k, H]; `left` keys if PARTIAL."""
    products = tl.dot(q, k.T, out_dtype=tl.int32)
    if PARTIAL:
        products = keep_columns(products, left, LEAST)
    # The maximum is that of the integers: a Hopper instruction takes three, and none waits for its conversion.
    new_max = tl.maximum(row_max, tl.max(products, axis=1).to(tl.float32) * factor)
    rescale = tl.exp2(row_max - new_max)
    offset: tl.constexpr = OFFSET if VALUES == "float8" else 0.0
    p = tl.exp2(products.to(tl.float32) * factor - (new_max - offset)[:, None])
    if PARTIAL:
        p = keep_columns(p, left, 0.0)  # with small factors LEAST is not far below the maximum
    if VALUES == "float8":
        part = tl.dot(operand_order(p.to(tl.float8e4nv), q.shape[0], k.shape[0]), v)
    else:
        part = tl.dot(p.to(tl.bfloat16), v)
    # Added outside of the tensor cores, whose float8 sums keep 14 bits; it costs what the multiplication alone would.
    acc = acc * rescale[:, None] + part
    return new_max, row_sum * rescale + tl.sum(p, axis=1), acc


@triton.jit
def add_linear(acc, q, inside, normalizer, projected, bias, N: tl.constexpr, H: tl.constexpr, Q: tl.constexpr):
    """acc + phi(q) projected / (1e-5 + phi(q) . normalizer) + bias; the pointers are those of the block and its head.

    q is read twice, the second time with `projected` in parts of H, so that neither's registers add to acc's.
    """
    columns, rows = tl.arange(0, H), tl.arange(0, Q)
    all_x = tl.load(q + rows[:, None] * (N * H) + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    row_max = tl.max(all_x, axis=1) * LOG2_E
    e = tl.exp2(all_x * LOG2_E - row_max[:, None])
    weight = 1.0 / tl.sum(e * (1e-5 + tl.load(normalizer + columns))[None, :], axis=1)
    PART: tl.constexpr = 64
    part = tl.arange(0, PART)
    for start in tl.static_range(0, H, PART):
        x = tl.load(q + rows[:, None] * (N * H) + (start + part)[None, :], mask=inside, other=0.0).to(tl.float32)
        phi = (tl.exp2(x * LOG2_E - row_max[:, None]) * weight[:, None]).to(tl.bfloat16)
        state = tl.load(projected + (start + part)[:, None] * H + columns[None, :])
        acc = tl.dot(phi, state, acc)
    return acc + tl.load(bias + columns)[None, :]


@triton.jit
def sage_forward_kernel(q_code, q_scale, k_code, k_scale, v, v_scale, table, q, projected, normalizer, bias, out,
                        L: tl.constexpr, N: tl.constexpr, H: tl.constexpr, COUNT: tl.constexpr, BLOCK_Q: tl.constexpr,
                        BLOCK_K: tl.constexpr, VALUES: tl.constexpr, SCALE: tl.constexpr):  # fmt: skip
    """One program a query block of a head; grid (query blocks, B * N). SCALE is log2(e) / sqrt(H).

    The pointers are those of `SageInputs`, and out bfloat16 [B, L, N, H].
    """
    i, head = tl.program_id(0), tl.program_id(1)
    b, n = (head // N).to(tl.int64), head % N
    q_blocks: tl.constexpr = (L + BLOCK_Q - 1) // BLOCK_Q
    k_blocks: tl.constexpr = (L + BLOCK_K - 1) // BLOCK_K
    v_length: tl.constexpr = (L + 127) // 128 * 128
    partial: tl.constexpr = L % BLOCK_K > 0
    columns, in_q, in_k = tl.arange(0, H), tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    q_offsets = in_q[:, None] * (N * H) + columns[None, :]
    k_offsets = in_k[:, None] * (N * H) + columns[None, :]
    q_tile = tl.load(q_code + ((b * q_blocks + i) * (BLOCK_Q * N) + n) * H + q_offsets)
    row_factor = tl.load(q_scale + head * q_blocks + i) * SCALE
    k_code += (b * (k_blocks * BLOCK_K * N) + n) * H
    k_scale += head * k_blocks
    table += (head * q_blocks + i).to(tl.int64) * COUNT
    if VALUES == "float8":
        v += (b * N + n) * (H * v_length)
        v_offsets = columns[None, :] * v_length + in_k[:, None]
    else:
        v += (b * L * N + n) * H
        v_offsets = k_offsets
    v_step: tl.constexpr = BLOCK_K if VALUES == "float8" else BLOCK_K * N * H

    row_max = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_Q,), tl.float32)
    acc = tl.zeros((BLOCK_Q, H), tl.float32)
    chosen = tl.load(table)
    for c in range(0, COUNT):
        left = L - chosen * BLOCK_K
        block = chosen.to(tl.int64)
        # Read a step ahead: loads whose address comes from a load of the same step are fetched less early.
        chosen = tl.load(table + tl.minimum(c + 1, COUNT - 1))
        factor = row_factor * tl.load(k_scale + block)
        k_tile = tl.load(k_code + block * (BLOCK_K * N * H) + k_offsets)
        if VALUES == "float8" or not partial:
            v_tile = tl.load(v + block * v_step + v_offsets)
        else:
            v_tile = tl.load(v + block * v_step + v_offsets, mask=(in_k < left)[:, None], other=0.0)
        row_max, row_sum, acc = attend(q_tile, k_tile, v_tile, factor, left, row_max, row_sum, acc, VALUES, partial)

    acc *= (1.0 / row_sum)[:, None] * tl.load(v_scale + head * H + columns)[None, :]
    inside = (i * BLOCK_Q + in_q < L)[:, None]
    here = ((b * L + i * BLOCK_Q) * N + n) * H
    linear_state = projected + head.to(tl.int64) * (H * H)
    acc = add_linear(acc, q + here, inside, normalizer + head * H, linear_state, bias, N, H, BLOCK_Q)
    tl.store(out + here + q_offsets, acc.to(tl.bfloat16), mask=inside)


def sage_forward(inputs: SageInputs, settings: Settings) -> jax.Array:
    """The sparse branch over the chosen key blocks plus the linear branch, bfloat16 `[B, L, N, H]`."""
    batch, _, heads, dim = inputs.q.shape
    (out,) = triton_call(
        sage_forward_kernel,
        *inputs,
        out_shape=(output(jnp.bfloat16, *inputs.q.shape),),
        in_place={7: 0} if settings.overwrite_q else {},  # a program reads the rows of q that it writes
        grid=(inputs.table.shape[2], batch * heads),
        num_warps=settings.tiles.warps,
        num_stages=settings.tiles.stages,
        **sizes_of(inputs.q),
        COUNT=inputs.table.shape[3],
        BLOCK_Q=settings.block_q,
        BLOCK_K=settings.block_k,
        VALUES=settings.values,
        SCALE=LOG2_E.value * dim**-0.5,
    )
    return out
