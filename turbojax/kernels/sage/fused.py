"""SageSLA out of fused Triton kernels, forward only; the equations are in `reference`.

block means of k, phi(k)^T v, sum phi(k)                 reads k and v
int8 q with its block means, int8 k less its mean        read q and k, write half as much
e4m3 v, transposed, in the order of its operand          reads v twice, writes half as much
scores, and the block map from them                      small
sparse softmax + linear branch + projection + bias       reads q, its codes and the chosen blocks, writes the result
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from turbojax.errors import UserError
from turbojax.kernels.dispatch import compute_capability
from turbojax.kernels.sage import triton_forward, triton_quantize
from turbojax.kernels.sage.reference import Values, quantize_values
from turbojax.kernels.sage.triton_forward import SageInputs, Settings
from turbojax.kernels.sla.fused import project_state, table_of_means
from turbojax.kernels.sla.triton_summary import key_summary, mean_of_means


def settings(count: int, *, block_q: int, block_k: int, values: Values, overwrite_q: bool = False) -> Settings:
    """Returns the fastest settings for the device's compute capability."""
    capability = compute_capability() or (9, 0)
    tiles = triton_forward.forward_tiles(capability, block_q=block_q, block_k=block_k, values=values)
    return Settings(count, block_q, block_k, values, tiles, overwrite_q)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, proj_weight: jax.Array, proj_bias: jax.Array, settings: Settings
) -> jax.Array:
    """`sage.sage_sparse_linear_attention` of bfloat16 q, k, v `[B, L, N, H]`."""
    s = settings
    k_means, state, normalizer, _ = key_summary(k, v, s.block_k)
    k_mean = mean_of_means(k_means, k.shape[1], s.block_k)
    k_code, k_scale, _ = triton_quantize.quantize_rows(k, s.block_k, mean=k_mean)
    q, k_code = lax.optimization_barrier((q, k_code))  # k's memory is free before q's codes take some
    q_code, q_scale, q_means = triton_quantize.quantize_rows(q, s.block_q, means=True)
    codes = q_code, q_scale, k_code, k_scale, *prepare_values(v, s.values)
    table, projected = table_of_means(q_means, k_means, k_mean, s.count), project_state(state, proj_weight)
    inputs = SageInputs(*codes, table, q, projected, normalizer, proj_bias.astype(jnp.float32))
    return triton_forward.sage_forward(inputs, settings)


def prepare_values(v: jax.Array, values: Values) -> tuple[jax.Array, jax.Array]:
    """v as `triton_forward.sage_forward` takes it, and its scales, float32 `[B, N, H]`."""
    if values == "float8":
        return triton_quantize.quantize_values(v)
    if values == "float8_values":
        code, scale = quantize_values(v)
        return code.astype(v.dtype), scale
    return v, jnp.ones((v.shape[0], *v.shape[2:]), jnp.float32)


def forward(q, k, v, proj_weight, proj_bias, settings: Settings):
    return attention(q, k, v, proj_weight, proj_bias, settings), None


def backward(settings: Settings, kept, d_out):
    raise UserError('SageSLA runs forward only: train with attention_type="sla", whose checkpoints are the same')


attention.defvjp(forward, backward)
