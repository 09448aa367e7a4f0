"""Measurements of training."""

import collections
import dataclasses
import functools
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from turbojax.bench import profiles
from turbojax.bench.measure import peak_bytes, temporary_bytes
from turbojax.models.published import MODELS
from turbojax.models.vae import VAEConfig
from turbojax.models.wan import WanConfig
from turbojax.pipeline.pipeline import bytes_by_dtype
from turbojax.pipeline.request import Request
from turbojax.train.losses import velocity_tangent
from turbojax.train.recipes import RCM, SLA, Networks, Recipe
from turbojax.train.schedule import Phases, learning_rate
from turbojax.train.state import initial_state, parameters
from turbojax.train.step import Frozen, adamw, make_step
from turbojax.train.times import LogNormal
from turbojax.train.trigflow import velocity
from turbojax.weights.random import random_module
from turbojax.weights.skeleton import wan_skeleton

ROUNDS = 3
TANGENT_STEP = 1e-4  # of the differences, as training has it by default


def measure_tangent(model: str, request: Request, **settings: Any) -> dict[str, dict[str, Any]]:
    """Measures sCM's tangent beside a call of the network: seconds (the best of some rounds, in which the functions
    take turns), in units of that call, and temporary bytes.

    forward: F with the fastest attention; reference: with attention that has a JVP; exact: t_F by its JVP;
    difference: t_F by two calls with the fastest attention; gradient: of a sum of F, in all parameters.
    float32 on a CPU, which has no fast bfloat16, else bfloat16.
    """
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    config: WanConfig = MODELS[model](dtype=dtype, **settings)
    shape = request.shape(VAEConfig.wan2_1())
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

    def t_F(parameters, tangent, implementation=None):
        module = network(parameters, implementation)
        return velocity_tangent(module, x, t, text, F_teacher, tangent=tangent, step=TANGENT_STEP)

    functions = {
        "forward": F,
        "reference": lambda parameters: F(parameters, "reference"),
        "exact": lambda parameters: t_F(parameters, "exact", "reference"),
        "difference": lambda parameters: t_F(parameters, "difference"),
        "gradient": jax.grad(lambda parameters: F(parameters).sum()),
    }
    compiled = {name: jax.jit(function).lower(parameters).compile() for name, function in functions.items()}
    rounds = [{name: call_seconds(run, parameters) for name, run in compiled.items()} for _ in range(ROUNDS)]
    seconds = {name: min(each[name] for each in rounds) for name in compiled}
    result: dict[str, dict[str, Any]] = {}
    for name, run in compiled.items():
        result[name] = {"seconds": seconds[name], "over_forward": seconds[name] / seconds["forward"]}
        result[name]["temporary_bytes"] = temporary_bytes(run)
    return result


def call_seconds(function: Callable, *arguments: Any) -> float:
    """Returns the seconds of one call; on a CPU those of its threads, which other processes do not lengthen."""
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    start = clock()
    jax.block_until_ready(function(*arguments))
    return clock() - start


CONSISTENCY_ALONE = Phases(fake=False, loss_scale_dmd=0.0)
# Calls of each network in a step, as forward passes: a gradient counts two more, a derivative along a direction one.
RECIPES: dict[str, tuple[Callable[[Networks], Recipe], dict[str, int]]] = {
    "sla": (lambda networks: SLA(networks, LogNormal(1.5)), {"teacher": 1, "student": 3}),
    "scm": (lambda networks: RCM(networks, LogNormal(0.7), phases=CONSISTENCY_ALONE), {"teacher": 2, "student": 5}),
}
# Multiplications and additions a second in bfloat16 with dense operands, as NVIDIA states them.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}


