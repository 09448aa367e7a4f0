"""int8 linear layers: the choice of an implementation for each op; the equations are in `reference`.

"mosaic" (Hopper), "triton" (compute capability 8.0 and later), both bfloat16, and "reference" (jnp, exact, anywhere).
None chooses; a named one runs or raises.
"""

from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int8

from turbojax.errors import UserError
from turbojax.kernels import dispatch
from turbojax.kernels.int8.reference import (
    BLOCK,
    HOPPER_STAGES,
    QuantConfig,
    Quantized,
    WeightScale,
    dequantize_weight,
    epilogue,
    matmul_blocks,
    matmul_rows,
    quantize_blocks,
    quantize_rows,
)
from turbojax.kernels.norms import Residual, modulated_norm

Implementation = Literal["mosaic", "triton", "reference"]


def choose(implementation: Implementation | None, dtype) -> Implementation:
    """Returns the implementation that runs on a dtype, of an op with a Triton kernel: the named one, or None's."""
    return dispatch.choose("the int8 linear layer", implementation, {"triton": dispatch.triton_unsupported(dtype)})


def choose_matmul(
    implementation: Implementation | None, dtype, quant: QuantConfig, sizes: tuple[int, int, int]
) -> Implementation:
    """Returns the implementation of a matmul of int8 with int8, its result in dtype; sizes: M, N and K."""
    triton = dispatch.triton_unsupported(dtype)
    mosaic = triton or mosaic_unsupported(quant, *sizes)
    return dispatch.choose("the int8 matmul", implementation, {"mosaic": mosaic, "triton": triton})


def mosaic_unsupported(quant: QuantConfig, m: int, n: int, k: int) -> str | None:
    """Names what the Hopper kernel requires besides, where it cannot run; None if it can."""
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
    """Raises UserError if in_features do not fill whole blocks."""
    if k % BLOCK:
        raise UserError(
            f"int8 linear layers need in_features to be a multiple of {BLOCK}, not {k}; leave it unquantized"
        )


def quantize(
    x: Float[Array, "*rows K"], quant: QuantConfig, *, implementation: Implementation | None = None
) -> Quantized:
    """Quantizes activations `[..., K]` to int8."""
    k = x.shape[-1]
    check_features(k)
    rows = x.reshape(-1, k)
    if choose(implementation, x.dtype) == "reference":
        q, scale = quantize_rows(rows) if quant.scheme == "channel" else quantize_blocks(rows, group=quant.group)
    else:
        from turbojax.kernels.int8 import triton_quantize

        q, scale = triton_quantize.quantize(rows, quant)
    return Quantized(q.reshape(x.shape), scale)


def norm_quantize(
    x: Float[Array, "B L D"],
    gain: Float32[Array, "#B 1 D"],
    shift: Float32[Array, "#B 1 D"],
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
    from turbojax.kernels.int8 import triton_quantize

    q, scale = triton_quantize.norm_quantize(x, gain, shift, quant, eps=eps)
    return Quantized(q.reshape(x.shape), scale)


def matmul(
    x: Quantized,
    w_q: Int8[Array, "N K"],
    w_scale: WeightScale,
    bias: Float[Array, "N"] | None,
    quant: QuantConfig,
    *,
    gelu: bool = False,
    add_to: Residual | None = None,
    dtype=jnp.bfloat16,
    implementation: Implementation | None = None,
) -> Float[Array, "*rows N"]:
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
            sums = matmul_blocks(x_q, x.scale, w_q, w_scale, group=quant.group)
        else:
            sums = matmul_rows(x_q, x.scale, w_q, w_scale)
        y = epilogue(sums, bias, gelu=gelu, dtype=dtype)
    else:
        y, *_ = kernel(chosen)(x_q, x.scale, w_q, w_scale, bias, quant, gelu=gelu, add_to=add_to)
    return y.reshape(*x.q.shape[:-1], n)


def kernel(chosen: Implementation) -> Callable:
    """Returns the matmul of the chosen kernels, which gives the result and, of an int8 one, its scales."""
    if chosen == "mosaic":
        from turbojax.kernels.int8 import mosaic_matmul

        return mosaic_matmul.matmul
    from turbojax.kernels.int8 import triton_matmul

    return triton_matmul.matmul


def adds_in_kernel(residual: Residual, quant: QuantConfig) -> bool:
    """Returns True if a kernel's epilogue can add the residual.

    A tile, of 128 rows at most, may hold rows of two samples with a gate each; channel tiles lack registers for two.
    """
    batch, length = residual.x.shape[:2]
    return batch == 1 or (quant.scheme == "block128" and length >= BLOCK)


def matmul_requantize(
    x: Quantized,
    w_q: Int8[Array, "N K"],
    w_scale: WeightScale,
    bias: Float[Array, "N"] | None,
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
    q, scale = kernel(chosen)(x_q, x.scale, w_q, w_scale, bias, quant, gelu=gelu, requantize=True)
    return Quantized(q.reshape(*x.q.shape[:-1], n), scale)


def dequantizing_matmul(
    x: Float[Array, "*rows K"],
    w_q: Int8[Array, "N K"],
    w_scale: WeightScale,
    bias: Float[Array, "N"] | None,
    quant: QuantConfig,
    *,
    gelu: bool = False,
    implementation: Implementation | None = None,
) -> Float[Array, "*rows N"]:
    """x `[..., K]` as it is times a weight that is dequantized in the kernel: `[..., N]` in x's dtype."""
    n, k = w_q.shape
    check_features(k)
    rows = x.reshape(-1, k)
    if choose(implementation, x.dtype) == "reference":
        weight = dequantize_weight(w_q, w_scale)
        y = lax.dot_general(rows.astype(jnp.float32), weight, (((1,), (1,)), ((), ())))
        return epilogue(y, bias, gelu=gelu, dtype=x.dtype).reshape(*x.shape[:-1], n)
    from turbojax.kernels.int8 import triton_matmul

    y = triton_matmul.dequantizing_matmul(rows, w_q, w_scale, bias, quant, gelu=gelu)
    return y.reshape(*x.shape[:-1], n)
