"""The networks of a run: from checkpoints or at random to the host, and from there to the devices."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from turbojax.models.wan import WanConfig
from turbojax.sharding import state_shardings
from turbojax.train.initial import transparent
from turbojax.train.registry import Registry, named
from turbojax.train.state import Params, parameters
from turbojax.train.toy import smooth_in_time
from turbojax.weights.encoders import load_vae
from turbojax.weights.files import find_components, transformer_path
from turbojax.weights.load import load_wan
from turbojax.weights.options import NetworkOptions
from turbojax.weights.random import random_module
from turbojax.weights.safetensors import ShapeDtype
from turbojax.weights.skeleton import Skeleton, vae_skeleton, wan_skeleton

HostParams = Mapping[str, np.ndarray]


class Source(NamedTuple):
    """A network before training: what it computes in, and its parameters on the host, in float32."""

    config: WanConfig
    params: HostParams


def open_networks(config: ConfigDict, registry: Registry) -> tuple[Source, Source | None]:
    """Reads the student, which rCM's fake score starts from too, and the teacher of sla and rcm."""
    sla = config.recipe == "sla"
    student = open_network(config, registry, config.weights, config.attention_type or ("sla" if sla else None))
    if config.recipe == "teacher":
        return student, None
    return student, open_network(config, registry, config.teacher or config.weights, "original" if sla else None)


def open_network(config: ConfigDict, registry: Registry, path: str, attention_type: str | None) -> Source:
    """Reads a file's network, or makes a random one; the memory of the devices is not touched."""
    options = {"attention_type": attention_type, "sla_topk": config.sla_topk, "dtype": jnp.float32}
    random = path == "random"
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        if random:
            skeleton = wan_skeleton(NetworkOptions(**options).apply(named(config.model, registry.transformers)))
            module = random_module(skeleton, seed=config.seed, what=f"random {config.model}")
        else:
            module = load_wan(transformer_path(path), NetworkOptions(quant_linear=False, **options))
        params = {name: np.asarray(value) for name, value in parameters(module).items()}
    if random:
        params = smooth_in_time(params)
    blocks = tuple(config.sla_blocks) if module.config.attention_type == "sla" else None
    changes = {"sla_blocks": blocks, "dtype": jnp.dtype(config.dtype), "remat": config.remat}
    return Source(dataclasses.replace(module.config, **changes), params)


def open_autoencoder(config: ConfigDict, registry: Registry) -> tuple[Skeleton, HostParams]:
    """Returns an autoencoder's structure, in what it computes in, and its parameters on the host, in float32."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        if config.weights == "random":
            own = named(config.model, registry.autoencoders)
            skeleton = vae_skeleton(dataclasses.replace(own, dtype=jnp.float32))
            module = random_module(skeleton, seed=config.seed, what=f"random {config.model} autoencoder")
        else:
            module = load_vae(find_components(None, {"vae": config.weights})["vae"], dtype=jnp.float32)
        params: HostParams = {name: np.asarray(value) for name, value in parameters(module).items()}
    if config.weights == "random":
        params = transparent(params, seed=config.seed)
    return vae_skeleton(dataclasses.replace(module.config, dtype=jnp.dtype(config.dtype))), params


def place(params: HostParams, like: Mapping[str, ShapeDtype]) -> Params:
    """Puts parameters on the devices of the mesh in force, in the dtypes of `like` and those of its names."""
    shardings = state_shardings(like)

    def put(name: str) -> jax.Array:
        value, dtype = params[name], like[name].dtype
        return jax.make_array_from_callback(value.shape, shardings[name], lambda index: value[index].astype(dtype))

    return {name: put(name) for name in like}


def to_host(params: Params) -> dict[str, np.ndarray]:
    """Copies whole parameters to every host."""
    if jax.process_count() == 1:
        return {name: np.asarray(value) for name, value in params.items()}
    return {name: multihost_utils.process_allgather(value, tiled=True) for name, value in params.items()}
