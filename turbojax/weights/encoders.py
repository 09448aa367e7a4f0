"""From checkpoint files to the networks around the transformer: VAE, text encoder and image encoder."""

import os
from collections.abc import Callable, Iterable, Mapping
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

Tensors = Mapping[str, np.ndarray]


class EncoderCheckpoint(NamedTuple):
    """A VAE, text or image encoder, checked against its own configuration; nothing has been read yet."""

    skeleton: Skeleton
    tensors: dict[TensorKey, np.ndarray]
    what: str


def open_vae(path: str | os.PathLike, *, dtype: Any = jnp.bfloat16) -> EncoderCheckpoint:
    """Opens a Wan 2.1 VAE, official or diffusers names; raises CheckpointError with all that does not fit."""
    return open_encoder(path, dtype, detect_vae_config, vae_skeleton, vae_rules, vae_layout)


def open_umt5(path: str | os.PathLike, *, dtype: Any = jnp.bfloat16) -> EncoderCheckpoint:
    """Opens a umT5 encoder, official or transformers' names; raises CheckpointError with all that does not fit."""
    return open_encoder(path, dtype, detect_umt5_config, umt5_skeleton, umt5_rules, umt5_layout)


def open_clip(path: str | os.PathLike, *, dtype: Any = jnp.float16) -> EncoderCheckpoint:
    """Opens a CLIP image encoder, official or transformers' names; raises CheckpointError as the others do."""
    return open_encoder(path, dtype, detect_clip_config, clip_skeleton, clip_rules, clip_layout, clip_tensors)


def open_encoder(
    path: str | os.PathLike,
    dtype: Any,
    detect: Callable[..., Any],
    skeleton_of: Callable[[Any], Skeleton],
    rules: Callable[[Tensors], Iterable[Rule]],
    layout: Callable[[Any], Layout],
    select: Callable[[Tensors, Any], Tensors] = lambda tensors, config: tensors,
) -> EncoderCheckpoint:
    """Detects the configuration and finds every parameter's tensor; errors begin with the file's name.

    select: returns the tensors that a network of this configuration takes.
    """
    tensors, what = read_tensors(path), Path(path).name
    try:
        config = detect(tensors, dtype=dtype)
        skeleton, selected = skeleton_of(config), select(tensors, config)
        specs = skeleton.tensor_specs()
        found = assign(selected, rules(tensors), specs, what="the checkpoint", layout=layout(config))
    except CheckpointError as error:
        raise CheckpointError(f"{what}: {error}") from error
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
