"""From checkpoint files to the networks around the transformer: VAE, text encoder and image encoder."""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from turbojax.errors import CheckpointError
from turbojax.models.vae import WanVAE
from turbojax.weights.clip import clip_rules, clip_tensors, detect_clip_config
from turbojax.weights.io import read_tensors
from turbojax.weights.layouts import Layout, clip_layout, umt5_layout, vae_layout
from turbojax.weights.lazy import CheckedTensors
from turbojax.weights.parameters import load_parameters
from turbojax.weights.rules import Rule, TensorKey, assign
from turbojax.weights.skeleton import Skeleton, clip_skeleton, umt5_skeleton, vae_skeleton
from turbojax.weights.umt5 import detect_umt5_config, umt5_rules
from turbojax.weights.vae import detect_vae_config, vae_rules


class EncoderCheckpoint(NamedTuple):
    """A VAE, text or image encoder, checked against its own configuration; nothing has been read yet."""

    skeleton: Skeleton
    tensors: dict[TensorKey, np.ndarray]
    what: str


def open_vae(path: str | os.PathLike, *, dtype: Any = jnp.bfloat16) -> EncoderCheckpoint:
    """Opens a Wan 2.1 VAE, official or diffusers names; raises CheckpointError with all that does not fit."""
    tensors = read_tensors(path)
    with naming(path) as name:
        config = detect_vae_config(tensors, dtype=dtype)
        return check_tensors(vae_skeleton(config), tensors, vae_rules(tensors), vae_layout(config), what=name)


def open_umt5(path: str | os.PathLike, *, dtype: Any = jnp.bfloat16) -> EncoderCheckpoint:
    """Opens a umT5 encoder, official or transformers' names; raises CheckpointError with all that does not fit."""
    tensors = read_tensors(path)
    with naming(path) as name:
        config = detect_umt5_config(tensors, dtype=dtype)
        return check_tensors(umt5_skeleton(config), tensors, umt5_rules(tensors), umt5_layout(config), what=name)


def open_clip(path: str | os.PathLike, *, dtype: Any = jnp.float16) -> EncoderCheckpoint:
    """Opens a CLIP image encoder, official or transformers' names; raises CheckpointError as the others do."""
    tensors = read_tensors(path)
    with naming(path) as name:
        config = detect_clip_config(tensors, dtype=dtype)
        used = clip_tensors(tensors, config.num_layers)
        return check_tensors(clip_skeleton(config), used, clip_rules(tensors), clip_layout(config), what=name)


@contextmanager
def naming(path: str | os.PathLike) -> Iterator[str]:
    """Yields the file's name, and puts it in front of what is wrong with it."""
    try:
        yield Path(path).name
    except CheckpointError as error:
        raise CheckpointError(f"{Path(path).name}: {error}") from error


def check_tensors(
    skeleton: Skeleton, tensors: Mapping[str, np.ndarray], rules: Iterable[Rule], layout: Layout, *, what: str
) -> EncoderCheckpoint:
    """Finds every parameter's tensor; raises CheckpointError with all that does not fit."""
    found = assign(tensors, rules, skeleton.tensor_specs(), what="the checkpoint", layout=layout)
    return EncoderCheckpoint(skeleton, found, what)


def load_vae(path: str | os.PathLike, *, dtype: Any = jnp.bfloat16) -> WanVAE:
    """Loads a Wan 2.1 VAE, official or diffusers names."""
    return load_encoder(open_vae(path, dtype=dtype))


def load_encoder(checkpoint: EncoderCheckpoint, *, streamed: bool = False) -> Any:
    """Loads the module whose parameters are the checkpoint's tensors as they are."""
    skeleton, tensors, what = checkpoint.skeleton, CheckedTensors(checkpoint.tensors), checkpoint.what
    arrays = load_parameters(skeleton, tensors.__getitem__, what=what, streamed=streamed)
    tensors.warn(what)
    return skeleton.fill(arrays, streamed=streamed)
