"""The Wan 2.1 / 2.2 video transformer (arXiv 2503.20314, section 4.2): text to video and image to video.

B batch, L tokens, N heads, H head dim, D width, F ffn width; latents are `b t h w c`. Follows the public modules
`wan/modules/model.py` (Wan 2.1) and `rcm/networks/wan2pt1.py` (TurboDiffusion).
"""

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from turbojax.errors import UserError
from turbojax.kernels.attention import dot_product_attention
from turbojax.kernels.int8 import QuantConfig, Quantized
from turbojax.kernels.sage import VALUES, Values, sage_sparse_linear_attention
from turbojax.kernels.sla import sparse_linear_attention
from turbojax.models.layers import (
    MLP,
    Dense,
    Int8Dense,
    LayerNorm,
    RMSNorm,
    modulated_norm,
    rotary_table,
    rotate,
    time_sinusoid,
)
from turbojax.sharding import over_heads, scan_layers

AttentionType = Literal["original", "sla", "sagesla"]
# Block sizes (queries, keys) that TurboDiffusion's published checkpoints run with: SageSLA's are those on Hopper.
BLOCKS: dict[str, tuple[int, int]] = {"original": (0, 0), "sla": (128, 64), "sagesla": (64, 128)}

Table = tuple[jax.Array, jax.Array]
Activation = jax.Array | Quantized


@dataclasses.dataclass(frozen=True)
class WanConfig:
    """Everything that decides the network's parameters and results.

    in_channels: latent channels (16), with mask (4) and condition latent (16) put behind them for image to video.
    clip_dim: width of the CLIP image tokens (Wan 2.1 image to video), None without.
    attention_type: self-attention: "original" (dense), "sla", or "sagesla" (int8 and float8, forward only).
    sla_topk, sla_blocks: share of key blocks, and rows of query and key blocks (None: as published).
    sage_values: how SageSLA multiplies with v, see `turbojax.kernels.sage`.
    attention_implementation: "reference" for attention that `jax.jvp` can differentiate; None for the fastest.
    quant: how the linear layers inside the blocks hold int8 weights; None for `dtype`.
    remat: whether gradients compute each block a second time instead of keeping what is inside it.
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
    eps: float = 1e-6
    attention_type: AttentionType = "original"
    sla_topk: float = 0.1
    sla_blocks: tuple[int, int] | None = None
    sage_values: Values = "float8"
    attention_implementation: Literal["reference"] | None = None
    quant: QuantConfig | None = None
    dtype: Any = jnp.bfloat16
    remat: bool = False

    def __post_init__(self):
        if self.attention_type not in BLOCKS:
            raise UserError(f"attention_type={self.attention_type!r} is unknown; choose {' or '.join(BLOCKS)}")
        if self.dim % self.num_heads or self.head_dim % 2:
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
        """Rows of a query block and of a key block."""
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

    def __call__(self, x: Activation, table: Table) -> jax.Array:
        """x `[B, L, D]`, quantized where the layers are, to `[B, L, D]`."""
        c = self.config
        q, k = self.norm_q(self.q(x)), self.norm_k(self.k(x))
        q, k, v = (split_heads(a, c.num_heads) for a in (q, k, self.v(x)))
        out = over_heads(self.attend, rotate(q, table), rotate(k, table), v)
        return self.o(out.reshape(*out.shape[:2], c.dim))

    def attend(self, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        """Attention over all tokens, q, k and v `[B, L, N, H]`; on a mesh, of some of the heads."""
        c = self.config
        if c.attention_type == "original":
            return dot_product_attention(q, k, v, implementation=c.attention_implementation)
        projection = self.proj_l.weight[...], self.proj_l.bias[...]
        settings: dict[str, Any] = {
            "topk": c.sla_topk,
            "block_q": c.blocks[0],
            "block_k": c.blocks[1],
            "implementation": c.attention_implementation,
        }
        if c.attention_type == "sla":
            return sparse_linear_attention(q, k, v, *projection, **settings)
        return sage_sparse_linear_attention(q, k, v, *projection, values=c.sage_values, **settings)


class CrossAttention(nnx.Module):
    """Attention to the text, plus attention to the image tokens where the model has them."""

    def __init__(self, config: WanConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.q, self.k, self.v, self.o = (block_linear(config, rngs) for _ in range(4))
        self.norm_q, self.norm_k = (RMSNorm(config.dim, eps=config.eps) for _ in range(2))
        if config.clip_dim:
            self.k_img, self.v_img = (block_linear(config, rngs) for _ in range(2))
            self.norm_k_img = RMSNorm(config.dim, eps=config.eps)

    def __call__(self, x: jax.Array, text: jax.Array, image: jax.Array | None) -> jax.Array:
        """x `[B, L, D]`, text `[B, 512, D]`, image `[B, 257, D]` or None to `[B, L, D]`."""
        heads = self.config.num_heads
        attend = functools.partial(dot_product_attention, implementation=self.config.attention_implementation)
        q = split_heads(self.norm_q(self.q(x)), heads)
        keys = self.k.prepare(text)
        k, v = split_heads(self.norm_k(self.k(keys)), heads), split_heads(self.v(keys), heads)
        out = attend(q, k, v)
        if image is not None:
            image = self.k_img.prepare(image)
            k, v = (
                split_heads(self.norm_k_img(self.k_img(image)), heads),
                split_heads(self.v_img(image), heads),
            )
            out = out + attend(q, k, v)
        return self.o(out.reshape(x.shape))


class FeedForward(nnx.Module):
    """fc2(gelu(fc1(x)))."""

    def __init__(self, config: WanConfig, *, rngs: nnx.Rngs):
        linear = linear_kind(config)
        self.fc1 = linear(config.dim, config.ffn_dim, dtype=config.dtype, rngs=rngs)
        self.fc2 = linear(config.ffn_dim, config.dim, dtype=config.dtype, rngs=rngs)

    def __call__(self, x: Activation) -> jax.Array:
        """x `[B, L, D]`, quantized where the layers are, to `[B, L, D]`."""
        return self.fc2(self.fc1.gelu(x))


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
        self, x: jax.Array, e0: jax.Array, text: jax.Array, image: jax.Array | None, table: Table
    ) -> jax.Array:
        """x `[B, L, D]`, e0 `[B, 6, D]` float32 to `[B, L, D]`."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation(self.modulation[...], e0)
        h = self.self_attn.q.prepare_normed(x, shift1, scale1, eps=self.eps)
        x = gated_sum(x, self.self_attn(h, table), gate1)
        x = x + self.cross_attn(self.norm3(x), text, image)
        h = self.ffn.fc1.prepare_normed(x, shift2, scale2, eps=self.eps)
        return gated_sum(x, self.ffn(h), gate2)


