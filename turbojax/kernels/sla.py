"""Sparse-linear attention (SLA, arXiv 2509.24006, section 4; TurboDiffusion, arXiv 2512.16093).

B batch, L tokens, N heads, H head dim. Queries are cut in blocks I of `block_q` rows, keys in blocks J of `block_k`:

    S_IJ = mean(q_I) . (mean(k_J) - mean(k))           chosen(I) = the topk largest S_IJ
    sparse  = softmax(q k^T / sqrt(H) over the chosen blocks) v
    linear  = phi(q) (phi(k)^T v) / (1e-5 + phi(q) sum phi(k)),   phi = softmax over the head dim, all keys
    output  = sparse + linear W_l^T + b_l

The block map takes no gradient, and no step holds `[L, L]`.

Implementations: "mosaic" (Hopper, blocks of 128 queries; its gradients are Triton's), "triton" (bfloat16, compute
capability 8.0 and later) and "reference" (jnp, anything, anywhere). None chooses; a named one runs or raises.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from turbojax.errors import UserError
from turbojax.kernels import dispatch

Implementation = Literal["mosaic", "triton", "reference"]

BLOCKS = ((128, 64), (64, 64), (64, 128))  # rows of query and key blocks that the kernels take
MOST_KEY_BLOCKS = 4096
# Scores no further from zero than this need no maximum: their exponentials, and sums of them, stay within float32.
BOUND = 60.0


def choose(implementation: Implementation | None, q: jax.Array, *, block_q: int, block_k: int) -> Implementation:
    """The implementation that runs: the named one, or the fastest one that can; q `[B, L, N, H]`."""
    triton = triton_obstacle(q, block_q=block_q, block_k=block_k)
    mosaic = triton or mosaic_obstacle(q, block_q=block_q)
    return dispatch.choose("sparse-linear attention", implementation, {"mosaic": mosaic, "triton": triton})


def triton_obstacle(q: jax.Array, *, block_q: int, block_k: int) -> str | None:
    """Why the Triton kernels cannot run, as what they take instead; None if they can."""
    if takes := dispatch.triton_obstacle(q.dtype):
        return takes
    if q.shape[-1] not in (64, 128):
        return f"a head dim of 64 or 128, not {q.shape[-1]}"
    if (block_q, block_k) not in BLOCKS:
        return f"blocks (block_q, block_k) of {', '.join(map(str, BLOCKS))}, not {(block_q, block_k)}"
    if q.shape[1] > MOST_KEY_BLOCKS * block_k:
        return f"up to {MOST_KEY_BLOCKS * block_k} tokens with {block_k=}, not {q.shape[1]}"
    return None


def mosaic_obstacle(q: jax.Array, *, block_q: int) -> str | None:
    """What the Hopper kernel takes besides, as `triton_obstacle`."""
    if dispatch.compute_capability() != (9, 0):
        return "a GPU of compute capability 9.0"
    if q.shape[1] % 8:  # Mosaic's tiled copies drop the rows behind the last full group of 8
        return f"lengths in eights, not {q.shape[1]}"
    if block_q != 128:
        return f"blocks of 128 queries, not {block_q}"
    return None


def num_selected(topk: float, key_blocks: int) -> int:
    """Key blocks a query block attends to: the truncated share `topk` of all, at least one."""
    if not 0 < topk <= 1:
        raise UserError(f"sla_topk={topk} must be in (0, 1]; 0.1 and 0.15 are usual")
    return max(1, int(topk * key_blocks))


def block_means(x: jax.Array, block: int) -> jax.Array:
    """Means over blocks of rows, float32; x `[B, L, N, H]` to `[B, N, ceil(L / block), H]`.

    A partial last block is divided by its own number of rows.
    """
    batch, length, heads, dim = x.shape
    f = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, -length % block), (0, 0), (0, 0)))
    sums = f.reshape(batch, -1, block, heads, dim).sum(axis=2)
    rows = jnp.minimum(block, length - block * jnp.arange(sums.shape[1])).astype(jnp.float32)
    return jnp.moveaxis(sums / rows[None, :, None, None], 1, 2)


def pooled_scores(q: jax.Array, k: jax.Array, *, block_q: int, block_k: int) -> jax.Array:
    """S of the module docstring, float32 `[B, N, query blocks, key blocks]`."""
    k_mean = jnp.mean(k.astype(jnp.float32), axis=1)[:, :, None]
    k_blocks = block_means(k, block_k) - k_mean
    return jnp.einsum("bnih,bnjh->bnij", block_means(q, block_q), k_blocks)


def block_table(q: jax.Array, k: jax.Array, *, topk: float, block_q: int, block_k: int) -> jax.Array:
    """The chosen key blocks of each query block in ascending order, int32 `[B, N, query blocks, chosen]`."""
    scores = lax.stop_gradient(pooled_scores(q, k, block_q=block_q, block_k=block_k))
    _, chosen = lax.top_k(scores, num_selected(topk, scores.shape[-1]))
    return jnp.sort(chosen, axis=-1)


def sparse_softmax(
    q: jax.Array, k: jax.Array, v: jax.Array, table: jax.Array, *, block_q: int, block_k: int
) -> jax.Array:
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


def linear_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """The linear branch before its projection, `[B, L, N, H]` in q's dtype; sums in float32."""
    phi_q, phi_k = (jax.nn.softmax(x.astype(jnp.float32), axis=-1) for x in (q, k))
    state = jnp.einsum("bsnh,bsnd->bnhd", phi_k, v.astype(jnp.float32))
    normalizer = jnp.einsum("blnh,bnh->bln", phi_q, phi_k.sum(axis=1))[..., None]
    return (jnp.einsum("blnh,bnhd->blnd", phi_q, state) / (1e-5 + normalizer)).astype(q.dtype)


def linear_branch(q: jax.Array, k: jax.Array, v: jax.Array, proj_weight: jax.Array, proj_bias: jax.Array) -> jax.Array:
    """The linear branch with its projection, `[B, L, N, H]` in q's dtype."""
    linear = jnp.einsum("blnh,dh->blnd", linear_attention(q, k, v), proj_weight.astype(q.dtype))
    return linear + proj_bias.astype(q.dtype)[None, None, None]


def sparse_linear_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    proj_weight: jax.Array,
    proj_bias: jax.Array,
    *,
    topk: float,
    block_q: int = 128,
    block_k: int = 64,
    implementation: Implementation | None = None,
) -> jax.Array:
    """The whole of the module docstring; q, k (rotated) and v `[B, L, N, H]`, proj_weight `[H, H]` (out, in).

    The default blocks are those that TurboDiffusion's published checkpoints run with. Kernels have gradients by
    `jax.vjp` only: training by `jax.jvp` (sCM) needs implementation="reference".
    """
    chosen = choose(implementation, q, block_q=block_q, block_k=block_k)
    if chosen != "reference":
        from turbojax.kernels import sla_fused

        count = num_selected(topk, -(-k.shape[1] // block_k))
        settings = sla_fused.settings(chosen, count, block_q=block_q, block_k=block_k, dim=q.shape[-1])
        return sla_fused.attention(q, k, v, proj_weight, proj_bias, settings)
    table = block_table(q, k, topk=topk, block_q=block_q, block_k=block_k)
    sparse = sparse_softmax(q, k, v, table, block_q=block_q, block_k=block_k)
    return sparse + linear_branch(q, k, v, proj_weight, proj_bias)
