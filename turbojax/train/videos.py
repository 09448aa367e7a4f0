"""Sample videos of a network in training."""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from turbojax.errors import UserError
from turbojax.media.video import check_path, save_video
from turbojax.pipeline.decode import decode
from turbojax.pipeline.denoise import sample
from turbojax.pipeline.text import TextEncoder
from turbojax.train.config import make_video_sampler
from turbojax.train.data import Shards
from turbojax.train.state import Params, in_compute_dtype
from turbojax.weights.encoders import load_vae
from turbojax.weights.files import find_components
from turbojax.weights.skeleton import Skeleton

MakeVideos = Callable[[int, Params], list[Path]]


def prepare_videos(config: ConfigDict, shards: Shards, skeleton: Skeleton, folder: Path) -> MakeVideos:
    """Makes make_videos(step, parameters): one video a prompt, of the size of the data, always from the same noise.

    Prompts are encoded here and the encoder is dropped; without any, they are those of the first samples of the data.
    """
    if jax.process_index() == 0:
        check_path(folder / "video.mp4")
    dtype = jnp.dtype(config.dtype)
    sampler = make_video_sampler(config)
    vae = load_vae(component(config, "vae"), dtype=dtype)
    check_width("vae", vae.config.z_dim, shards.index.latents[-1])
    if config.sample_prompts:
        encoder = TextEncoder.from_files(
            component(config, "text_encoder"), component(config, "tokenizer"), dtype=dtype, cache=False
        )
        text = encoder(config.sample_prompts.split("|"))
        del encoder
        check_width("text_encoder", text.shape[-1], shards.index.text_dim)
    else:
        text = np.stack([shards[i]["text"] for i in range(min(config.num_samples, len(shards)))]).astype(dtype)
    negative = None
    if config.sample_guidance != 1:
        own = shards.negative()  # with zero rows to the longest prompt of the data; those given may be longer
        rows = np.pad(own, ((0, text.shape[1] - len(own)), (0, 0)))
        negative = np.broadcast_to(rows.astype(text.dtype), text.shape)
    noise_key, step_key = jax.random.split(jax.random.key(config.seed))
    noise = jax.random.normal(noise_key, (len(text), *shards.index.latents), jnp.float32)
    run = jax.jit(sample, static_argnums=(0, 1, 2))

    def make_videos(step: int, params: Params) -> list[Path]:
        graph, state = nnx.split(skeleton.fill(in_compute_dtype(skeleton, params)))
        guidance = jnp.float32(config.sample_guidance)
        span, start = (0, sampler.num_steps), sampler.initial(noise)
        latents = run(graph, sampler, span, state, start, text, negative, guidance, step_key, None, None, {})
        if jax.process_count() > 1:
            latents = multihost_utils.process_allgather(latents, tiled=True)
        # By every process: under a mesh that is a computation of all.
        decoded = [np.concatenate(list(decode(vae, latent))) for latent in np.asarray(latents)]
        if jax.process_index() > 0:
            return []
        paths = []
        for i, video in enumerate(decoded):
            paths += save_video(video, folder / f"step_{step:06d}_{i}.mp4", shards.index.fps)
        logging.info("Wrote %d sample videos to %s", len(paths), folder)
        return paths

    return make_videos


def component(config: ConfigDict, name: str) -> Path:
    """Returns the path of the VAE, text encoder or tokenizer: the one given, or the downloaded one."""
    return find_components(None, {name: config[name]})[name]


def check_width(name: str, width: int, expected: int) -> None:
    """Raises UserError for a component that the data were not made with."""
    if width != expected:
        raise UserError(f"{name} has {width} channels and the data {expected}; give the {name} that made the data")
