"""The umT5 text encoder of Wan (arXiv 2304.09151; T5: arXiv 1910.10683).

B batch, L tokens, N heads, H head dim, D width, F ffn width. Follows the public module `wan/modules/t5.py`
(Wan 2.1). The token embedding table (2.1 GB for xxl) is not part of the network: a prompt needs at most 512
of its rows, so it stays in the checkpoint file on the host and `embed_tokens` gathers them from there.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Shaped

from turbojax.errors import UserError
from turbojax.models.layers import Dense, RMSNorm, scan_blocks, split_heads, stack_blocks

TEXT_LEN = 512  # rows of text that the video transformers attend to
Mask = Bool[Array, "B L"] | Int[Array, "B L"]


@dataclasses.dataclass(frozen=True)
class UMT5Config:
    """Everything that decides the encoder's parameters and results.

    attention_dim: width of q, k and v over all heads.
    num_buckets, max_distance: relative positions are distinguished up to max_distance, in num_buckets steps,
      half of them for keys after the query.
    dtype: parameters and activations; bfloat16 or float32 (T5 models overflow in float16).
    """

    vocab_size: int
    dim: int
    attention_dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    num_buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6
    dtype: Any = jnp.bfloat16

    def __post_init__(self):
        if self.attention_dim % self.num_heads:
            raise UserError(f"{self.attention_dim=} must be a multiple of {self.num_heads=}")
        if jnp.dtype(self.dtype) == jnp.float16:
            raise UserError("dtype=float16 overflows in umT5; use bfloat16 or float32")

    @classmethod
    def xxl(cls, **changes) -> "UMT5Config":
        """umT5-xxl, the text encoder of Wan 2.1 and 2.2: 4.6B parameters without the embedding table."""
        widths = dict(vocab_size=256384, dim=4096, attention_dim=4096, ffn_dim=10240)
        return cls(**(widths | dict(num_heads=64, num_layers=24) | changes))


class Attention(nnx.Module):
    """o(softmax(q k^T + bias) v): no scaling, and every layer has its own bias by relative position."""

    def __init__(self, config: UMT5Config, *, rngs: nnx.Rngs):
        c = self.config = config
        linear = functools.partial(Dense, use_bias=False, dtype=c.dtype, rngs=rngs)
        self.q, self.k, self.v = (linear(c.dim, c.attention_dim) for _ in range(3))
        self.o = linear(c.attention_dim, c.dim)
        table = (c.num_buckets, c.num_heads)
        self.position_bias = nnx.Param(jax.random.normal(rngs.params(), table, jnp.float32))

    def __call__(
        self, x: Float[Array, "B L D"], mask: Bool[Array, "B L"], buckets: Int[Array, "L L"]
    ) -> Float[Array, "B L D"]:
        """Attends where the mask is true; softmax in float32."""
        q, k, v = (split_heads(a, self.config.num_heads) for a in (self.q(x), self.k(x), self.v(x)))
        scores = jnp.einsum("bqnh,bknh->bnqk", q, k, preferred_element_type=jnp.float32)
        scores = scores + self.bias(buckets)[None]
        scores = jnp.where(mask[:, None, None], scores, jnp.finfo(scores.dtype).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
        out = jnp.einsum("bnqk,bknh->bqnh", weights, v, preferred_element_type=jnp.float32).astype(x.dtype)
        return self.o(out.reshape(*x.shape[:2], -1))

    def bias(self, buckets: Int[Array, "L L"]) -> Float[Array, "N L L"]:
        """Returns the bias that is added to the scores, float32."""
        return self.position_bias[...].T[:, buckets]


class GatedMLP(nnx.Module):
    """fc2(fc1(x) gelu(gate(x))), tanh form of GELU."""

    def __init__(self, config: UMT5Config, *, rngs: nnx.Rngs):
        c = config
        linear = functools.partial(Dense, use_bias=False, dtype=c.dtype, rngs=rngs)
        self.gate, self.fc1 = (linear(c.dim, c.ffn_dim) for _ in range(2))
        self.fc2 = linear(c.ffn_dim, c.dim)

    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        return self.fc2(self.fc1(x) * jax.nn.gelu(self.gate(x), approximate=True))


class Block(nnx.Module):
    """Attention and ffn, each behind a norm and added to the stream."""

    def __init__(self, config: UMT5Config, *, rngs: nnx.Rngs):
        self.norm1, self.norm2 = (RMSNorm(config.dim, eps=config.eps) for _ in range(2))
        self.attn = Attention(config, rngs=rngs)
        self.ffn = GatedMLP(config, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B L D"], mask: Bool[Array, "B L"], buckets: Int[Array, "L L"]
    ) -> Float[Array, "B L D"]:
        x = x + self.attn(self.norm1(x), mask, buckets)
        return x + self.ffn(self.norm2(x))


class UMT5Encoder(nnx.Module):
    """Token embeddings to text features. Parameters of the blocks are stacked `[layers, ...]`."""

    def __init__(self, config: UMT5Config, *, rngs: nnx.Rngs):
        self.config = config
        self.blocks = stack_blocks(Block, config, rngs)
        self.norm = RMSNorm(config.dim, eps=config.eps)

    def __call__(self, x: Float[Array, "B L D"], mask: Mask) -> Float[Array, "B L D"]:
        """Returns text features in the config's dtype.

        x: rows of the embedding table, from `embed_tokens`.
        mask: true for tokens; what is computed for the other rows means nothing.
        """
        x, context, rest = self.embed(x, mask)
        return self.unembed(scan_blocks(self.blocks, x, context), rest)

    def embed(self, x: Float[Array, "B L D"], mask: Mask) -> tuple[jax.Array, tuple, tuple]:
        """Returns x in the config's dtype, what else each block takes, and nothing for `unembed`."""
        buckets = jnp.asarray(position_buckets(x.shape[1], self.config))
        return x.astype(self.config.dtype), (mask.astype(jnp.bool_), buckets), ()

    def unembed(self, x: Float[Array, "B L D"], rest: tuple) -> Float[Array, "B L D"]:
        """Returns the norm of the last block's result."""
        return self.norm(x)


