"""Measurements: what ran where, how long and in how much memory, as JSON under benchmarks/."""

import datetime
import importlib.metadata
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from turbojax.models import vae as vae_model
from turbojax.models.tokenizer import Tokenizer
from turbojax.models.vae import VAEConfig, WanVAE
from turbojax.models.wan import WanConfig, WanModel
from turbojax.pipeline import MODELS, TurboVideoPipeline, latent_shape
from turbojax.video import whole_file
from turbojax.weights.load import Skeleton, wan_skeleton
from turbojax.weights.random import random_module


def environment() -> dict[str, Any]:
    """Device, versions, command and date."""
    device = jax.devices()[0]
    packages = ("jax", "jaxlib", "flax", "triton", "jax-triton", "numpy")
    return {
        "device": device.device_kind,
        "device_memory_limit": (device.memory_stats() or {}).get("bytes_limit"),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.date.today().isoformat(),
    }


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def peak_bytes() -> int | None:
    """Most bytes in use on the device since the process began; None where the device does not count them."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def median_seconds(function: Callable[[], Any], *, repeats: int = 5) -> float:
    """Median wall-clock seconds of a call that returns arrays, after one call to warm up."""
    jax.block_until_ready(function())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function())
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def save(result: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(environment() | result, indent=1) + "\n")


def text_to_video(
    tokenizer: Tokenizer,
    *,
    model: str,
    num_frames: int,
    height: int,
    width: int,
    num_inference_steps: int,
    output: Path,
    **options: Any,
) -> dict[str, Any]:
    """Random weights at full size, from prompt to closed file: a cold call and two warm ones.

    Seconds by stage; `end_to_end` is wall-clock from the prompt to the closed file, compilation included.
    """
    pipe = TurboVideoPipeline.random(model, tokenizer, **options)
    result: dict[str, Any] = {"load_seconds": pipe.load_seconds, "loaded_peak_bytes": peak_bytes(), "calls": []}
    for i, name in enumerate(("cold", "warm", "warm")):
        start = time.perf_counter()
        video = pipe(
            f"A cat surfing wave number {i} at sunset",
            num_frames=num_frames,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            seed=i,
        )
        writing = time.perf_counter()
        pipe.save_video(video.videos[0], output)
        end = time.perf_counter()
        seconds = {**video.timings, "file": end - writing, "end_to_end": end - start}
        result["calls"].append({"call": name, "seconds": seconds, "peak_bytes": peak_bytes()})
    return result


def vae_decoding(*, height: int, width: int, chunks: tuple[int, ...]) -> dict[str, Any]:
    """Decoding in chunks: agreement, seconds, and peak memory for 21 and 41 latent frames."""
    config = VAEConfig.wan2_1()
    vae = random_module(Skeleton.of(lambda: WanVAE(config, rngs=nnx.Rngs(0))), what="random VAE")
    _, h, w, c = latent_shape(config, 81, height, width)
    long = np.asarray(jax.random.normal(jax.random.key(0), (1, 41, h, w, c)))
    result: dict[str, Any] = {}
    first = None
    for chunk in chunks:

        def clip(latents: np.ndarray, chunk: int = chunk) -> np.ndarray:
            parts = vae_model.decode_chunks(vae, latents, chunk=chunk)
            return np.concatenate([np.asarray(part.astype(jnp.float32)) for part in parts], axis=1)

        video = clip(long[:, :21])
        peak_21 = peak_bytes()
        start = time.perf_counter()
        for part in vae_model.decode_chunks(vae, long[:, :21], chunk=chunk, as_uint8=True):
            np.asarray(part)
        seconds = time.perf_counter() - start
        if first is None:
            first = video
        for part in vae_model.decode_chunks(vae, long, chunk=chunk, as_uint8=True):
            np.asarray(part)
        result[f"chunk_{chunk}"] = {
            "seconds_81_frames_to_host": seconds,
            "peak_bytes_21_latents": peak_21,
            "peak_bytes_41_latents": peak_bytes(),
            "max_difference_over_range": float(np.abs(video - first).max() / (first.max() - first.min())),
            "rms_difference_over_range": float(np.sqrt(np.mean((video - first) ** 2)) / (first.max() - first.min())),
        }
    return result


def compile_seconds(*, model: str, layers: tuple[int, ...], height: int, width: int, **options: Any) -> dict[str, Any]:
    """Seconds to trace, lower and compile one network call with different numbers of layers."""
    result = {}
    shape = latent_shape(VAEConfig.wan2_1(), 81, height, width)
    for count in layers:
        config: WanConfig = MODELS[model](num_layers=count, **options)
        skeleton = wan_skeleton(config)
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
        memory = compiled.memory_analysis()
        weights = sum(spec.size * spec.dtype.itemsize for spec in skeleton.specs.values())
        result[f"layers_{count}"] = {
            "seconds": seconds,
            "weight_bytes": weights,
            "temporary_bytes": getattr(memory, "temp_size_in_bytes", None),
        }
    return result
