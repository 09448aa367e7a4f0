"""Measurements of the autoencoder: chunks, tiles and precision."""

import dataclasses
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from turbojax.bench.measure import peak_bytes, timed_calls
from turbojax.models import tiling
from turbojax.models import vae as vae_model
from turbojax.models.tiling import Tiling, decode_tiled
from turbojax.models.vae import VAEConfig, WanVAE
from turbojax.pipeline.request import latent_shape
from turbojax.weights.random import random_module
from turbojax.weights.skeleton import Skeleton


def measure_decoding(*, height: int, width: int, chunks: tuple[int, ...]) -> dict[str, Any]:
    """Measures decoding in tiles and in chunks: agreement, seconds, and peak memory for 21 and 41 latent frames.

    `bfloat16_*_difference`: from float32, for 17 frames of 128 x 192, over the range of the values.
    """
    config = VAEConfig.wan2_1()
    vae = random_module(Skeleton.of(lambda: WanVAE(config, rngs=nnx.Rngs(0))), what="random VAE")
    _, h, w, c = latent_shape(config, 81, height, width)
    long = np.asarray(jax.random.normal(jax.random.key(0), (1, 41, h, w, c)))
    short = long[:, :21]
    result: dict[str, Any] = bfloat16_difference(vae, long[:, :5, :16, :24])
    # Before all else that is large, since the peak has no reset.
    (_, seconds), _ = timed_calls(lambda: decode_tiled(vae, short, as_uint8=True), 2)
    result["tiled"] = {"seconds_81_frames_to_host": seconds, "peak_bytes_21_latents": peak_bytes()}
    first = None
    for chunk in chunks:

        def decoded(latents: np.ndarray, chunk: int = chunk, **options: Any) -> list[np.ndarray]:
            return [np.asarray(part) for part in vae_model.decode_chunks(vae, latents, chunk=chunk, **options)]

        video = np.concatenate(decoded(short), axis=1).astype(np.float32)
        first = video if first is None else first
        peak_21 = peak_bytes()
        (_, *warm), _ = timed_calls(lambda: decoded(short, as_uint8=True), 3)
        decoded(long, as_uint8=True)
        off = difference(video, first)
        result[f"chunk_{chunk}"] = {
            "seconds_81_frames_to_host": min(warm),
            "peak_bytes_21_latents": peak_21,
            "peak_bytes_41_latents": peak_bytes(),
            "max_difference_over_range": off["largest"],
            "rms_difference_over_range": off["rms"],
        }
    return result


def bfloat16_difference(vae: WanVAE, latents: np.ndarray) -> dict[str, float]:
    """Returns how far decoding is from the same weights in float32, over the range of the values."""
    config = dataclasses.replace(vae.config, dtype=jnp.float32)
    exact = nnx.eval_shape(lambda: WanVAE(config, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(exact)
    exact = nnx.merge(graph, jax.tree.map(lambda like, a: a.astype(like.dtype), state, nnx.state(vae)))
    with jax.default_matmul_precision("highest"):
        expected = np.asarray(vae_model.decode(exact, latents))
    off = difference(np.asarray(vae_model.decode(vae, latents).astype(jnp.float32)), expected)
    return {"bfloat16_max_difference": off["largest"], "bfloat16_rms_difference": off["rms"]}


def measure_tiling() -> dict[str, dict[str, float]]:
    """Measures tiles of a random float32 autoencoder of width 8 beside whole frames, over the range of the values.

    The content is smooth. By overlap in latents, and by whether weights change along its middle half or, `whole`, all
    along it.
    """
    vae = WanVAE(VAEConfig(dim=8, dtype=jnp.float32), rngs=nnx.Rngs(0))
    latents, video = waves(2, 24, 80, 16, length=8), waves(5, 64, 640, 3, length=64)
    frames, encoded = np.asarray(vae_model.decode(vae, latents)), np.asarray(vae_model.encode(vae, video))
    result = {}
    for overlap in (8, 16):
        tiles = Tiling(48, overlap)
        result[f"decoding, {overlap}"] = difference(tiling.decode_tiled(vae, latents, tiling=tiles), frames)
        result[f"encoding, {overlap}"] = difference(tiling.encode_tiled(vae, video, tiling=tiles), encoded)
        with mock.patch.object(tiling, "blend_weights", lambda n: (np.arange(n, dtype=np.float32) + 0.5) / n):
            whole = tiling.decode_tiled(vae, latents, tiling=tiles)
        result[f"decoding, {overlap}, whole"] = difference(whole, frames)
    return result


def waves(frames: int, height: int, width: int, channels: int, *, length: float) -> np.ndarray:
    """Returns smooth content, float32 `[1, t, h, w, c]`."""
    t, y, x = np.ogrid[:frames, :height, :width]
    each = [np.sin((x * (1 + 0.1 * i) + 0.7 * y) / length + i + 0.4 * t) for i in range(channels)]
    return np.stack(each, axis=-1)[None].astype(np.float32)


def difference(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """Returns the largest and the root mean square difference, over the range of b."""
    scale = np.ptp(b)
    return {"largest": float(np.abs(a - b).max() / scale), "rms": float(np.sqrt(np.mean((a - b) ** 2)) / scale)}
