"""Measurements of training."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from turbojax.models.vae import VAEConfig
from turbojax.models.wan import WanConfig
from turbojax.pipeline import MODELS
from turbojax.sampling import latent_shape
from turbojax.train.losses import velocity_tangent
from turbojax.train.trigflow import velocity
from turbojax.weights.load import wan_skeleton
from turbojax.weights.random import random_module

ROUNDS = 3


def tangent(
    *, model: str, layers: int, num_frames: int, height: int, width: int, **options: Any
) -> dict[str, dict[str, Any]]:
    """What sCM's tangent costs beside a call of the network: seconds (the best of some rounds, in which the functions
    take turns), in units of that call, and temporary bytes.

    forward: F with the fastest attention; reference: with attention that has a JVP; exact: t_F by its JVP;
    difference: t_F by two calls with the fastest attention; gradient: of a sum of F, in all parameters.
    float32 on a CPU, which has no fast bfloat16, else bfloat16.
    """
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    config: WanConfig = MODELS[model](num_layers=layers, dtype=dtype, **options)
    shape = (1, *latent_shape(VAEConfig.wan2_1(), num_frames, height, width))
    keys = jax.random.split(jax.random.key(0), 3)
    x, F_teacher = (jax.random.normal(key, shape, jnp.float32) for key in keys[:2])
    text = jax.random.normal(keys[2], (1, config.text_len, config.text_dim), dtype)
    t = jnp.full(1, 1.1, jnp.float32)
    parameters = nnx.state(random_module(wan_skeleton(config), what=f"random {model}"))

    def network(parameters, implementation=None):
        graph = wan_skeleton(dataclasses.replace(config, attention_implementation=implementation)).graph
        return lambda x, timesteps, text: nnx.merge(graph, parameters)(x, timesteps, text)

    def F(parameters, implementation=None):
        return velocity(network(parameters, implementation), x, t, text)

    def t_F(parameters, implementation=None, **how):
        return velocity_tangent(network(parameters, implementation), x, t, text, F_teacher, **how)

    functions = {
        "forward": F,
        "reference": lambda parameters: F(parameters, "reference"),
        "exact": lambda parameters: t_F(parameters, "reference"),
        "difference": lambda parameters: t_F(parameters, tangent="difference"),
        "gradient": jax.grad(lambda parameters: F(parameters).sum()),
    }
    compiled = {name: jax.jit(function).lower(parameters).compile() for name, function in functions.items()}
    rounds = [{name: call_seconds(run, parameters) for name, run in compiled.items()} for _ in range(ROUNDS)]
    seconds = {name: min(each[name] for each in rounds) for name in compiled}
    return {
        name: {
            "seconds": seconds[name],
            "over_forward": seconds[name] / seconds["forward"],
            "temporary_bytes": getattr(run.memory_analysis(), "temp_size_in_bytes", None),
        }
        for name, run in compiled.items()
    }


def call_seconds(function: Callable, *arguments: Any) -> float:
    """Seconds of one call; on a CPU those of its threads, which other processes do not lengthen."""
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    start = clock()
    jax.block_until_ready(function(*arguments))
    return clock() - start
