"""int8 linear layers, y = x W^T + b, whose weights are dequantized inside the matmul.

M rows (tokens), K in-features, N out-features. Two schemes:

block128 (TurboDiffusion's checkpoints): one scale per 128 x 128 block of the weight, one per 128 x 128 block of the
activations, or with group=1 one per 1 x 128.

    amax = max(1e-8, max |w| in the block),  scale = amax / 128,  q = clip(round(w 128 / amax), -128, 127)
    y[m, n] = sum over blocks k of (x_scale[m, k] w_scale[n, k]) sum over i in k of x_q[m, i] w_q[n, i]

channel: one scale per row of the weight and per row of the activations.

    y[m, n] = x_scale[m] w_scale[n] sum over i of x_q[m, i] w_q[n, i]

Activations are quantized after their leading axes are flattened. The inner sums are int32, the outer one float32; the
result is rounded to the output's dtype before and after the bias. The positive extreme of a block becomes 127, the
negative one -128; NaN in gives NaN out, by way of its scale.

Implementations: "mosaic" (Hopper), "triton" (compute capability 8.0 and later), both bfloat16, and "reference" (jnp,
exact, anywhere). None chooses; a named one runs or raises.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from turbojax.errors import UserError
from turbojax.kernels import dispatch
from turbojax.kernels.norms import Residual, modulated_norm
from turbojax.kernels.triton_call import triton_call

Scheme = Literal["block128", "channel"]
Implementation = Literal["mosaic", "triton", "reference"]

BLOCK = 128
HOPPER_STAGES = 4  # blocks of features that the Hopper kernel has in flight
SMALLEST_AMAX = 1e-8


@dataclasses.dataclass(frozen=True)
class QuantConfig:
    """How linear layers hold weights and take activations.

    scheme: "block128" or "channel". group: rows of activations a scale, 128 or 1 (block128 only; 1 is more exact).
    weight_only: activations stay bfloat16 and the weight is converted in the kernel: best quality, same memory.
    """

    scheme: Scheme = "block128"
    group: Literal[1, 128] = 128
    weight_only: bool = False


QUANT_SCHEMES: dict[str, QuantConfig] = {
    "block128": QuantConfig(),
    "block128_rows": QuantConfig(group=1),
    "block128_weights": QuantConfig(weight_only=True),
    "channel": QuantConfig("channel"),
    "channel_weights": QuantConfig("channel", weight_only=True),
}


def quant_scheme(name: str) -> QuantConfig:
    """A scheme by the name that configurations use."""
    if name not in QUANT_SCHEMES:
        raise UserError(f"quant_scheme={name!r} is unknown; choose one of {', '.join(QUANT_SCHEMES)}")
    return QUANT_SCHEMES[name]


def scheme_name(config: QuantConfig) -> str:
    """The name of a scheme, see `quant_scheme`; raises UserError where there is none for it."""
    for name, scheme in QUANT_SCHEMES.items():
        if scheme == config:
            return name
    raise UserError(f"{config} is none of the schemes {', '.join(QUANT_SCHEMES)}")


class Quantized(NamedTuple):
    """int8 activations `[..., K]` and their float32 scales by flattened row, see the module docstring."""

    q: jax.Array
    scale: jax.Array


def choose(implementation: Implementation | None, dtype) -> Implementation:
    """The implementation that runs on values of a dtype, where there is a Triton kernel: the named one, or None's."""
    return dispatch.choose("the int8 linear layer", implementation, {"triton": dispatch.triton_obstacle(dtype)})


def choose_matmul(
    implementation: Implementation | None, dtype, quant: QuantConfig, sizes: tuple[int, int, int]
) -> Implementation:
    """The same for a matmul of int8 with int8, its result in dtype; sizes: M, N and K."""
    triton = dispatch.triton_obstacle(dtype)
    mosaic = triton or mosaic_obstacle(quant, *sizes)
    return dispatch.choose("the int8 matmul", implementation, {"mosaic": mosaic, "triton": triton})


