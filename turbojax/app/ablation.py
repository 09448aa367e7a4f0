"""Grids over settings: a video for each combination, made once, and what it took."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict
from PIL import Image
from tqdm import tqdm

from turbojax.app.ablation_report import Row, write_report
from turbojax.app.generate import PipelineCache, load_options, read_settings
from turbojax.app.records import Records, fingerprint
from turbojax.config import changed, parse_value
from turbojax.errors import UserError
from turbojax.files import check_folder, whole_file
from turbojax.json_reader import Array, FileName, Map, Number, Schema
from turbojax.media.quality import psnr
from turbojax.media.video import check_path

Cell = dict[str, Any]  # the values of the settings that vary
FIXED = ("output", "num_samples")  # that no axis can be
# Videos that differ in these have nothing to compare, a picture of another thing or size.
INCOMPARABLE = (
    *("prompt", "image", "last_image", "background", "adaptive_size", "seed"),
    *("resolution", "aspect_ratio", "height", "width", "num_frames", "fps"),
)

# Of a record: the video and some of its frames, and what it took.
MEASURED: dict[str, Schema] = {"files": Array(FileName(folders=True), 2), "seconds": Map(Number(0, 1e9))}


def parse_settings(texts: Sequence[str]) -> dict[str, list[Any]]:
    """Returns values by setting of "sla_topk=0.05,0.1"; where a value has a comma, they are separated by | instead."""
    settings: dict[str, list[Any]] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        if not (equals and values):
            raise UserError(f"{text!r} is no setting with values; write for instance sla_topk=0.05,0.1,0.2")
        if name in settings or name in FIXED:
            raise UserError(f"{name} cannot vary{' twice' if name in settings else ''}; give another setting")
        parsed = [parse_value(name, value.strip()) for value in values.split("|" if "|" in values else ",")]
        settings[name] = list(dict.fromkeys(parsed))
    return settings


def cells_of(config: ConfigDict, grid: Mapping[str, Sequence[Any]]) -> list[Cell]:
    """Returns all combinations, those of one network together: axes that need another one loaded vary slowest."""
    first = {name: values[0] for name, values in grid.items()}

    def loaded_once(name: str) -> bool:
        options = [load_options(changed(config, **first | {name: value})) for value in grid[name]]
        return len({dataclasses.replace(own, sla_topk=None) for own in options}) == 1  # a call takes any sla_topk

    names = sorted(grid, key=loaded_once)
    return [dict(zip(names, values, strict=True)) for values in itertools.product(*(grid[name] for name in names))]


def ablate(
    config: ConfigDict,
    grid: Mapping[str, Sequence[Any]],
    folder: Path,
    *,
    reference: Cell | None = None,
    repeats: int = 1,
    num_frames: int = 4,
) -> Path:
    """Makes the videos of a grid and the report on them; returns the report's page.

    reference: settings of the videos that the others are compared with, which have all else in common with them:
      {"sla_topk": 1.0} compares each with the one of its sigma_max. None for the first value of every axis but those of
      INCOMPARABLE.
    repeats: calls for each video; the last one's seconds count.
    num_frames: shown of each video, and compared.

    One sample is made of each, whatever the configuration says. The folder has videos/, frames/ (PNG), cells.jsonl with
    a line for each video that is finished, which is not made again, and, at the end, results.jsonl, results.csv,
    plot.png and index.html.
    A grid over sla_topk loads the network with attention_type "sla" unless the configuration names one.
    Raises UserError for what cannot be, most of it before anything is loaded.
    """
    if not grid or repeats < 1 or num_frames < 1:
        raise UserError(f"{len(grid)} axes, {repeats=} and {num_frames=} are nothing to do; give at least one of each")
    if reference is None:
        reference = {name: values[0] for name, values in grid.items() if name not in INCOMPARABLE}
    if wrong := [name for name in reference if name in (*INCOMPARABLE, *FIXED)]:
        raise UserError(f"videos of another {wrong[0]} have nothing to compare; name another reference")
    if "sla_topk" in grid and "attention_type" not in grid and config.attention_type is None:
        logging.info("attention_type=sla, since sla_topk varies")
        config = changed(config, attention_type="sla")
    cells = cells_of(config, grid)
    compared = [cell | reference for cell in cells]
    for cell in (*cells, *compared):
        read_settings(changed(config, num_samples=1, **cell))
    check_path(folder / "videos" / "video.mp4")
    folder = check_folder(folder)
    check_folder(folder / "frames")
    check_folder(folder / "videos")
    finished, pipelines = Records(folder / "cells.jsonl", MEASURED), PipelineCache()
    work = list({str(cell): cell for cell in (*cells, *compared)}.values())
    records: dict[str, dict[str, Any]] = {}
    for cell in tqdm(work, desc="Cells", unit="cell", disable=None):
        own = changed(config, num_samples=1, **cell)
        key = cell_key(own, repeats, num_frames)
        record = finished.get(key)
        if record is None:
            record = {"key": key, "cell": cell} | measure(pipelines, own, folder, key, repeats, num_frames)
            finished.add(record)
        records[str(cell)] = record
    rows = []
    for cell, other in zip(cells, compared, strict=True):
        record, against = records[str(cell)], records[str(other)]
        difference = None if record is against else psnr(frames_of(folder, record), frames_of(folder, against))
        rows.append(Row(cell, difference, record["seconds"], record["files"][0], record["files"][1:]))
    page = write_report(folder, config, dict(grid), rows, reference)
    logging.info("Wrote %s", page)
    return page


def cell_key(config: ConfigDict, repeats: int, num_frames: int) -> str:
    """Names what is measured here with these settings."""
    own = {name: value for name, value in config.to_dict().items() if name not in ("output", "cache_prompts")}
    return fingerprint(own | {"repeats": repeats, "frames": num_frames, "device": jax.devices()[0].device_kind})


def measure(
    pipelines: PipelineCache, config: ConfigDict, folder: Path, key: str, repeats: int, num_frames: int
) -> dict[str, Any]:
    """Makes a video and files of some of its frames; returns what the record says of them."""
    video = f"videos/{key}.mp4"
    for _ in range(repeats):
        result = pipelines.make(config, folder / video)
    (frames,) = result.videos
    files = []
    for i in np.linspace(0, len(frames) - 1, min(num_frames, len(frames))).round().astype(int):
        files.append(f"frames/{key}_{i:04d}.png")
        with whole_file(folder / files[-1]) as temporary:
            Image.fromarray(frames[i]).save(temporary)
    seconds = {name: round(value, 4) for name, value in result.timings.items()}
    return {"seconds": seconds, "device": jax.devices()[0].device_kind, "files": [video, *files]}


def frames_of(folder: Path, record: Mapping[str, Any]) -> np.ndarray:
    """Reads the frames that are shown of a video, uint8 `[n, H, W, 3]`."""
    return np.stack([np.asarray(Image.open(folder / name)) for name in record["files"][1:]])
