"""Measurements: what ran where, how long and in how much memory, as JSON under benchmarks/."""

import contextlib
import dataclasses
import datetime
import functools
import importlib.metadata
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx
from jax import lax

from turbojax.files import whole_file
from turbojax.kernels import int8
from turbojax.kernels.int8 import QUANT_SCHEMES, QuantConfig
from turbojax.memory.planner import device_limit, memory_stats
from turbojax.models import vae as vae_model
from turbojax.models import wan
from turbojax.models.image_condition import image_shapes, takes_images
from turbojax.models.layers import contract, rotary_table
from turbojax.models.published import MODELS
from turbojax.models.sizes import tree_bytes
from turbojax.models.tiling import decode_tiled
from turbojax.models.tokenizer import Tokenizer
from turbojax.models.vae import VAEConfig, WanVAE
from turbojax.models.wan import WanConfig, WanModel
from turbojax.pipeline.denoise import latent_shape, make_sampler, sample
from turbojax.pipeline.pipeline import TurboVideoPipeline, bytes_by_dtype
from turbojax.weights.load import with_options
from turbojax.weights.random import random_module
from turbojax.weights.skeleton import Skeleton, wan_skeleton


def command_line() -> str:
    """This process's, without the file that is written."""
    words = [word for word in sys.argv if not word.startswith("--out=")]
    return " ".join(words if words[0].startswith("turbojax ") else ["python", *words])


def environment() -> dict[str, Any]:
    """Device, versions, command and date."""
    device = jax.devices()[0]
    packages = ("jax", "jaxlib", "flax", "triton", "jax-triton", "numpy")
    return {
        "device": device.device_kind,
        "device_memory_limit": device_limit(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "command": command_line(),
        "date": datetime.date.today().isoformat(),
    }


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def peak_bytes() -> int | None:
    """Most bytes in use on the device since the process began; None where the device does not count them."""
    return memory_stats().get("peak_bytes_in_use")


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
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(environment() | result, indent=1) + "\n")


