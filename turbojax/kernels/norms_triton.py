"""Triton kernel of the rotary norm; the equations are in `turbojax.kernels.norms`."""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from turbojax.kernels.sizes import next_power_of_2
from turbojax.kernels.triton_call import triton_call


@triton.jit
def rms_norm_rotate_kernel(
    x, weight, cos, sin, y, L: tl.constexpr, D: tl.constexpr, H: tl.constexpr, EPS: tl.constexpr, WIDTH: tl.constexpr
):
    """One program a row of x, bfloat16 [B, L, D]; WIDTH is D's next power of two.

    weight float32 [D], cos and sin float32 [L, H / 2]. A thread has whole pairs, so that splitting them moves nothing.
    """
    row = tl.program_id(0).to(tl.int64)
    columns, pairs = tl.arange(0, WIDTH), tl.arange(0, WIDTH // 2)
    inside = columns < D
    f = tl.load(x + row * D + columns, mask=inside, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(f * f, axis=0) / D + EPS)
    normed = (f * rstd * tl.load(weight + columns, mask=inside, other=0.0)).to(tl.bfloat16).to(tl.float32)
    a, b = tl.split(tl.reshape(normed, (WIDTH // 2, 2)))
    angles = (row % L) * (H // 2) + pairs % (H // 2)
    c, s = tl.load(cos + angles), tl.load(sin + angles)
    rotated = tl.reshape(tl.join(a * c - b * s, a * s + b * c), (WIDTH,))
    tl.store(y + row * D + columns, rotated.to(tl.bfloat16), mask=inside)


def rms_norm_rotate(x: jax.Array, weight: jax.Array, cos: jax.Array, sin: jax.Array, *, eps: float) -> jax.Array:
    """Launches `norms.rms_norm_rotate`: x bfloat16 `[B, L, D]` to `[B, L, N, H]`, in place if nothing else needs x."""
    batch, length, width = x.shape
    dim = 2 * cos.shape[-1]
    shape = (batch, length, width // dim, dim)
    (y,) = triton_call(
        rms_norm_rotate_kernel,
        x.reshape(shape),
        weight.astype(jnp.float32),
        cos,
        sin,
        out_shape=(jax.ShapeDtypeStruct(shape, jnp.bfloat16),),
        in_place={0: 0},
        grid=(batch * length,),
        num_warps=warps(width),
        L=length,
        D=width,
        H=dim,
        EPS=eps,
        WIDTH=next_power_of_2(width),
    )
    return y


def warps(width: int) -> int:
    """Warps a program: 32 values of a row a thread."""
    return max(1, min(8, next_power_of_2(width) // 1024))
