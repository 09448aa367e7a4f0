"""Measurements of whole videos, of their diffusion stage, and of what compiling takes."""

import functools
import time
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from turbojax.bench.measure import peak_bytes, temporary_bytes, timed_calls
from turbojax.diffusion import RCM
from turbojax.models.image_condition import image_shapes, takes_images
from turbojax.models.published import MODELS, known_network
from turbojax.models.sizes import tree_bytes
from turbojax.models.tokenizer import Tokenizer
from turbojax.models.vae import VAEConfig
from turbojax.models.wan import WanConfig, WanModel
from turbojax.pipeline.denoise import sample
from turbojax.pipeline.options import LoadOptions
from turbojax.pipeline.pipeline import TurboVideoPipeline, bytes_by_dtype
from turbojax.pipeline.request import Request, latent_shape
from turbojax.weights.random import random_module
from turbojax.weights.skeleton import wan_skeleton


def measure_video(options: LoadOptions, tokenizer: Tokenizer, request: Request) -> dict[str, Any]:
    """Measures random weights at full size, from prompt (and image) to closed file: a cold call and two warm ones.

    Seconds by stage, "image" to encode it, "experts" to change them where one is there at a time; `end_to_end` is
    wall-clock from the prompt to the closed file, compilation included, and `file` what writing takes after the last
    frame. What the calls run is compiled while the weights are made; a first run finds nothing in the compilation cache
    (`programs`: found and not found there) and a second one everything.
    """
    found = {"cache_hits": 0, "cache_misses": 0}

    def count(event: str, **_: Any) -> None:
        if (name := event.rpartition("/")[2]) in found:
            found[name] += 1

    jax.monitoring.register_event_listener(count)
    pipe = TurboVideoPipeline.load(options, prepare=request, tokenizer=tokenizer)
    result: dict[str, Any] = {"load_seconds": pipe.load_seconds, "loaded_peak_bytes": peak_bytes(), "calls": []}
    for i, name in enumerate(("cold", "warm", "warm")):
        start = time.perf_counter()
        video = pipe.generate(replace(request, prompt=f"A cat surfing wave number {i} at sunset", seed=i))
        seconds = video.timings | {"end_to_end": time.perf_counter() - start}
        result["calls"].append({"call": name, "seconds": seconds, "peak_bytes": peak_bytes()})
    return result | {"programs": found}


def measure_diffusion(options: LoadOptions, request: Request) -> dict[str, Any]:
    """Measures the diffusion stage alone, random weights at full size: seconds and peak memory."""
    config, vae = options.apply(known_network(options.model)), VAEConfig.wan2_1()
    transformer = random_module(wan_skeleton(config), what=f"random {options.model}")
    graph, state = nnx.split(transformer)
    loaded = peak_bytes()
    shape = request.shape(vae)
    sampler = RCM(request.num_inference_steps, sigma_max=80.0)
    keys = jax.random.split(jax.random.key(0), 3)
    noise = jax.random.normal(keys[0], shape, jnp.float32)
    text = jax.random.normal(keys[1], (1, config.text_len, config.text_dim), config.dtype)
    shapes = image_shapes(config, vae, shape) if takes_images(config) else {}
    images = {name: jnp.zeros(spec.shape, spec.dtype) for name, spec in shapes.items()}
    arguments = (sampler.initial(noise), text, None, jnp.float32(1), keys[2], None, None, images)
    run = jax.jit(functools.partial(sample, graph, sampler, (0, sampler.num_steps)))
    (cold, warm), latents = timed_calls(lambda: run(state, *arguments), 2)
    return {
        "seconds_cold": cold,
        "seconds_warm": warm,
        "loaded_peak_bytes": loaded,
        "peak_bytes": peak_bytes(),
        "finite": bool(jnp.isfinite(latents).all()),
        "weights": bytes_by_dtype(state),
    }


def measure_compilation(*, model: str, layers: tuple[int, ...], height: int, width: int) -> dict[str, Any]:
    """Measures the seconds to trace, lower and compile one network call with different numbers of layers."""
    result = {}
    shape = latent_shape(VAEConfig.wan2_1(), 81, height, width)
    for count in layers:
        config: WanConfig = MODELS[model](num_layers=count)
        graph, state = nnx.split(nnx.eval_shape(lambda config=config: WanModel(config, rngs=nnx.Rngs(0))))

        def network(state, x, t, text, graph=graph):
            return nnx.merge(graph, state)(x, t, text)

        arguments = (
            jax.ShapeDtypeStruct((1, *shape), jnp.float32),
            jax.ShapeDtypeStruct((1,), jnp.float32),
            jax.ShapeDtypeStruct((1, config.text_len, config.text_dim), config.dtype),
        )
        start = time.perf_counter()
        compiled = jax.jit(network).lower(state, *arguments).compile()
        seconds = time.perf_counter() - start
        sizes = {"weight_bytes": tree_bytes(wan_skeleton(config).specs), "temporary_bytes": temporary_bytes(compiled)}
        result[f"layers_{count}"] = {"seconds": seconds, **sizes}
    return result
