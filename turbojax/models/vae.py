"""The Wan 2.1 video autoencoder (arXiv 2503.20314, section 4.1): 1 + 4n frames to 1 + n latents at 1/8.

Video and latents are `b t h w c`. Convolutions in time are causal, so a clip runs in chunks of any length:
the frames that the next chunk looks back on, the cache, are a pytree of arrays that goes in and comes out.
The first frame is a chunk of its own, because it takes no part in the resampling of time. Follows the public
module `wan/modules/vae.py` (Wan 2.1, class WanVAE_ with its cached encode and decode).
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Num, UInt8

from turbojax.errors import UserError
from turbojax.models.layers import Dense, along_last
from turbojax.models.sizes import tree_bytes
from turbojax.models.vae_layers import (
    AttentionBlock,
    Cache,
    CausalBlock,
    CausalConv3d,
    ChannelNorm,
    Downsample,
    Frames,
    ResidualBlock,
    Upsample,
)

WORKING_SET = 2.1  # bytes in use while decoding, for each of the cache: XLA's own count for an H100
CHUNK = 1  # latents at once; more takes memory and no less time (docs/notes/vae.md)

# Statistics of the released latents, by channel (class WanVAE of the public module).
# fmt: off
LATENT_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
               0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
LATENT_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
              3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)
# fmt: on


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """Everything that decides the autoencoder's parameters and results.

    dim_mult: width of each stage in units of `dim`, from full resolution down.
    temporal_downsample: for each step between two stages, True if it halves the frames too.
    mean, std: the latents handed out are `(mu - mean) / std`, one constant a channel.
    """

    dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    mean: tuple[float, ...] = LATENT_MEAN
    std: tuple[float, ...] = LATENT_STD
    dtype: Any = jnp.bfloat16

    def __post_init__(self):
        if len(self.temporal_downsample) != len(self.dim_mult) - 1:
            raise UserError(
                f"temporal_downsample={self.temporal_downsample} must have {len(self.dim_mult) - 1} flags, "
                f"one less than dim_mult={self.dim_mult}"
            )
        if not len(self.mean) == len(self.std) == self.z_dim:
            raise UserError(f"mean and std must have z_dim={self.z_dim} values")

    @property
    def spatial_factor(self) -> int:
        """Returns the pixels a latent, along height and along width."""
        return 2 ** len(self.temporal_downsample)

    @property
    def temporal_factor(self) -> int:
        """Returns the frames a latent, after the first."""
        return 2 ** sum(self.temporal_downsample)

    @classmethod
    def wan2_1(cls, **changes) -> "VAEConfig":
        """The released autoencoder (Wan2.1_VAE.pth), which Wan 2.2 A14B uses too."""
        return cls(**changes)


def middle(features: int, *, dtype: Any, rngs: nnx.Rngs) -> nnx.List:
    ends = [ResidualBlock(features, features, dtype=dtype, rngs=rngs) for _ in range(2)]
    return nnx.List([ends[0], AttentionBlock(features, dtype=dtype, rngs=rngs), ends[1]])


class Coder(nnx.Module):
    """Base of encoder and decoder: conv_in, blocks, then conv_out(silu(norm(x)))."""

    conv_in: CausalConv3d
    norm: ChannelNorm
    conv_out: CausalConv3d

    @property
    def blocks(self) -> list[CausalBlock]:
        raise NotImplementedError

    def init_cache(self, batch: int, height: int, width: int) -> Cache:
        """Returns zeros, as before the first frame; height and width of the input, in pixels or latents."""
        conv_in, blocks = self.conv_in.init_cache(batch, height, width), []
        for block in self.blocks:
            blocks.append(block.init_cache(batch, height, width))
            height, width = int(height * block.scale), int(width * block.scale)
        return conv_in, blocks, self.conv_out.init_cache(batch, height, width)

    def __call__(self, x: Frames, cache: Cache, *, first: bool, part: range | None = None) -> tuple[Frames, Cache]:
        """Runs a chunk; part (static): these blocks only, the first one with conv_in and the last one with conv_out."""
        past_in, pasts, past_out = cache
        blocks, pasts = self.blocks, list(pasts)
        part = range(len(blocks)) if part is None else part
        if part.start == 0:
            x, past_in = self.conv_in(x, past_in)
        for i in part:
            x, pasts[i] = blocks[i](x, pasts[i], first=first)
        if part.stop == len(blocks):
            x, past_out = self.conv_out(jax.nn.silu(self.norm(x)), past_out)
        return x, (past_in, pasts, past_out)


class Encoder(Coder):
    """Frames `[b, t, h, w, 3]` to `[b, t / 4, h / 8, w / 8, 2 z_dim]`."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        make: dict[str, Any] = dict(dtype=config.dtype, rngs=rngs)
        widths = [config.dim * m for m in config.dim_mult]
        down: list[CausalBlock] = []
        for stage, (before, width) in enumerate(itertools.pairwise((config.dim, *widths))):
            down.append(ResidualBlock(before, width, **make))
            down += [ResidualBlock(width, width, **make) for _ in range(config.num_res_blocks - 1)]
            if stage < len(widths) - 1:
                down.append(Downsample(width, temporal=config.temporal_downsample[stage], **make))
        self.conv_in = CausalConv3d(3, config.dim, **make)
        self.downsamples = nnx.List(down)
        self.middle = middle(widths[-1], **make)
        self.norm = ChannelNorm(widths[-1])
        self.conv_out = CausalConv3d(widths[-1], 2 * config.z_dim, **make)

    @property
    def blocks(self) -> list[CausalBlock]:
        return [*self.downsamples, *self.middle]

    @property
    def stages(self) -> list[range]:
        """Returns the blocks by resolution: each Downsample ends a part of them."""
        blocks = self.blocks
        ends = [i + 1 for i, block in enumerate(blocks) if isinstance(block, Downsample)]
        return [range(start, stop) for start, stop in itertools.pairwise((0, *ends, len(blocks)))]


