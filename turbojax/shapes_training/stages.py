"""From nothing to a small model that is shipped: the stages, each of which goes on where it was stopped.

A folder has one for each stage. A stage is done when its last file is there. The package ships what they made, so that
a stage's result can also be taken from there.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
from absl import logging
from ml_collections import ConfigDict

from turbojax.errors import UserError
from turbojax.files import make_folder, whole_file, write_json
from turbojax.json_reader import Array, Map, Number, Object, read_json
from turbojax.shapes import MODEL, SHIPPED_SIGMA_MAX, SHIPPED_TOPK
from turbojax.shapes.networks import TEXT_ENCODERS
from turbojax.shapes.text import ENCODER, TOKENIZER, train_text_encoder, word_tokenizer, write_text_encoder
from turbojax.shapes.words import vocabulary
from turbojax.shapes_training.registry import train
from turbojax.shapes_training.settings import FOLDER
from turbojax.shapes_training.shards import write_shapes_shards
from turbojax.train.loop import stop_requests
from turbojax.train.make_shards import load_encoders
from turbojax.train.metrics import CURVES, read_curves
from turbojax.train.runs import TRANSFORMER, VAE
from turbojax.weights.convert import convert
from turbojax.weights.files import find_components
from turbojax.weights.merge import merge

# What there is to learn from by size: how many samples, how many of them in a shard.
IMAGES = {"full": (262_144, 8192), "tiny": (8, 4)}
VIDEOS = {"full": (65_536, 1024), "tiny": (8, 4)}
TRAINED = ("vae", "image", "teacher", "sla", "rcm", "merged")
SHIPPED = {"text": (ENCODER, TOKENIZER), "vae": (VAE,)}  # files of a stage that others need
STORY = "training.json"
NUMBER = Number(-1e12, 1e12)
NUMBERS = Map(NUMBER)
STORIES = Object({"quality": Map(NUMBERS), "curves": Map(Array(Object({"step": NUMBER}, others=NUMBER)))})
MOST_BYTES = 12_000_000  # of all that is shipped
POINTS = 100  # of a curve that is shipped

Settings = Callable[[str], ConfigDict]


@dataclasses.dataclass(frozen=True)
class Job:
    """settings: a stage's configuration by its name; max_minutes: when to stop, 0 for never."""

    folder: Path
    size: str
    settings: Settings
    max_minutes: float = 0.0

    def config(self, stage: str) -> ConfigDict:
        """Returns a stage's configuration with its paths in this folder."""
        config = self.settings(stage)
        for name, value in config.items():
            if isinstance(value, str) and Path(value).is_relative_to(FOLDER):
                config[name] = str(self.folder / Path(value).relative_to(FOLDER))
        return config


def learn_text(job: Job) -> None:
    config = job.config("text")
    words = word_tokenizer(vocabulary())
    settings = {name: config[name] for name in ("steps", "batch", "peak", "seed")}
    reader, right = train_text_encoder(words, TEXT_ENCODERS[config.model](), **settings)
    logging.info("The text encoder's right answers: %s", right)
    folder = Path(config.workdir)
    make_folder(folder)
    write_json(folder / "quality.json", right)
    write_text_encoder(folder, words, reader)


def learn(stage: str, job: Job) -> None:
    config = job.config(stage)
    config.max_minutes = job.max_minutes
    train(config)


def make_data(stage: str, job: Job) -> None:
    """Writes shards: "image_data" of single frames, or "data" of videos."""
    config, images = job.config("vae"), stage == "image_data"
    count, shard_size = (IMAGES if images else VIDEOS)[job.size]
    given: dict[str, str | Path | None] = {
        "vae": job.folder / "vae",
        "text_encoder": job.folder / "text",
        "tokenizer": job.folder / "text",
    }
    vae, text, index = load_encoders(
        find_components(None, given),
        dtype=jnp.dtype(job.config("teacher").dtype),
        num_frames=1 if images else config.num_frames,
        height=config.height,
        width=config.width,
        fps=16,
        shard_size=shard_size,
    )
    with stop_requests(job.max_minutes) as stop:
        workers = (os.cpu_count() or 1) if config.workers else 0  # nothing else is to be done meanwhile
        # Other seeds than the autoencoder's: its latents are those of videos that it has not seen.
        seed = config.seed + (2 if images else 1)
        write_shapes_shards(job.folder / stage, vae, text, index, count=count, seed=seed, workers=workers, stop=stop)
    write_json(job.folder / stage / "done.json", {"samples": count})


