"""Inputs of an image-to-video network from its images: a mask and latents, for all frames of the video.

The clip to encode is the image, then grey (0) up to the end, or up to a last image. B is 1 here: one condition serves
all samples. Latents are `b t h w c`. Source: TurboDiffusion, inference/wan2.2_i2v_infer.py.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32

from turbojax.errors import UserError
from turbojax.media.image import ImageSource, resize, to_unit
from turbojax.models.clip import CLIPVision, clip_dtype, encode_image
from turbojax.models.sizes import tree_bytes
from turbojax.models.vae import VAEConfig, WanVAE, check_video
from turbojax.models.vae_layers import Cache
from turbojax.models.wan import CLIP_TOKENS, WanConfig

# Bytes in use while encoding, for each of the cache: XLA's count for an H100, 1.5, and the frames between two stages.
WORKING_SET = 1.7


def image_inputs(
    vae: WanVAE, clip: CLIPVision | None, images: Sequence[np.ndarray], *, num_frames: int, width: int, height: int
) -> dict[str, jax.Array]:
    """Makes `y`, and `clip` where there is an image encoder.

    images: uint8 `[H, W, 3]` of any size, for the first frame or for the first and the last.
    """
    frames = [to_unit(resize(image, width, height)) for image in images]
    inputs = {"y": condition(vae, frames[0], num_frames=num_frames, last_image=frames[1] if frames[1:] else None)}
    if clip is not None:
        inputs["clip"] = jnp.concatenate([encode_image(clip, image) for image in images], axis=1)
    return inputs


def image_shapes(config: WanConfig, vae: VAEConfig, shape: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of `image_inputs` for latents `[B, t, h, w, c]`; empty for networks without images."""
    shapes: dict[str, tuple] = {}
    if takes_images(config):
        shapes["y"] = (*shape[1:-1], vae.temporal_factor + vae.z_dim), jnp.float32
    if config.clip_dim:
        shapes["clip"] = (config.clip_images * CLIP_TOKENS, config.clip_dim), clip_dtype(config.dtype)
    return {name: jax.ShapeDtypeStruct((shape[0], *own), dtype) for name, (own, dtype) in shapes.items()}


def takes_images(config: WanConfig) -> bool:
    """Returns True if a network makes videos from images."""
    return config.in_channels != config.out_channels


def check_images(config: WanConfig, image: ImageSource | None, last_image: ImageSource | None) -> None:
    """Raises UserError where the images of a call are not what the network takes."""
    if not takes_images(config):
        if image is not None or last_image is not None:
            raise UserError("this transformer makes videos from text alone; leave out the image, or take another one")
        return
    if image is None:
        raise UserError("this transformer makes videos from images; give image=, or a text-to-video checkpoint")
    if config.clip_dim and (last_image is None) != (config.clip_images == 1):
        takes = "a first and a last image" if config.clip_images > 1 else "a first image only"
        raise UserError(f"this transformer takes {takes}; give {'both' if last_image is None else 'no last_image'}")


def condition(
    vae: WanVAE, image: np.ndarray, *, num_frames: int, last_image: np.ndarray | None = None
) -> Float32[Array, "1 t h w c"]:
    """Makes mask and latents, `[1, 1 + n, h/8, w/8, 4 + z_dim]`, the network's `y`.

    image, last_image: `[h, w, 3]` in [-1, 1]. num_frames: 1 + 4n.
    """
    latents = encode_still(vae, image, num_frames=num_frames, last_image=last_image)
    return jnp.concatenate((mask(latents.shape, vae.config, last=last_image is not None), latents), axis=-1)


def mask(shape: tuple[int, ...], config: VAEConfig, *, last: bool) -> Float32[Array, "b t h w frames"]:
    """Makes 1 where a frame is given, a channel for each of a latent's frames (4 times the first one)."""
    given = np.zeros((*shape[:-1], config.temporal_factor), np.float32)
    given[:, 0] = 1
    if last:
        given[:, -1, ..., -1] = 1
    return jnp.asarray(given)