class ImageEmbedding(nnx.Module):
    """CLIP tokens `[B, 257, clip_dim]` to `[B, 257, D]`."""

    def __init__(self, config: WanConfig, *, rngs: nnx.Rngs):
        width, dim = config.clip_dim, config.dim
        assert width is not None
        self.norm_in, self.norm_out = LayerNorm(width, eps=1e-5), LayerNorm(dim, eps=1e-5)
        exact_gelu = lambda x: jax.nn.gelu(x, approximate=False)  # noqa: E731
        self.mlp = MLP((width, width, dim), exact_gelu, dtype=config.dtype, rngs=rngs)

    def __call__(self, clip: jax.Array) -> jax.Array:
        return self.norm_out(self.mlp(self.norm_in(clip)))


class Head(nnx.Module):
    """Modulated norm and projection to patches, in float32."""

    def __init__(self, config: WanConfig, *, rngs: nnx.Rngs):
        c = config
        self.eps = c.eps
        self.modulation = nnx.Param(jax.random.normal(rngs.params(), (2, c.dim), jnp.float32) / math.sqrt(c.dim))
        self.proj = Dense(c.dim, c.out_channels * c.patch_features, dtype=c.dtype, rngs=rngs)

    def __call__(self, x: jax.Array, e: jax.Array) -> jax.Array:
        """x `[B, L, D]`, e `[B, D]` to float32 `[B, L, patch features]`."""
        shift, scale = modulation(self.modulation[...], e[:, None])
        return self.proj(modulated_norm(x.astype(jnp.float32), shift, scale, eps=self.eps))


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

        @nnx.split_rngs(splits=c.num_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(rngs):
            return Block(c, rngs=rngs)

        self.blocks = stack(rngs)
        self.head = Head(c, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        timesteps: jax.Array,
        text: jax.Array,
        *,
        y: jax.Array | None = None,
        clip: jax.Array | None = None,
    ) -> jax.Array:
        """Velocity, float32 `[B, T, H, W, out_channels]`.

        x: noisy latents `[B, T, H, W, C]`; H and W even.
        timesteps: float32 `[B]` in 0..1000.
        text: text embedding `[B, 512, text_dim]`, zero rows past the prompt's end.
        y: mask and condition latents `[B, T, H, W, 20]` (image to video).
        clip: CLIP tokens `[B, 257, clip_dim]` (Wan 2.1 image to video).
        """
        self.check(x, y, clip)
        dtype = self.config.dtype
        x = x.astype(dtype) if y is None else jnp.concatenate((x.astype(dtype), y.astype(dtype)), axis=-1)
        grid = patch_grid(x, self.config.patch)
        tokens = self.patch_embedding(patchify(x, self.config.patch))
        e, e0 = self.embed_time(timesteps)
        text = self.text_embedding(text.astype(dtype))
        image = None if clip is None else self.image_embedding(clip.astype(dtype))
        table = rotary_table(grid, self.config.head_dim)
        tokens = self.run_blocks(tokens, e0, text, image, table)
        return unpatchify(self.head(tokens, e), grid, self.config.patch)

    def embed_time(self, timesteps: jax.Array) -> tuple[jax.Array, jax.Array]:
        """timesteps `[B]` to e `[B, D]` for the head and e0 `[B, 6, D]` for the blocks, in float32."""
        e = self.time_embedding(time_sinusoid(timesteps, self.config.freq_dim))
        e0 = self.time_projection(jax.nn.silu(e))
        return e, e0.reshape(e.shape[0], 6, self.config.dim)

    def run_blocks(self, x, e0, text, image, table: Table) -> jax.Array:
        graph, layers = nnx.split(self.blocks)

        def run_block(layer, x, per_sample, table):
            return nnx.merge(graph, layer)(x, *per_sample, table)

        return scan_layers(run_block, layers, x, (e0, text, image), table, remat=self.config.remat)

    def check(self, x: jax.Array, y: jax.Array | None, clip: jax.Array | None) -> None:
        c = self.config
        channels = x.shape[-1] + (0 if y is None else y.shape[-1])
        if channels != c.in_channels:
            raise UserError(f"the model takes {c.in_channels} latent channels (condition included), not {channels}")
        if (clip is None) != (c.clip_dim is None):
            raise UserError(f"clip tokens were {'not ' if clip is None else ''}given to a model with {c.clip_dim=}")
        for size, patch in zip(x.shape[1:4], c.patch, strict=True):
            if size % patch:
                raise UserError(f"latents of shape {x.shape[1:4]} do not divide into patches of {c.patch}")


def linear_kind(config: WanConfig):
    return Dense if config.quant is None else functools.partial(Int8Dense, quant=config.quant)


def block_linear(config: WanConfig, rngs: nnx.Rngs):
    return linear_kind(config)(config.dim, config.dim, dtype=config.dtype, rngs=rngs)


def split_heads(x: jax.Array, heads: int) -> jax.Array:
    """`[B, L, D]` to `[B, L, N, H]`."""
    return x.reshape(*x.shape[:-1], heads, -1)


def modulation(own: jax.Array, e: jax.Array) -> list[jax.Array]:
    """A block's own modulation `[n, D]` plus the timestep's `[B, n or 1, D]`, as n arrays `[B, 1, D]`, float32."""
    both = own.astype(jnp.float32)[None] + e
    return jnp.split(both, both.shape[1], axis=1)


def gated_sum(x: jax.Array, branch: jax.Array, gate: jax.Array) -> jax.Array:
    """x + gate * branch in float32, cast back."""
    return (x.astype(jnp.float32) + gate * branch.astype(jnp.float32)).astype(x.dtype)


def patch_grid(x: jax.Array, patch: tuple[int, int, int]) -> tuple[int, int, int]:
    t, h, w = (size // p for size, p in zip(x.shape[1:4], patch, strict=True))
    return t, h, w


def patchify(x: jax.Array, patch: tuple[int, int, int]) -> jax.Array:
    """`[B, T, H, W, C]` to `[B, L, C pt ph pw]`, channel slowest, so that the weight is the Conv3d's reshaped."""
    (pt, ph, pw), (t, h, w) = patch, patch_grid(x, patch)
    x = x.reshape(x.shape[0], t, pt, h, ph, w, pw, x.shape[-1])
    return x.transpose(0, 1, 3, 5, 7, 2, 4, 6).reshape(x.shape[0], t * h * w, -1)


def unpatchify(x: jax.Array, grid: tuple[int, int, int], patch: tuple[int, int, int]) -> jax.Array:
    """`[B, L, pt ph pw C]`, channel fastest, to `[B, T, H, W, C]`."""
    (t, h, w), (pt, ph, pw) = grid, patch
    x = x.reshape(x.shape[0], t, h, w, pt, ph, pw, -1).transpose(0, 1, 4, 2, 5, 3, 6, 7)
    return x.reshape(x.shape[0], t * pt, h * ph, w * pw, -1)
