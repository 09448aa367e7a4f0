"""int8 linear layers with one scale per 128 x 128 block, as in TurboDiffusion's quantized checkpoints.

    amax = max(1e-8, max |w| in the block),  scale = amax / 128,  q = clip(round(w * 128 / amax), -128, 127)
    y[m, n] = sum over blocks k of (x_scale[m, k] w_scale[n, k]) sum over i in k of x_q[m, i] w_q[n, i]

Activations are quantized the same way in blocks of 128 rows, after their leading axes are flattened. The positive
extreme of a block becomes 127, the negative one -128. The inner sum is int32, the outer one float32.
"""

import jax
import jax.numpy as jnp
from jax import lax

from turbojax.errors import UserError

BLOCK = 128


def quantize_blocks(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x `[M, K]` to int8 `[M, K]` and float32 scales `[ceil(M / 128), ceil(K / 128)]`.

    Partial blocks at the ends use the rows and columns that exist.
    """
    m, k = x.shape
    f = jnp.pad(x.astype(jnp.float32), ((0, -m % BLOCK), (0, -k % BLOCK)))
    blocks = f.reshape(f.shape[0] // BLOCK, BLOCK, f.shape[1] // BLOCK, BLOCK)
    amax = jnp.maximum(jnp.max(jnp.abs(blocks), axis=(1, 3), keepdims=True), 1e-8)
    q = jnp.clip(jnp.round(blocks * (128.0 / amax)), -128, 127).astype(jnp.int8)
    return q.reshape(f.shape)[:m, :k], (amax / 128.0)[:, 0, :, 0]


def dequantize_blocks(q: jax.Array, scale: jax.Array, dtype=jnp.float32) -> jax.Array:
    """int8 `[..., N, K]` and scales `[..., N / 128, K / 128]` back to values in `dtype`."""
    n, k = q.shape[-2:]
    spread = jnp.repeat(jnp.repeat(scale, BLOCK, axis=-2), BLOCK, axis=-1)[..., :n, :k]
    return (q.astype(jnp.float32) * spread).astype(dtype)


def matmul_blocks(x_q: jax.Array, x_scale: jax.Array, w_q: jax.Array, w_scale: jax.Array) -> jax.Array:
    """The sum of the module docstring: `[M, K]` int8 times `[N, K]` int8 to float32 `[M, N]`."""
    (m, k), n = x_q.shape, w_q.shape[0]

    def add_block(y: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
        x_k = lax.dynamic_slice_in_dim(x_q, i * BLOCK, BLOCK, axis=1)
        w_k = lax.dynamic_slice_in_dim(w_q, i * BLOCK, BLOCK, axis=1)
        part = lax.dot_general(x_k, w_k, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
        rows = jnp.repeat(x_scale[:, i], BLOCK)[:m, None]
        columns = jnp.repeat(w_scale[:, i], BLOCK)[None, :n]
        return y + part.astype(jnp.float32) * (rows * columns), None

    y, _ = lax.scan(add_block, jnp.zeros((m, n), jnp.float32), jnp.arange(k // BLOCK))
    return y


def matmul(x: jax.Array, w_q: jax.Array, w_scale: jax.Array) -> jax.Array:
    """Quantizes x `[..., K]` and multiplies with w_q `[N, K]`; returns `[..., N]` in x's dtype."""
    n, k = w_q.shape
    if k % BLOCK:
        raise UserError(f"int8 linear layers need in_features to be a multiple of {BLOCK}, not {k}")
    x_q, x_scale = quantize_blocks(x.reshape(-1, k))
    return matmul_blocks(x_q, x_scale, w_q, w_scale).astype(x.dtype).reshape(*x.shape[:-1], n)