Frame = Float[Array, "1 1 _ _ _"]  # input and result of the encoder's stages


@functools.partial(jax.jit, static_argnames=("graph", "first", "stage"), donate_argnames="cache")
def encode_stage(
    graph, state, frames: Sequence[Frame], cache: Cache | None, *, first: bool, stage: int
) -> tuple[Frame, Cache]:
    """Runs a stage of the encoder on as many frames as it makes one of; cache None at first."""
    vae, x = nnx.merge(graph, state), jnp.concatenate(frames, axis=1)
    cache = vae.encoder.init_cache(x.shape[0], *x.shape[2:4]) if cache is None else cache
    return vae.encode_chunk(x, cache, first=first, stage=stage)


def encoding_bytes(vae: WanVAE, height: int, width: int) -> int:
    """Returns the bytes that `encode_still` takes besides the weights, for an image of this size in pixels."""
    cache = jax.eval_shape(lambda: vae.encoder.init_cache(1, height, width))
    return int(WORKING_SET * tree_bytes(cache))


def compile_still(vae: WanVAE, height: int, width: int) -> None:
    """Compiles what `encode_still` runs for an image of this size; vae may be abstract."""
    graph, state = nnx.split(vae)
    cache = None
    for first in (True, False):
        frame: Any = jax.ShapeDtypeStruct((1, 1, height, width, 3), vae.config.dtype)
        for stage, (stride, _) in enumerate(stages_of(vae)):
            frames = [frame] * (1 if first else stride)
            lowered = encode_stage.lower(graph, state, frames, cache, first=first, stage=stage)
            lowered.compile()
            frame, cache = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), lowered.out_info)


def encode_still(
    vae: WanVAE, image: np.ndarray, *, num_frames: int, last_image: np.ndarray | None = None
) -> Float32[Array, "1 t h w z"]:
    """Encodes the clip of an image and grey frames, as `turbojax.models.vae.encode` does, for less work.

    The encoder looks back only, so some time after the image each of its stages gives the same frame over and over.
    From there on the stage is passed over and its result used again: of 80 grey frames the first stage computes 11,
    the second 22, the third 22 of 40, and only the smallest resolution all 20.
    """
    check_video((1, num_frames, *image.shape), vae.config)
    first, grey = (jnp.asarray(a, vae.config.dtype)[None, None] for a in (image, np.zeros_like(image)))
    frames = [first, *[grey] * (num_frames - 1)]
    if last_image is not None:
        if image.shape != last_image.shape or num_frames == 1:
            raise UserError("a last image needs the size of the first, and more than one frame")
        frames[-1] = jnp.asarray(last_image, vae.config.dtype)[None, None]
    graph, state = nnx.split(vae)
    cache = None
    for stage, (stride, constant) in enumerate(stages_of(vae)):
        groups = [frames[:1], *(frames[i : i + stride] for i in range(1, len(frames), stride))]
        frames = []
        for i, group in enumerate(groups):
            ends = last_image is not None and i == len(groups) - 1
            if i <= constant or ends:
                frame, cache = encode_stage(graph, state, group, cache, first=i == 0, stage=stage)
            frames.append(frame)
    return jnp.concatenate(frames, axis=1)


def stages_of(vae: WanVAE) -> list[tuple[int, int]]:
    """Returns the number of frames that each stage makes one of, and the frame from which on all are the same."""
    encoder, stages = vae.encoder, []
    frame = encoder.conv_in.constant_from(1)
    for i, part in enumerate(encoder.stages):
        stride = 1
        for block in (encoder.blocks[j] for j in part):
            frame, stride = block.constant_from(frame), stride * block.stride
        if i == len(encoder.stages) - 1:
            frame = encoder.conv_out.constant_from(frame)
        stages.append((stride, frame))
    return stages
