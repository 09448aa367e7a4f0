"""Triton kernels that quantize activations; the equations are in `reference`.

M rows, K in-features, a multiple of 128. A scale covers 128 in-features and `GROUP` rows (128 or 1) in the block
scheme, a whole row in the channel scheme.
"""

from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from turbojax.kernels.int8.reference import BLOCK, QuantConfig
from turbojax.kernels.sizes import cdiv, next_power_of_2
from turbojax.kernels.triton_call import output, triton_call


@triton.jit
def to_int8(x, amax):
    """x * 128 / amax, rounded to the nearest, ties to even, 127 at most; amax broadcasts against |x| and bounds it.

    Rounding happens in the addition of 1.5 * 2^23, whose last bit counts ones: the sum's low byte is the code.
    """
    ratio = tl.minimum(x * (128.0 / amax), 127.0)
    return (ratio + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def amax_of_bits(bits):
    """The float32 value of the largest |x|'s bfloat16 bits, at least 1e-8; NaN's bits are above all others."""
    amax = (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return tl.where(bits > 0x7F80, amax, tl.maximum(amax, 1e-8))


@triton.jit
def store_quantized(v, q, scale, offsets, rows, i, j, M: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr):
    """Quantizes the 128 x 128 bfloat16 block (i, j) of a [M, K] matrix, GROUP rows to a scale; without rows past M.

    Bits without the sign are ordered as magnitudes are, so that the maximum needs no float32 copy of the block: half
    the registers, more programs at once.
    """
    without_sign = tl.where(rows < M, 0x7FFF, 0).to(tl.int16)[:, None]
    bits = tl.max(v.to(tl.int16, bitcast=True) & without_sign, axis=1)
    if GROUP == 128:
        amax = amax_of_bits(tl.max(bits, axis=0))
        tl.store(q + offsets, to_int8(v.to(tl.float32), amax), mask=(rows < M)[:, None])
        tl.store(scale + i * (K // 128) + j, amax / 128.0)
    else:
        amax = amax_of_bits(bits)
        tl.store(q + offsets, to_int8(v.to(tl.float32), amax[:, None]), mask=(rows < M)[:, None])
        tl.store(scale + rows.to(tl.int64) * (K // 128) + j, amax / 128.0, mask=rows < M)


@triton.jit
def quantize_blocks_kernel(x, q, scale, M: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr):
    """One program a 128 x 128 block of x, bfloat16; GROUP rows share a scale (128 or 1)."""
    j, i = tl.program_id(0), tl.program_id(1)
    rows, columns = i * 128 + tl.arange(0, 128), j * 128 + tl.arange(0, 128)
    inside = (rows < M)[:, None]
    offsets = rows.to(tl.int64)[:, None] * K + columns[None, :]
    v = tl.load(x + offsets, mask=inside, other=0.0)
    store_quantized(v, q, scale, offsets, rows, i, j, M, K, GROUP)


@triton.jit
def quantize_rows_kernel(x, q, scale, K: tl.constexpr, CHUNK: tl.constexpr):
    """One program a row of x; the second reading comes from the cache."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, CHUNK)
    amax = tl.zeros((CHUNK,), tl.float32)
    nans = tl.zeros((CHUNK,), tl.int32)
    for start in range(0, K, CHUNK):
        f = tl.load(x + row * K + start + columns, mask=start + columns < K, other=0.0).to(tl.float32)
        amax = tl.maximum(amax, tl.abs(f))
        nans += (f != f).to(tl.int32)
    amax = tl.where(tl.sum(nans, axis=0) > 0, float("nan"), tl.maximum(tl.max(amax, axis=0), 1e-8))
    for start in range(0, K, CHUNK):
        inside = start + columns < K
        f = tl.load(x + row * K + start + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(q + row * K + start + columns, to_int8(f, amax), mask=inside)
    tl.store(scale + row, amax / 128.0)


@triton.jit
def of_rows(gate, rows, columns, M: tl.constexpr, N: tl.constexpr, BATCH: tl.constexpr):
    """Rows of gate, float32 [BATCH, N], that belong to a tile's rows; a tile belongs to two samples at most.

    One or two rows of it are read: an element for each of the tile's would keep the cache busy.
    """
    length: tl.constexpr = M // BATCH
    sample = tl.min(rows, axis=0) // length
    gates = tl.load(gate + sample * N + columns, mask=columns < N, other=0.0)[None, :]
    if BATCH > 1:
        following = tl.minimum(sample + 1, BATCH - 1)
        second = tl.load(gate + following * N + columns, mask=columns < N, other=0.0)[None, :]
        gates = tl.where((rows < (sample + 1) * length)[:, None], gates, second)
    return gates


@triton.jit
def row_statistics_kernel(x, statistics, D: tl.constexpr, EPS: tl.constexpr, WIDTH: tl.constexpr):
    """Mean and 1 / sqrt(var + eps) of one row, float32 [M, 2]; WIDTH is D's next power of two."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    f = tl.load(x + row * D + columns, mask=columns < D, other=0.0).to(tl.float32)
    mean = tl.sum(f, axis=0) / D
    f = tl.where(columns < D, f - mean, 0.0)
    tl.store(statistics + 2 * row, mean)
    tl.store(statistics + 2 * row + 1, tl.rsqrt(tl.sum(f * f, axis=0) / D + EPS))


@triton.jit
def norm_quantize_kernel(x, statistics, gain, shift, q, q_scale,
                         M: tl.constexpr, L: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr):  # fmt: skip
    """layer_norm(x) gain + shift, rounded to bfloat16 and quantized; x [B, L, D], gain and shift [B, D].

    One program a 128 x 128 block.
    """
    j, i = tl.program_id(0), tl.program_id(1)
    rows, columns = i * 128 + tl.arange(0, 128), j * 128 + tl.arange(0, 128)
    inside = (rows < M)[:, None]
    offsets = rows.to(tl.int64)[:, None] * D + columns[None, :]
    mean = tl.load(statistics + 2 * rows, mask=rows < M, other=0.0)[:, None]
    rstd = tl.load(statistics + 2 * rows + 1, mask=rows < M, other=0.0)[:, None]
    f = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32) * rstd - mean * rstd
    if L >= 128:
        f = f * of_rows(gain, rows, columns, M, D, M // L) + of_rows(shift, rows, columns, M, D, M // L)
    else:  # a block may hold rows of many samples
        sample = (rows // L)[:, None] * D + columns[None, :]
        f = f * tl.load(gain + sample, mask=inside, other=0.0) + tl.load(shift + sample, mask=inside, other=0.0)
    store_quantized(f.to(tl.bfloat16), q, q_scale, offsets, rows, i, j, M, D, GROUP)


def quantize(x: jax.Array, quant: QuantConfig) -> tuple[jax.Array, jax.Array]:
    """x bfloat16 `[M, K]` to int8 and its float32 scales."""
    m, k = x.shape
    if quant.scheme == "block128":
        return launch_blocks(quantize_blocks_kernel, x, sizes=(m, k), group=quant.group, num_warps=16, K=k)
    out_shape = output(jnp.int8, m, k), output(jnp.float32, m)
    return triton_call(quantize_rows_kernel, x, out_shape=out_shape, grid=(m,), num_warps=4, K=k, CHUNK=1024)


def norm_quantize(
    x: jax.Array, gain: jax.Array, shift: jax.Array, quant: QuantConfig, *, eps: float
) -> tuple[jax.Array, jax.Array]:
    """layer_norm(x) gain + shift, rounded to bfloat16, to int8 `[B L, D]` and its float32 scales.

    x bfloat16 `[B, L, D]`, gain and shift float32 `[B or 1, 1, D]`.
    """
    batch, length, width = x.shape
    m = batch * length
    norm: dict[str, Any] = {"D": width, "EPS": eps, "WIDTH": next_power_of_2(width)}
    out_shape = (output(jnp.float32, m, 2),)
    (statistics,) = triton_call(row_statistics_kernel, x, out_shape=out_shape, grid=(m,), num_warps=4, **norm)
    gain, shift = (jnp.broadcast_to(a, (batch, 1, width)) for a in (gain, shift))
    arrays, sizes = (x, statistics, gain, shift), (m, width)
    return launch_blocks(norm_quantize_kernel, *arrays, sizes=sizes, group=quant.group, num_warps=8, L=length, D=width)


def launch_blocks(
    kernel: Any, *arrays: jax.Array, sizes: tuple[int, int], group: int, **constants: Any
) -> tuple[jax.Array, jax.Array]:
    """Launches a kernel of the block scheme, one program a 128 x 128 block of an `[M, K]` matrix; sizes: M and K."""
    m, k = sizes
    grid = k // BLOCK, cdiv(m, BLOCK)
    return triton_call(kernel, *arrays, out_shape=block_shapes(m, k, group), grid=grid, M=m, GROUP=group, **constants)


def block_shapes(m: int, k: int, group: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """An int8 matrix `[m, k]` and its scales, `group` rows and 128 columns to one."""
    return output(jnp.int8, m, k), output(jnp.float32, cdiv(m, group), cdiv(k, BLOCK))
