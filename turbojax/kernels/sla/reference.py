"""Sparse-linear attention (SLA, arXiv 2509.24006, section 4; TurboDiffusion, arXiv 2512.16093).

B batch, L tokens, N heads, H head dim. Tokens are cut in blocks I of `block_q` rows, keys in blocks J of `block_k`:

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
from jaxtyping import Array, Float, Float32

from turbojax.errors import UserError
from turbojax.kernels.arrays import BlockTable, Keys, Tokens

# Scores no further from zero than this need no maximum: their exponentials, and sums of them, stay within float32.
BOUND = 60.0
LOG2_E = math.log2(math.e)


class SparseInputs(NamedTuple):
    """Arrays that the kernels of the forward pass take.

    q, k, v bfloat16. table: chosen blocks, ascending. projected: (phi(k)^T v) W_l^T, bfloat16. normalizer: sum phi(k).
    bounds: how far from zero a query block's scores can be; within BOUND nothing is rescaled for a maximum.
    """

    q: Tokens
    k: Tokens
    v: Tokens
    table: BlockTable
    projected: Float[Array, "B N H H"]
    normalizer: Float32[Array, "B N H"]
    bias: Float32[Array, "H"]
    bounds: Float32[Array, "B N q_blocks"]


def num_selected(topk: float, key_blocks: int) -> int:
    """Key blocks a query block attends to: the fraction `topk` of all, rounded down, at least one."""
    if not 0 < topk <= 1:
        raise UserError(f"sla_topk={topk} must be in (0, 1]; 0.1 and 0.15 are usual")
    return max(1, int(topk * key_blocks))


def rows_to_blocks(x: Tokens, block: int) -> Float[Array, "B N blocks {block} H"]:
    """`[B, L, N, H]` to `[B, N, blocks, block, H]`, the last block filled with zeros."""
    batch, length, heads, dim = x.shape
    x = jnp.pad(x, ((0, 0), (0, -length % block), (0, 0), (0, 0)))
    return x.reshape(batch, -1, block, heads, dim).transpose(0, 3, 1, 2, 4)


def blocks_to_rows(x: Float[Array, "blocks B N block H"], length: int) -> Tokens:
    """Blocks along the first axis to the first `length` rows."""
    _, batch, heads, _, dim = x.shape
    return x.transpose(1, 0, 3, 2, 4).reshape(batch, -1, heads, dim)[:, :length]


def take_blocks(blocks: jax.Array, index: jax.Array) -> jax.Array:
    """Blocks `[B, N, blocks, ...]` of each head at index `[B, N, chosen]`."""
    return jax.vmap(jax.vmap(lambda blocks, index: blocks[index]))(blocks, index)


def block_means(x: Tokens, block: int) -> Float32[Array, "B N blocks H"]:
    """Means over blocks of rows, float32; x `[B, L, N, H]` to `[B, N, ceil(L / block), H]`.

    A partial last block is divided by its own number of rows.
    """
    batch, length, heads, dim = x.shape
    f = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, -length % block), (0, 0), (0, 0)))
    sums = f.reshape(batch, -1, block, heads, dim).sum(axis=2)
    rows = jnp.minimum(block, length - block * jnp.arange(sums.shape[1])).astype(jnp.float32)
    return jnp.moveaxis(sums / rows[None, :, None, None], 1, 2)


def pooled_scores(q: Tokens, k: Keys, *, block_q: int, block_k: int) -> Float32[Array, "B N q_blocks k_blocks"]:
    """S of the module docstring, float32 `[B, N, query blocks, key blocks]`."""
    k_mean = jnp.mean(k.astype(jnp.float32), axis=1)[:, :, None]
    k_blocks = block_means(k, block_k) - k_mean
    return jnp.einsum("bnih,bnjh->bnij", block_means(q, block_q), k_blocks)


def block_table(q: Tokens, k: Keys, *, topk: float, block_q: int, block_k: int) -> BlockTable:
    """Turns top-k into blocks: the key blocks that each query block attends to, ascending."""
    scores = lax.stop_gradient(pooled_scores(q, k, block_q=block_q, block_k=block_k))
    _, chosen = lax.top_k(scores, num_selected(topk, scores.shape[-1]))
    return jnp.sort(chosen, axis=-1)


def sparse_softmax(q: Tokens, k: Tokens, v: Tokens, table: BlockTable, *, block_q: int, block_k: int) -> Tokens:
    """Softmax attention over the chosen key blocks, `[B, L, N, H]` in q's dtype."""
    batch, length, heads, dim = q.shape
    k_blocks, v_blocks = rows_to_blocks(k, block_k), rows_to_blocks(v, block_k)

    def attend(block: tuple[jax.Array, jax.Array]) -> jax.Array:
        q_i, chosen = block
        k_i = take_blocks(k_blocks, chosen).reshape(batch, heads, -1, dim)
        v_i = take_blocks(v_blocks, chosen).reshape(batch, heads, -1, dim)
        rows = (chosen[..., None] * block_k + jnp.arange(block_k)[None, None, None]).reshape(batch, heads, 1, -1)
        scores = jnp.einsum("bnqh,bnkh->bnqk", q_i, k_i, preferred_element_type=jnp.float32) * dim**-0.5
        weights = jax.nn.softmax(jnp.where(rows < length, scores, -jnp.inf), axis=-1).astype(v.dtype)
        out = jnp.einsum("bnqk,bnkh->bnqh", weights, v_i, preferred_element_type=jnp.float32)
        return out.astype(q.dtype)

    out = lax.map(attend, (jnp.moveaxis(rows_to_blocks(q, block_q), 2, 0), jnp.moveaxis(table, 2, 0)))
    return blocks_to_rows(out, length)


def linear_attention(q: Tokens, k: Keys, v: Keys) -> Tokens:
    """The linear branch before its projection, `[B, L, N, H]` in q's dtype; sums in float32."""
    phi_q, phi_k = (jax.nn.softmax(x.astype(jnp.float32), axis=-1) for x in (q, k))
    state = jnp.einsum("bsnh,bsnd->bnhd", phi_k, v.astype(jnp.float32))
    normalizer = jnp.einsum("blnh,bnh->bln", phi_q, phi_k.sum(axis=1))[..., None]
    return (jnp.einsum("blnh,bnhd->blnd", phi_q, state) / (1e-5 + normalizer)).astype(q.dtype)


def linear_branch(
    q: Tokens, k: Keys, v: Keys, proj_weight: Float[Array, "H H"], proj_bias: Float[Array, "H"]
) -> Tokens:
    """The linear branch with its projection, `[B, L, N, H]` in q's dtype."""
    linear = jnp.einsum("blnh,dh->blnd", linear_attention(q, k, v), proj_weight.astype(q.dtype))
    return linear + proj_bias.astype(q.dtype)[None, None, None]
