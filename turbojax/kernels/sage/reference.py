"""SageSLA: sparse-linear attention with int8 q k^T and float8 values (TurboDiffusion, arXiv 2512.16093; SageAttention,
arXiv 2411.10958). Forward only.

As `turbojax.kernels.sla.reference`, but the sparse branch quantizes q by blocks of `block_q` rows, and k, less its mean
over the sequence, by blocks of `block_k` rows:

    scale = max |x| / 127 + 1e-7 over the block,  code = round(x / scale), halves away from zero
    S = (q_code k_code^T) q_scale k_scale / sqrt(H)

Subtracting the mean of k changes no softmax: it adds one number to a whole row of S. Values, by `values`:

    "exact"         softmax(S) v in v's dtype
    "float8_values" v as e4m3 with a scale per channel,  v_code = e4m3(v 2.25 / amax),  v_scale = amax / 2.25
    "float8"        P as e4m3, too: block by block with the running maximum m of S log2(e),
                    P = 2^(S log2(e) - m + 8.807), rounded for the product and not for the denominator

2.25 leaves room for float16 sums of products in the published kernels; 8.807 = log2(448) puts P's largest value at the
format's. No step holds `[L, L]`.
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, Int8

from turbojax.kernels.arrays import BlockTable, Tokens
from turbojax.kernels.sla.reference import LOG2_E, blocks_to_rows, rows_to_blocks, take_blocks

Values = Literal["exact", "float8", "float8_values"]
VALUES: tuple[Values, ...] = get_args(Values)

E4M3_OF_V = 2.25
LARGEST_E4M3 = 448.0
P_OFFSET = 8.807


def quantize_rows(x: Tokens, block: int) -> tuple[Int8[Array, "B N blocks {block} H"], Float32[Array, "B N blocks"]]:
    """x `[B, L, N, H]` to int8 `[B, N, blocks, block, H]` and float32 scales `[B, N, blocks]`."""
    blocks = rows_to_blocks(x.astype(jnp.float32), block)
    scale = jnp.max(jnp.abs(blocks), axis=(3, 4)) / 127.0 + 1e-7
    ratio = blocks / scale[..., None, None]
    code = jnp.trunc(ratio + jnp.where(ratio >= 0, 0.5, -0.5))  # halves away from zero
    return code.astype(jnp.int8), scale


def quantize_values(v: Tokens, *, largest: float = E4M3_OF_V) -> tuple[Tokens, Float32[Array, "B N H"]]:
    """v `[B, L, N, H]` to e4m3 and float32 scales `[B, N, H]`, one a channel."""
    f = v.astype(jnp.float32)
    amax = jnp.maximum(jnp.max(jnp.abs(f), axis=1), 1e-20)  # a channel of zeros stays one
    code = to_e4m3(f * (largest / amax)[:, None])
    return code, amax / largest


def to_e4m3(x: jax.Array) -> jax.Array:
    """Nearest float8_e4m3fn, ties to even, saturated at 448.

    Behind a barrier, since XLA drops the rounding on GPUs where the codes are converted back at once.
    """
    return lax.optimization_barrier(jnp.clip(x, -LARGEST_E4M3, LARGEST_E4M3).astype(jnp.float8_e4m3fn))


def sage_sparse(
    q: Tokens, k: Tokens, v: Tokens, table: BlockTable, *, block_q: int, block_k: int, values: Values
) -> Tokens:
    """The sparse branch; q, k, v `[B, L, N, H]`, table from `sla.block_table`; `[B, L, N, H]` in q's dtype."""
    batch, length, heads, dim = q.shape
    q_code, q_scale = quantize_rows(q, block_q)
    k_mean = jnp.mean(k.astype(jnp.float32), axis=1, keepdims=True)
    k_code, k_scale = quantize_rows(k.astype(jnp.float32) - k_mean, block_k)
    if values == "exact":
        v_code, v_scale = v, jnp.ones((batch, heads, dim), jnp.float32)
    else:
        v_code, v_scale = quantize_values(v)
    v_blocks = rows_to_blocks(v_code.astype(jnp.float32), block_k)

    def attend(block: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        code, scale, chosen = block
        rows = chosen[..., None] * block_k + jnp.arange(block_k)[None, None, None]
        integers = jnp.einsum("bnqh,bnckh->bnqck", code, take_blocks(k_code, chosen), preferred_element_type=jnp.int32)
        factor = scale[..., None] * take_blocks(k_scale, chosen) * (LOG2_E * dim**-0.5)
        scores = integers.astype(jnp.float32) * factor[:, :, None, :, None]
        scores = jnp.where((rows < length)[:, :, None], scores, -jnp.inf)
        product = float8_product if values == "float8" else exact_product
        return product(scores, take_blocks(v_blocks, chosen))

    per_block = tuple(jnp.moveaxis(a, 2, 0) for a in (q_code, q_scale, table))
    out = lax.map(attend, per_block) * v_scale[None, :, :, None]
    return blocks_to_rows(out, length).astype(q.dtype)


def exact_product(scores: jax.Array, v: jax.Array) -> jax.Array:
    """Softmax over all chosen keys; scores in base 2 `[B, N, q, c, k]`, v `[B, N, c, k, H]`; float32 `[B, N, q, H]`."""
    row_max = jnp.max(scores, axis=(3, 4), keepdims=True)
    p = jnp.exp2(scores - row_max)
    return jnp.einsum("bnqck,bnckh->bnqh", p, v) / jnp.sum(p, axis=(3, 4))[..., None]


def float8_product(scores: jax.Array, v: jax.Array) -> jax.Array:
    """`exact_product` block by block with P in e4m3."""

    def add_block(carry, block):
        row_max, acc, row_sum = carry
        s, v_j = block
        new_max = jnp.maximum(row_max, jnp.max(s, axis=3))
        rescale = jnp.exp2(row_max - new_max)
        p = jnp.exp2(s - new_max[..., None] + P_OFFSET)
        rounded = to_e4m3(p).astype(jnp.float32)
        acc = acc * rescale[..., None] + jnp.einsum("bnqk,bnkh->bnqh", rounded, v_j)
        return (new_max, acc, row_sum * rescale + jnp.sum(p, axis=3)), None

    shape = scores.shape[:3]
    start = (
        jnp.full(shape, -jnp.inf, jnp.float32),
        jnp.zeros((*shape, v.shape[-1]), jnp.float32),
        jnp.zeros(shape, jnp.float32),
    )
    (_, acc, row_sum), _ = lax.scan(add_block, start, (jnp.moveaxis(scores, 3, 0), jnp.moveaxis(v, 2, 0)))
    return acc / row_sum[..., None]
