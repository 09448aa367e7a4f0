"""The recipe of a video autoencoder, and what comes behind it: latents of mean 0 and deviation 1.

B batch; video uint8 `[B, 1 + 4n, H, W, 3]`, latents `[B, 1 + n, H / 8, W / 8, z_dim]`. Latents here are those that the
pipeline sees, (mu - mean) / std with the released constants, so that a released autoencoder can be trained on.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from turbojax.media.quality import psnr
from turbojax.models import vae as vae_model
from turbojax.models.vae import VAEConfig, WanVAE
from turbojax.train.recipes import STUDENT_ALONE, Batch, Loss, NetworkParams, normal, summary
from turbojax.train.schedule import Phases, StepSchedule
from turbojax.train.state import in_compute_dtype
from turbojax.weights.io import write_safetensors
from turbojax.weights.layouts import layout_tensors, vae_layout
from turbojax.weights.skeleton import Skeleton
from turbojax.weights.vae import VAE_OFFICIAL

SMOOTH = 1e-2  # where sqrt(d^2 + SMOOTH^2) passes from square to absolute; pixels are in [-1, 1]
LEAST, MOST = -12.0, 4.0  # of a latent's log variance


@dataclasses.dataclass(frozen=True)
class Autoencoding:
    """Distance of the reconstruction plus kl_scale times the KL divergence from N(0, 1), as means (arXiv 1312.6114).

    The distance is Charbonnier's, absolute but smooth, plus the squared one: alone the first leaves thin things out
    for long, since the median of what is there is the background, and the second leaves edges soft.
    """

    skeleton: Skeleton
    kl_scale: float = 2e-4
    ema_rate: float = 0.1
    phases: Phases = STUDENT_ALONE

    def loss(self, params: NetworkParams, batch: Batch, schedule: StepSchedule) -> Loss:
        del schedule
        vae = self.skeleton.fill(in_compute_dtype(self.skeleton, params.student))
        video = as_pixels(batch["video"])
        mean, log_variance = encode(vae, video)
        latents = mean + jnp.exp(log_variance / 2) * normal(batch["key"], mean.shape[1:])
        difference = decode(vae, latents).astype(jnp.float32) - video
        distance = jnp.sqrt(difference**2 + SMOOTH**2).mean(axis=(1, 2, 3, 4))
        kl = (mean**2 + jnp.exp(log_variance) - 1 - log_variance).mean(axis=(1, 2, 3, 4)) / 2
        error = (difference**2).mean(axis=(1, 2, 3, 4))
        return summary(loss=distance + error + self.kl_scale * kl, distance=distance, kl=kl, squared_error=error)


def as_pixels(video: Any) -> Any:
    """Converts uint8 levels to float32 in [-1, 1]."""
    return video.astype(np.float32) / 127.5 - 1


def encode(vae: WanVAE, video: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns mean and log variance of the latents, float32, of pixels in [-1, 1]; differentiable, in one chunk."""
    cache = vae.encoder.init_cache(video.shape[0], *video.shape[2:4])
    features, _ = vae.encoder(video.astype(vae.config.dtype), cache, first=True)
    both = vae.quant(features).astype(jnp.float32)
    mu, log_variance = jnp.split(both, 2, axis=-1)
    mean, std = vae.statistics(mu)
    return (mu - mean) / std, jnp.clip(log_variance - 2 * jnp.log(std), LEAST, MOST)


def decode(vae: WanVAE, latents: jax.Array) -> jax.Array:
    """Decodes frames about [-1, 1] in the model's dtype; differentiable, in one chunk."""
    cache = vae.decoder.init_cache(latents.shape[0], *latents.shape[2:4])
    return vae.decode_chunk(latents, cache, first=True)[0]


def normalized(
    params: Mapping[str, np.ndarray], mean: np.ndarray, std: np.ndarray, config: VAEConfig
) -> dict[str, np.ndarray]:
    """Returns parameters whose latents are (z - mean) / std, z those of `params`, and are decoded to the same frames.

    mean, std: `[z_dim]`. With released constants M and S, mu = S z + M: the encoder's last convolution is scaled by
    1 / std, the decoder's first one, which sees mu, by std; log variances shift along.
    """
    released_mean, released_std = (np.asarray(a, np.float64) for a in (config.mean, config.std))
    center = released_mean + released_std * mean  # of mu
    shift = released_mean - center / std  # new mu = mu / std + shift
    out = {name: np.asarray(value) for name, value in params.items()}
    scale, offset = np.concatenate((1 / std, np.ones_like(std))), np.concatenate((shift, -2 * np.log(std)))
    weight, bias = out["post_quant.weight"].astype(np.float64), out["post_quant.bias"].astype(np.float64)
    changes = {
        "quant.weight": out["quant.weight"] * scale[:, None],
        "quant.bias": out["quant.bias"] * scale + offset,
        "post_quant.weight": weight * std,
        "post_quant.bias": bias - weight @ (shift * std),
    }
    return out | {name: value.astype(np.float32) for name, value in changes.items()}


LOSSLESS = 10 * math.log10(255**2 / 1e-9)  # dB that equal videos count as: JSON has no infinity


class Quality(NamedTuple):
    """Quality of an autoencoder on some videos.

    psnr: of reconstructions, dB over all pixels. mean_off, std_off: largest distance of any latent channel's mean from
    0, and of its deviation from 1.
    """

    psnr: float
    mean_off: float
    std_off: float


def latent_statistics(vae: WanVAE, videos: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and deviation of each latent channel over videos uint8 `[T, H, W, 3]`, float64 `[z_dim]`."""
    chunk = 2**10  # all at once
    latents = [vae_model.encode(vae, as_pixels(video)[None], chunk=chunk) for video in videos]
    flat = np.concatenate([np.asarray(z, np.float64).reshape(-1, z.shape[-1]) for z in latents])
    return flat.mean(axis=0), flat.std(axis=0)


def quality(vae: WanVAE, videos: list[np.ndarray]) -> Quality:
    """Measures videos uint8 `[T, H, W, 3]` that go through the autoencoder as the pipeline runs it."""

    def reconstruct(video: np.ndarray) -> np.ndarray:
        latents = vae_model.encode(vae, as_pixels(video)[None], chunk=2**10)
        return np.asarray(vae_model.decode(vae, latents, chunk=2**10, as_uint8=True))[0]

    mean, std = latent_statistics(vae, videos)
    found = psnr(map(reconstruct, videos), videos, most=LOSSLESS)
    return Quality(found, float(np.abs(mean).max()), float(np.abs(std - 1).max()))


def write_autoencoder(path: Path, skeleton: Skeleton, params: Mapping[str, np.ndarray]) -> None:
    """Writes a checkpoint in the official names, in the dtype that the skeleton computes in."""
    vae = skeleton.fill({name: jnp.asarray(value) for name, value in params.items()})
    layout = vae_layout(vae.config)
    dtype = jnp.dtype(vae.config.dtype)
    specs = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in layout.items()}
    tensors = ((name, value.astype(dtype)) for name, value in layout_tensors(vae, layout, VAE_OFFICIAL))
    write_safetensors(path, tensors, specs, metadata={"format": "turbojax"})