class Decoder(Coder):
    """`[b, t, h, w, z_dim]` to frames `[b, 4 t, 8 h, 8 w, 3]`."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        make: dict[str, Any] = dict(dtype=config.dtype, rngs=rngs)
        widths = [config.dim * m for m in reversed(config.dim_mult)]
        temporal = config.temporal_downsample[::-1]
        before = widths[0]
        up: list[CausalBlock] = []
        for stage, width in enumerate(widths):
            up.append(ResidualBlock(before, width, **make))
            up += [ResidualBlock(width, width, **make) for _ in range(config.num_res_blocks)]
            if stage < len(widths) - 1:
                up.append(Upsample(width, temporal=temporal[stage], **make))
            before = width // 2
        self.conv_in = CausalConv3d(config.z_dim, widths[0], **make)
        self.middle = middle(widths[0], **make)
        self.upsamples = nnx.List(up)
        self.norm = ChannelNorm(widths[-1])
        self.conv_out = CausalConv3d(widths[-1], 3, **make)

    @property
    def blocks(self) -> list[CausalBlock]:
        return [*self.middle, *self.upsamples]

    @property
    def halves(self) -> tuple[range, range]:
        """Returns the blocks that see a whole frame, at the latents' resolution, and those that see less."""
        return range(len(self.middle)), range(len(self.middle), len(self.blocks))


