"""Triton kernels of the int8 linear layer; the equations are in `turbojax.kernels.int8`.

M rows, N out-features, K in-features. Every kernel takes pointers and constants; K is a multiple of 128. A scale covers
128 in-features and `GROUP` rows (128 or 1) in the block scheme, a whole row in the channel scheme.
"""

from typing import NamedTuple

import triton
import triton.language as tl


class Tiles(NamedTuple):
    """Rows and columns of a program's tile, warps, stages of loads in flight, and height of a band of tiles."""

    rows: int
    columns: int
    warps: int
    stages: int
    band: int = 8


# 96 KiB of shared memory, which compute capability 8.9 and 12.0 have; more columns spill registers (tests/kernels).
BLOCK_TILES = Tiles(128, 128, warps=8, stages=3)
CHANNEL_TILES = Tiles(128, 128, warps=4, stages=3)
DEQUANTIZING_TILES = Tiles(128, 128, warps=8, stages=3)


def tiles(scheme: str) -> Tiles:
    return CHANNEL_TILES if scheme == "channel" else BLOCK_TILES


@triton.jit
def to_int8(x, amax):
    """x * 128 / amax, rounded to the nearest, ties to even, 127 at most; amax broadcasts against |x| and bounds it.

    Rounding happens in the addition of 1.5 * 2^23, whose last bit counts ones: the sum's low byte is the code.
    """
    ratio = tl.minimum(x * (128.0 / amax), 127.0)
    return (ratio + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def gelu_tanh(x):
    """GELU, tanh form: x * sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3))."""
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def nan_or_max(f, amax):
    """amax, at least 1e-8, or NaN if any of f is: maxima drop NaN, and a NaN must not become a silent zero."""
    has_nan = tl.sum(tl.sum((f != f).to(tl.int32), axis=1), axis=0) > 0
    return tl.where(has_nan, float("nan"), tl.maximum(amax, 1e-8))


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
    top = tl.max(v.to(tl.int16, bitcast=True) & without_sign, axis=1)
    if GROUP == 128:
        amax = amax_of_bits(tl.max(top, axis=0))
        tl.store(q + offsets, to_int8(v.to(tl.float32), amax), mask=(rows < M)[:, None])
        tl.store(scale + i * (K // 128) + j, amax / 128.0)
    else:
        amax = amax_of_bits(top)
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
    top = tl.zeros((CHUNK,), tl.float32)
    nans = tl.zeros((CHUNK,), tl.int32)
    for start in range(0, K, CHUNK):
        f = tl.load(x + row * K + start + columns, mask=start + columns < K, other=0.0).to(tl.float32)
        top = tl.maximum(top, tl.abs(f))
        nans += (f != f).to(tl.int32)
    amax = tl.where(tl.sum(nans, axis=0) > 0, float("nan"), tl.maximum(tl.max(top, axis=0), 1e-8))
    for start in range(0, K, CHUNK):
        inside = start + columns < K
        f = tl.load(x + row * K + start + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(q + row * K + start + columns, to_int8(f, amax), mask=inside)
    tl.store(scale + row, amax / 128.0)


@triton.jit
def tile_of_program(M: tl.constexpr, N: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, BAND: tl.constexpr):
    """Tile indices: BAND rows of tiles are walked column by column, so that neighbours share cached operands."""
    tiles_m, tiles_n = tl.cdiv(M, TILE_M), tl.cdiv(N, TILE_N)
    program = tl.program_id(0)
    band = program // (BAND * tiles_n)
    height = tl.minimum(tiles_m - band * BAND, BAND)
    within = program % (BAND * tiles_n)
    return band * BAND + within % height, within // height


@triton.jit
def finish(y, bias, columns, N: tl.constexpr, HAS_BIAS: tl.constexpr, GELU: tl.constexpr):
    """Bias and GELU with the reference's roundings: the sum to bfloat16, the biased sum to bfloat16."""
    y = y.to(tl.bfloat16)
    if HAS_BIAS:
        b = tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)
        y = (y.to(tl.float32) + b[None, :]).to(tl.bfloat16)
    if GELU:
        y = gelu_tanh(y.to(tl.float32)).to(tl.bfloat16)
    return y


@triton.jit
def of_rows(gate, rows, columns, M: tl.constexpr, N: tl.constexpr, BATCH: tl.constexpr):
    """What a tile's rows take of gate, float32 [BATCH, N]; a tile belongs to two samples at most.

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
def int8_matmul_kernel(
    x,
    x_scale,
    w,
    w_scale,
    bias,
    residual,
    gate,
    y,
    y_scale,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    SCHEME: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GELU: tl.constexpr,
    BATCH: tl.constexpr,
    RESIDUAL: tl.constexpr,
    REQUANTIZE: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    BAND: tl.constexpr,
):
    """y = x w^T: x int8 [M, K], w int8 [N, K], y bfloat16 [M, N], or int8 with a scale per 128 x 128 block.

    With RESIDUAL y = residual + gate (x w^T), residual bfloat16 [M, N], gate float32 [BATCH, N].

    SCHEME "block": x_scale [M / GROUP, K / 128], w_scale [N / 128, K / 128]; the tile is 128 x 128.
    SCHEME "channel": x_scale [M], w_scale [N]; one int32 sum over all of K.
    """
    tile_m, tile_n = tile_of_program(M, N, TILE_M, TILE_N, BAND)
    rows, columns = tile_m * TILE_M + tl.arange(0, TILE_M), tile_n * TILE_N + tl.arange(0, TILE_N)
    # Rows and columns past the end repeat inside ones: loads need no mask, and nothing of them is stored.
    x_ptrs = x + (rows % M).to(tl.int64)[:, None] * K + tl.arange(0, 128)[None, :]
    w_ptrs = w + (columns % N).to(tl.int64)[:, None] * K + tl.arange(0, 128)[None, :]
    acc = tl.zeros((TILE_M, TILE_N), tl.float32)
    if SCHEME == "channel":
        total = tl.zeros((TILE_M, TILE_N), tl.int32)
        for _ in range(0, K, 128):
            total = tl.dot(tl.load(x_ptrs), tl.load(w_ptrs).T, total, out_dtype=tl.int32)
            x_ptrs += 128
            w_ptrs += 128
        row_scale, column_scale = tl.load(x_scale + rows % M), tl.load(w_scale + columns % N)
        acc = total.to(tl.float32) * row_scale[:, None] * column_scale[None, :]
    else:
        if GROUP == 128:
            x_scale += tile_m * (K // 128)
        else:
            x_scale += (rows % M) * (K // 128)
        w_scale += tile_n * (K // 128)
        for block in range(0, K // 128):
            row_scale, block_scale = tl.load(x_scale + block), tl.load(w_scale + block)
            part = tl.dot(tl.load(x_ptrs), tl.load(w_ptrs).T, out_dtype=tl.int32).to(tl.float32)
            x_ptrs += 128
            w_ptrs += 128
            if GROUP == 128:
                acc += part * (row_scale * block_scale)
            else:
                acc += part * (row_scale * block_scale)[:, None]
    out = finish(acc, bias, columns, N, HAS_BIAS, GELU)
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    offsets = rows.to(tl.int64)[:, None] * N + columns[None, :]
    if RESIDUAL:
        own = tl.load(residual + offsets, mask=inside, other=0.0).to(tl.float32)
        out = (own + of_rows(gate, rows, columns, M, N, BATCH) * out.to(tl.float32)).to(tl.bfloat16)
    if REQUANTIZE:
        f = tl.where(inside, out.to(tl.float32), 0.0)
        amax = nan_or_max(f, tl.max(tl.max(tl.abs(f), axis=1), axis=0))
        tl.store(y + offsets, to_int8(f, amax), mask=inside)
        tl.store(y_scale + tile_m * tl.cdiv(N, 128) + tile_n, amax / 128.0)
    else:
        tl.store(y + offsets, out, mask=inside)


@triton.jit
def dequantizing_matmul_kernel(
    x,
    w,
    w_scale,
    bias,
    y,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    SCHEME: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GELU: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    BAND: tl.constexpr,
):
    """y = x w^T with x bfloat16 [M, K] and w int8 [N, K], whose values are exact in bfloat16.

    Computed as (w x^T)^T: tensor cores take the converted operand from registers only on the left. The scale of a
    128 x 128 weight block multiplies that block's float32 sum.
    """
    tile_m, tile_n = tile_of_program(M, N, TILE_M, TILE_N, BAND)
    rows, columns = tile_m * TILE_M + tl.arange(0, TILE_M), tile_n * TILE_N + tl.arange(0, TILE_N)
    x_ptrs = x + (rows % M).to(tl.int64)[:, None] * K + tl.arange(0, 128)[None, :]
    w_ptrs = w + (columns % N).to(tl.int64)[:, None] * K + tl.arange(0, 128)[None, :]
    acc = tl.zeros((TILE_N, TILE_M), tl.float32)
    for start in range(0, K, 128):
        weights = tl.load(w_ptrs).to(tl.bfloat16)
        if SCHEME == "channel":
            acc = tl.dot(weights, tl.load(x_ptrs).T, acc)
        else:
            part = tl.dot(weights, tl.load(x_ptrs).T)
            acc += part * tl.load(w_scale + tile_n * (K // 128) + start // 128)
        x_ptrs += 128
        w_ptrs += 128
    if SCHEME == "channel":
        acc *= tl.load(w_scale + columns % N)[:, None]
    out = finish(acc.T, bias, columns, N, HAS_BIAS, GELU)
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    tl.store(y + rows.to(tl.int64)[:, None] * N + columns[None, :], out, mask=inside)


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
def norm_quantize_kernel(
    x,
    statistics,
    gain,
    shift,
    q,
    q_scale,
    M: tl.constexpr,
    L: tl.constexpr,
    D: tl.constexpr,
    GROUP: tl.constexpr,
):
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
