"""Triton kernels that quantize q, k and v for SageSLA; the equations are in `reference`.

B batch, L tokens, N heads, H head dim. int8 codes of q and k are padded to whole blocks and e4m3 values to 128 rows,
with zeros: inside the loop over key blocks their loads need no mask, and only the partial block masks its scores.
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from turbojax.kernels.sage.reference import E4M3_OF_V
from turbojax.kernels.sizes import cdiv
from turbojax.kernels.sla.triton_summary import sum_rows
from turbojax.kernels.triton_call import output, sizes_of, triton_call

VALUE_ROWS = 128  # rows of v that one program converts
AMAX_ROWS = 512  # rows of v that one program takes the largest magnitude of


@triton.jit
def float_of_bits(bits):
    """The float32 value of magnitude bits; NaN's are above all others, so that maxima of bits keep it."""
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def quantize_rows_kernel(x, mean, code, scale, means,
                         L: tl.constexpr, N: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr,
                         CENTRED: tl.constexpr, MEANS: tl.constexpr):  # fmt: skip
    """One program a block of rows of a head; grid (N, blocks, B).

    x bfloat16 [B, L, N, H], less mean float32 [B, N, H] if CENTRED, to code int8 [B, blocks * BLOCK, N, H] and scale
    float32 [B, N, blocks]. If MEANS, means float32 [B, N, blocks, H] gets the means of x's rows.
    """
    n, i, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    blocks = tl.num_programs(1)
    columns, in_block = tl.arange(0, H), tl.arange(0, BLOCK)
    inside = (i * BLOCK + in_block < L)[:, None]
    offsets = in_block[:, None] * (N * H) + columns[None, :]
    values = tl.load(x + ((b * L + i * BLOCK) * N + n) * H + offsets, mask=inside, other=0.0)
    f = values.to(tl.float32)
    block = (b * N + n) * blocks + i
    if CENTRED:
        f = tl.where(inside, f - tl.load(mean + (b * N + n) * H + columns)[None, :], 0.0)
        amax = float_of_bits(tl.max(tl.max(f.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1), axis=0))
    else:
        bits = tl.max(tl.max(values.to(tl.int16, bitcast=True) & 0x7FFF, axis=1), axis=0)
        amax = float_of_bits(bits.to(tl.int32) << 16)
    step = tl.div_rn(amax, 127.0) + 1e-7
    # f / step correctly rounded, as the reference divides: the quotient by the reciprocal, and its remainder's share.
    reciprocal = tl.div_rn(1.0, step)
    ratio = f * reciprocal
    ratio = tl.fma(tl.fma(ratio, -step, f), reciprocal, ratio)
    ratio += tl.where(ratio >= 0, 0.5, -0.5)  # the conversion truncates: halves go away from zero
    tl.store(code + ((b * blocks + i) * (BLOCK * N) + n) * H + offsets, ratio.to(tl.int8))
    tl.store(scale + block, step)
    if MEANS:
        rows = tl.minimum(L - i * BLOCK, BLOCK).to(tl.float32)
        tl.store(means + block * H + columns, tl.div_rn(sum_rows(values, BLOCK), rows))


@triton.jit
def channel_amax_kernel(
    v, amax, L: tl.constexpr, N: tl.constexpr, H: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr
):
    """max |v| over CHUNK rows: v bfloat16 [B, L, N, H], amax float32 [B, chunks, N, H]; grid (N, chunks, B)."""
    n, i, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    columns, in_rows = tl.arange(0, H), tl.arange(0, ROWS)
    offsets = in_rows[:, None] * (N * H) + columns[None, :]
    amax_bits = tl.zeros((ROWS, H), tl.int16)
    for start in range(0, CHUNK, ROWS):
        row = i * CHUNK + start
        x = tl.load(v + ((b * L + row) * N + n) * H + offsets, mask=(row + in_rows < L)[:, None], other=0.0)
        amax_bits = tl.maximum(amax_bits, x.to(tl.int16, bitcast=True) & 0x7FFF)
    bits = tl.max(amax_bits, axis=0).to(tl.int32) << 16
    tl.store(amax + ((b * tl.num_programs(1) + i) * N + n) * H + columns, float_of_bits(bits))