def position_buckets(length: int, config: UMT5Config) -> Int[np.ndarray, "L L"]:
    """Returns the buckets of all pairs of query and key, int32."""
    position = np.arange(length)
    offset = position[None] - position[:, None]
    return relative_buckets(offset, num_buckets=config.num_buckets, max_distance=config.max_distance)


def relative_buckets(
    offset: Int[np.ndarray, "*pairs"], *, num_buckets: int, max_distance: int
) -> Int[np.ndarray, "*pairs"]:
    """Returns the bucket of each offset, key position minus query position; int32.

    Keys after the query get the upper half of the buckets. In each half the first half is exact, the rest
    grows logarithmically to max_distance, and everything beyond shares the last bucket. Offsets are known
    when the network is traced, so this is numpy.
    """
    half = num_buckets // 2
    exact = half // 2
    distance = np.abs(offset)
    octaves = np.log(np.maximum(distance, 1) / exact) / np.log(max_distance / exact)
    far = np.minimum(exact + (octaves * (half - exact)).astype(np.int32), half - 1)
    return (np.where(offset > 0, half, 0) + np.where(distance < exact, distance, far)).astype(np.int32)


def embed_tokens(table: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Rows of the embedding table on the host, `ids.shape + [D]` in the table's dtype.

    table: `[vocab, D]`, may be memory-mapped: only the rows asked for are read. umT5 does not scale them.
    Raises UserError if an id is not in the table.
    """
    ids = np.asarray(ids)
    outside = ids[(ids < 0) | (ids >= len(table))]
    if outside.size:
        raise UserError(
            f"token id {outside[0]} is outside the text encoder's {len(table)} embeddings; "
            "use the tokenizer that belongs to the text encoder (umT5's, in google/umt5-xxl)"
        )
    return np.asarray(table[ids])


def encode_text(
    encoder: UMT5Encoder | Callable[[jax.Array, jax.Array], jax.Array],
    table: np.ndarray,
    ids: np.ndarray,
    mask: np.ndarray,
    *,
    length: int = TEXT_LEN,
) -> Float[Array, "B length D"]:
    """Encodes text for the video transformer, rows past each prompt's end zero.

    encoder: the module, or a function of (x, mask) that runs one. A module is compiled once for each shape.
    table: embedding table `[vocab, D]`, stays on the host.
    ids, mask: int32 `[B, L]` from the tokenizer, L <= length.
    Raises UserError for ids outside the table and for prompts longer than `length`.
    """
    if ids.shape != mask.shape or ids.ndim != 2 or ids.shape[1] > length:
        raise UserError(f"{ids.shape=} and {mask.shape=} must be [batch, tokens] with tokens <= {length}")
    run = functools.partial(run_encoder, *nnx.split(encoder)) if isinstance(encoder, UMT5Encoder) else encoder
    x, tokens = jax.device_put((embed_tokens(table, ids), mask))
    return zero_past_end(run(x, tokens), tokens, length=length)


@functools.partial(jax.jit, static_argnums=0)
def run_encoder(graph: nnx.GraphDef, state: nnx.State, x: jax.Array, mask: jax.Array) -> jax.Array:
    """Calls a split module; compiled once per architecture and shape, whatever the weights."""
    return nnx.merge(graph, state)(x, mask)


@functools.partial(jax.jit, static_argnames="length")
def zero_past_end(x: Float[Array, "B L D"], mask: Shaped[Array, "B L"], *, length: int) -> Float[Array, "B {length} D"]:
    """Sets rows to zero where mask is zero, and pads with zero rows to `length`."""
    x = jnp.where(mask[..., None].astype(jnp.bool_), x, jnp.zeros((), x.dtype))
    return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0)))
