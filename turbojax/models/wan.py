"""The Wan 2.1 / 2.2 video transformer (arXiv 2503.20314, section 4.2): text to video and image to video.

B batch, L tokens, N heads, H head dim, D width, F ffn width; latents are `b t h w c`. Follows the public modules
`wan/modules/model.py` (Wan 2.1) and `rcm/networks/wan2pt1.py` (TurboDiffusion).
"""

import dataclasses
import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Num

from turbojax.errors import UserError
from turbojax.kernels.attention import dot_product_attention
from turbojax.kernels.int8 import QuantConfig, Quantized
from turbojax.kernels.norms import Residual, Table, modulated_norm
from turbojax.kernels.sage import VALUES, Values, sage_sparse_linear_attention
from turbojax.kernels.sla import sparse_linear_attention
from turbojax.models.layers import (
    MLP,
    Dense,
    Int8Dense,
    LayerNorm,
    RMSNorm,
    rotary_table,
    split_heads,
    stack_blocks,
    time_sinusoid,
)
from turbojax.sharding import over_heads, scan_layers

AttentionType = Literal["original", "sla", "sagesla"]
# Block sizes (queries, keys) that TurboDiffusion's published checkpoints run with: SageSLA's are those on Hopper.
BLOCKS: dict[str, tuple[int, int]] = {"original": (0, 0), "sla": (128, 64), "sagesla": (64, 128)}

CLIP_TOKENS = 257  # of an image

Activation = Float[Array, "B L D"] | Quantized
KeysValues = tuple[Float[Array, "*layers B _ N H"], Float[Array, "*layers B _ N H"]]
Tokens = KeysValues | Float[Array, "B _ D"]
# Largest keys and values of text and image, over all layers, that are kept for a video. They mostly save launches,
# which count at 1.3B; at 14B they would take 0.4 GB.
KEYS_BYTES = 2**28

# Modules that run before the steps and not in them.
EMBEDDINGS = ("text_embedding", "time_embedding", "time_projection", "image_embedding")


class Context(NamedTuple):
    """Inputs of the blocks that no step changes; `WanModel.prepare` makes it once for a video.

    text, image: keys and values of every layer, `[layers, B, tokens, N, H]`, or, where these take more than KEYS_BYTES,
    tokens `[B, tokens, D]` of which each layer makes its own in each step; image None without CLIP tokens.
    table: rotary, over the tokens.
    """

    text: Tokens
    image: Tokens | None
    table: Table


class TimeEmbedding(NamedTuple):
    """A timestep's modulation of the head and of the blocks, float32."""

    head: Float[Array, "*steps B D"]
    blocks: Float[Array, "*steps B 6 D"]


