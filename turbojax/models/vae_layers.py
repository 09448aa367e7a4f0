"""Layers of the video autoencoder: convolutions that are causal in time, with a cache, and the blocks made of them.

Video and features are `b t h w c`. The cache of a layer is the frames that the next chunk looks back on.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from turbojax.kernels.attention import dot_product_attention
from turbojax.kernels.sizes import cdiv
from turbojax.models.layers import Dense, along_last

Cache = Any  # a pytree of arrays `[b, frames, h, w, c]`
Frames = Float[Array, "b _ _ _ _"]


def conv_over_space(
    x: Float[Array, "n _ _ in"], kernel: Float[Array, "kh kw in out"], bias: Float[Array, " out"], *, stride: int = 1
) -> Float[Array, "n _ _ out"]:
    """Convolves images; `h / stride` rows and `w / stride` columns come out.

    Pads evenly with zeros; with stride 2 only one row at the bottom and one column at the right.
    """
    padding = [(size // 2 - (stride - 1), size // 2) for size in kernel.shape[:2]]
    dims = ("NHWC", "HWIO", "NHWC")
    y = lax.conv_general_dilated(x, kernel.astype(x.dtype), (stride, stride), padding, dimension_numbers=dims)
    return y + along_last(bias, y)


def join_frames(x: Float[Array, "b t h w c"], size: int, *, stride: int = 1) -> Float[Array, "b _ h w _"]:
    """Puts `size` frames side by side: `[b, (t - size) // stride + 1, h, w, size c]`."""
    steps = (x.shape[1] - size) // stride + 1
    return jnp.concatenate([x[:, i : i + stride * (steps - 1) + 1 : stride] for i in range(size)], axis=-1)


def conv_over_time(
    joined: Float[Array, "b t h w _"], kernel: Float[Array, "kt kh kw in out"], bias: Float[Array, " out"]
) -> Float[Array, "b t h w out"]:
    """y[t] = bias + sum over i of conv2d(x[stride t + i], kernel[i]): unpadded in time, padded in space.

    joined: from `join_frames`. The sum is one 2-D convolution of kt frames joined on channels: on Hopper faster than
    cuDNN's 3-D convolution.
    """
    _, height, width, _, features_out = kernel.shape
    kernel = jnp.moveaxis(kernel, 0, 2).reshape(height, width, -1, features_out)
    y = conv_over_space(joined.reshape(-1, *joined.shape[2:]), kernel, bias)
    return y.reshape(*joined.shape[:-1], features_out)


def init_kernel(shape: tuple[int, ...], dtype: Any, rngs: nnx.Rngs) -> nnx.Param:
    return nnx.Param(jax.random.normal(rngs.params(), shape, dtype) / math.sqrt(math.prod(shape[:-1])))


class Conv2d(nnx.Module):
    """A 3 x 3 convolution of each frame alone."""

    def __init__(self, features_in: int, features_out: int, *, stride: int = 1, dtype: Any, rngs: nnx.Rngs):
        self.stride = stride
        self.kernel = init_kernel((3, 3, features_in, features_out), dtype, rngs)
        self.bias = nnx.Param(jnp.zeros(features_out, dtype))

    def __call__(self, x: Float[Array, "b t h w in"]) -> Float[Array, "b t _ _ out"]:
        y = conv_over_space(x.reshape(-1, *x.shape[2:]), self.kernel[...], self.bias[...], stride=self.stride)
        return y.reshape(*x.shape[:2], *y.shape[1:])


class CausalConv3d(nnx.Module):
    """Convolution over time and space that looks back only: `past` frames come before x, zeros at the start.

    size: kernel in time, height and width. stride: in time. The cache holds the last size - stride frames.
    """

    def __init__(
        self, features_in: int, features_out: int, *, size=(3, 3, 3), stride: int = 1, dtype: Any, rngs: nnx.Rngs
    ):
        self.stride, self.dtype = stride, dtype
        self.kernel = init_kernel((*size, features_in, features_out), dtype, rngs)
        self.bias = nnx.Param(jnp.zeros(features_out, dtype))

    def init_cache(self, batch: int, height: int, width: int) -> Float[Array, "{batch} _ {height} {width} _"]:
        """Returns zeros, as before the first frame."""
        size, _, _, features_in, _ = self.kernel.shape
        return jnp.zeros((batch, size - self.stride, height, width, features_in), self.dtype)

    def constant_from(self, frame: int) -> int:
        """Returns the frame of the result from which on nothing changes, if the input does not from `frame` on."""
        return cdiv(frame + self.kernel.shape[0] - 1, self.stride)

    def __call__(
        self, x: Float[Array, "b _ h w in"], past: Float[Array, "b past h w in"]
    ) -> tuple[Float[Array, "b _ h w out"], Float[Array, "b past h w in"]]:
        """Returns the result and the next `past`."""
        joined = join_frames(jnp.concatenate((past, x), axis=1), self.kernel.shape[0], stride=self.stride)
        # The next cache comes after the frames are joined, so that XLA writes it where `past` was instead of copying
        # every `past` first.
        joined, past, x = lax.optimization_barrier((joined, past, x))
        seen = jnp.concatenate((past, x), axis=1)
        return conv_over_time(joined, self.kernel[...], self.bias[...]), seen[:, seen.shape[1] - past.shape[1] :]


class ChannelNorm(nnx.Module):
    """x / |x| * sqrt(C) * gamma over the last axis, in float32; the length |x| is at least 1e-12."""

    def __init__(self, features: int):
        self.gamma = nnx.Param(jnp.ones(features, jnp.float32))

    def __call__(self, x: Float[Array, "*rows C"]) -> Float[Array, "*rows C"]:
        f = x.astype(jnp.float32)
        length = jnp.sqrt(jnp.sum(f * f, axis=-1, keepdims=True))
        f = f / jnp.maximum(length, 1e-12) * math.sqrt(x.shape[-1])
        return (f * along_last(self.gamma[...], f)).astype(x.dtype)


class CausalBlock(nnx.Module):
    """A piece of the encoder or decoder: x and its cache in, x and its cache out.

    first (static): x begins with the first frame of the clip.
    """

    scale = 1.0  # height and width are multiplied by it
    stride = 1  # frames after the first are divided by it

    def init_cache(self, batch: int, height: int, width: int) -> Cache:
        """Returns zeros, as before the first frame; height and width are those of the input."""
        return ()

    def constant_from(self, frame: int) -> int:
        """Returns what `CausalConv3d.constant_from` does; frames are counted from 0, the clip's first."""
        return frame

    def __call__(self, x: Frames, cache: Cache, *, first: bool) -> tuple[Frames, Cache]:
        raise NotImplementedError


