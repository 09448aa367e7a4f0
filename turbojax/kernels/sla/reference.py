"""Sparse-linear attention (SLA, arXiv 2509.24006, section 4; TurboDiffusion, arXiv 2512.16093).

B batch, L tokens, N heads, H head dim. Queries are cut in blocks I of `block_q` rows, keys in blocks J of `block_k`:

    S_IJ = mean(q_I) . (mean(k_J) - mean(k))           chosen(I) = the topk largest S_IJ
    sparse  = softmax(q k^T / sqrt(H) over the chosen blocks) v
    linear  = phi(q) (phi(k)^T v) / (1e-5 + phi(q) sum phi(k)),   phi = softmax over the head dim, all keys
    output  = sparse + linear W_l^T + b_l

The block map takes no gradient, and no step holds `[L, L]`.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from turbojax.errors import UserError

# Scores no further from zero than this need no maximum: their exponentials, and sums of them, stay within float32.
BOUND = 60.0
LOG2_E = math.log2(math.e)


class SparseInputs(NamedTuple):
    """Arrays that the kernels of the forward pass take.

    q, k, v bfloat16. table: chosen blocks, ascending. projected: (phi(k)^T v) W_l^T, bfloat16. normalizer: sum phi(k).
    bounds: how far from zero a query block's scores can be; within BOUND nothing is rescaled for a maximum.
    """

    q: Float[Array, "B L N H"]
    k: Float[Array, "B L N H"]
    v: Float[Array, "B L N H"]
    table: Int32[Array, "B N q_blocks chosen"]
    projected: Float[Array, "B N H H"]
    normalizer: Float32[Array, "B N H"]
    bias: Float32[Array, "H"]
    bounds: Float32[Array, "B N q_blocks"]


def num_selected(topk: float, key_blocks: int) -> int:
    """Key blocks a query block attends to: the fraction `topk` of all, rounded down, at least one."""
    if not 0 < topk <= 1:
        raise UserError(f"sla_topk={topk} must be in (0, 1]; 0.1 and 0.15 are usual")
    return max(1, int(topk * key_blocks))


def block_means(x: Float[Array, "B L N H"], block: int) -> Float32[Array, "B N blocks H"]:
    """Means over blocks of rows, float32; x `[B, L, N, H]` to `[B, N, ceil(L / block), H]`.

    A partial last block is divided by its own number of rows.
    """
    batch, length, heads, dim = x.shape
    f = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, -length % block), (0, 0), (0, 0)))
    sums = f.reshape(batch, -1, block, heads, dim).sum(axis=2)
    rows = jnp.minimum(block, length - block * jnp.arange(sums.shape[1])).astype(jnp.float32)
    return jnp.moveaxis(sums / rows[None, :, None, None], 1, 2)


def pooled_scores(
    q: Float[Array, "B L N H"], k: Float[Array, "B S N H"], *, block_q: int, block_k: int
) -> Float32[Array, "B N q_blocks k_blocks"]:
    """S of the module docstring, float32 `[B, N, query blocks, key blocks]`."""
    k_mean = jnp.mean(k.astype(jnp.float32), axis=1)[:, :, None]
    k_blocks = block_means(k, block_k) - k_mean
    return jnp.einsum("bnih,bnjh->bnij", block_means(q, block_q), k_blocks)


def block_table(
    q: Float[Array, "B L N H"], k: Float[Array, "B S N H"], *, topk: float, block_q: int, block_k: int
) -> Int32[Array, "B N q_blocks chosen"]:
    """Turns top-k into blocks: the key blocks that each query block attends to, ascending."""
    scores = lax.stop_gradient(pooled_scores(q, k, block_q=block_q, block_k=block_k))
    _, chosen = lax.top_k(scores, num_selected(topk, scores.shape[-1]))
    return jnp.sort(chosen, axis=-1)


def sparse_softmax(
    q: Float[Array, "B L N H"],
    k: Float[Array, "B L N H"],
    v: Float[Array, "B L N H"],
    table: Int32[Array, "B N q_blocks chosen"],
    *,
    block_q: int,
    block_k: int,
) -> Float[Array, "B L N H"]:
    """Softmax attention over the chosen key blocks, `[B, L, N, H]` in q's dtype."""
    batch, length, heads, dim = q.shape

    def blocks_first(x: jax.Array, block: int) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, -length % block), (0, 0), (0, 0)))
        return x.reshape(batch, -1, block, heads, dim).transpose(0, 3, 1, 2, 4)

    k_blocks, v_blocks = blocks_first(k, block_k), blocks_first(v, block_k)
    take = jax.vmap(jax.vmap(lambda blocks, index: blocks[index]))

    def attend(block: tuple[jax.Array, jax.Array]) -> jax.Array:
        q_i, chosen = block
        k_i = take(k_blocks, chosen).reshape(batch, heads, -1, dim)
        v_i = take(v_blocks, chosen).reshape(batch, heads, -1, dim)
        rows = (chosen[..., None] * block_k + jnp.arange(block_k)[None, None, None]).reshape(batch, heads, 1, -1)
        scores = jnp.einsum("bnqh,bnkh->bnqk", q_i, k_i, preferred_element_type=jnp.float32) * dim**-0.5
        weights = jax.nn.softmax(jnp.where(rows < length, scores, -jnp.inf), axis=-1).astype(v.dtype)
        out = jnp.einsum("bnqk,bnkh->bnqh", weights, v_i, preferred_element_type=jnp.float32)
        return out.astype(q.dtype)

    out = lax.map(attend, (jnp.moveaxis(blocks_first(q, block_q), 2, 0), jnp.moveaxis(table, 2, 0)))
    return out.transpose(1, 0, 3, 2, 4).reshape(batch, -1, heads, dim)[:, :length]


def linear_attention(
    q: Float[Array, "B L N H"], k: Float[Array, "B S N H"], v: Float[Array, "B S N H"]
) -> Float[Array, "B L N H"]:
    """The linear branch before its projection, `[B, L, N, H]` in q's dtype; sums in float32."""
    phi_q, phi_k = (jax.nn.softmax(x.astype(jnp.float32), axis=-1) for x in (q, k))
    state = jnp.einsum("bsnh,bsnd->bnhd", phi_k, v.astype(jnp.float32))
    normalizer = jnp.einsum("blnh,bnh->bln", phi_q, phi_k.sum(axis=1))[..., None]
    return (jnp.einsum("blnh,bnhd->blnd", phi_q, state) / (1e-5 + normalizer)).astype(q.dtype)


def linear_branch(
    q: Float[Array, "B L N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N H"],
    proj_weight: Float[Array, "H H"],
    proj_bias: Float[Array, "H"],
) -> Float[Array, "B L N H"]:
    """The linear branch with its projection, `[B, L, N, H]` in q's dtype."""
    linear = jnp.einsum("blnh,dh->blnd", linear_attention(q, k, v), proj_weight.astype(q.dtype))
    return linear + proj_bias.astype(q.dtype)[None, None, None]