@dataclasses.dataclass(frozen=True)
class WanConfig:
    """Everything that decides the network's parameters and results.

    in_channels: latent channels (16), with mask (4) and condition latent (16) put behind them for image to video.
    clip_dim: width of the CLIP image tokens (Wan 2.1 image to video), None without.
    clip_images: images whose tokens it takes: 2 for the model of a first and a last frame.
    attention_type: self-attention: "original" (dense), "sla", or "sagesla" (int8 and float8, forward only).
    sla_topk, sla_blocks: fraction of key blocks, and rows of query and key blocks (None: as published).
    sage_values: how SageSLA multiplies with v, see `turbojax.kernels.sage.reference`.
    sigma_max: first noise level that rCM's steps begin with; None: as published.
    attention_implementation: "reference" for attention that `jax.jvp` can differentiate; None for the fastest.
    quant: how the linear layers inside the blocks hold int8 weights; None for `dtype`.
    remat: gradients compute each block a second time instead of keeping its intermediates.
    """

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    in_channels: int = 16
    out_channels: int = 16
    patch: tuple[int, int, int] = (1, 2, 2)
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    clip_dim: int | None = None
    clip_images: int = 1
    eps: float = 1e-6
    attention_type: AttentionType = "original"
    sla_topk: float = 0.1
    sla_blocks: tuple[int, int] | None = None
    sage_values: Values = "float8"
    sigma_max: float | None = None
    attention_implementation: Literal["reference"] | None = None
    quant: QuantConfig | None = None
    dtype: Any = jnp.bfloat16
    remat: bool = False

    def __post_init__(self):
        if self.attention_type not in BLOCKS:
            raise UserError(f"attention_type={self.attention_type!r} is unknown; choose {' or '.join(BLOCKS)}")
        if self.num_heads < 1 or self.dim % self.num_heads or self.head_dim % 2:
            raise UserError(f"dim={self.dim} does not give num_heads={self.num_heads} heads of an even width")
        if not 0 < self.sla_topk <= 1:
            raise UserError(f"sla_topk={self.sla_topk} must be in (0, 1]; 0.1 and 0.15 are usual")
        if self.sage_values not in VALUES:
            raise UserError(f"sage_values={self.sage_values!r} is unknown; choose {' or '.join(VALUES)}")

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def blocks(self) -> tuple[int, int]:
        """Returns the rows of a query block and of a key block."""
        return self.sla_blocks or BLOCKS[self.attention_type]

    @property
    def patch_features(self) -> int:
        return math.prod(self.patch)

    @classmethod
    def t2v_1_3b(cls, **changes) -> "WanConfig":
        """Wan 2.1 text to video, 1.3B."""
        return cls(**(dict(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30) | changes))

    @classmethod
    def t2v_14b(cls, **changes) -> "WanConfig":
        """Wan 2.1 text to video, 14B."""
        return cls(**(dict(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40) | changes))

    @classmethod
    def i2v_14b(cls, **changes) -> "WanConfig":
        """Wan 2.1 image to video, 14B, with CLIP tokens."""
        return cls.t2v_14b(**(dict(in_channels=36, clip_dim=1280) | changes))

    @classmethod
    def i2v_a14b(cls, **changes) -> "WanConfig":
        """Wan 2.2 image to video, one of the two experts of A14B."""
        return cls.t2v_14b(**(dict(in_channels=36) | changes))