def whole_video(
    tokenizer: Tokenizer,
    *,
    model: str,
    image: np.ndarray | None = None,
    num_frames: int,
    height: int,
    width: int,
    num_inference_steps: int,
    output: Path,
    **options: Any,
) -> dict[str, Any]:
    """Random weights at full size, from prompt (and image) to closed file: a cold call and two warm ones.

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
    sizes: dict[str, Any] = dict(num_frames=num_frames, height=height, width=width, adaptive_size=False)
    settings = sizes | {"num_inference_steps": num_inference_steps, "image": image}
    pipe = TurboVideoPipeline.random(model, tokenizer, prepare=settings, **options)
    result: dict[str, Any] = {"load_seconds": pipe.load_seconds, "loaded_peak_bytes": peak_bytes(), "calls": []}
    for i, name in enumerate(("cold", "warm", "warm")):
        start = time.perf_counter()
        video = pipe(f"A cat surfing wave number {i} at sunset", seed=i, output=output, **settings)
        seconds = video.timings | {"end_to_end": time.perf_counter() - start}
        result["calls"].append({"call": name, "seconds": seconds, "peak_bytes": peak_bytes()})
    return result | {"programs": found}


def vae_decoding(*, height: int, width: int, chunks: tuple[int, ...]) -> dict[str, Any]:
    """Decoding in tiles and in chunks: agreement, seconds, and peak memory for 21 and 41 latent frames.

    `bfloat16_*_difference`: from float32, for 17 frames of 128 x 192, over the range of the values.
    """
    config = VAEConfig.wan2_1()
    vae = random_module(Skeleton.of(lambda: WanVAE(config, rngs=nnx.Rngs(0))), what="random VAE")
    _, h, w, c = latent_shape(config, 81, height, width)
    long = np.asarray(jax.random.normal(jax.random.key(0), (1, 41, h, w, c)))
    result: dict[str, Any] = bfloat16_difference(vae, long[:, :5, :16, :24])
    seconds = []
    for _ in range(2):  # the first compiles; before all else that is large, since the peak has no reset
        start = time.perf_counter()
        decode_tiled(vae, long[:, :21], as_uint8=True)
        seconds.append(time.perf_counter() - start)
    result["tiled"] = {"seconds_81_frames_to_host": seconds[1], "peak_bytes_21_latents": peak_bytes()}
    first = None
    for chunk in chunks:

        def clip(latents: np.ndarray, chunk: int = chunk) -> np.ndarray:
            parts = vae_model.decode_chunks(vae, latents, chunk=chunk)
            return np.concatenate([np.asarray(part.astype(jnp.float32)) for part in parts], axis=1)

        video = clip(long[:, :21])
        peak_21 = peak_bytes()
        seconds = []
        for _ in range(3):  # the first compiles
            start = time.perf_counter()
            for part in vae_model.decode_chunks(vae, long[:, :21], chunk=chunk, as_uint8=True):
                np.asarray(part)
            seconds.append(time.perf_counter() - start)
        if first is None:
            first = video
        for part in vae_model.decode_chunks(vae, long, chunk=chunk, as_uint8=True):
            np.asarray(part)
        result[f"chunk_{chunk}"] = {
            "seconds_81_frames_to_host": min(seconds[1:]),
            "peak_bytes_21_latents": peak_21,
            "peak_bytes_41_latents": peak_bytes(),
            "max_difference_over_range": float(np.abs(video - first).max() / (first.max() - first.min())),
            "rms_difference_over_range": float(np.sqrt(np.mean((video - first) ** 2)) / (first.max() - first.min())),
        }
    return result


def bfloat16_difference(vae: WanVAE, latents: np.ndarray) -> dict[str, float]:
    config = dataclasses.replace(vae.config, dtype=jnp.float32)
    exact = nnx.eval_shape(lambda: WanVAE(config, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(exact)
    exact = nnx.merge(graph, jax.tree.map(lambda like, a: a.astype(like.dtype), state, nnx.state(vae)))
    with jax.default_matmul_precision("highest"):
        expected = np.asarray(vae_model.decode(exact, latents))
    error = np.asarray(vae_model.decode(vae, latents).astype(jnp.float32)) - expected
    scale = float(np.ptp(expected))
    return {
        "bfloat16_max_difference": float(np.abs(error).max()) / scale,
        "bfloat16_rms_difference": float(np.sqrt(np.mean(error**2))) / scale,
    }


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
        weights = tree_bytes(skeleton.specs)
        result[f"layers_{count}"] = {
            "seconds": seconds,
            "weight_bytes": weights,
            "temporary_bytes": getattr(memory, "temp_size_in_bytes", None),
        }
    return result


# Rows, out-features and in-features of the linear layers: 1.3B at 480p, 14B at 720p.
LINEAR_SHAPES = (
    (32768, 1536, 1536),
    (32768, 8960, 1536),
    (32768, 1536, 8960),
    (75648, 5120, 5120),
    (75648, 13824, 5120),
    (75648, 5120, 13824),
)
CHECKED_ROWS = 1024  # rows compared with float32


def linear_layers(*, schemes: tuple[str, ...], shapes=LINEAR_SHAPES) -> dict[str, Any]:
    """int8 linear layers beside bfloat16 through XLA (cuBLAS): ms, TOPS, and relative error against float32.

    ms and tops: quantization of the activations, matmul and bias; matmul_*: from activations quantized already.
    """
    result: dict[str, Any] = {}
    for m, n, k in shapes:
        keys = jax.random.split(jax.random.key(m + n + k), 4)
        inputs = [jax.random.normal(key, (m, k), jnp.bfloat16) for key in keys[:2]]  # in turn: no reuse of the cache
        weight = jax.random.normal(keys[2], (n, k), jnp.bfloat16) * k**-0.5
        bias = jax.random.normal(keys[3], (n,), jnp.bfloat16)
        exact = jnp.dot(
            inputs[0][:CHECKED_ROWS].astype(jnp.float32), weight.T.astype(jnp.float32), precision=lax.Precision.HIGHEST
        )
        exact = exact + bias.astype(jnp.float32)[None]
        operations = 2 * m * n * k
        rows: dict[str, Any] = {}
        dense = jax.jit(lambda x, w, b: contract(x, w) + b[None])
        rows["bfloat16"] = measured(dense, [(x, weight, bias) for x in inputs], operations, exact)
        for name in schemes:
            rows[name] = int8_layer(QUANT_SCHEMES[name], inputs, weight, bias, operations, exact)
            rows[name]["speed_over_bfloat16"] = rows["bfloat16"]["ms"] / rows[name]["ms"]
        result[f"{m} x {n} x {k}"] = rows
        logging.info("%d x %d x %d: %s", m, n, k, {name: round(row["ms"], 3) for name, row in rows.items()})
    return result


def int8_layer(quant: QuantConfig, inputs, weight, bias, operations: int, exact) -> dict[str, Any]:
    w_q, w_scale = jax.jit(int8.quantize_weight, static_argnums=1)(weight, quant.scheme)
    if quant.weight_only:
        full = jax.jit(lambda x: int8.dequantizing_matmul(x, w_q, w_scale, bias, quant))
        return measured(full, [(x,) for x in inputs], operations, exact)
    quantize = jax.jit(lambda x: int8.quantize(x, quant))
    full = jax.jit(lambda x: int8.matmul(int8.quantize(x, quant), w_q, w_scale, bias, quant))
    matmul = jax.jit(lambda x: int8.matmul(x, w_q, w_scale, bias, quant))
    quantized = [(quantize(x),) for x in inputs]
    matmul_seconds = seconds_a_call(matmul, quantized)
    return measured(full, [(x,) for x in inputs], operations, exact) | {
        "matmul_ms": 1e3 * matmul_seconds,
        "matmul_tops": operations / matmul_seconds / 1e12,
        "quantize_ms": 1e3 * seconds_a_call(quantize, [(x,) for x in inputs]),
    }


def measured(function: Callable, arguments: list[tuple], operations: int, exact: jax.Array) -> dict[str, float]:
    seconds = seconds_a_call(function, arguments)
    error = function(*arguments[0])[: len(exact)].astype(jnp.float32) - exact
    relative = float(jnp.linalg.norm(error) / jnp.linalg.norm(exact))
    return {"ms": 1e3 * seconds, "tops": operations / seconds / 1e12, "relative_error": relative}


def seconds_a_call(function: Callable, arguments: list[tuple], *, calls: int = 20) -> float:
    """Median over repeats of a run of calls that go to the device without waiting, after a warm-up.

    With few calls a run the first launch and the wait at the end, 0.1 ms together, would count against small shapes.
    """

    def run() -> Any:
        last = None
        for i in range(calls):
            last = function(*arguments[i % len(arguments)])
        return last

    return median_seconds(run) / calls


def one_block(*, model: str, tokens: tuple[int, int, int], schemes: tuple[str | None, ...]) -> dict[str, Any]:
    """One transformer block without its attention: linear layers, norms, rotary, gates. Milliseconds and bytes."""
    result: dict[str, dict[str, Any]] = {}
    for name in schemes:
        config = with_options(MODELS[model](num_layers=1), quant_linear=name is not None, quant_scheme=name)
        block = wan.Block(config, rngs=nnx.Rngs(0))
        graph, state = nnx.split(block)
        length = tokens[0] * tokens[1] * tokens[2]
        keys = jax.random.split(jax.random.key(0), 3)
        x = jax.random.normal(keys[0], (1, length, config.dim), config.dtype)
        e0 = 0.1 * jax.random.normal(keys[1], (1, 6, config.dim), jnp.float32)
        text = jax.random.normal(keys[2], (1, config.text_len, config.dim), config.dtype)
        context = wan.Context(*block.cross_attn.keys(text, None), rotary_table(tokens, config.head_dim))

        @jax.jit
        def run(state, x, graph=graph, e0=e0, context=context):
            with without_attention():
                return nnx.merge(graph, state)(x, e0, *context)

        weights = tree_bytes(state)
        memory = run.lower(state, x).compile().memory_analysis()
        temporary = getattr(memory, "temp_size_in_bytes", None)
        seconds = seconds_a_call(run, [(state, x)], calls=5)
        result[name or "bfloat16"] = {"ms": 1e3 * seconds, "weight_bytes": weights, "temporary_bytes": temporary}
    for row in result.values():
        row["speed_over_bfloat16"] = result["bfloat16"]["ms"] / row["ms"]
        row["weights_over_bfloat16"] = row["weight_bytes"] / result["bfloat16"]["weight_bytes"]
    return result


@contextlib.contextmanager
def without_attention() -> Iterator[None]:
    """While a network is traced, attention is a sum of its operands: nothing else of the block changes."""
    original = wan.dot_product_attention

    def stand_in(q, k, v, **settings):
        del settings
        return q + jnp.mean(k + v, axis=1, keepdims=True)

    wan.dot_product_attention = stand_in
    try:
        yield
    finally:
        wan.dot_product_attention = original


def diffusion(
    *, model: str, num_frames: int, height: int, width: int, num_inference_steps: int, **options: Any
) -> dict[str, Any]:
    """The diffusion stage alone, random weights at full size: seconds and peak memory."""
    config = with_options(MODELS[model](), **options)
    transformer = random_module(wan_skeleton(config), what=f"random {model}")
    graph, state = nnx.split(transformer)
    loaded = peak_bytes()
    shape = (1, *latent_shape(VAEConfig.wan2_1(), num_frames, height, width))
    steps = make_sampler("rcm", num_steps=num_inference_steps, sigma_max=80.0)
    keys = jax.random.split(jax.random.key(0), 3)
    noise = jax.random.normal(keys[0], shape, jnp.float32)
    text = jax.random.normal(keys[1], (1, config.text_len, config.text_dim), config.dtype)
    shapes = image_shapes(config, VAEConfig.wan2_1(), shape) if takes_images(config) else {}
    images = {name: jnp.zeros(spec.shape, spec.dtype) for name, spec in shapes.items()}
    arguments = (steps.initial(noise), text, None, jnp.float32(1), keys[2], None, None, images)
    run = jax.jit(functools.partial(sample, graph, steps, (0, num_inference_steps)))
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        latents = jax.block_until_ready(run(state, *arguments))
        seconds.append(time.perf_counter() - start)
    return {
        "seconds_cold": seconds[0],
        "seconds_warm": seconds[1],
        "loaded_peak_bytes": loaded,
        "peak_bytes": peak_bytes(),
        "finite": bool(jnp.isfinite(latents).all()),
        "weights": bytes_by_dtype(state),
    }