class ResidualBlock(CausalBlock):
    """shortcut(x) + conv2(silu(norm2(conv1(silu(norm1(x))))))."""

    def __init__(self, features_in: int, features_out: int, *, dtype: Any, rngs: nnx.Rngs):
        self.norm1 = ChannelNorm(features_in)
        self.conv1 = CausalConv3d(features_in, features_out, dtype=dtype, rngs=rngs)
        self.norm2 = ChannelNorm(features_out)
        self.conv2 = CausalConv3d(features_out, features_out, dtype=dtype, rngs=rngs)
        changes = features_in != features_out
        self.shortcut = Dense(features_in, features_out, dtype=dtype, rngs=rngs) if changes else None

    def init_cache(self, batch: int, height: int, width: int) -> Cache:
        return self.conv1.init_cache(batch, height, width), self.conv2.init_cache(batch, height, width)

    def constant_from(self, frame: int) -> int:
        return self.conv2.constant_from(self.conv1.constant_from(frame))

    def __call__(self, x: Frames, cache: Cache, *, first: bool) -> tuple[Frames, Cache]:
        past1, past2 = cache
        y, past1 = self.conv1(jax.nn.silu(self.norm1(x)), past1)
        y, past2 = self.conv2(jax.nn.silu(self.norm2(y)), past2)
        return y + (x if self.shortcut is None else self.shortcut(x)), (past1, past2)


