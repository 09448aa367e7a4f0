"""Measurement of one transformer layer by kernels, beside the roofline.

Time is from a profile, bytes and operations are from shapes.
"""

import collections
import math
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from turbojax.bench import hlo, profiles
from turbojax.bench.measure import seconds_per_call
from turbojax.models import wan
from turbojax.models.wan import WanConfig, WanModel
from turbojax.weights.random import random_module
from turbojax.weights.skeleton import wan_skeleton

# An H100's roofline as measured: bytes per second of a copy; operations per second of cuBLAS in bfloat16 and of int8
# without block scales.
BYTES, BFLOAT16, INT8 = 3.0e12, 791e12, 1450e12
NO_COMMAND_BUFFERS = {"xla_gpu_enable_command_buffer": ""}  # in which a profile would not tell kernels apart
# Scopes that name no part of the model.
NO_SCOPES = {"triton_kernel_call", "mpmd_map", "anonymous", "entry", "eval_jaxpr", "body", "while", ""}
LAYERS = 3  # enough for the stacks of weights to be sliced as in the whole network


def measure_layer(
    config: WanConfig, grid: tuple[int, int, int], *, calls: int = 3, compiler_options: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Measures one layer of a network with random weights and inputs, as a table of its kernels.

    grid: patches in time, height and width. The result: ms of a layer and the fraction of it that the kernels
    explain; of each kernel ms, bytes and operations, the ms that the roofline allows (floor_ms) and the fraction of the
    roofline that is reached. Kernels that the profile names and the compiled program does not are under unnamed_ms.
    """
    function, arguments = layers_function(config, grid)
    lowered = function.lower(*arguments)
    compiled = lowered.compile(compiler_options=compiler_options)
    text = compiled.as_text()
    seconds = seconds_per_call(compiled, [arguments], calls=calls) / LAYERS
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(calls):
                jax.block_until_ready(compiled(*arguments))
        measured = profiled_seconds(Path(folder))
    a_layer = {op: total / calls / LAYERS for op, total in measured.items()}
    rows = []
    for kernel in layer_kernels(text):
        its_seconds = sum(a_layer.pop(name, 0.0) for name in (kernel.name, *kernel.inside))
        rows.append(table_row(kernel, its_seconds, config))
    # The loop itself is among them: on a CPU its time is that of a thread that waits.
    outside = set(hlo.parse(text)[hlo.entry(text)]) | {name for kernel in hlo.kernels(text) for name in kernel.inside}
    unnamed = {op: 1e3 * total for op, total in a_layer.items() if op not in outside}
    rows.sort(key=lambda row: -row["ms"])
    return {
        "ms": 1e3 * seconds,
        "explained": sum(row["ms"] for row in rows) / (1e3 * seconds),
        "floor_ms": sum(row["floor_ms"] for row in rows),
        "bytes": sum(row["bytes"] for row in rows),
        "kernels": rows,
        "unnamed_ms": unnamed,
    }


def layers_function(config: WanConfig, grid: tuple[int, int, int]) -> tuple[Any, tuple]:
    """Returns the network's layers, jitted, and their arguments: parameters, tokens, time embedding and context."""
    model = random_module(wan_skeleton(config), what="random layers")
    assert isinstance(model, WanModel)
    keys = jax.random.split(jax.random.key(0), 3)
    tokens = jax.random.normal(keys[0], (1, math.prod(grid), config.dim), config.dtype)
    e0 = 0.1 * jax.random.normal(keys[1], (1, 6, config.dim), jnp.float32)
    text = jax.random.normal(keys[2], (1, config.text_len, config.text_dim), config.dtype)
    graph, state = nnx.split(model)
    context = jax.jit(lambda state: nnx.merge(graph, state).prepare(text, grid))(state)

    def run(state: Any, tokens: jax.Array, e0: jax.Array, context: wan.Context) -> jax.Array:
        return nnx.merge(graph, state).run_blocks(tokens, e0, context)

    return jax.jit(run), (state, tokens, e0, context)


def layer_kernels(text: str) -> list[hlo.Kernel]:
    """Returns the kernels of one layer, in order: the body of the loop that moves the most bytes."""
    bodies = (hlo.kernels(text, within=name) for name in hlo.loop_bodies(text))
    return max(bodies, key=lambda kernels: sum(kernel.bytes for kernel in kernels))


def profiled_seconds(folder: Path) -> dict[str, float]:
    """Returns the seconds of each instruction of compiled programs in a profile: on the devices, else on the host."""
    devices, host = collections.defaultdict[str, float](float), collections.defaultdict[str, float](float)
    for event in profiles.events(folder):
        if event.op:
            (devices if event.plane.startswith("/device:GPU") else host)[event.op] += event.seconds
    return dict(devices or host)


def table_row(kernel: hlo.Kernel, seconds: float, config: WanConfig) -> dict[str, Any]:
    """Returns a kernel's row of the table: measured seconds beside the roofline."""
    count, rate = operations(kernel, config)
    floor = max(kernel.bytes / BYTES, count / rate)
    scopes = [scope for scope in kernel.source.split("/") if scope not in NO_SCOPES]
    return {
        "kernel": kernel.name,
        "what": "/".join(scopes[-2:]) or kernel.opcode,
        "ms": 1e3 * seconds,
        "bytes": kernel.bytes,
        "operations": count,
        "floor_ms": 1e3 * floor,
        "fraction": floor / seconds if seconds else None,
    }


def operations(kernel: hlo.Kernel, config: WanConfig) -> tuple[int, float]:
    """Returns the multiplications and additions on tensor cores, and the rate that bounds them."""
    matrices = [array for array in kernel.inputs if len(array.sizes) > 1]
    table = next((array for array in matrices if array.dtype == "s32" and len(array.sizes) == 4), None)
    if "int8_matmul" in kernel.source:
        return product_operations([a for a in matrices if a.dtype == "s8"], kernel.outputs[0]), INT8
    if kernel.opcode.startswith("__cublas") and matrices[0].dtype == "bf16":
        return product_operations(matrices[:2], kernel.outputs[0]), BFLOAT16
    if kernel.opcode.startswith("__cudnn"):  # softmax(q k^T) v
        return 4 * matrices[0].elements * matrices[1].elements // config.dim, BFLOAT16
    if table is not None:  # the same over the chosen blocks, [B, N, query blocks, chosen]
        elements = table.elements * math.prod(config.blocks)
        return 4 * elements * config.head_dim, INT8 if config.attention_type == "sagesla" else BFLOAT16
    return 0, BFLOAT16


def product_operations(factors: list[hlo.Array], result: hlo.Array) -> int:
    """Returns 2 M N K from M K, N K and M N."""
    return 2 * math.isqrt(factors[0].elements * factors[1].elements * result.elements)