class WanVAE(nnx.Module):
    """Encoder and decoder, one chunk at a time; `encode` and `decode` below run whole clips.

    The first chunk of a clip is 1 + 4n frames (1 + n latents) with `first=True` (static), each further one 4n frames
    (n latents) for any n. The result does not depend on how the clip was cut.
    """

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Encoder(config, rngs=rngs)
        self.quant = Dense(2 * config.z_dim, 2 * config.z_dim, dtype=config.dtype, rngs=rngs)
        self.post_quant = Dense(config.z_dim, config.z_dim, dtype=config.dtype, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)

    def encode_chunk(
        self, video: Frames, cache: Cache, *, first: bool, stage: int | None = None
    ) -> tuple[Frames, Cache]:
        """Encodes video `[b, 4n, h, w, 3]` in [-1, 1] to latents, float32 `[b, n, h/8, w/8, z_dim]`, and cache.

        stage (static): run only this one of the encoder's stages, on the result of the one before it.
        """
        stages = self.encoder.stages
        part = None if stage is None else stages[stage]
        x, cache = self.encoder(video.astype(self.config.dtype), cache, first=first, part=part)
        if part and part != stages[-1]:
            return x, cache
        mu = self.quant(x)[..., : self.config.z_dim].astype(jnp.float32)
        mean, std = self.statistics(mu)
        return (mu - mean) / std, cache

    def decode_chunk(
        self, latents: Frames, cache: Cache, *, first: bool, half: int | None = None
    ) -> tuple[Frames, Cache]:
        """Decodes latents `[b, n, h, w, z_dim]` to frames, `[b, 4n, 8h, 8w, 3]` in the model's dtype, and the cache.

        Frames lie about [-1, 1] and are not clamped. half (static): only go through this one of the decoder's halves,
        0 from latents to features `[b, n, h, w, c]` or 1 from there on.
        """
        if half != 1:
            mu = latents.astype(jnp.float32)
            mean, std = self.statistics(mu)
            latents = self.post_quant((mu * std + mean).astype(self.config.dtype))
        part = None if half is None else self.decoder.halves[half]
        return self.decoder(latents, cache, first=first, part=part)

    def statistics(self, like: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns mean and std of the latents, with leading axes of one."""
        mean, std = (along_last(jnp.asarray(a, jnp.float32), like) for a in (self.config.mean, self.config.std))
        return mean, std


# Module-level, so that a second clip of a size compiles nothing; the donated cache is updated in place. The first chunk
# has no cache yet: its zeros are created inside.
@functools.partial(jax.jit, static_argnames="graph", donate_argnames="cache")
def _encode_chunk(graph, state, video: jax.Array, cache: Cache | None) -> tuple[jax.Array, Cache]:
    vae, first = nnx.merge(graph, state), cache is None
    cache = vae.encoder.init_cache(video.shape[0], *video.shape[2:4]) if first else cache
    return vae.encode_chunk(video, cache, first=first)


@functools.partial(jax.jit, static_argnames=("graph", "half", "as_uint8"), donate_argnames="cache")
def run_decoder(
    graph, state, latents: jax.Array, cache: Cache | None, *, half: int | None = None, as_uint8: bool = False
) -> tuple[jax.Array, Cache]:
    vae, first = nnx.merge(graph, state), cache is None
    if first:
        cache = vae.decoder.init_cache(latents.shape[0], *latents.shape[2:4])
        cache = cache if half is None else part_of(cache, vae.decoder.halves[half])
    frames, cache = vae.decode_chunk(latents, cache, first=first, half=half)
    return to_uint8(frames) if as_uint8 else frames, cache


def part_of(cache: Cache, blocks: range) -> Cache:
    """Returns a coder's cache without what only its other blocks need."""
    past_in, pasts, past_out = cache
    kept = [past if i in blocks else () for i, past in enumerate(pasts)]
    return past_in if blocks.start == 0 else (), kept, past_out if blocks.stop == len(pasts) else ()


def to_uint8(frames: Float[Array, "*video"]) -> UInt8[Array, "*video"]:
    """Turns frames in [-1, 1] into levels: round((x + 1) * 127.5), clamped to 0..255."""
    f = jnp.clip(frames.astype(jnp.float32), -1, 1)
    return jnp.round((f + 1) * 127.5).astype(jnp.uint8)


def encode(vae: WanVAE, video: jax.Array | np.ndarray, *, chunk: int = CHUNK) -> Float32[Array, "b t h w z"]:
    """Encodes video `[b, 1 + 4n, h, w, 3]` in [-1, 1] to latents `[b, 1 + n, h/8, w/8, z_dim]`.

    The latents are (mu - mean) / std, without sampling.
    video: any float dtype; may lie on the host, one chunk at a time goes to the device.
    chunk: latents computed at once. It decides memory, not the result.

    Raises UserError unless frames are 1 + 4n and height and width (pixels) are multiples of 8.
    """
    check_video(video.shape, vae.config)
    graph, state = nnx.split(vae)
    factor, cache, start, latents = vae.config.temporal_factor, None, 0, []
    for size in (1, *(factor * n for n in chunk_sizes((video.shape[1] - 1) // factor, chunk))):
        piece = jnp.asarray(video[:, start : start + size], vae.config.dtype)
        z, cache = _encode_chunk(graph, state, piece, cache)
        latents.append(z)
        start += size
    return jnp.concatenate(latents, axis=1)


def decode(vae: WanVAE, latents: jax.Array | np.ndarray, **options) -> Num[Array, "b t h w 3"]:
    """Decodes latents `[b, 1 + n, h, w, z_dim]` to the video `[b, 1 + 4n, 8h, 8w, 3]`; options of `decode_chunks`."""
    return jnp.concatenate(list(decode_chunks(vae, latents, **options)), axis=1)


def decode_chunks(
    vae: WanVAE, latents: jax.Array | np.ndarray, *, chunk: int = CHUNK, as_uint8: bool = False
) -> Iterator[Num[Array, "b t h w 3"]]:
    """Yields the video piece by piece, in memory that does not grow with its length.

    latents: `[b, 1 + n, h, w, z_dim]`, as `encode` returns them.
    chunk: latents computed at once. It decides memory, not the result.
    as_uint8: yield levels 0..255 instead of unclamped values about [-1, 1] in the model's dtype.

    The first piece has one frame, further ones four a latent: `[b, t, 8h, 8w, 3]`. When a piece is handed
    out, the next one is already under way on the device, so that copying to the host costs no time. Raises
    UserError at the call for other shapes.
    """
    check_latents(latents.shape, vae.config)
    sizes = (1, *chunk_sizes(latents.shape[1] - 1, chunk))

    def pieces() -> Iterator[jax.Array]:
        graph, state = nnx.split(vae)
        waiting: list[jax.Array] = []
        cache, start = None, 0
        for size in sizes:
            z = jnp.asarray(latents[:, start : start + size], jnp.float32)
            frames, cache = run_decoder(graph, state, z, cache, as_uint8=as_uint8)
            yield from waiting
            waiting = [frames]
            start += size
        yield from waiting

    return pieces()


def decoding_bytes(vae: WanVAE, height: int, width: int) -> int:
    """Returns the bytes that decoding takes besides the weights, for latents of this size and a chunk of one."""
    cache = jax.eval_shape(lambda: vae.decoder.init_cache(1, height, width))
    return int(WORKING_SET * tree_bytes(cache))


def compile_decoding(vae: WanVAE, shape: tuple[int, ...], *, as_uint8: bool = False) -> list[jax.stages.Compiled]:
    """Compiles what `decode_chunks` runs for latents of a shape `[b, 1 + n, h, w, z_dim]`; vae may be abstract."""
    check_latents(shape, vae.config)
    graph, state = nnx.split(vae)
    cache = jax.eval_shape(lambda: vae.decoder.init_cache(shape[0], *shape[2:4]))
    chunks = ((1, None), *((size, cache) for size in dict.fromkeys(chunk_sizes(shape[1] - 1, CHUNK))))
    latents = [(jax.ShapeDtypeStruct((shape[0], size, *shape[2:]), jnp.float32), past) for size, past in chunks]
    return [run_decoder.lower(graph, state, z, past, as_uint8=as_uint8).compile() for z, past in latents]


def chunk_sizes(n: int, chunk: int) -> tuple[int, ...]:
    """Cuts n latents into pieces of at most `chunk`, all equal where a size above chunk / 2 allows it."""
    if chunk < 1:
        raise UserError(f"{chunk=} must be at least 1 latent")
    size = next((s for s in range(chunk, chunk // 2, -1) if n % s == 0), chunk)
    return (size,) * (n // size) + ((n % size,) if n % size else ())


def check_video(shape: tuple[int, ...], config: VAEConfig) -> None:
    """Raises UserError unless the autoencoder takes a video of this shape."""
    if len(shape) != 5 or shape[-1] != 3:
        raise UserError(f"video has shape {list(shape)}; give [batch, frames, height, width, 3]")
    _, frames, height, width, _ = shape
    check_step("frames", frames, config.temporal_factor, offset=1)
    check_step("height", height, config.spatial_factor)
    check_step("width", width, config.spatial_factor)


def check_step(name: str, value: int, step: int, *, offset: int = 0) -> None:
    """Raises UserError unless value is offset + n * step (n from 0, and from 1 without an offset)."""
    least = offset or step
    if value < least or (value - offset) % step:
        low = max(least, value - (value - offset) % step)
        nearest = f"{low}, {low + step}" if value > low else f"{low}"
        kind = f"{offset} + a multiple of {step}" if offset else f"a multiple of {step}"
        raise UserError(f"{name}={value} must be {kind}; nearest: {nearest}")


def check_latents(shape: tuple[int, ...], config: VAEConfig) -> None:
    """Raises UserError unless the autoencoder takes latents of this shape."""
    if len(shape) != 5 or shape[-1] != config.z_dim or 0 in shape:
        raise UserError(f"latents have shape {list(shape)}; give [batch, latents, height, width, {config.z_dim}]")
