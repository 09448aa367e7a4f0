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
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int8, Int32

from turbojax.errors import UserError

Scheme = Literal["block128", "channel"]
WeightScale = Float32[Array, "n_blocks k_blocks"] | Float32[Array, "N"]

BLOCK = 128
HOPPER_STAGES = 4  # blocks of features that the Hopper kernel has in flight
SMALLEST_AMAX = 1e-8


@dataclasses.dataclass(frozen=True)
class QuantConfig:
    """Format of the weights and activations of linear layers.

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
    """Returns a scheme by the name that configurations use."""
    if name not in QUANT_SCHEMES:
        raise UserError(f"quant_scheme={name!r} is unknown; choose one of {', '.join(QUANT_SCHEMES)}")
    return QUANT_SCHEMES[name]


def scheme_name(config: QuantConfig) -> str:
    """Returns the name of a scheme, see `quant_scheme`; raises UserError where there is none for it."""
    for name, scheme in QUANT_SCHEMES.items():
        if scheme == config:
            return name
    raise UserError(f"{config} is none of the schemes {', '.join(QUANT_SCHEMES)}")


class Quantized(NamedTuple):
    """int8 activations `[..., K]` and their float32 scales by flattened row, see the module docstring."""

    q: Int8[Array, "*rows K"]
    scale: Float32[Array, "..."]


def quantize_blocks(
    x: Float[Array, "M K"], *, group: int = BLOCK
) -> tuple[Int8[Array, "M K"], Float32[Array, "m_groups k_blocks"]]:
    """x `[M, K]` to int8 `[M, K]` and float32 scales `[ceil(M / group), ceil(K / 128)]`; the reference.

    Partial blocks at the ends use the rows and columns that exist.
    """
    m, k = x.shape
    f = jnp.pad(x.astype(jnp.float32), ((0, -m % group), (0, -k % BLOCK)))
    blocks = f.reshape(f.shape[0] // group, group, f.shape[1] // BLOCK, BLOCK)
    amax = largest(blocks, axis=(1, 3))
    return to_int8(blocks, amax).reshape(f.shape)[:m, :k], (amax / 128.0)[:, 0, :, 0]


def quantize_rows(x: Float[Array, "M K"]) -> tuple[Int8[Array, "M K"], Float32[Array, "M"]]:
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


def quantize_weight(weight: Float[Array, "N K"], scheme: Scheme) -> tuple[Int8[Array, "N K"], WeightScale]:
    """A weight `[N, K]` to int8 and its scales, `[ceil(N / 128), ceil(K / 128)]` or `[N]`."""
    return quantize_blocks(weight) if scheme == "block128" else quantize_rows(weight)


def dequantize_weight(q: Int8[Array, "N K"], scale: WeightScale, dtype=jnp.float32) -> Float[Array, "N K"]:
    """int8 `[N, K]` and its scales, of either scheme, back to values in `dtype`."""
    if scale.ndim == 1:
        return (q.astype(jnp.float32) * scale[:, None]).astype(dtype)
    n, k = q.shape
    spread = jnp.repeat(jnp.repeat(scale, BLOCK, axis=0), BLOCK, axis=1)[:n, :k]
    return (q.astype(jnp.float32) * spread).astype(dtype)


def matmul_blocks(
    x_q: Int8[Array, "M K"],
    x_scale: Float32[Array, "m_groups k_blocks"],
    w_q: Int8[Array, "N K"],
    w_scale: Float32[Array, "n_blocks k_blocks"],
    *,
    group: int = BLOCK,
) -> Float32[Array, "M N"]:
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


def matmul_rows(
    x_q: Int8[Array, "M K"], x_scale: Float32[Array, "M"], w_q: Int8[Array, "N K"], w_scale: Float32[Array, "N"]
) -> Float32[Array, "M N"]:
    """The channel scheme's sum, float32 `[M, N]`; the reference."""
    return int32_matmul(x_q, w_q).astype(jnp.float32) * x_scale[:, None] * w_scale[None, :]


def int32_matmul(x_q: Int8[Array, "M K"], w_q: Int8[Array, "N K"]) -> Int32[Array, "M N"]:
    return lax.dot_general(x_q, w_q, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)


def epilogue(y: jax.Array, bias: jax.Array | None, *, gelu: bool, dtype) -> jax.Array:
    y = y.astype(dtype)
    if bias is not None:
        y = y + bias.astype(dtype)[None]
    return jax.nn.gelu(y.astype(jnp.float32)).astype(dtype) if gelu else y