def learn_merged(job: Job) -> None:
    """Puts SLA's difference on the distilled network, and trains what comes of it."""
    start = Path(job.config("merged").weights)
    make_folder(start.parent)
    rcm, teacher, sla = (job.folder / stage / TRANSFORMER for stage in ("rcm", "teacher", "sla"))
    merge(rcm, teacher, sla, start, dtype=jnp.bfloat16, overwrite=True)
    learn("merged", job)


def ship(job: Job) -> None:
    """Makes the merged network int8 and lays all files into one folder, with the curves."""
    folder, dtype = job.folder / "model", jnp.bfloat16
    make_folder(folder)
    transformer = folder / "TurboWan-shapes-quant.safetensors"
    convert(
        job.folder / "merged" / TRANSFORMER,
        transformer,
        quantize="block128",
        dtype=dtype,
        overwrite=True,
        sla_topk=SHIPPED_TOPK,
        sigma_max=SHIPPED_SIGMA_MAX,
    )
    copy(job.folder / "text" / TOKENIZER, folder / TOKENIZER)
    copy(job.folder / "text" / ENCODER, folder / ENCODER)
    convert(job.folder / "vae" / VAE, folder / VAE, dtype=dtype, overwrite=True)
    curves = {stage: thinned(job.folder / stage / CURVES) for stage in TRAINED}
    again = "run the stage again"
    quality = {
        stage: read_json(job.folder / stage / "quality.json", NUMBERS, suggestion=again) for stage in ("vae", "text")
    }
    write_json(folder / STORY, {"quality": quality, "curves": curves}, indent=None)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    logging.info("%s holds %.2f MB", folder, size / 1e6)
    if size > MOST_BYTES:
        raise UserError(f"{folder} holds {size} bytes and may hold {MOST_BYTES}; make a network smaller")


def check_shipped(stage: str) -> None:
    if stage not in SHIPPED:
        raise UserError(f"the package does not ship what {stage} made; choose among {','.join(SHIPPED)}")


def take(stage: str, job: Job) -> None:
    """Takes a stage's result, its quality and its curve from what is shipped."""
    check_shipped(stage)
    folder = job.folder / stage
    story = read_json(MODEL / STORY, STORIES, suggestion="install the package again")
    make_folder(folder)
    write_json(folder / "quality.json", story["quality"][stage])
    if curve := story["curves"].get(stage):
        with whole_file(folder / CURVES) as temporary:
            points = (point | {"step": round(point["step"])} for point in curve)
            temporary.write_text("".join(f"{json.dumps(point)}\n" for point in points))
    for name in reversed(SHIPPED[stage]):  # the last file of a stage is the first of these
        copy(MODEL / name, folder / name)


def copy(source: Path, target: Path) -> None:
    with whole_file(target) as temporary:
        shutil.copyfile(source, temporary)


def thinned(path: Path) -> list[dict[str, float]]:
    """Thins a curve to about POINTS points, to four digits."""
    lines = read_curves(path)
    lines = lines[:: max(1, len(lines) // POINTS)]
    return [{name: float(f"{value:.4g}") for name, value in line.items()} for line in lines]


@dataclasses.dataclass(frozen=True)
class Stage:
    run: Callable[[Job], None]
    last: str  # file that is there when it is done


STAGES: dict[str, Stage] = {
    "text": Stage(learn_text, f"text/{ENCODER}"),
    "vae": Stage(lambda job: learn("vae", job), f"vae/{VAE}"),
    "image_data": Stage(lambda job: make_data("image_data", job), "image_data/done.json"),
    "data": Stage(lambda job: make_data("data", job), "data/done.json"),
    "image": Stage(lambda job: learn("image", job), f"image/{TRANSFORMER}"),
    "teacher": Stage(lambda job: learn("teacher", job), f"teacher/{TRANSFORMER}"),
    "sla": Stage(lambda job: learn("sla", job), f"sla/{TRANSFORMER}"),
    "rcm": Stage(lambda job: learn("rcm", job), f"rcm/{TRANSFORMER}"),
    "merged": Stage(learn_merged, f"merged/{TRANSFORMER}"),
    "ship": Stage(ship, f"model/{STORY}"),
}