class AttentionBlock(CausalBlock):
    """x + proj(attention(norm(x))) over the pixels of each frame alone, one head as wide as the channels."""

    def __init__(self, features: int, *, dtype: Any, rngs: nnx.Rngs):
        self.norm = ChannelNorm(features)
        self.to_qkv = Dense(features, 3 * features, dtype=dtype, rngs=rngs)
        self.proj = Dense(features, features, dtype=dtype, rngs=rngs)

    def __call__(self, x: Frames, cache: Cache, *, first: bool) -> tuple[Frames, Cache]:
        batch, frames, height, width, features = x.shape
        qkv = self.to_qkv(self.norm(x)).reshape(batch * frames, height * width, 1, 3 * features)
        y = dot_product_attention(*jnp.split(qkv, 3, axis=-1))
        return x + self.proj(y.reshape(x.shape)), cache


class Downsample(CausalBlock):
    """Halves height and width and, if `temporal`, the frames after the first."""

    scale = 0.5

    def __init__(self, features: int, *, temporal: bool, dtype: Any, rngs: nnx.Rngs):
        make = functools.partial(CausalConv3d, size=(3, 1, 1), stride=2, dtype=dtype, rngs=rngs)
        self.conv = Conv2d(features, features, stride=2, dtype=dtype, rngs=rngs)
        self.time_conv = make(features, features) if temporal else None
        self.stride = 2 if temporal else 1

    def init_cache(self, batch: int, height: int, width: int) -> Cache:
        return () if self.time_conv is None else self.time_conv.init_cache(batch, height // 2, width // 2)

    def constant_from(self, frame: int) -> int:
        return frame if self.time_conv is None else self.time_conv.constant_from(frame)

    def __call__(self, x: Frames, cache: Cache, *, first: bool) -> tuple[Frames, Cache]:
        x = self.conv(x)
        if self.time_conv is None:
            return x, cache
        if not first:
            return self.time_conv(x, cache)
        head, rest = x[:, :1], x[:, 1:]  # the head goes on as it is, and is what the rest looks back on
        if not rest.shape[1]:
            return head, head
        rest, cache = self.time_conv(rest, head)
        return jnp.concatenate((head, rest), axis=1), cache


class Upsample(CausalBlock):
    """Doubles height and width, halves channels and, if `temporal`, doubles the frames after the first."""

    scale = 2.0

    def __init__(self, features: int, *, temporal: bool, dtype: Any, rngs: nnx.Rngs):
        make = functools.partial(CausalConv3d, size=(3, 1, 1), dtype=dtype, rngs=rngs)
        self.time_conv = make(features, 2 * features) if temporal else None
        self.conv = Conv2d(features, features // 2, dtype=dtype, rngs=rngs)

    def init_cache(self, batch: int, height: int, width: int) -> Cache:
        return () if self.time_conv is None else self.time_conv.init_cache(batch, height, width)

    def __call__(self, x: Frames, cache: Cache, *, first: bool) -> tuple[Frames, Cache]:
        if self.time_conv is not None:
            head, rest = (x[:, :1], x[:, 1:]) if first else (x[:, :0], x)  # the rest looks back on zeros, not the head
            if rest.shape[1]:
                rest, cache = self.time_conv(rest, cache)
                rest = jnp.stack(jnp.split(rest, 2, axis=-1), axis=2)  # the first half of the channels is earlier
                x = jnp.concatenate((head, rest.reshape(rest.shape[0], -1, *rest.shape[3:])), axis=1)
        batch, frames, height, width, features = x.shape
        x = jnp.broadcast_to(x[:, :, :, None, :, None], (batch, frames, height, 2, width, 2, features))
        return self.conv(x.reshape(batch, frames, 2 * height, 2 * width, features)), cache
