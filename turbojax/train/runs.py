"""Opens what a training needs before its first step, a network and its data, and writes the network at the end."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from turbojax import sharding
from turbojax.errors import UserError
from turbojax.files import write_json
from turbojax.models.vae import WanVAE
from turbojax.models.wan import WanConfig
from turbojax.train.autoencoder import latent_statistics, normalized, quality, write_autoencoder
from turbojax.train.config import make_recipe
from turbojax.train.data import Shards, batches, open_shards
from turbojax.train.networks import HostParams, open_autoencoder, open_networks
from turbojax.train.recipes import Networks, Recipe
from turbojax.train.registry import Data, Registry
from turbojax.train.state import in_compute_dtype
from turbojax.train.toy import write_toy_shards
from turbojax.train.videos import MakeVideos, prepare_videos
from turbojax.weights.convert import write_wan
from turbojax.weights.rules import TensorKey
from turbojax.weights.skeleton import Skeleton

TRANSFORMER, VAE = "transformer.safetensors", "Wan2.1_VAE.safetensors"
UNSEEN = 64  # videos that an autoencoder's latents are normalized by, and that its quality is measured on


@dataclasses.dataclass(frozen=True)
class Run:
    """A training before its first step, with parameters on the host.

    accumulation: micro-batches if the settings name none. signature: what the network has in common with that of the
    run it goes on from. data, prepare_videos: to be called on the mesh in force. export: writes trained parameters.
    """

    recipe: Recipe
    params: HostParams
    accumulation: int
    signature: dict[str, Any]
    data: Callable[[], AbstractContextManager[Data]]
    export: Callable[[HostParams], Path]
    teacher: HostParams = dataclasses.field(default_factory=dict)
    negative: np.ndarray | None = None
    prepare_videos: Callable[[], MakeVideos] | None = None


def open_transformer_run(config: ConfigDict, registry: Registry, workdir: Path, mesh: jax.sharding.Mesh) -> Run:
    """Opens the training of a video network, on shards of latents and text."""
    make = make_recipe(config)
    shards = open_shards(write_toy_shards(workdir / "toy_data") if config.data == "toy" else config.data)
    student, teacher = open_networks(config, registry)
    for network in (student, teacher):
        if network:
            check_data(shards, network.config)
    networks = Networks.of(student.config, (teacher or student).config)

    def data() -> AbstractContextManager[Data]:
        share = sharding.batch_share()
        return contextlib.nullcontext(batches(shards, batch_size=config.batch_size, seed=config.seed, share=share))

    frozen = {}
    if teacher:
        specs = networks.teacher.specs
        frozen = {name: teacher.params[name].astype(spec.dtype, copy=False) for name, spec in specs.items()}
    videos = functools.partial(prepare_videos, config, shards, networks.student, workdir / "videos")
    return Run(
        recipe=make(networks),
        params=student.params,
        accumulation=config.batch_size // (mesh.shape[sharding.DATA] * mesh.shape[sharding.FSDP]) or 1,
        signature=network_size(student.config),
        data=data,
        export=functools.partial(export, workdir / TRANSFORMER, student.config),
        teacher=frozen,
        negative=shards.negative(),
        prepare_videos=videos if config.sample_every else None,
    )


def open_autoencoder_run(config: ConfigDict, registry: Registry, workdir: Path, mesh: jax.sharding.Mesh) -> Run:
    """Opens the training of an autoencoder, on videos that are drawn as it goes."""
    skeleton, params = open_autoencoder(config, registry)
    drawn = registry.drawn[config.data]
    settings = {name: config[name] for name in ("num_frames", "height", "width", "seed")}
    more = {name: config[name] for name in ("batch_size", "crops", "workers")}
    return Run(
        recipe=make_recipe(config)(skeleton),
        params=params,
        accumulation=1,
        signature={"parameters": sum(value.size for value in params.values())},
        data=lambda: drawn.batches(share=sharding.batch_share(), **more, **settings),
        export=lambda trained: export_autoencoder(
            workdir, skeleton, trained, drawn.videos(range(2**30, 2**30 + UNSEEN), **settings)
        ),
    )


def check_data(shards: Shards, config: WanConfig) -> None:
    """Raises UserError where data and network do not belong together."""
    channels, text_dim = shards.index.latents[-1], shards.index.text_dim
    if channels != config.in_channels:
        raise UserError(
            f"{shards.folder} holds latents of {channels} channels and the network takes {config.in_channels}; "
            "take a text-to-video network and the VAE that belongs to it"
        )
    if text_dim != config.text_dim:
        raise UserError(
            f"{shards.folder} holds text of width {text_dim} and the network takes {config.text_dim}; "
            "make the data with the network's text encoder"
        )


def network_size(config: WanConfig) -> dict[str, str | int | None]:
    """Returns the sizes that two runs must have in common for one to take the other's checkpoints."""
    names = ("dim", "ffn_dim", "num_heads", "num_layers", "in_channels", "text_dim", "clip_dim", "attention_type")
    return {name: getattr(config, name) for name in names}


def export(path: Path, config: WanConfig, params: HostParams) -> Path:
    """Writes a network as a checkpoint in the official names, which `scripts/generate.py` takes."""

    def piece(entry: TensorKey) -> np.ndarray:
        return params[entry.target] if entry.layer is None else params[entry.target][entry.layer]

    if jax.process_index() == 0:
        write_wan(path, config, piece, dtype=config.dtype)
        logging.info("Wrote the average of the weights to %s", path)
    return path


def export_autoencoder(
    workdir: Path, skeleton: Skeleton, params: Mapping[str, np.ndarray], videos: list[np.ndarray]
) -> Path:
    """Normalizes the latents by what they are for these videos and writes checkpoint and quality."""

    def module(params: Mapping[str, np.ndarray]) -> WanVAE:
        return skeleton.fill(in_compute_dtype(skeleton, {name: jnp.asarray(value) for name, value in params.items()}))

    trained = module(params)
    final = normalized(params, *latent_statistics(trained, videos), trained.config)
    found = quality(module(final), videos)
    path = workdir / VAE
    if jax.process_index() == 0:
        write_autoencoder(path, skeleton, final)
        write_json(workdir / "quality.json", found._asdict())
        logging.info("Wrote the average of the weights to %s; reconstructions have %.1f dB", path, found.psnr)
    return path