@triton.jit
def operand_order(x, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """x [ROWS, KEYS] with key 16 a + 8 b + 2 c + d at 16 a + 4 c + 2 b + d: no thread needs another's.

    Of a product's result, thread c has keys 2 c + d and 8 + 2 c + d; of a float8 operand, the four from 4 c on.
    """
    return x.reshape(ROWS, KEYS // 16, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(ROWS, KEYS)


@triton.jit
def quantize_values_kernel(
    v, amax, code, L: tl.constexpr, N: tl.constexpr, H: tl.constexpr, ROWS: tl.constexpr, LARGEST: tl.constexpr
):
    """v bfloat16 [B, L, N, H] with amax float32 [B, N, H] to e4m3 [B, N, H, blocks * ROWS]; grid (N, blocks, B).

    Transposed: float8 tensor cores want the keys, over which they sum, next to each other. In `operand_order`.
    """
    n, i, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    columns, in_rows = tl.arange(0, H), tl.arange(0, ROWS)
    factor = tl.div_rn(LARGEST, tl.load(amax + (b * N + n) * H + columns))
    offsets = in_rows[:, None] * (N * H) + columns[None, :]
    inside = (i * ROWS + in_rows < L)[:, None]
    f = tl.load(v + ((b * L + i * ROWS) * N + n) * H + offsets, mask=inside, other=0.0).to(tl.float32)
    codes = operand_order((f * factor[None, :]).to(tl.float8e4nv).T, H, ROWS)
    rows_first = columns[:, None] * (tl.num_programs(1) * ROWS) + in_rows[None, :]
    tl.store(code + (b * N + n) * H * tl.num_programs(1) * ROWS + i * ROWS + rows_first, codes)


def quantize_rows(
    x: jax.Array, block: int, *, mean: jax.Array | None = None, means: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Launches `reference.quantize_rows`: x bfloat16 `[B, L, N, H]`, less mean float32 `[B, N, H]` if given.

    Gives int8 `[B, L padded to the block, N, H]`, float32 scales `[B, N, blocks]`, and with means also x's block means,
    float32 `[B, N, blocks, H]`; without, `[1]` and undefined.
    """
    batch, length, heads, dim = x.shape
    blocks = cdiv(length, block)
    code, scale, block_means = triton_call(
        quantize_rows_kernel,
        *(x, jnp.zeros(1, jnp.float32) if mean is None else mean),
        out_shape=(
            output(jnp.int8, batch, blocks * block, heads, dim),
            output(jnp.float32, batch, heads, blocks),
            output(jnp.float32, *((batch, heads, blocks, dim) if means else (1,))),
        ),
        grid=(heads, blocks, batch),
        num_warps=block * dim // 1024,
        **sizes_of(x),
        BLOCK=block,
        CENTRED=mean is not None,
        MEANS=means,
    )
    return code, scale, block_means


def quantize_values(v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Launches `reference.quantize_values`: v bfloat16 `[B, L, N, H]` to e4m3 and float32 scales `[B, N, H]`.

    The codes are transposed and padded with zeros, `[B, N, H, L padded to 128]`, each 16 keys in `operand_order`:
    key 8 b + 2 c + d at 4 c + 2 b + d.
    """
    batch, length, heads, dim = v.shape
    chunks, blocks = cdiv(length, AMAX_ROWS), cdiv(length, VALUE_ROWS)
    (parts,) = triton_call(
        channel_amax_kernel,
        v,
        out_shape=(output(jnp.float32, batch, chunks, heads, dim),),
        grid=(heads, chunks, batch),
        num_warps=8,
        CHUNK=AMAX_ROWS,
        ROWS=8192 // dim,
        **sizes_of(v),
    )
    amax = jnp.maximum(jnp.max(parts, axis=1), 1e-20)  # a channel of zeros stays one
    (code,) = triton_call(
        quantize_values_kernel,
        *(v, amax),
        out_shape=(output(jnp.float8_e4m3fn, batch, heads, dim, blocks * VALUE_ROWS),),
        grid=(heads, blocks, batch),
        num_warps=8,
        ROWS=VALUE_ROWS,
        LARGEST=E4M3_OF_V,
        **sizes_of(v),
    )
    return code, amax / E4M3_OF_V
