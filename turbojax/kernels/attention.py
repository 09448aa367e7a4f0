"""Dense softmax attention, softmax(q k^T / sqrt(H)) v.

B batch, L queries, S keys, N heads, H head dim. Neither form holds all scores `[N, L, S]` at once.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from turbojax.kernels import dispatch
from turbojax.kernels.arrays import Keys, Tokens
from turbojax.kernels.sizes import cdiv

Implementation = Literal["cudnn", "reference"]

SCORES_IN_MEMORY = 2**26  # float32 scores that the reference holds at once: 256 MiB
TILE = 128  # queries; XLA pads operands of which a tensor core's tile takes a part
CUDNN_HEAD_DIM = 128  # the largest that cuDNN takes on every generation with bf16


def dot_product_attention(
    q: Tokens, k: Keys, v: Keys, *, last: int = 1, implementation: Implementation | None = None
) -> Tokens:
    """q `[B, L, N, H]`, k and v `[B, S, N, H]` to `[B, L, N, H]` in q's dtype; softmax in float32.

    last: how many keys the last one stands for, which are all equal to it.
    implementation: "cudnn" (last = 1 alone) or "reference"; None takes cuDNN where it can run. A named one runs or
      raises.
    """
    if dispatch.choose("dense attention", implementation, {"cudnn": cudnn_unsupported(q, last=last)}) == "cudnn":
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    return attention_reference(q, k, v, last=last)


def cudnn_unsupported(q: dispatch.Shaped, *, last: int = 1) -> str | None:
    """Names what cuDNN's flash attention requires instead of arrays like q; None where it takes them."""
    if last != 1:
        return f"keys one by one, not {last=}"
    if takes := dispatch.no_kernels():
        return takes
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"bfloat16 or float16, not {q.dtype}"
    if q.shape[-1] > CUDNN_HEAD_DIM or q.shape[-1] % 8:
        return f"a head dim in eights up to {CUDNN_HEAD_DIM}, not {q.shape[-1]}"
    return None


def attention_reference(q: Tokens, k: Keys, v: Keys, *, last: int = 1) -> Tokens:
    """Computes the definition, one block of queries at a time; last as `dot_product_attention` takes it."""
    batch, length, heads, dim = q.shape
    block = max(1, min(length, SCORES_IN_MEMORY // (batch * heads * k.shape[1])))
    if TILE < block < length:
        count = cdiv(length, block // TILE * TILE)
        block = cdiv(length, count * TILE) * TILE

    # n equal keys add n times the exponential of one.
    more = jnp.zeros((1, 1, 1, k.shape[1]), jnp.float32).at[..., -1].set(math.log(last))

    def attend(q: jax.Array) -> jax.Array:
        scores = jnp.einsum("blnh,bsnh->bnls", q, k, preferred_element_type=jnp.float32) * dim**-0.5
        scores = scores if last == 1 else scores + more
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        return jnp.einsum("bnls,bsnh->blnh", weights, v).astype(q.dtype)  # summed in float32, see `layers.contract`

    if block == length:
        return attend(q)
    padded = jnp.pad(q, ((0, 0), (0, -length % block), (0, 0), (0, 0)))
    blocks = jnp.moveaxis(padded.reshape(batch, -1, block, heads, dim), 1, 0)
    out = jnp.moveaxis(lax.map(attend, blocks), 0, 1)
    return out.reshape(batch, -1, heads, dim)[:, :length]
