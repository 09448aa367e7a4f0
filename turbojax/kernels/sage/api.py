"""SageSLA: the choice of an implementation; the equations are in `reference`.

"triton" (bfloat16, compute capability 8.0 and later, float8 from 8.9 on) and "reference" (jnp, anything, anywhere).
None chooses; a named one runs or raises.
"""

from jaxtyping import Array, Float

from turbojax.errors import UserError
from turbojax.kernels import dispatch
from turbojax.kernels.arrays import Tokens
from turbojax.kernels.sage.reference import VALUES, Values, sage_sparse
from turbojax.kernels.sizes import cdiv
from turbojax.kernels.sla.api import Implementation, triton_unsupported
from turbojax.kernels.sla.reference import block_table, linear_branch, num_selected


def choose(
    implementation: Implementation | None, q: dispatch.Shaped, *, block_q: int, block_k: int, values: Values
) -> Implementation:
    """Returns the implementation: the named one, or the fused one if it can run; float8 never falls back on a GPU."""
    unsupported = triton_unsupported(q, block_q=block_q, block_k=block_k)
    chosen = dispatch.choose("SageSLA", implementation, {"triton": unsupported})
    capability = dispatch.compute_capability()
    if chosen == "triton" and values != "exact" and capability is not None and capability < (8, 9):
        has = ".".join(map(str, capability))
        raise UserError(f'sage_values="{values}" needs compute capability 8.9, not {has}; set sage_values="exact"')
    return chosen


def sage_sparse_linear_attention(
    q: Tokens,
    k: Tokens,
    v: Tokens,
    proj_weight: Float[Array, "H H"],
    proj_bias: Float[Array, "H"],
    *,
    topk: float,
    block_q: int = 64,
    block_k: int = 128,
    values: Values = "float8",
    implementation: Implementation | None = None,
    overwrite_q: bool = False,
) -> Tokens:
    """Attends as `reference` defines it, plus SLA's linear branch, from unquantized q, k, v.

    q, k (rotated) and v `[B, L, N, H]`, proj_weight `[H, H]` (out, in). The default blocks are those that the published
    checkpoints run with on Hopper; elsewhere they are 128 and 64. overwrite_q: the result takes q's memory, which
    costs a copy if q is needed elsewhere. Raises UserError where a named implementation cannot run, and where the fused
    one is differentiated.
    """
    if values not in VALUES:
        raise UserError(f"{values=} is unknown; choose {' or '.join(VALUES)}")
    if choose(implementation, q, block_q=block_q, block_k=block_k, values=values) == "triton":
        from turbojax.kernels.sage import fused

        count = num_selected(topk, cdiv(k.shape[1], block_k))
        blocks = {"block_q": block_q, "block_k": block_k}
        settings = fused.settings(count, **blocks, values=values, overwrite_q=overwrite_q)
        return fused.attention(q, k, v, proj_weight, proj_bias, settings)
    table = block_table(q, k, topk=topk, block_q=block_q, block_k=block_k)
    sparse = sage_sparse(q, k, v, table, block_q=block_q, block_k=block_k, values=values)
    return sparse + linear_branch(q, k, v, proj_weight, proj_bias)
