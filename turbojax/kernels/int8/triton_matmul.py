"""Triton kernels of int8 matmuls; the equations are in `reference`.

M rows, N out-features, K in-features. Every kernel takes pointers and constants; K is a multiple of 128. A scale covers
128 in-features and `GROUP` rows (128 or 1) in the block scheme, a whole row in the channel scheme.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from turbojax.kernels.int8.reference import BLOCK, QuantConfig
from turbojax.kernels.int8.triton_quantize import block_shapes, of_rows, to_int8
from turbojax.kernels.norms import Residual
from turbojax.kernels.sizes import cdiv
from turbojax.kernels.triton_call import triton_call


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
def gelu_tanh(x):
    """GELU, tanh form: x * sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3))."""
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def nan_or_max(f, amax):
    """amax, at least 1e-8, or NaN if any of f is: maxima drop NaN, and a NaN must not become a silent zero."""
    has_nan = tl.sum(tl.sum((f != f).to(tl.int32), axis=1), axis=0) > 0
    return tl.where(has_nan, float("nan"), tl.maximum(amax, 1e-8))


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
def epilogue(y, bias, columns, N: tl.constexpr, HAS_BIAS: tl.constexpr, GELU: tl.constexpr):
    """Bias and GELU with the reference's roundings: the sum to bfloat16, the biased sum to bfloat16."""
    y = y.to(tl.bfloat16)
    if HAS_BIAS:
        b = tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)
        y = (y.to(tl.float32) + b[None, :]).to(tl.bfloat16)
    if GELU:
        y = gelu_tanh(y.to(tl.float32)).to(tl.bfloat16)
    return y


@triton.jit
def int8_matmul_kernel(x, x_scale, w, w_scale, bias, residual, gate, y, y_scale,
                       M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, SCHEME: tl.constexpr, GROUP: tl.constexpr,
                       HAS_BIAS: tl.constexpr, GELU: tl.constexpr, BATCH: tl.constexpr, RESIDUAL: tl.constexpr,
                       REQUANTIZE: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr,
                       BAND: tl.constexpr):  # fmt: skip
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
        sums = tl.zeros((TILE_M, TILE_N), tl.int32)
        for _ in range(0, K, 128):
            sums = tl.dot(tl.load(x_ptrs), tl.load(w_ptrs).T, sums, out_dtype=tl.int32)
            x_ptrs += 128
            w_ptrs += 128
        row_scale, column_scale = tl.load(x_scale + rows % M), tl.load(w_scale + columns % N)
        acc = sums.to(tl.float32) * row_scale[:, None] * column_scale[None, :]
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
    out = epilogue(acc, bias, columns, N, HAS_BIAS, GELU)
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
def dequantizing_matmul_kernel(x, w, w_scale, bias, y,
                               M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, SCHEME: tl.constexpr,
                               HAS_BIAS: tl.constexpr, GELU: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr,
                               BAND: tl.constexpr):  # fmt: skip
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
    out = epilogue(acc.T, bias, columns, N, HAS_BIAS, GELU)
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    tl.store(y + rows.to(tl.int64)[:, None] * N + columns[None, :], out, mask=inside)


def matmul(
    x_q: jax.Array,
    x_scale: jax.Array,
    w_q: jax.Array,
    w_scale: jax.Array,
    bias: jax.Array | None,
    quant: QuantConfig,
    *,
    gelu: bool,
    requantize: bool = False,
    add_to: Residual | None = None,
) -> tuple[jax.Array, jax.Array]:
    """x int8 `[M, K]` times w int8 `[N, K]`, bfloat16 `[M, N]`, or int8 with its scales if requantize.

    The scales are a placeholder of one element otherwise.
    """
    m, n = len(x_q), len(w_q)
    result = jax.ShapeDtypeStruct((m, n), jnp.int8 if requantize else jnp.bfloat16)
    scales = block_shapes(m, n, BLOCK)[1] if requantize else jax.ShapeDtypeStruct((1, 1), jnp.float32)
    residual, gate = jnp.zeros(8, jnp.bfloat16), jnp.zeros(4, jnp.float32)  # placeholders
    if add_to is not None:
        residual, gate = add_to.x, gates(add_to)
    y, y_scale = launch_tiles(
        int8_matmul_kernel,
        *(x_q, x_scale, w_q, w_scale, bias_or_zeros(bias, n), residual, gate),
        out_shape=(result, scales),
        sizes=(m, n, x_q.shape[1]),
        tiles=tiles(quant.scheme),
        SCHEME=quant.scheme,
        GROUP=quant.group,
        HAS_BIAS=bias is not None,
        GELU=gelu,
        BATCH=1 if add_to is None else add_to.x.shape[0],
        RESIDUAL=add_to is not None,
        REQUANTIZE=requantize,
    )
    return y, y_scale


def dequantizing_matmul(
    x: jax.Array, w_q: jax.Array, w_scale: jax.Array, bias: jax.Array | None, quant: QuantConfig, *, gelu: bool
) -> jax.Array:
    """x bfloat16 `[M, K]` times w int8 `[N, K]`, dequantized in the kernel; bfloat16 `[M, N]`."""
    (m, k), n = x.shape, len(w_q)
    (y,) = launch_tiles(
        dequantizing_matmul_kernel,
        *(x, w_q, w_scale, bias_or_zeros(bias, n)),
        out_shape=(jax.ShapeDtypeStruct((m, n), jnp.bfloat16),),
        sizes=(m, n, k),
        tiles=DEQUANTIZING_TILES,
        SCHEME=quant.scheme,
        HAS_BIAS=bias is not None,
        GELU=gelu,
    )
    return y


def launch_tiles(
    kernel: Any,
    *arrays: jax.Array,
    out_shape: Sequence[jax.ShapeDtypeStruct],
    sizes: tuple[int, int, int],
    tiles: Tiles,
    **constants: Any,
) -> Any:
    """Launches a matmul's kernel, one program a tile of the result; sizes: M, N and K."""
    m, n, k = sizes
    constants |= {"M": m, "N": n, "K": k, "TILE_M": tiles.rows, "TILE_N": tiles.columns, "BAND": tiles.band}
    return triton_call(
        kernel,
        *arrays,
        out_shape=out_shape,
        grid=(cdiv(m, tiles.rows) * cdiv(n, tiles.columns),),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        **constants,
    )


def bias_or_zeros(bias: jax.Array | None, n: int) -> jax.Array:
    """A bias `[N]` in bfloat16, zeros in place of None."""
    return jnp.zeros(n, jnp.bfloat16) if bias is None else bias.astype(jnp.bfloat16)


def gates(residual: Residual) -> jax.Array:
    """The gate of every sample, float32 `[B, D]`."""
    batch, _, width = residual.x.shape
    return jnp.ones((batch, width), jnp.float32) if residual.gate is None else residual.gate.reshape(batch, width)
