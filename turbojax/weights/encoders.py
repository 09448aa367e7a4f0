"""From checkpoint files to the networks around the transformer: VAE, text encoder and image encoder."""

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from turbojax.errors import CheckpointError
from turbojax.models.clip import CLIPConfig, CLIPVision
from turbojax.models.offload import Streamed
from turbojax.models.umt5 import UMT5Config, UMT5Encoder
from turbojax.models.vae import VAEConfig, WanVAE
from turbojax.weights.clip import clip_rules, clip_tensors, detect_clip_config
from turbojax.weights.io import read_tensors
from turbojax.weights.layouts import Layout, clip_layout, umt5_layout, vae_layout
from turbojax.weights.lazy import Watched
from turbojax.weights.parameters import place
from turbojax.weights.rules import Entry, Rule, assign
from turbojax.weights.skeleton import Skeleton, clip_skeleton, umt5_skeleton, vae_skeleton
from turbojax.weights.umt5 import detect_umt5_config, token_table, umt5_rules
from turbojax.weights.vae import detect_vae_config, vae_rules


class PlainCheckpoint(NamedTuple):
    """A VAE or text encoder, checked against its own configuration; nothing has been read yet."""

    skeleton: Skeleton
    tensors: dict[Entry, np.ndarray]


@contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Puts the file's name in front of what is wrong with it."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{Path(path).name}: {error}") from error


def open_vae(path: str | os.PathLike, *, dtype: Any = jnp.bfloat16) -> PlainCheckpoint:
    """Opens a Wan 2.1 VAE, official or diffusers names; raises CheckpointError with all that does not fit."""
    tensors = read_tensors(path)
    with naming(path):
        config: VAEConfig = dataclasses.replace(detect_vae_config(tensors), dtype=dtype)
        return check_plain(vae_skeleton(config), tensors, vae_rules(tensors), vae_layout(config))


def open_umt5(path: str | os.PathLike, *, dtype: Any = jnp.bfloat16) -> PlainCheckpoint:
    """Opens a umT5 encoder, official or transformers' names; raises CheckpointError with all that does not fit."""
    tensors = read_tensors(path)
    with naming(path):
        config: UMT5Config = dataclasses.replace(detect_umt5_config(tensors), dtype=dtype)
        return check_plain(umt5_skeleton(config), tensors, umt5_rules(tensors), umt5_layout(config))


def open_clip(path: str | os.PathLike, *, dtype: Any = jnp.float16) -> PlainCheckpoint:
    """Opens a CLIP image encoder, official or transformers' names; raises CheckpointError as the others do."""
    tensors = read_tensors(path)
    with naming(path):
        config: CLIPConfig = dataclasses.replace(detect_clip_config(tensors), dtype=dtype)
        return check_plain(
            clip_skeleton(config), clip_tensors(tensors, config.num_layers), clip_rules(tensors), clip_layout(config)
        )


def check_plain(
    skeleton: Skeleton, tensors: Mapping[str, np.ndarray], rules: Iterable[Rule], layout: Layout
) -> PlainCheckpoint:
    """Every parameter's tensor; raises CheckpointError with all that is missing, unknown, misshapen or mistyped."""
    found = assign(tensors, rules, skeleton.entries(), what="the checkpoint", published=layout)
    return PlainCheckpoint(skeleton, found)


def load_vae(path: str | os.PathLike, *, dtype: Any = jnp.bfloat16) -> WanVAE:
    """Loads a Wan 2.1 VAE, official or diffusers names."""
    return load_plain(open_vae(path, dtype=dtype), what=Path(path).name)


def load_umt5(
    path: str | os.PathLike, *, dtype: Any = jnp.bfloat16, streamed: bool = False
) -> tuple[UMT5Encoder | Streamed, np.ndarray]:
    """Loads a umT5 encoder; returns it and its token table `[vocab, D]`, which stays in the memory-mapped file."""
    encoder = load_plain(open_umt5(path, dtype=dtype), what=Path(path).name, streamed=streamed)
    return encoder, token_table(read_tensors(path))


def load_clip(path: str | os.PathLike, *, dtype: Any = jnp.float16) -> CLIPVision:
    """Loads a CLIP image encoder, official or transformers' names."""
    return load_plain(open_clip(path, dtype=dtype), what=Path(path).name)


def load_plain(checkpoint: PlainCheckpoint, *, what: str, streamed: bool = False) -> Any:
    """A module whose parameters are the checkpoint's tensors as they are."""
    skeleton, tensors = checkpoint.skeleton, Watched(checkpoint.tensors)
    arrays = place(skeleton, tensors.__getitem__, what=what, streamed=streamed)
    tensors.warn(what)
    return skeleton.fill(arrays, streamed=streamed)
