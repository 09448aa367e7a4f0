"""Sparse-linear attention: the choice of an implementation; the equations are in `reference`.

"mosaic" (Hopper, blocks of 128 queries; its gradients are Triton's), "triton" (bfloat16, compute capability 8.0 and
later) and "reference" (jnp, anything, anywhere). None chooses; a named one runs or raises.
"""

from typing import Literal

from jaxtyping import Array, Float

from turbojax.kernels import dispatch
from turbojax.kernels.arrays import Tokens
from turbojax.kernels.sizes import cdiv
from turbojax.kernels.sla.reference import block_table, linear_branch, num_selected, sparse_softmax

Implementation = Literal["mosaic", "triton", "reference"]

BLOCKS = ((128, 64), (64, 64), (64, 128))  # rows of query and key blocks that the kernels take
MOST_KEY_BLOCKS = 4096


def choose(implementation: Implementation | None, q: dispatch.Shaped, *, block_q: int, block_k: int) -> Implementation:
    """Returns the implementation that runs: the named one, or the fastest one that can; q `[B, L, N, H]`."""
    triton = triton_unsupported(q, block_q=block_q, block_k=block_k)
    mosaic = triton or mosaic_unsupported(q, block_q=block_q)
    return dispatch.choose("sparse-linear attention", implementation, {"mosaic": mosaic, "triton": triton})


def triton_unsupported(q: dispatch.Shaped, *, block_q: int, block_k: int) -> str | None:
    """Names what the Triton kernels require instead of q and these blocks; None if they can run."""
    if takes := dispatch.triton_unsupported(q.dtype):
        return takes
    if q.shape[-1] not in (64, 128):
        return f"a head dim of 64 or 128, not {q.shape[-1]}"
    if (block_q, block_k) not in BLOCKS:
        return f"blocks (block_q, block_k) of {', '.join(map(str, BLOCKS))}, not {(block_q, block_k)}"
    if q.shape[1] > MOST_KEY_BLOCKS * block_k:
        return f"up to {MOST_KEY_BLOCKS * block_k} tokens with {block_k=}, not {q.shape[1]}"
    return None


def mosaic_unsupported(q: dispatch.Shaped, *, block_q: int) -> str | None:
    """Names what the Hopper kernel requires besides; None if it can run."""
    if dispatch.compute_capability() != (9, 0):
        return "a GPU of compute capability 9.0"
    if q.shape[1] % 8:  # Mosaic's tiled copies drop the rows behind the last full group of 8
        return f"lengths in eights, not {q.shape[1]}"
    if block_q != 128:
        return f"blocks of 128 queries, not {block_q}"
    return None


def sparse_linear_attention(
    q: Tokens,
    k: Tokens,
    v: Tokens,
    proj_weight: Float[Array, "H H"],
    proj_bias: Float[Array, "H"],
    *,
    topk: float,
    block_q: int = 128,
    block_k: int = 64,
    implementation: Implementation | None = None,
) -> Tokens:
    """Attends as `reference` defines it; q, k (rotated) and v `[B, L, N, H]`, proj_weight `[H, H]` (out, in).

    The default blocks are those that TurboDiffusion's published checkpoints run with. Kernels have gradients by
    `jax.vjp` only: training by `jax.jvp` (sCM) needs implementation="reference".
    """
    chosen = choose(implementation, q, block_q=block_q, block_k=block_k)
    if chosen != "reference":
        from turbojax.kernels.sla import fused

        count = num_selected(topk, cdiv(k.shape[1], block_k))
        settings = fused.settings(chosen, count, block_q=block_q, block_k=block_k, dim=q.shape[-1])
        return fused.attention(q, k, v, proj_weight, proj_bias, settings)
    table = block_table(q, k, topk=topk, block_q=block_q, block_k=block_k)
    sparse = sparse_softmax(q, k, v, table, block_q=block_q, block_k=block_k)
    return sparse + linear_branch(q, k, v, proj_weight, proj_bias)
