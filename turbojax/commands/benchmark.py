"""Measures turbojax and writes JSON: device, versions, command, date and figures.

    python scripts/benchmark.py --case=text_to_video --model=wan2.1-t2v-1.3b --out=benchmarks/t2v.json
    python scripts/benchmark.py --case=image_to_video --model=wan2.2-i2v-a14b --quant_scheme=block128
    python scripts/benchmark.py --case=vae
    python scripts/benchmark.py --case=file
    python scripts/benchmark.py --case=compile --model=wan2.1-t2v-14b
    python scripts/benchmark.py --case=linear
    python scripts/benchmark.py --case=attention
    python scripts/benchmark.py --case=block --model=wan2.1-t2v-14b --resolution=720p
    python scripts/benchmark.py --case=layer --model=wan2.1-t2v-14b --resolution=720p --attention_type=sagesla \
        --quant_scheme=block128
    python scripts/benchmark.py --case=tangent --model=wan2.1-t2v-1.3b --num_layers=2 --num_frames=1
    python scripts/benchmark.py --case=train_step --recipe=sla --out=benchmarks/train_step_sla.json
    python scripts/benchmark.py --case=diffusion --model=wan2.1-t2v-14b --resolution=720p --quant_scheme=block128
    python scripts/benchmark.py --case=memory --quant_scheme=block128 --memory=stream

Cases: text_to_video (random weights at full size, prompt to mp4, cold and warm), image_to_video (likewise with an
image), vae (decoding in chunks and tiles), file (settings of x264; on any device), tiles (errors of the VAE's; on any
device),
linear (int8 layers beside bfloat16), attention (dense, SLA and SageSLA with their parts, gradients and errors),
block (one transformer block without attention), layer (a whole one, kernel by kernel), diffusion (that stage alone),
memory (predicted against measured peaks and seconds a step), tangent (the forward derivative that sCM trains with, of
--num_layers=N layers; on any device), train_step (of SLA fine-tuning, or --recipe=scm; with a profile), compile
(seconds for --num_layers=N; a second one in the same process would find its kernels tuned).
A table, with peers' figures beside ours where the card is theirs, goes to standard error, JSON to standard output.
Peak memory has no reset, so run one case a process.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
from absl import flags

from turbojax import (
    UserError,
    benchmark,
    benchmark_attention,
    benchmark_memory,
    benchmark_step,
    benchmark_video,
    cli,
)
from turbojax.benchmark_report import report
from turbojax.demo import demo_picture
from turbojax.files import check_file, user_path
from turbojax.kernels.int8 import QUANT_SCHEMES
from turbojax.models.tokenizer import Tokenizer
from turbojax.models.vae import VAEConfig
from turbojax.networks import MODELS
from turbojax.sampling import latent_shape
from turbojax.shapes import WORDS
from turbojax.video import check_path, video_size
from turbojax.weights.load import with_options

FLAGS = flags.FlagValues()
CASE = flags.DEFINE_enum(
    "case",
    "text_to_video",
    [
        *("text_to_video", "image_to_video", "vae", "compile", "linear", "attention", "block", "layer", "diffusion"),
        *("memory", "tangent", "train_step", "file", "tiles"),
    ],
    "what to measure",
    flag_values=FLAGS,
)
MODEL = flags.DEFINE_string("model", "wan2.1-t2v-1.3b", "network, with random weights", flag_values=FLAGS)
RESOLUTION = flags.DEFINE_string("resolution", "480p", "480p or 720p, 16:9", flag_values=FLAGS)
FRAMES = flags.DEFINE_integer("num_frames", 81, "4 n + 1", flag_values=FLAGS)
STEPS = flags.DEFINE_integer("num_inference_steps", 4, "1 to 4", flag_values=FLAGS)
ATTENTION = flags.DEFINE_string("attention_type", "original", "original, sla or sagesla", flag_values=FLAGS)
TOPK = flags.DEFINE_float("sla_topk", 0.1, "share of key blocks", flag_values=FLAGS)
LAYERS = flags.DEFINE_integer("num_layers", 40, "layers, of the cases compile and tangent", flag_values=FLAGS)
RECIPE = flags.DEFINE_enum("recipe", "sla", ["sla", "scm"], "of the case train_step", flag_values=FLAGS)
QUANT = flags.DEFINE_enum("quant_scheme", None, list(QUANT_SCHEMES), "int8 linear layers", flag_values=FLAGS)
MEMORY = flags.DEFINE_string(
    "memory", "auto", "auto, resident, stream or GB to plan for, of whole videos and memory", flag_values=FLAGS
)
OUT = flags.DEFINE_string("out", None, "JSON file to write; printed only if not given", flag_values=FLAGS)


def main() -> None:
    if OUT.value:
        check_file(OUT.value)  # before minutes of measuring
    if jax.default_backend() != "gpu" and CASE.value not in ("tangent", "file", "tiles"):
        raise UserError("benchmarks need a GPU; none was found (pip install -e '.[cuda12]')")
    width, height = video_size(RESOLUTION.value, "16:9")
    size: dict[str, int] = {"num_frames": FRAMES.value, "height": height, "width": width}
    options: dict[str, Any] = {
        "attention_type": ATTENTION.value,
        "sla_topk": TOPK.value,
        "quant_linear": QUANT.value is not None,
        "quant_scheme": QUANT.value,
    }
    tokens = (1 + (FRAMES.value - 1) // 4, height // 16, width // 16)
    if CASE.value in ("text_to_video", "image_to_video"):
        tokenizer = Tokenizer.from_path(WORDS)
        with tempfile.TemporaryDirectory() as folder:
            result = benchmark.whole_video(
                tokenizer,
                model=MODEL.value,
                num_inference_steps=STEPS.value,
                memory=MEMORY.value,
                image=demo_picture() if CASE.value == "image_to_video" else None,
                output=check_path(Path(folder) / "video.mp4"),
                **size,
                **options,
            )
    elif CASE.value == "memory":
        result = benchmark_memory.memory(
            Tokenizer.from_path(WORDS),
            model=MODEL.value,
            memory=MEMORY.value,
            num_inference_steps=STEPS.value,
            options=options,
            **size,
        )
    elif CASE.value == "file":
        with tempfile.TemporaryDirectory() as folder:
            result = benchmark_video.video_writing(Path(folder), **size)
    elif CASE.value == "tiles":
        result = benchmark_video.tiling_errors()
    elif CASE.value == "vae":
        result = benchmark.vae_decoding(height=height, width=width, chunks=(1, 2, 4))
    elif CASE.value == "linear":
        result = benchmark.linear_layers(schemes=tuple(QUANT_SCHEMES))
    elif CASE.value == "attention":
        result = benchmark_attention.attention(save)
    elif CASE.value == "block":
        result = benchmark.one_block(model=MODEL.value, tokens=tokens, schemes=(None, "block128", "channel"))
    elif CASE.value == "layer":
        config = with_options(MODELS[MODEL.value](num_layers=benchmark_step.LAYERS), **options)
        result = benchmark_step.layer(config, tokens, compiler_options=benchmark_step.NO_COMMAND_BUFFERS)
    elif CASE.value == "diffusion":
        result = benchmark.diffusion(model=MODEL.value, num_inference_steps=STEPS.value, **size, **options)
    elif CASE.value == "train_step":
        from turbojax import benchmark_training  # needs the extra `train`

        result = benchmark_training.train_step(
            recipe=RECIPE.value,
            config=MODELS[MODEL.value](sla_topk=TOPK.value, remat=True),
            latents=latent_shape(VAEConfig.wan2_1(), FRAMES.value, height, width),
        )
    elif CASE.value == "tangent":
        from turbojax import benchmark_training

        result = benchmark_training.tangent(
            model=MODEL.value,
            layers=LAYERS.value,
            **size,
            attention_type=ATTENTION.value,
            sla_topk=TOPK.value,
        )
    else:
        jax.config.update("jax_enable_compilation_cache", False)
        result = benchmark.compile_seconds(model=MODEL.value, layers=(LAYERS.value,), height=height, width=width)
    measurement = benchmark.environment() | save(result)
    print(json.dumps(measurement, indent=1))
    print(report(measurement), file=sys.stderr)


def save(result: dict[str, Any]) -> dict[str, Any]:
    """The result with what was measured; into --out where that is given."""
    own = (CASE, MODEL, RESOLUTION, FRAMES, STEPS, ATTENTION, TOPK, LAYERS, RECIPE, QUANT, MEMORY)
    whole = {"case": CASE.value, "settings": {flag.name: flag.value for flag in own}, "result": result}
    if OUT.value:
        benchmark.save(whole, user_path(OUT.value))
    return whole


def run() -> None:
    cli.run(main, flag_values=FLAGS, help_text=__doc__ or "")
