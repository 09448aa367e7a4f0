"""The image encoder of Wan 2.1's image to video: CLIP's ViT-H/14, trained with XLM-Roberta (arXiv 2212.07143).

B batch, L tokens (1 + 16 x 16 = 257), N heads, H head dim, D width. The video network attends to the result of the
last layer but one, so the last layer is not even built. Follows the public module `wan/modules/clip.py` (Wan 2.1,
`visual` with `use_31_block`).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, UInt8

from turbojax.errors import UserError
from turbojax.kernels.attention import dot_product_attention
from turbojax.models.layers import MLP, Dense, LayerNorm, scan_blocks, split_heads, stack_blocks
from turbojax.models.wan import patchify

# Statistics of pixels in 0..1, by channel (OpenAI's CLIP).
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """Everything that decides the encoder's parameters and results. num_layers: those that run, one less than stored.

    dtype: float16 holds these weights more closely than bfloat16; the published code runs in it.
    """

    dim: int = 1280
    mlp_dim: int = 5120
    num_heads: int = 16
    num_layers: int = 31
    image_size: int = 224
    patch: int = 14
    eps: float = 1e-5
    dtype: Any = jnp.float16

    def __post_init__(self):
        if self.image_size % self.patch or self.dim % self.num_heads:
            raise UserError(f"{self.image_size=} must divide by {self.patch=}, and {self.dim=} by {self.num_heads=}")

    @property
    def tokens(self) -> int:
        """Returns the number of tokens: a class token and one for each patch."""
        return 1 + (self.image_size // self.patch) ** 2

    @classmethod
    def vit_h_14(cls, **changes) -> "CLIPConfig":
        """The released encoder (models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth)."""
        return cls(**changes)


def clip_dtype(dtype: Any) -> Any:
    """Returns the encoder's dtype beside a video network's: float16 where that one is bfloat16."""
    return jnp.float16 if jnp.dtype(dtype) == jnp.bfloat16 else dtype


class Attention(nnx.Module):
    """o(attention(q, k, v)) over all tokens."""

    def __init__(self, config: CLIPConfig, *, rngs: nnx.Rngs):
        self.num_heads, dim, dtype = config.num_heads, config.dim, config.dtype
        self.q, self.k, self.v, self.o = (Dense(dim, dim, dtype=dtype, rngs=rngs) for _ in range(4))

    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        q, k, v = (split_heads(linear(x), self.num_heads) for linear in (self.q, self.k, self.v))
        return self.o(dot_product_attention(q, k, v).reshape(x.shape))


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)) with the exact GELU."""

    def __init__(self, config: CLIPConfig, *, rngs: nnx.Rngs):
        c = config
        self.norm1, self.norm2 = LayerNorm(c.dim, eps=c.eps), LayerNorm(c.dim, eps=c.eps)
        self.attn = Attention(c, rngs=rngs)
        exact_gelu = functools.partial(jax.nn.gelu, approximate=False)
        self.mlp = MLP((c.dim, c.mlp_dim, c.dim), exact_gelu, dtype=c.dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class CLIPVision(nnx.Module):
    """Images to the tokens that `WanModel` takes as `clip`."""

    def __init__(self, config: CLIPConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        self.patch_embedding = Dense(3 * c.patch**2, c.dim, use_bias=False, dtype=c.dtype, rngs=rngs)
        self.class_token = nnx.Param(jax.random.normal(rngs.params(), (c.dim,), c.dtype) * c.dim**-0.5)
        self.positions = nnx.Param(jax.random.normal(rngs.params(), (c.tokens, c.dim), c.dtype) * c.dim**-0.5)
        self.norm = LayerNorm(c.dim, eps=c.eps)
        self.blocks = stack_blocks(Block, c, rngs)

    def __call__(self, images: Float[Array, "B size size 3"]) -> Float[Array, "B tokens D"]:
        """Turns images, as `prepare` gives them, into 257 tokens each."""
        c = self.config
        x = self.patch_embedding(patchify(images.astype(c.dtype)[:, None], (1, c.patch, c.patch)))
        first = jnp.broadcast_to(self.class_token[...], (x.shape[0], 1, c.dim))
        x = self.norm(jnp.concatenate((first, x), axis=1) + self.positions[...][None])
        return scan_blocks(self.blocks, x, ())


@functools.partial(jax.jit, static_argnames="graph")
def _encode(graph, state, images: jax.Array) -> jax.Array:
    return nnx.merge(graph, state)(images)


def encode_image(clip: CLIPVision, image: UInt8[np.ndarray, "height width 3"]) -> Float[Array, "1 tokens D"]:
    """Turns an image of any size into tokens."""
    graph, state = nnx.split(clip)
    return _encode(graph, state, jnp.asarray(prepare(image, clip.config.image_size))[None])


def prepare(image: UInt8[np.ndarray, "height width 3"], size: int) -> Float32[np.ndarray, "{size} {size} 3"]:
    """Squeezes an image to size x size and normalises it.

    Bicubic between pixels and without antialiasing, as the published code resizes.
    """
    pixels = image.astype(np.float32) / np.float32(255)
    for _ in range(2):  # rows, then columns; the axes are back in order after the second
        index, weights = cubic_taps(pixels.shape[0], size)
        pixels = np.einsum("otwc,ot->woc", pixels[index], weights)
    return (pixels - np.array(PIXEL_MEAN, np.float32)) / np.array(PIXEL_STD, np.float32)


def cubic_taps(size_in: int, size_out: int, *, a: float = -0.75) -> tuple[np.ndarray, np.ndarray]:
    """Returns the four pixels that each result is made of, int `[out, 4]`, and their weights, float32.

    Keys' kernel: (a + 2) d^3 - (a + 3) d^2 + 1 up to distance 1, a (d^3 - 5 d^2 + 8 d - 4) up to 2. Past the edge the
    last pixel is repeated. PyTorch's a is -0.75.
    """
    centre = (np.arange(size_out) + 0.5) * (size_in / size_out) - 0.5
    index = np.floor(centre).astype(int)[:, None] + np.arange(-1, 3)
    d = np.abs(centre[:, None] - index)
    near, far = (a + 2) * d**3 - (a + 3) * d**2 + 1, a * (d**3 - 5 * d**2 + 8 * d - 4)
    weights = np.where(d <= 1, near, far).astype(np.float32)
    return np.clip(index, 0, size_in - 1), weights