def mosaic_obstacle(quant: QuantConfig, m: int, n: int, k: int) -> str | None:
    """Names what the Hopper kernel takes besides, where it cannot run; None if it can."""
    if dispatch.compute_capability() != (9, 0):
        return "a GPU of compute capability 9.0"
    if quant.scheme == "block128" and quant.group == 1:
        return "one scale a block of 128 rows, not one a row"
    if m % 8:  # Mosaic drops rows behind the last full group of 8
        return f"rows in eights, not {m}"
    if n % BLOCK:
        return f"out_features in multiples of {BLOCK}, not {n}"
    # Else nothing keeps a warp group from the next tile while the other still reads this one's largest values.
    if k <= HOPPER_STAGES * BLOCK:
        return f"more than {HOPPER_STAGES * BLOCK} in_features, as many as it has in flight, not {k}"
    return None


def check_features(k: int) -> None:
    if k % BLOCK:
        raise UserError(
            f"int8 linear layers need in_features to be a multiple of {BLOCK}, not {k}; leave it unquantized"
        )


# Quantization.


def quantize_blocks(x: jax.Array, *, group: int = BLOCK) -> tuple[jax.Array, jax.Array]:
    """x `[M, K]` to int8 `[M, K]` and float32 scales `[ceil(M / group), ceil(K / 128)]`; the reference.

    Partial blocks at the ends use the rows and columns that exist.
    """
    m, k = x.shape
    f = jnp.pad(x.astype(jnp.float32), ((0, -m % group), (0, -k % BLOCK)))
    blocks = f.reshape(f.shape[0] // group, group, f.shape[1] // BLOCK, BLOCK)
    amax = largest(blocks, axis=(1, 3))
    return to_int8(blocks, amax).reshape(f.shape)[:m, :k], (amax / 128.0)[:, 0, :, 0]


def quantize_rows(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x `[M, K]` to int8 `[M, K]` and float32 scales `[M]`; the reference."""
    f = x.astype(jnp.float32)
    amax = largest(f, axis=(1,))
    return to_int8(f, amax), (amax / 128.0)[:, 0]


def largest(f: jax.Array, *, axis: tuple[int, ...]) -> jax.Array:
    """max |f|, at least 1e-8, axes kept; NaN if any is, which XLA's maximum on CPUs does not promise."""
    amax = jnp.maximum(jnp.max(jnp.abs(f), axis=axis, keepdims=True), SMALLEST_AMAX)
    return jnp.where(jnp.isnan(f).any(axis=axis, keepdims=True), jnp.nan, amax)


def to_int8(f: jax.Array, amax: jax.Array) -> jax.Array:
    return jnp.clip(jnp.round(f * (128.0 / amax)), -128, 127).astype(jnp.int8)


def quantize_weight(weight: jax.Array, scheme: Scheme) -> tuple[jax.Array, jax.Array]:
    """A weight `[N, K]` to int8 and its scales, `[ceil(N / 128), ceil(K / 128)]` or `[N]`."""
    return quantize_blocks(weight) if scheme == "block128" else quantize_rows(weight)


def dequantize_weight(q: jax.Array, scale: jax.Array, dtype=jnp.float32) -> jax.Array:
    """int8 `[N, K]` and its scales, of either scheme, back to values in `dtype`."""
    if scale.ndim == 1:
        return (q.astype(jnp.float32) * scale[:, None]).astype(dtype)
    n, k = q.shape
    spread = jnp.repeat(jnp.repeat(scale, BLOCK, axis=0), BLOCK, axis=1)[:n, :k]
    return (q.astype(jnp.float32) * spread).astype(dtype)


def quantize(x: jax.Array, quant: QuantConfig, *, implementation: Implementation | None = None) -> Quantized:
    """Activations `[..., K]` to int8."""
    k = x.shape[-1]
    check_features(k)
    rows = x.reshape(-1, k)
    if choose(implementation, x.dtype) == "reference":
        q, scale = quantize_rows(rows) if quant.scheme == "channel" else quantize_blocks(rows, group=quant.group)
    else:
        q, scale = quantize_triton(rows, quant)
    return Quantized(q.reshape(x.shape), scale)


def quantize_triton(x: jax.Array, quant: QuantConfig) -> tuple[jax.Array, jax.Array]:
    from turbojax.kernels import int8_triton

    m, k = x.shape
    if quant.scheme == "channel":
        return triton_call(
            int8_triton.quantize_rows_kernel,
            x,
            out_shape=(jax.ShapeDtypeStruct((m, k), jnp.int8), jax.ShapeDtypeStruct((m,), jnp.float32)),
            grid=(m,),
            num_warps=4,
            num_stages=1,
            K=k,
            CHUNK=1024,
        )
    return triton_call(
        int8_triton.quantize_blocks_kernel,
        x,
        out_shape=block_shapes(m, k, quant.group),
        grid=(k // BLOCK, row_blocks(m)),
        num_warps=16,
        num_stages=1,
        M=m,
        K=k,
        GROUP=quant.group,
    )


def block_shapes(m: int, k: int, group: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """An int8 matrix `[m, k]` and its scales, `group` rows and 128 columns to one."""
    scales = (-(-m // group), -(-k // BLOCK))
    return jax.ShapeDtypeStruct((m, k), jnp.int8), jax.ShapeDtypeStruct(scales, jnp.float32)


def row_blocks(rows: int) -> int:
    """Blocks of 128 rows."""
    return -(-rows // BLOCK)


def norm_quantize(
    x: jax.Array,
    gain: jax.Array,
    shift: jax.Array,
    quant: QuantConfig,
    *,
    eps: float,
    implementation: Implementation | None = None,
) -> Quantized:
    """layer_norm(x) gain + shift, rounded to x's dtype and quantized.

    x `[B, L, D]`, gain and shift float32 `[B or 1, 1, D]`. The kernel reads x twice and writes int8 once.
    """
    check_features(x.shape[-1])
    if quant.scheme == "channel" or choose(implementation, x.dtype) == "reference":
        return quantize(modulated_norm(x, gain, shift, eps=eps), quant, implementation=implementation)
    from turbojax.kernels import int8_triton

    batch, length, width = x.shape
    m = batch * length
    (statistics,) = triton_call(
        int8_triton.row_statistics_kernel,
        x,
        out_shape=(jax.ShapeDtypeStruct((m, 2), jnp.float32),),
        grid=(m,),
        num_warps=4,
        num_stages=1,
        D=width,
        EPS=eps,
        WIDTH=1 << (width - 1).bit_length(),
    )
    q, q_scale = triton_call(
        int8_triton.norm_quantize_kernel,
        x,
        statistics,
        *(jnp.broadcast_to(a, (batch, 1, width)) for a in (gain, shift)),
        out_shape=block_shapes(m, width, quant.group),
        grid=(width // BLOCK, row_blocks(m)),
        num_warps=8,
        num_stages=1,
        M=m,
        L=length,
        D=width,
        GROUP=quant.group,
    )
    return Quantized(q.reshape(x.shape), q_scale)


# Multiplication.


def matmul(
    x: Quantized,
    w_q: jax.Array,
    w_scale: jax.Array,
    bias: jax.Array | None,
    quant: QuantConfig,
    *,
    gelu: bool = False,
    add_to: Residual | None = None,
    dtype=jnp.bfloat16,
    implementation: Implementation | None = None,
) -> jax.Array:
    """int8 x `[..., K]` times int8 w `[N, K]`, plus bias `[N]`, through GELU (tanh) if asked: `[..., N]` in dtype.

    With add_to the result is its sum with that, whose x is `[B, L, N]`; the kernels add before they write.
    """
    n, k = w_q.shape
    check_features(k)
    x_q = x.q.reshape(-1, k)
    chosen = choose_matmul(implementation, dtype, quant, (len(x_q), n, k))
    if add_to is not None and (chosen == "reference" or not adds_in_kernel(add_to, quant)):
        y = matmul(x, w_q, w_scale, bias, quant, gelu=gelu, dtype=dtype, implementation=implementation)
        return add_to.plus(y)
    if chosen == "reference":
        if quant.scheme == "block128":
            total = matmul_blocks(x_q, x.scale, w_q, w_scale, group=quant.group)
        else:
            total = matmul_rows(x_q, x.scale, w_q, w_scale)
        y = finish(total, bias, gelu=gelu, dtype=dtype)
    elif chosen == "mosaic":
        from turbojax.kernels import int8_mosaic

        (y,) = int8_mosaic.matmul(x_q, x.scale, w_q, w_scale, bias, scheme=quant.scheme, gelu=gelu, add_to=add_to)
    else:
        y, _ = matmul_triton(x_q, x.scale, w_q, w_scale, bias, quant, gelu=gelu, requantize=False, add_to=add_to)
    return y.reshape(*x.q.shape[:-1], n)


def adds_in_kernel(residual: Residual, quant: QuantConfig) -> bool:
    """Whether a kernel's epilogue takes the sum.

    A tile, of 128 rows at most, may hold rows of two samples with a gate each; channel tiles lack registers for two.
    """
    batch, length = residual.x.shape[:2]
    return batch == 1 or (quant.scheme == "block128" and length >= BLOCK)


def matmul_requantize(
    x: Quantized,
    w_q: jax.Array,
    w_scale: jax.Array,
    bias: jax.Array | None,
    quant: QuantConfig,
    *,
    gelu: bool = False,
    dtype=jnp.bfloat16,
    implementation: Implementation | None = None,
) -> Quantized:
    """`matmul`, its result quantized for the next layer.

    With 128 x 128 blocks a tile of the result is a block of the next input: it leaves the kernel as int8.
    """
    n, k = w_q.shape
    x_q = x.q.reshape(-1, k)
    chosen = choose_matmul(implementation, dtype, quant, (len(x_q), n, k))
    if chosen == "reference" or quant.scheme == "channel" or quant.group == 1 or n % BLOCK:
        y = matmul(x, w_q, w_scale, bias, quant, gelu=gelu, dtype=dtype, implementation=implementation)
        return quantize(y, quant, implementation="reference" if chosen == "reference" else "triton")
    if chosen == "mosaic":
        from turbojax.kernels import int8_mosaic

        q, scale = int8_mosaic.matmul(x_q, x.scale, w_q, w_scale, bias, scheme="block128", gelu=gelu, requantize=True)
    else:
        q, scale = matmul_triton(x_q, x.scale, w_q, w_scale, bias, quant, gelu=gelu, requantize=True)
    return Quantized(q.reshape(*x.q.shape[:-1], n), scale)


def matmul_blocks(
    x_q: jax.Array, x_scale: jax.Array, w_q: jax.Array, w_scale: jax.Array, *, group: int = BLOCK
) -> jax.Array:
    """The block scheme's sum: `[M, K]` int8 times `[N, K]` int8 to float32 `[M, N]`; the reference."""
    (m, k), n = x_q.shape, w_q.shape[0]

    def add_block(y: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
        x_k = lax.dynamic_slice_in_dim(x_q, i * BLOCK, BLOCK, axis=1)
        w_k = lax.dynamic_slice_in_dim(w_q, i * BLOCK, BLOCK, axis=1)
        rows = jnp.repeat(x_scale[:, i], group)[:m, None]
        columns = jnp.repeat(w_scale[:, i], BLOCK)[None, :n]
        return y + int32_matmul(x_k, w_k).astype(jnp.float32) * (rows * columns), None

    y, _ = lax.scan(add_block, jnp.zeros((m, n), jnp.float32), jnp.arange(k // BLOCK))
    return y


def matmul_rows(x_q: jax.Array, x_scale: jax.Array, w_q: jax.Array, w_scale: jax.Array) -> jax.Array:
    """The channel scheme's sum, float32 `[M, N]`; the reference."""
    return int32_matmul(x_q, w_q).astype(jnp.float32) * x_scale[:, None] * w_scale[None, :]


def int32_matmul(x_q: jax.Array, w_q: jax.Array) -> jax.Array:
    return lax.dot_general(x_q, w_q, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)


def finish(y: jax.Array, bias: jax.Array | None, *, gelu: bool, dtype) -> jax.Array:
    y = y.astype(dtype)
    if bias is not None:
        y = y + bias.astype(dtype)[None]
    return jax.nn.gelu(y.astype(jnp.float32)).astype(dtype) if gelu else y


def matmul_triton(
    x_q,
    x_scale,
    w_q,
    w_scale,
    bias,
    quant: QuantConfig,
    *,
    gelu: bool,
    requantize: bool,
    add_to: Residual | None = None,
):
    """Result and scales; the scales are a placeholder of one element unless requantize."""
    from turbojax.kernels import int8_triton

    (m, k), n = x_q.shape, w_q.shape[0]
    batch = 1 if add_to is None else add_to.x.shape[0]
    tiles = int8_triton.tiles(quant.scheme)
    result = jax.ShapeDtypeStruct((m, n), jnp.int8 if requantize else jnp.bfloat16)
    scales = block_shapes(m, n, BLOCK)[1] if requantize else jax.ShapeDtypeStruct((1, 1), jnp.float32)
    return triton_call(
        int8_triton.int8_matmul_kernel,
        x_q,
        x_scale,
        w_q,
        w_scale,
        jnp.zeros(n, jnp.bfloat16) if bias is None else bias.astype(jnp.bfloat16),
        jnp.zeros(8, jnp.bfloat16) if add_to is None else add_to.x,
        jnp.zeros(4, jnp.float32) if add_to is None else gates(add_to),
        out_shape=(result, scales),
        grid=(-(-m // tiles.rows) * -(-n // tiles.columns),),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        M=m,
        N=n,
        K=k,
        SCHEME=quant.scheme,
        GROUP=quant.group,
        HAS_BIAS=bias is not None,
        GELU=gelu,
        BATCH=batch,
        RESIDUAL=add_to is not None,
        REQUANTIZE=requantize,
        TILE_M=tiles.rows,
        TILE_N=tiles.columns,
        BAND=tiles.band,
    )


def gates(residual: Residual) -> jax.Array:
    """The gate of every sample, float32 `[B, D]`."""
    batch, _, width = residual.x.shape
    return jnp.ones((batch, width), jnp.float32) if residual.gate is None else residual.gate.reshape(batch, width)


def dequantizing_matmul(
    x: jax.Array,
    w_q: jax.Array,
    w_scale: jax.Array,
    bias: jax.Array | None,
    quant: QuantConfig,
    *,
    gelu: bool = False,
    implementation: Implementation | None = None,
) -> jax.Array:
    """x `[..., K]` as it is times a weight that is dequantized in the kernel: `[..., N]` in x's dtype."""
    n, k = w_q.shape
    check_features(k)
    rows = x.reshape(-1, k)
    if choose(implementation, x.dtype) == "reference":
        weight = dequantize_weight(w_q, w_scale)
        y = lax.dot_general(rows.astype(jnp.float32), weight, (((1,), (1,)), ((), ())))
        return finish(y, bias, gelu=gelu, dtype=x.dtype).reshape(*x.shape[:-1], n)
    from turbojax.kernels import int8_triton

    m, tiles = len(rows), int8_triton.DEQUANTIZING_TILES
    (y,) = triton_call(
        int8_triton.dequantizing_matmul_kernel,
        rows,
        w_q,
        w_scale,
        jnp.zeros(n, jnp.bfloat16) if bias is None else bias.astype(jnp.bfloat16),
        out_shape=(jax.ShapeDtypeStruct((m, n), jnp.bfloat16),),
        grid=(-(-m // tiles.rows) * -(-n // tiles.columns),),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        M=m,
        N=n,
        K=k,
        SCHEME=quant.scheme,
        HAS_BIAS=bias is not None,
        GELU=gelu,
        TILE_M=tiles.rows,
        TILE_N=tiles.columns,
        BAND=tiles.band,
    )
    return y.reshape(*x.shape[:-1], n)
