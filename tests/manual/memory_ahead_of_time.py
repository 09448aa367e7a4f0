"""The planner's estimates beside XLA's memory analysis for an H100, without a GPU; writes JSON.

    python tests/manual/memory_ahead_of_time.py [--out=benchmarks/ahead_of_time/memory.json]

Needs jax's CUDA plugin (jax 0.11 or later) and jax-triton; takes ten minutes on two cores. Kernels are lowered as on a
GPU. Without one XLA cannot search for the fastest matmul and is told to take cuBLAS, as it does on an H100; what the
search itself takes (`estimates.autotuning_bytes`) is left out of both numbers. Not run by pytest.
"""

import argparse
import json
import os
import types
from pathlib import Path
from unittest import mock

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_gpu_enable_triton_gemm=false"

import jax

from tests.manual.h100 import absent_h100
from turbojax.bench import measure
from turbojax.media.video import video_size
from turbojax.memory import estimates
from turbojax.memory.estimates import Residency, analyze, estimate
from turbojax.models.published import MODELS, ModelConfigs
from turbojax.models.umt5 import UMT5Config
from turbojax.models.vae import VAEConfig
from turbojax.pipeline.denoise import abstract_arguments, sampler_program
from turbojax.pipeline.request import Request
from turbojax.weights.options import NetworkOptions
from turbojax.weights.skeleton import wan_skeleton

SMALL, LARGE = "wan2.1-t2v-1.3b", "wan2.1-t2v-14b"
SETTINGS = [
    *((model, size, {"quant_scheme": scheme}) for model in (SMALL, LARGE) for size in ("480p", "720p")
      for scheme in (None, "block128", "channel")),
    *((LARGE, "720p", {"quant_scheme": scheme, "attention_type": attention}) for scheme in (None, "block128")
      for attention in ("sla", "sagesla")),
]  # fmt: skip
STREAMED = Residency(text_streamed=True, vae_tiled=True, transformer_streamed=True)


def compare(model: str, size: str, quant_scheme: str | None, **options) -> dict[str, dict[str, dict[str, int]]]:
    """Bytes of temporaries by stage, resident and streamed (with the VAE in tiles)."""
    config = NetworkOptions(quant_linear=quant_scheme is not None, quant_scheme=quant_scheme, **options).apply(
        MODELS[model]()
    )
    configs = ModelConfigs(config, VAEConfig.wan2_1(), UMT5Config.xxl())
    width, height = video_size(size, "16:9")
    request = Request(width=width, height=height)
    workload, sampler = request.workload(configs), request.sampler_for(config)
    arguments = abstract_arguments(request, configs)
    program = lambda _: sampler_program(sampler, (0, 4), wan_skeleton(config).abstract(), arguments)[1]()  # noqa: E731
    analysis = analyze(configs, workload, program)
    result = {}
    for name, where in (("resident", Residency()), ("streamed", STREAMED)):
        found, guess = analysis(where)._asdict(), estimate(configs, workload, where)._asdict()
        result[name] = {stage: {"analysis": found[stage], "estimate": guess[stage]} for stage in found}
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    gpu = types.SimpleNamespace(platform="gpu", compute_capability="9.0", core_count=132)
    import jax_triton.triton_lib as launcher

    results = {}
    with (
        jax.default_device(absent_h100()),
        mock.patch.object(estimates, "autotuning_bytes", return_value=0),
        mock.patch.object(jax, "devices", return_value=[gpu]),
        mock.patch.object(jax, "default_backend", return_value="gpu"),
        mock.patch.object(launcher.triton_kernel_call_lib, "get_compute_capability", return_value=90),
    ):
        for model, size, options in SETTINGS:
            name = " ".join([model, size, *(str(value) for value in options.values() if value)])
            results[name] = compare(model, size, **options)
            print(name, json.dumps(results[name]), flush=True)
    if out:
        measure.save({"case": "memory, compiled for an H100 without one", "result": results}, out)


if __name__ == "__main__":
    main()
