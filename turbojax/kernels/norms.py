"""Between the matmuls: norms over the width with their modulation, the rotary embedding, the residual sum.

B batch, L tokens, N heads, H head dim, D = N H width. Reductions run in float32; results have x's dtype.

    rms_norm(x)        = x / sqrt(mean(x^2) + eps) * weight
    layer_norm(x)      = (x - mean) / sqrt(var + eps) * weight + bias
    modulated_norm(x)  = layer_norm(x) gain + shift
    rotate(x)          = (a cos - b sin, a sin + b cos) for each interleaved pair (a, b) of a head

Implementations of `rms_norm_rotate`: "triton" (bfloat16, compute capability 8.0 and later) and "reference" (jnp,
anything, anywhere). None chooses; a named one runs or raises.
"""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32

from turbojax.kernels import dispatch
from turbojax.kernels.arrays import Rows, Tokens, Vector

Implementation = Literal["triton", "reference"]
Table = tuple[Float[Array, "L pairs"], Float[Array, "L pairs"]]


class Residual(NamedTuple):
    """The sum that a branch goes into: x `[..., D]`, gate float32 `[B, 1, D]` or None for one."""

    x: jax.Array
    gate: jax.Array | None = None

    def plus(self, branch: jax.Array) -> jax.Array:
        """x + gate * branch in float32, rounded once to x's dtype."""
        if self.gate is None:
            return self.x + branch
        return (self.x.astype(jnp.float32) + self.gate * branch.astype(jnp.float32)).astype(self.x.dtype)


def along_last(vector: jax.Array, like: jax.Array) -> jax.Array:
    """A vector `[D]` with leading axes of one and the dtype of `like`, so that the two broadcast explicitly."""
    return vector.astype(like.dtype).reshape((1,) * (like.ndim - 1) + vector.shape)


def rms_norm(x: Rows, weight: Vector, *, eps: float) -> Rows:
    """x / sqrt(mean(x^2) + eps) * weight; x `[..., D]`, weight `[D]`, in float32, cast back at exit."""
    f = x.astype(jnp.float32)
    f = f * lax.rsqrt(jnp.mean(f * f, axis=-1, keepdims=True) + eps)
    return (f * along_last(weight, f)).astype(x.dtype)


def layer_norm(x: Rows, weight: Vector | None = None, bias: Vector | None = None, *, eps: float) -> Rows:
    """(x - mean) / sqrt(var + eps) * weight + bias; x `[..., D]`, in float32, cast back at exit.

    This is the true layer norm. TurboDiffusion's fast kernel counts its padding in the variance, see docs/numerics.md.
    """
    f = x.astype(jnp.float32)
    f = f - jnp.mean(f, axis=-1, keepdims=True)
    f = f * lax.rsqrt(jnp.mean(f * f, axis=-1, keepdims=True) + eps)
    if weight is not None:
        f = f * along_last(weight, f)
    if bias is not None:
        f = f + along_last(bias, f)
    return f.astype(x.dtype)


def modulated_norm(
    x: Float[Array, "B L D"], gain: Float32[Array, "#B 1 D"], shift: Float32[Array, "#B 1 D"], *, eps: float
) -> Float[Array, "B L D"]:
    """layer_norm(x) gain + shift in float32, cast back; x `[B, L, D]`, gain and shift float32 `[B or 1, 1, D]`."""
    return (layer_norm(x.astype(jnp.float32), eps=eps) * gain + shift).astype(x.dtype)


def rotate(x: Tokens, table: Table) -> Tokens:
    """Rotates interleaved pairs (0, 1), (2, 3), ... in float32; x `[B, L, N, H]`, table cos and sin `[L, H / 2]`."""
    cos, sin = (a[None, :, None, :] for a in table)
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    return jnp.stack((a * cos - b * sin, a * sin + b * cos), axis=-1).reshape(x.shape).astype(x.dtype)


def rms_norm_rotate(
    x: Float[Array, "B L D"], weight: Vector, table: Table, *, eps: float, implementation: Implementation | None = None
) -> Tokens:
    """rotate(rms_norm(x)) by heads, the norm rounded to x's dtype before; one read and one write of x.

    x `[B, L, D]`, weight `[D]`, table cos and sin float32 `[L, H / 2]`, to `[B, L, N, H]`. Gradients are the
    reference's, by `jax.vjp` and `jax.jvp`.
    """
    if choose(implementation, x.dtype, 2 * table[0].shape[-1]) == "triton":
        return fused(x, weight, table, eps)
    return reference(x, weight, table, eps)


def choose(implementation: Implementation | None, dtype: Any, head_dim: int) -> Implementation:
    """Returns the implementation that runs: the named one, or the kernel if it can."""
    takes = dispatch.triton_unsupported(dtype)
    if not takes and head_dim not in (64, 128):
        takes = f"a head dim of 64 or 128, not {head_dim}"
    return dispatch.choose("the rotary norm", implementation, {"triton": takes})


def reference(x: jax.Array, weight: jax.Array, table: Table, eps: float) -> jax.Array:
    normed = rms_norm(x, weight, eps=eps)
    return rotate(normed.reshape(*x.shape[:2], -1, 2 * table[0].shape[-1]), table)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def fused(x: jax.Array, weight: jax.Array, table: Table, eps: float) -> jax.Array:
    from turbojax.kernels import norms_triton

    return norms_triton.rms_norm_rotate(x, weight, *table, eps=eps)


@fused.defjvp
def fused_jvp(eps: float, primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    _, tangent = jax.jvp(functools.partial(reference, eps=eps), primals, tangents)
    return fused(*primals, eps), tangent
