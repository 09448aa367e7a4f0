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
    python scripts/benchmark.py --case=train_step --recipe=sla --out=benchmarks/h100/train_step_sla.json
    python scripts/benchmark.py --case=diffusion --model=wan2.1-t2v-14b --resolution=720p --quant_scheme=block128
    python scripts/benchmark.py --case=memory --quant_scheme=block128 --memory=stream

Cases: text_to_video (random weights at full size, prompt to mp4, cold and warm), image_to_video (likewise with an
image), vae (decoding in chunks and tiles), file (settings of x264; on any device), tiles (errors of the VAE's; on any
device), linear (int8 layers beside bfloat16), attention (dense, SLA and SageSLA with parts, gradients and errors),
block (one transformer block without attention), layer (a whole one, kernel by kernel), diffusion (that stage alone),
memory (predicted against measured peaks and seconds a step), tangent (the forward derivative that sCM trains with, of
--num_layers=N layers; on any device), train_step (of SLA fine-tuning, or --recipe=scm; with a profile), compile
(seconds for --num_layers=N; a second one in the same process would find its kernels tuned).
A table, with peers' figures beside ours where the GPU is theirs, goes to standard error, JSON to standard output.
Peak memory has no reset, so run one case a process.
"""

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from absl import flags

from turbojax.bench import attention, layer, linear, measure, memory, vae, video, video_file
from turbojax.bench.report import report
from turbojax.errors import UserError
from turbojax.files import check_file, user_path
from turbojax.kernels.int8 import QUANT_SCHEMES
from turbojax.media.video import check_path, video_size
from turbojax.models.image_condition import takes_images
from turbojax.models.published import MODELS
from turbojax.models.tokenizer import Tokenizer
from turbojax.models.vae import VAEConfig
from turbojax.pipeline.options import LoadOptions
from turbojax.pipeline.request import Request, latent_shape
from turbojax.shapes import WORDS
from turbojax.shapes.demo import demo_picture

FLAGS = flags.FlagValues()
MODEL = flags.DEFINE_string("model", "wan2.1-t2v-1.3b", "network, with random weights", flag_values=FLAGS)
RESOLUTION = flags.DEFINE_string("resolution", "480p", "480p or 720p, 16:9", flag_values=FLAGS)
FRAMES = flags.DEFINE_integer("num_frames", 81, "4 n + 1", flag_values=FLAGS)
STEPS = flags.DEFINE_integer("num_inference_steps", 4, "1 to 4", flag_values=FLAGS)
ATTENTION = flags.DEFINE_string("attention_type", "original", "original, sla or sagesla", flag_values=FLAGS)
TOPK = flags.DEFINE_float("sla_topk", 0.1, "fraction of key blocks", flag_values=FLAGS)
LAYERS = flags.DEFINE_integer("num_layers", 40, "layers, of the cases compile and tangent", flag_values=FLAGS)
RECIPE = flags.DEFINE_enum("recipe", "sla", ["sla", "scm"], "of the case train_step", flag_values=FLAGS)
QUANT = flags.DEFINE_enum("quant_scheme", None, list(QUANT_SCHEMES), "int8 linear layers", flag_values=FLAGS)
MEMORY = flags.DEFINE_string(
    "memory", "auto", "auto, resident, stream or GB to plan for, of whole videos and memory", flag_values=FLAGS
)
OUT = flags.DEFINE_string("out", None, "JSON file to write; printed only if not given", flag_values=FLAGS)


WITHOUT_A_GPU = ("tangent", "file", "tiles")  # cases that measure something there


def frame_size() -> dict[str, Any]:
    """Returns height and width in pixels."""
    width, height = video_size(RESOLUTION.value, "16:9")
    return {"height": height, "width": width}


def size() -> dict[str, Any]:
    """Returns frames, height and width in pixels."""
    return {"num_frames": FRAMES.value, **frame_size()}


def request(image: Any = None) -> Request:
    """Returns the call that is measured."""
    return Request(num_inference_steps=STEPS.value, image=image, adaptive_size=False, **size())


def options() -> LoadOptions:
    """Returns what the networks are made with."""
    return LoadOptions(
        weights="random",
        model=MODEL.value,
        attention_type=ATTENTION.value,
        sla_topk=TOPK.value,
        quant_linear=QUANT.value is not None,
        quant_scheme=QUANT.value,
        memory=MEMORY.value,
    )


def tokens() -> tuple[int, int, int]:
    """Returns the patches of the latents in time, height and width."""
    return 1 + (FRAMES.value - 1) // 4, frame_size()["height"] // 16, frame_size()["width"] // 16


def measure_video(image: Any = None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        file = check_path(Path(folder) / "video.mp4")
        return video.measure_video(options(), Tokenizer.from_path(WORDS), replace(request(image), output=file))


def measure_memory() -> dict[str, Any]:
    image = demo_picture() if takes_images(MODELS[MODEL.value]()) else None
    return memory.measure_memory(options(), Tokenizer.from_path(WORDS), request(image))


def measure_writing() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        return video_file.measure_writing(Path(folder), **size())


def measure_layer() -> dict[str, Any]:
    config = options().apply(MODELS[MODEL.value](num_layers=layer.LAYERS))
    return layer.measure_layer(config, tokens(), compiler_options=layer.NO_COMMAND_BUFFERS)


def measure_train_step() -> dict[str, Any]:
    from turbojax.bench import training  # needs the extra `train`

    config = MODELS[MODEL.value](sla_topk=TOPK.value, remat=True)
    latents = latent_shape(VAEConfig.wan2_1(), **size())
    return training.measure_train_step(recipe=RECIPE.value, config=config, latents=latents)


def measure_tangent() -> dict[str, Any]:
    from turbojax.bench import training

    settings = {"num_layers": LAYERS.value, "attention_type": ATTENTION.value, "sla_topk": TOPK.value}
    return training.measure_tangent(MODEL.value, request(), **settings)


def measure_compilation() -> dict[str, Any]:
    jax.config.update("jax_enable_compilation_cache", False)
    return video.measure_compilation(model=MODEL.value, layers=(LAYERS.value,), **frame_size())


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "text_to_video": measure_video,
    "image_to_video": lambda: measure_video(demo_picture()),
    "vae": lambda: vae.measure_decoding(**frame_size(), chunks=(1, 2, 4)),
    "compile": measure_compilation,
    "linear": lambda: linear.measure_linear_layers(schemes=tuple(QUANT_SCHEMES)),
    "attention": lambda: attention.measure_attention(save),
    "block": lambda: linear.measure_block(model=MODEL.value, tokens=tokens(), schemes=(None, "block128", "channel")),
    "layer": measure_layer,
    "diffusion": lambda: video.measure_diffusion(options(), request()),
    "memory": measure_memory,
    "tangent": measure_tangent,
    "train_step": measure_train_step,
    "file": measure_writing,
    "tiles": vae.measure_tiling,
}
CASE = flags.DEFINE_enum("case", "text_to_video", list(CASES), "what to measure", flag_values=FLAGS)


def main() -> None:
    if OUT.value:
        check_file(OUT.value)  # before minutes of measuring
    if jax.default_backend() != "gpu" and CASE.value not in WITHOUT_A_GPU:
        raise UserError("benchmarks need a GPU; none was found (pip install -e '.[cuda12]')")
    measurement = measure.environment() | save(CASES[CASE.value]())
    print(json.dumps(measurement, indent=1))
    print(report(measurement), file=sys.stderr)


def save(result: dict[str, Any]) -> dict[str, Any]:
    """Returns the result with its case and settings, written into --out where that is given."""
    own = (CASE, MODEL, RESOLUTION, FRAMES, STEPS, ATTENTION, TOPK, LAYERS, RECIPE, QUANT, MEMORY)
    whole = {"case": CASE.value, "settings": {flag.name: flag.value for flag in own}, "result": result}
    if OUT.value:
        measure.save(whole, user_path(OUT.value))
    return whole
