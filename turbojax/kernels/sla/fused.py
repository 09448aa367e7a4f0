"""Sparse-linear attention out of fused kernels, with its gradients; the equations are in `reference`.

block means of q, the longest query of each block    reads q
block means of k, phi(k)^T v, sum phi(k), longest k  reads k and v
scores, and the block map from them                  small
sparse softmax + linear branch + projection + bias   reads q and the chosen blocks of k and v, writes the result
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from turbojax.kernels.dispatch import compute_capability
from turbojax.kernels.sla import mosaic_forward, triton_backward, triton_forward, triton_linear, triton_summary
from turbojax.kernels.sla.reference import SparseInputs
from turbojax.kernels.sla.triton_forward import Settings, SparseKernel


def settings(sparse_kernel: SparseKernel, count: int, *, block_q: int, block_k: int, dim: int) -> Settings:
    """Returns the fastest settings for the device's compute capability."""
    capability, sizes = compute_capability(), {"block_q": block_q, "block_k": block_k, "dim": dim}
    forward, backward = triton_forward.tiles(capability, **sizes), triton_backward.tiles(capability, **sizes)
    return Settings(count, block_q, block_k, sparse_kernel, forward, backward)


def sparse_forward(
    inputs: SparseInputs, settings: Settings, *, residuals: bool
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """`triton_forward.sparse_forward`, or the Hopper kernel in its place, which has no residuals."""
    if settings.sparse_kernel == "mosaic" and not residuals:
        return mosaic_forward.sparse_forward(inputs, block_k=settings.block_k), None, None
    return triton_forward.sparse_forward(inputs, settings, residuals=residuals)


def exact_einsum(equation: str, *arrays: jax.Array) -> jax.Array:
    """Computes float32 products, not the tensor cores' shorter ones."""
    return jnp.einsum(equation, *arrays, precision=lax.Precision.HIGHEST)


def block_table(q: jax.Array, k_means: jax.Array, settings: Settings) -> tuple[jax.Array, jax.Array]:
    """Computes `reference.block_table` from the means of k's blocks, float32 `[B, N, key blocks, H]`.

    Also the largest norm of a query of each block, float32 `[B, N, query blocks]`.
    """
    k_mean = triton_summary.mean_of_means(k_means, q.shape[1], settings.block_k)
    q_means, q_norms = triton_summary.block_means(q, settings.block_q)
    return table_of_means(q_means, k_means, k_mean, settings.count), q_norms


def table_of_means(q_means: jax.Array, k_means: jax.Array, k_mean: jax.Array, count: int) -> jax.Array:
    """The block map from block means `[B, N, blocks, H]` and the mean of k `[B, N, H]`, all float32."""
    scores = exact_einsum("bnih,bnjh->bnij", q_means, k_means - k_mean[:, :, None])
    return triton_summary.choose_blocks(scores, count)


def score_bounds(q_norms: jax.Array, k_norm: jax.Array, dim: int) -> jax.Array:
    """Largest magnitude of scores, `[B, N, query blocks]`, by the norms of a block's queries and of all keys."""
    return q_norms * k_norm[:, :, None] * dim**-0.5


def project_state(state: jax.Array, proj_weight: jax.Array) -> jax.Array:
    """phi(k)^T v W_l^T, bfloat16 `[B, N, H, H]`, from float32 phi(k)^T v."""
    return exact_einsum("bnhe,de->bnhd", state, proj_weight.astype(jnp.float32)).astype(jnp.bfloat16)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, proj_weight: jax.Array, proj_bias: jax.Array, settings: Settings
) -> jax.Array:
    """`sla.sparse_linear_attention` of bfloat16 q, k, v `[B, L, N, H]`; the block map takes no gradient."""
    out, _ = forward(q, k, v, proj_weight, proj_bias, settings, residuals=False)
    return out


def forward(q, k, v, proj_weight, proj_bias, settings: Settings, *, residuals: bool = True):
    """Returns the result, and the residuals that the gradients need."""
    k_means, state, normalizer, k_norm = triton_summary.key_summary(k, v, settings.block_k, norms=True)
    table, q_norms = block_table(q, k_means, settings)
    projected = project_state(state, proj_weight)
    bounds = score_bounds(q_norms, k_norm, q.shape[-1])
    inputs = SparseInputs(q, k, v, table, projected, normalizer, proj_bias.astype(jnp.float32), bounds)
    out, sparse, lse = sparse_forward(inputs, settings, residuals=residuals)
    return out, (q, k, v, proj_weight, proj_bias, table, state, normalizer, sparse, lse)


def backward(settings: Settings, kept, d_out: jax.Array) -> tuple[jax.Array, ...]:
    q, k, v, proj_weight, proj_bias, table, state, normalizer, sparse, lse = kept
    projected = project_state(state, proj_weight)
    dq, d_projected, d_normalizer, d_bias = triton_linear.linear_queries(q, d_out, projected, normalizer)
    d_state = exact_einsum("bnhd,de->bnhe", d_projected, proj_weight.astype(jnp.float32)).astype(q.dtype)
    dk, dv = triton_linear.linear_keys(k, v, d_state, d_normalizer)
    dq, dk, dv = triton_backward.sparse_backward(q, k, v, table, sparse, lse, d_out, (dq, dk, dv), settings)
    d_weight = exact_einsum("bnhd,bnhe->de", d_projected, state).astype(proj_weight.dtype)
    return dq, dk, dv, d_weight, d_bias.sum(axis=(0, 1)).astype(proj_bias.dtype)


attention.defvjp(forward, backward)
