"""Kernels of one layer and the bytes that each moves, compiled for an H100 on a machine without a GPU.

    JAX_PLATFORMS=cpu python -m tests.manual.layer_bytes --attention_type=sagesla --quant_scheme=block128

Needs jax with its CUDA plugin, Triton and jax-triton; nothing runs, and XLA tunes nothing: on a GPU it may choose other
matmuls. With MOSAIC_GPU_DUMP_TO=FOLDER and MOSAIC_GPU_DUMP_PTXAS=1 Mosaic kernels leave registers and spills there.
"""

import math
import types

import jax
import jax.numpy as jnp
from absl import app, flags
from flax import nnx

from tests.manual.h100 import absent_h100
from turbojax.bench import layer
from turbojax.media.video import video_size
from turbojax.models.layers import rotary_table
from turbojax.models.published import MODELS
from turbojax.models.wan import Context, WanConfig, WanModel
from turbojax.weights.options import NetworkOptions

MODEL = flags.DEFINE_string("model", "wan2.1-t2v-14b", "network")
RESOLUTION = flags.DEFINE_string("resolution", "720p", "480p or 720p, 16:9, 81 frames")
ATTENTION = flags.DEFINE_string("attention_type", "sagesla", "original, sla or sagesla")
QUANT = flags.DEFINE_string("quant_scheme", None, "int8 linear layers")


def pretend(device: jax.Device) -> None:
    """Makes kernels be chosen and compiled for a device that is not there."""
    from jax_triton import triton_lib

    jax.devices = lambda *_: [device]
    jax.default_backend = lambda: "gpu"
    library = triton_lib.triton_kernel_call_lib
    names = {name: getattr(library, name) for name in dir(library) if not name.startswith("__")}
    triton_lib.triton_kernel_call_lib = types.SimpleNamespace(**names | {"get_compute_capability": lambda _: 90})


def compiled_layers(config: WanConfig, grid: tuple[int, int, int], device: jax.Device) -> str:
    """The optimized HLO of the network's layers at a grid of patches, from shapes alone."""
    spec, heads = jax.ShapeDtypeStruct, (config.num_heads, config.head_dim)
    graph, state = nnx.split(nnx.eval_shape(lambda: WanModel(config, rngs=nnx.Rngs(0))))
    table = jax.eval_shape(lambda: rotary_table(grid, config.head_dim))
    keys = spec((config.num_layers, 1, config.text_len, *heads), config.dtype)
    tokens = spec((1, math.prod(grid), config.dim), config.dtype)
    e0 = spec((1, 6, config.dim), jnp.float32)

    def run(state, tokens, e0, context):
        return nnx.merge(graph, state).run_blocks(tokens, e0, context)

    sharding = jax.sharding.SingleDeviceSharding(device)
    arguments = state, tokens, e0, Context((keys, keys), None, table)
    arguments = jax.tree.map(lambda a: spec(a.shape, a.dtype, sharding=sharding), arguments)
    options = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 0}
    return jax.jit(run, donate_argnums=1).lower(*arguments).compile(compiler_options=options).as_text()


def main(_) -> None:
    config = NetworkOptions(
        attention_type=ATTENTION.value, quant_linear=QUANT.value is not None, quant_scheme=QUANT.value
    ).apply(MODELS[MODEL.value](num_layers=2))
    jax.devices()  # finds the plugin
    device = absent_h100()
    pretend(device)
    width, height = video_size(RESOLUTION.value, "16:9")
    text = compiled_layers(config, (21, height // 16, width // 16), device)
    rows = [layer.table_row(kernel, 0.0, config) for kernel in layer.layer_kernels(text)]
    for row in sorted(rows, key=lambda row: -row["bytes"]):
        print(f"{row['bytes'] / 1e9:8.3f} GB {row['floor_ms']:7.3f} ms  {row['kernel']:32s} {row['what']}")
    moved, floor = (sum(row[name] for row in rows) for name in ("bytes", "floor_ms"))
    print(f"{moved / 1e9:8.3f} GB {floor:7.3f} ms  together, {len(rows)} launches")


if __name__ == "__main__":
    app.run(main)