def measure_train_step(
    *, recipe: str, config: WanConfig, latents: tuple[int, int, int, int], text_len: int = 512, steps: int = 3
) -> dict[str, Any]:
    """Measures an optimizer step of one sample with random weights: seconds, memory, utilisation, largest items.

    recipe: "sla" (teacher forward, student forward and backward through SLA's kernels) or "scm" (consistency alone:
      guided teacher, exact tangent, student forward and backward).
    config: of the dense network, for instance `MODELS["wan2.1-t2v-1.3b"](remat=True)`; latents `[t, h, w, c]`.

    model_flops_utilisation counts what the step has to compute: not the second forward pass of remat.
    """
    make_recipe, calls = RECIPES[recipe]
    student = dataclasses.replace(config, attention_type="sla", sla_blocks=(64, 64)) if recipe == "sla" else config
    networks = Networks.of(student, config)
    optimizer = adamw(learning_rate(1e-5), betas=(0.9, 0.999), weight_decay=0.01)
    step = make_step(make_recipe(networks), {"student": optimizer})
    master = wan_skeleton(dataclasses.replace(student, dtype=jnp.float32))
    params = parameters(random_module(master, what="random student"))
    state = jax.jit(functools.partial(initial_state, student=optimizer.transform), donate_argnums=0)(params)
    del params
    text = jax.random.normal(jax.random.key(0), (1, text_len, config.text_dim), config.dtype)
    frozen = Frozen(parameters(random_module(networks.teacher, what="random teacher")), text[0])
    batch = {"latents": jax.random.normal(jax.random.key(1), (1, *latents), jnp.float32), "text": text}
    jax.block_until_ready((state, frozen))
    held = bytes_by_dtype((state, frozen))

    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        for i in range(steps + 2):  # the first compiles, the last is profiled
            if i == steps + 1:
                jax.profiler.start_trace(folder)
            start = time.perf_counter()
            state, metrics = step(i, state, frozen, batch)
            jax.block_until_ready(state)
            seconds.append(time.perf_counter() - start)
        jax.profiler.stop_trace()
        largest = largest_items(Path(folder))
    median = statistics.median(seconds[1:-1])
    networks_by_name = {"teacher": config, "student": student}
    flops = sum(count * forward_flops(networks_by_name[name], latents, text_len) for name, count in calls.items())
    kind = jax.devices()[0].device_kind
    peak = next((peak for name, peak in PEAK_FLOPS.items() if name in kind), None)
    return {
        "seconds": median,
        "seconds_of_the_first": seconds[0],
        "bytes_held": held,
        "peak_bytes": peak_bytes(),
        "tokens": math.prod(latents[:3]) // config.patch_features,
        "model_flops": flops,
        "model_flops_utilisation": peak and flops / median / peak,
        "largest_items": largest,
        "metrics": {name: float(value) for name, value in metrics.items()},
    }


def forward_flops(config: WanConfig, latents: tuple[int, int, int, int], text_len: int) -> float:
    """Returns the multiplications and additions of one forward pass of one sample, in its matrix products."""
    c, tokens = config, math.prod(latents[:3]) // config.patch_features
    share = 1.0 if c.attention_type == "original" else c.sla_topk
    block: float = 2 * tokens * (6 * c.dim**2 + 2 * c.dim * c.ffn_dim)  # q, k, v, o; q and o of cross-attention; ffn
    block += 2 * text_len * 2 * c.dim**2  # k and v of cross-attention
    block += 4 * tokens * c.dim * (share * tokens + text_len)  # scores and sums of values
    if c.attention_type != "original":
        block += 6 * tokens * c.dim * c.head_dim  # the linear branch: its state, its use, its projection
    ends = 2 * tokens * c.dim * c.patch_features * (c.in_channels + c.out_channels)
    return c.num_layers * block + ends + 2 * text_len * c.dim * (c.text_dim + c.dim)


def largest_items(folder: Path, count: int = 3) -> list[dict[str, Any]]:
    """Returns what took most of a profile's time: names, milliseconds, calls, and their share of all items.

    On a GPU these are kernels and copies of all streams; elsewhere what XLA's threads ran.
    """
    seconds, calls = collections.defaultdict[str, float](float), collections.Counter[str]()
    gpu = jax.default_backend() == "gpu"
    for event in profiles.events(folder):
        if event.line.startswith("Stream") if gpu else "XLA" in event.line:
            seconds[event.name] += event.seconds
            calls[event.name] += 1
    total = sum(seconds.values())
    most = sorted(seconds.items(), key=lambda item: -item[1])[:count]
    return [{"name": name, "ms": 1e3 * took, "calls": calls[name], "share": took / total} for name, took in most]