class SelfAttention(nnx.Module):
    """o(attention(rotate(norm(q)), rotate(norm(k)), v)), dense or sparse-linear."""

    def __init__(self, config: WanConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.q, self.k, self.v, self.o = (block_linear(config, rngs) for _ in range(4))
        self.norm_q, self.norm_k = (RMSNorm(config.dim, eps=config.eps) for _ in range(2))
        if config.attention_type != "original":
            self.proj_l = Dense(config.head_dim, config.head_dim, dtype=config.dtype, rngs=rngs)

    def __call__(self, x: Activation, table: Table, *, add_to: Residual | None = None) -> Float[Array, "B L D"]:
        """Attends; x is quantized where the layers are, and the result is summed into add_to if given."""
        c = self.config
        q, k = self.norm_q.rotated(self.q(x), table), self.norm_k.rotated(self.k(x), table)
        out = over_heads(self.attend, q, k, split_heads(self.v(x), c.num_heads))
        return self.o(out.reshape(*out.shape[:2], c.dim), add_to=add_to)

    def attend(
        self, q: Float[Array, "B L N H"], k: Float[Array, "B L N H"], v: Float[Array, "B L N H"]
    ) -> Float[Array, "B L N H"]:
        """Attends over all tokens; on a mesh, by some of the heads."""
        c = self.config
        if c.attention_type == "original":
            return dot_product_attention(q, k, v, implementation=c.attention_implementation)
        projection = self.proj_l.weight[...], self.proj_l.bias[...]
        block_q, block_k = c.blocks
        settings: dict[str, Any] = dict(topk=c.sla_topk, block_q=block_q, block_k=block_k)
        settings["implementation"] = c.attention_implementation
        if c.attention_type == "sla":
            return sparse_linear_attention(q, k, v, *projection, **settings)
        return sage_sparse_linear_attention(q, k, v, *projection, values=c.sage_values, overwrite_q=True, **settings)


class CrossAttention(nnx.Module):
    """Attention to the text, plus attention to the image tokens where the model has them."""

    def __init__(self, config: WanConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.q, self.k, self.v, self.o = (block_linear(config, rngs) for _ in range(4))
        self.norm_q, self.norm_k = (RMSNorm(config.dim, eps=config.eps) for _ in range(2))
        if config.clip_dim:
            self.k_img, self.v_img = (block_linear(config, rngs) for _ in range(2))
            self.norm_k_img = RMSNorm(config.dim, eps=config.eps)

    def keys(
        self, text: Float[Array, "B _ D"], image: Float[Array, "B _ D"] | None
    ) -> tuple[KeysValues, KeysValues | None]:
        """Returns keys and values of text and of the image's 257 or 514 tokens."""
        heads = self.config.num_heads
        text = self.k.prepare(text)
        of_text = split_heads(self.norm_k(self.k(text)), heads), split_heads(self.v(text), heads)
        if image is None:
            return of_text, None
        image = self.k_img.prepare(image)
        return of_text, (split_heads(self.norm_k_img(self.k_img(image)), heads), split_heads(self.v_img(image), heads))

    def __call__(
        self, x: Activation, text: Tokens, image: Tokens | None, *, add_to: Residual | None = None
    ) -> Float[Array, "B L D"]:
        """Attends; x is quantized where the layers are, and the result is summed into add_to if given.

        text, image: their keys and values, or tokens that `keys` takes.
        """
        if isinstance(text, jax.Array):
            assert not isinstance(image, tuple)
            text, image = self.keys(text, image)
        attend = functools.partial(dot_product_attention, implementation=self.config.attention_implementation)
        q = split_heads(self.norm_q(self.q(x)), self.config.num_heads)
        missing = self.config.text_len - text[0].shape[1]  # rows that equal the last, see `WanModel.embed_text`
        out = attend(q, *text, last=1 + missing)
        if image is not None:
            out = out + attend(q, *image)
        return self.o(out.reshape(*out.shape[:2], self.config.dim), add_to=add_to)


class FeedForward(nnx.Module):
    """fc2(gelu(fc1(x)))."""

    def __init__(self, config: WanConfig, *, rngs: nnx.Rngs):
        linear = linear_kind(config)
        self.fc1 = linear(config.dim, config.ffn_dim, dtype=config.dtype, rngs=rngs)
        self.fc2 = linear(config.ffn_dim, config.dim, dtype=config.dtype, rngs=rngs)

    def __call__(self, x: Activation, *, add_to: Residual | None = None) -> Float[Array, "B L D"]:
        """Runs both layers; x is quantized where they are, and the result is summed into add_to if given."""
        return self.fc2(self.fc1.gelu(x), add_to=add_to)


class Block(nnx.Module):
    """Self-attention, cross-attention and ffn; the first and the last are modulated and gated by the timestep."""

    def __init__(self, config: WanConfig, *, rngs: nnx.Rngs):
        c = config
        self.eps = c.eps
        self.modulation = nnx.Param(jax.random.normal(rngs.params(), (6, c.dim), jnp.float32) / math.sqrt(c.dim))
        self.self_attn = SelfAttention(c, rngs=rngs)
        self.norm3 = LayerNorm(c.dim, eps=c.eps)
        self.cross_attn = CrossAttention(c, rngs=rngs)
        self.ffn = FeedForward(c, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B L D"], e0: Float[Array, "B 6 D"], text: Tokens, image: Tokens | None, table: Table
    ) -> Float[Array, "B L D"]:
        """Runs the block; e0 is float32, text and image are as `CrossAttention` takes them."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation(self.modulation[...], e0)
        h = self.self_attn.q.prepare_normed(x, 1 + scale1, shift1, eps=self.eps)
        x = self.self_attn(h, table, add_to=Residual(x, gate1))
        h = self.cross_attn.q.prepare_normed(x, *self.norm3.affine(), eps=self.eps)
        x = self.cross_attn(h, text, image, add_to=Residual(x))
        h = self.ffn.fc1.prepare_normed(x, 1 + scale2, shift2, eps=self.eps)
        return self.ffn(h, add_to=Residual(x, gate2))


class ImageEmbedding(nnx.Module):
    """CLIP tokens to the width of the model; those of two images one after the other, with positions."""

    def __init__(self, config: WanConfig, *, rngs: nnx.Rngs):
        width, dim = config.clip_dim, config.dim
        assert width is not None
        self.norm_in, self.norm_out = LayerNorm(width, eps=1e-5), LayerNorm(dim, eps=1e-5)
        exact_gelu = lambda x: jax.nn.gelu(x, approximate=False)  # noqa: E731
        self.mlp = MLP((width, width, dim), exact_gelu, dtype=config.dtype, rngs=rngs)
        tokens = config.clip_images * CLIP_TOKENS
        self.positions = nnx.Param(jnp.zeros((tokens, width), config.dtype)) if config.clip_images > 1 else None

    def __call__(self, clip: Float[Array, "B tokens clip_dim"]) -> Float[Array, "B tokens D"]:
        if self.positions is not None:
            clip = clip + self.positions[...].astype(clip.dtype)[None]
        return self.norm_out(self.mlp(self.norm_in(clip)))


class Head(nnx.Module):
    """Modulated norm and projection to patches, in float32."""

    def __init__(self, config: WanConfig, *, rngs: nnx.Rngs):
        c = config
        self.eps = c.eps
        self.modulation = nnx.Param(jax.random.normal(rngs.params(), (2, c.dim), jnp.float32) / math.sqrt(c.dim))
        self.proj = Dense(c.dim, c.out_channels * c.patch_features, dtype=c.dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B L D"], e: Float[Array, "B D"]) -> Float[Array, "B L features"]:
        """Returns the features of the patches, float32."""
        shift, scale = modulation(self.modulation[...], e[:, None])
        return self.proj(modulated_norm(x.astype(jnp.float32), 1 + scale, shift, eps=self.eps))


class WanModel(nnx.Module):
    """The network: latents, timestep and text to the rectified-flow velocity."""

    def __init__(self, config: WanConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        self.patch_embedding = Dense(c.in_channels * c.patch_features, c.dim, dtype=c.dtype, rngs=rngs)
        self.text_embedding = MLP((c.text_dim, c.dim, c.dim), jax.nn.gelu, dtype=c.dtype, rngs=rngs)
        self.time_embedding = MLP((c.freq_dim, c.dim, c.dim), jax.nn.silu, dtype=c.dtype, rngs=rngs)
        self.time_projection = Dense(c.dim, 6 * c.dim, dtype=c.dtype, rngs=rngs)
        if c.clip_dim:
            self.image_embedding = ImageEmbedding(c, rngs=rngs)
        self.blocks = stack_blocks(Block, c, rngs)
        self.head = Head(c, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b t h w c"],
        timesteps: Float[Array, " b"],
        text: Float[Array, "b tokens text_dim"],
        *,
        y: Float[Array, "b t h w _"] | None = None,
        clip: Float[Array, "b clip_tokens clip_dim"] | None = None,
    ) -> Float[Array, "b t h w out_channels"]:
        """Returns the velocity, float32.

        x: noisy latents; h and w even.
        timesteps: float32 in 0..1000.
        text: text embedding of 512 tokens, zero rows past the prompt's end; of these any number may be left out, with
          the same result.
        y: mask and condition latents (image to video).
        clip: 257 CLIP tokens, of two images 514 (Wan 2.1 image to video).
        """
        context = self.prepare(text, patch_grid(x, self.config.patch), clip=clip)
        return self.velocity(x, self.embed_time(timesteps), context, y=y)

    # The parts of `__call__`. A sampler prepares once for a video and embeds all its timesteps at once.

    def prepare(
        self,
        text: Float[Array, "b tokens text_dim"],
        grid: tuple[int, int, int],
        *,
        clip: Float[Array, "b clip_tokens clip_dim"] | None = None,
    ) -> Context:
        """Computes what no step changes, see `__call__`; grid: patches in time, height and width."""
        text, image = self.embed_text(text, clip)
        table = rotary_table(grid, self.config.head_dim)
        if not kept_keys(self.config, sum(math.prod(a.shape[:2]) for a in jax.tree.leaves((text, image)))):
            return Context(text, image, table)
        graph, layers = nnx.split(self.blocks.cross_attn)
        keys_of = lambda _, layer: (None, nnx.merge(graph, layer).keys(text, image))  # noqa: E731
        _, (of_text, of_image) = lax.scan(keys_of, None, layers)
        return Context(of_text, of_image, table)

    def velocity(
        self,
        x: Float[Array, "b t h w c"],
        time: TimeEmbedding,
        context: Context,
        *,
        y: Float[Array, "b t h w _"] | None = None,
    ) -> Float[Array, "b t h w out_channels"]:
        """Computes one step: time from `embed_time`, context from `prepare`."""
        tokens = self.run_blocks(self.embed_latents(x, y), time.blocks, context)
        return self.unembed(tokens, (time, x))

    def run_blocks(
        self, x: Float[Array, "B L D"], e0: Float[Array, "B 6 D"], context: Context
    ) -> Float[Array, "B L D"]:
        """Runs tokens through all blocks by one scan."""
        graph, layers = nnx.split(self.blocks)

        def run_block(layer, x, keys, per_sample, table):
            e0, tokens = per_sample
            return nnx.merge(graph, layer)(x, e0, *(keys or tokens), table)

        keys: Any = (context.text, context.image)
        tokens = None
        if isinstance(context.text, jax.Array):
            keys, tokens = None, keys
        return scan_layers(run_block, layers, x, keys, (e0, tokens), context.table, remat=self.config.remat)

    def embed(self, x, timesteps, text, *, y=None, clip=None) -> tuple[jax.Array, tuple, tuple]:
        """Returns tokens, what else each block takes, and what `unembed` takes, where blocks are streamed."""
        time, table = self.embed_time(timesteps), rotary_table(patch_grid(x, self.config.patch), self.config.head_dim)
        return self.embed_latents(x, y), (time.blocks, *self.embed_text(text, clip), table), (time, x)

    def unembed(
        self, tokens: Float[Array, "b L D"], rest: tuple[TimeEmbedding, jax.Array]
    ) -> Float[Array, "b t h w out_channels"]:
        """Turns the last block's tokens into the velocity; of the latents in `rest` only the shape is used."""
        time, x = rest
        return unpatchify(self.head(tokens, time.head), patch_grid(x, self.config.patch), self.config.patch)

    def embed_latents(self, x: Float[Array, "b t h w c"], y: Float[Array, "b t h w _"] | None) -> Float[Array, "b L D"]:
        """Turns latents with their condition into tokens."""
        c = self.config
        channels = x.shape[-1] + (0 if y is None else y.shape[-1])
        if channels != c.in_channels:
            raise UserError(f"the model takes {c.in_channels} latent channels (condition included), not {channels}")
        for size, patch in zip(x.shape[1:4], c.patch, strict=True):
            if size % patch:
                raise UserError(f"latents of shape {x.shape[1:4]} do not divide into patches of {c.patch}")
        x = x.astype(c.dtype) if y is None else jnp.concatenate((x.astype(c.dtype), y.astype(c.dtype)), axis=-1)
        return self.patch_embedding(patchify(x, c.patch))

    def embed_time(self, timesteps: Float[Array, " B"]) -> TimeEmbedding:
        """Embeds float32 timesteps in 0..1000."""
        e = self.time_embedding(time_sinusoid(timesteps, self.config.freq_dim))
        e0 = self.time_projection(jax.nn.silu(e))
        return TimeEmbedding(e, e0.reshape(e.shape[0], 6, self.config.dim))

    def embed_text(
        self, text: Float[Array, "B _ text_dim"], clip: Float[Array, "B _ clip_dim"] | None
    ) -> tuple[Float[Array, "B _ D"], Float[Array, "B _ D"] | None]:
        """Embeds text and the image's 257 or 514 tokens as cross-attention takes them.

        Of text with less than 512 rows, the last one stands for itself and all that are left out.
        """
        c = self.config
        if text.shape[1] < c.text_len:
            text = jnp.pad(text, ((0, 0), (0, 1), (0, 0)))
        if (clip is None) != (c.clip_dim is None):
            raise UserError(f"clip tokens were {'not ' if clip is None else ''}given to a model with {c.clip_dim=}")
        if clip is not None and clip.shape[1] != c.clip_images * CLIP_TOKENS:
            tokens = c.clip_images * CLIP_TOKENS
            raise UserError(f"{clip.shape[1]} clip tokens were given and the model takes {tokens}, those of its images")
        image = None if clip is None else self.image_embedding(clip.astype(c.dtype))
        return self.text_embedding(text.astype(c.dtype)), image


def kept_keys(config: WanConfig, tokens: int) -> int:
    """Returns the bytes of keys and values of this many tokens in all layers; 0 where each step computes them."""
    size = 2 * config.num_layers * tokens * config.dim * jnp.dtype(config.dtype).itemsize
    return size if size <= KEYS_BYTES else 0


def linear_kind(config: WanConfig):
    return Dense if config.quant is None else functools.partial(Int8Dense, quant=config.quant)


def block_linear(config: WanConfig, rngs: nnx.Rngs):
    return linear_kind(config)(config.dim, config.dim, dtype=config.dtype, rngs=rngs)


def modulation(own: Float[Array, "n D"], e: Float[Array, "B _ D"]) -> list[Float[Array, "B 1 D"]]:
    """Adds a block's own modulation and the timestep's n or 1; n arrays in float32."""
    both = own.astype(jnp.float32)[None] + e
    return jnp.split(both, both.shape[1], axis=1)


def patch_grid(x: jax.Array, patch: tuple[int, int, int]) -> tuple[int, int, int]:
    """Returns the patches in time, height and width."""
    t, h, w = (size // p for size, p in zip(x.shape[1:4], patch, strict=True))
    return t, h, w


def patchify(x: Num[Array, "b t h w c"], patch: tuple[int, int, int]) -> Num[Array, "b L features"]:
    """Turns patches into tokens `[b, L, c pt ph pw]`, channel slowest, so that the weight is the Conv3d's reshaped."""
    (pt, ph, pw), (t, h, w) = patch, patch_grid(x, patch)
    x = x.reshape(x.shape[0], t, pt, h, ph, w, pw, x.shape[-1])
    return x.transpose(0, 1, 3, 5, 7, 2, 4, 6).reshape(x.shape[0], t * h * w, -1)


def unpatchify(
    x: Num[Array, "b L features"], grid: tuple[int, int, int], patch: tuple[int, int, int]
) -> Num[Array, "b t h w c"]:
    """Turns tokens `[b, L, pt ph pw c]`, channel fastest, into latents."""
    (t, h, w), (pt, ph, pw) = grid, patch
    x = x.reshape(x.shape[0], t, h, w, pt, ph, pw, -1).transpose(0, 1, 4, 2, 5, 3, 6, 7)
    return x.reshape(x.shape[0], t * pt, h * ph, w * pw, -1)
