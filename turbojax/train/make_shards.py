"""From videos and captions to shards of latents and text embeddings, for `turbojax.train.data` to read.

Shard k holds what can be read of the k-th `shard_size` clips of the list, so that a run that was stopped, or got more
clips at the end of its list, goes on behind the shards that are finished.
"""

import csv
import dataclasses
import hashlib
import io
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from absl import logging
from tqdm import tqdm

from turbojax.errors import CheckpointError, UserError, quoted
from turbojax.files import sole_user, user_path
from turbojax.json_reader import Object, String, parse_json
from turbojax.media.video import check_fps, read_video
from turbojax.models import vae as vae_model
from turbojax.models.umt5 import TEXT_LEN, encode_text
from turbojax.models.vae import WanVAE
from turbojax.pipeline.request import latent_shape
from turbojax.pipeline.text import TextEncoder
from turbojax.text_files import read_text, split_lines
from turbojax.train.autoencoder import as_pixels
from turbojax.train.data import (
    DTYPES,
    INDEX,
    MOST_SAMPLES,
    Index,
    Sample,
    import_grain,
    open_shard,
    read_index,
    write_index,
    write_negative,
    write_shard,
)
from turbojax.weights.encoders import load_vae
from turbojax.weights.io import file_metadata, read_tensors

VIDEOS = re.compile(r"\.(mp4|m4v|mov|mkv|webm|avi|gif|mpg|mpeg|ts|mts|m2ts|wmv|flv|3gp|ogv)", re.IGNORECASE)
LISTS = ("captions.jsonl", "captions.csv")
SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}  # that spreadsheets write instead of commas
ROW = Object({"file": String(), "caption": String()}, others="left out")
READERS = 4  # threads that read videos, and the videos that they read ahead


class Clip(NamedTuple):
    """A video file, its name relative to the folder of videos, and its caption."""

    path: Path
    source: str
    caption: str


class Summary(NamedTuple):
    """Samples written now, samples in shards that were there before, and clips that could not be read."""

    written: int
    kept: int
    skipped: int


def find_clips(folder: str | os.PathLike, captions: str | os.PathLike | None = None) -> list[Clip]:
    """Finds the videos of a folder with their captions, in the order of the list or of their names.

    captions: a .jsonl file with {"file": NAME, "caption": TEXT} a line, or a .csv file with the columns file and
      caption; names are relative to the folder. If not given: the folder's captions.jsonl or captions.csv, or else a
      text file beside each video (x.txt for x.mp4); videos without one are left out.

    Raises UserError if there are none, or a line of the list has no file or caption.
    """
    folder = user_path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder of videos")
    lists = [user_path(captions)] if captions else [folder / name for name in LISTS if (folder / name).is_file()]
    clips = listed_clips(folder, lists[0]) if lists else captioned_clips(folder)
    if not clips:
        raise UserError(
            f"{lists[0] if lists else folder} has no videos with captions; give a list with --captions=FILE.jsonl, "
            "or put x.txt beside x.mp4"
        )
    if empty := [clip.source for clip in clips if not clip.caption.strip()]:
        logging.warning(
            "%d of %d captions are empty, the first is that of %s: their videos teach what an empty prompt shows",
            *(len(empty), len(clips), empty[0]),
        )
    return clips


def listed_clips(folder: Path, path: Path) -> list[Clip]:
    if path.suffix not in (".jsonl", ".csv"):
        raise UserError(f"the list of captions {path} must end in .jsonl or .csv")
    rows = rows_of_csv if path.suffix == ".csv" else rows_of_jsonl
    clips = []
    for line, row in rows(read_text(path), path):
        file = Path(os.path.abspath(folder / row["file"])) if row["file"].isprintable() else folder
        if Path(os.path.abspath(folder)) not in file.parents:
            raise UserError(f"line {line} of {path}: file is {quoted(row['file'])} and must be a path below {folder}")
        clips.append(Clip(folder / row["file"], row["file"], row["caption"]))
    return clips


def rows_of_csv(text: str, path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        check_columns(reader.fieldnames or (), path)
        for row in reader:
            if None in row or not row["file"] or row["caption"] is None:
                raise UserError(
                    f"line {reader.line_num} of {path} has no file and caption, or more columns than the first line; "
                    'a caption with commas is written in quotes, "..."'
                )
            yield reader.line_num, row
    except csv.Error as error:
        raise UserError(f"{path} cannot be read as CSV behind line {reader.line_num}: {error}") from error


def check_columns(names: Sequence[str], path: Path) -> None:
    """Raises UserError if the first line of a list, unless it is empty, does not name the columns."""
    if names and not {"file", "caption"} <= set(names):
        others = [name for mark, name in SEPARATORS.items() if any(mark in column for column in names)]
        if others:
            raise UserError(f"{path} separates its columns by {others[0]}; write it with commas: file,caption")
        raise UserError(f"{path} has the columns {quoted(list(names))}; name those to be read file and caption")


def rows_of_jsonl(text: str, path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    for line, row in enumerate(split_lines(text), start=1):
        if row.strip():
            where, form = f"line {line} of {path}", 'a line is {"file": NAME, "caption": TEXT}'
            yield line, parse_json(row.encode(), ROW, name=where, suggestion=form, error=UserError)


def captioned_clips(folder: Path) -> list[Clip]:
    videos = sorted(path for path in folder.rglob("*") if VIDEOS.fullmatch(path.suffix))
    with_text = [path for path in videos if path.with_suffix(".txt").is_file()]
    if len(with_text) < len(videos):
        logging.warning("%d of %d videos have no caption and are left out", len(videos) - len(with_text), len(videos))
    return [
        Clip(path, str(path.relative_to(folder)), read_text(path.with_suffix(".txt")).strip()) for path in with_text
    ]


def identity(path: str | os.PathLike) -> str:
    """Returns a checkpoint's name and a digest of its tensors: names, shapes, dtypes and first bytes of each."""
    digest = hashlib.sha256()
    for name, tensor in read_tensors(path).items():
        start = tensor.reshape(-1)[:256].tobytes()
        digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode() + start)
    return f"{Path(path).name} {digest.hexdigest()[:12]}"


def load_encoders(where: Mapping[str, Path], *, dtype: jnp.dtype, **settings: Any) -> tuple[WanVAE, TextEncoder, Index]:
    """Loads the networks in the files that `find_components` gives, and the index of what they make.

    settings: as `make_index` takes them.
    """
    vae = load_vae(where["vae"], dtype=dtype)
    text = TextEncoder.from_files(where["text_encoder"], where["tokenizer"], dtype=dtype, cache=False)
    identities = identity(where["vae"]), identity(where["text_encoder"])
    return vae, text, make_index(vae, text, identities, **settings)


def make_index(vae: WanVAE, text: TextEncoder, identities: tuple[str, str], **settings: Any) -> Index:
    """Makes the index of shards made by these models; raises UserError for sizes that no latents have.

    identities: which weights the two have. settings: num_frames, height, width, fps, negative_prompt and shard_size.
    """
    latents = latent_shape(vae.config, settings["num_frames"], settings["height"], settings["width"])
    models: dict[str, Any] = {"text_dim": text.config.dim, "vae": identities[0], "text_encoder": identities[1]}
    index = Index(latents=latents, dtype=jnp.dtype(vae.config.dtype).name, **models, **settings)
    if not 1 <= index.shard_size <= MOST_SAMPLES:
        raise UserError(f"shard_size={index.shard_size} must be from 1 to {MOST_SAMPLES}")
    check_fps(index.fps)
    return index


def make_shards(
    clips: Sequence[Clip], output: str | os.PathLike, vae: WanVAE, text: TextEncoder, index: Index
) -> Summary:
    """Encodes clips into shards, and writes the index anew after each.

    Clips that cannot be read or are too short are reported and left out. Shards that were made of the same clips before
    stay.

    Raises UserError if the folder holds data of other settings or is being written by another process, no clip could be
    read, or a model gives NaN.
    """
    output = user_path(output)
    with sole_user(output):
        check_folder(output, index)
        tell_cut(clips, text)
        for line in text.cut([index.negative_prompt]):
            logging.warning("negative_prompt: %s", line)
        write_negative(output, embed(text, [index.negative_prompt], index)[0])
        summary, files = encode_shards(clips, output, vae, text, index)
        if not files:
            raise UserError(
                f"none of the {len(clips)} clips could be used, so {output} has no data; see the messages above"
            )
        write_index(output, index, files)
    return summary


def encode_shards(
    clips: Sequence[Clip], output: Path, vae: WanVAE, text: TextEncoder, index: Index
) -> tuple[Summary, dict[str, int]]:
    """Writes the shards that are not finished; how many samples each has by its name."""
    files: dict[str, int] = {}
    written = kept = 0
    with tqdm(total=len(clips), unit="clip", desc="Encoding", disable=None, leave=False) as bar:
        for number, begin in enumerate(range(0, len(clips), index.shard_size)):
            group = clips[begin : begin + index.shard_size]
            path = output / f"shard-{number:05}.safetensors"
            plan = digest(index, group)
            if count := finished(path, index, plan):
                files[path.name] = count
                kept += count
                bar.update(len(group))
            elif samples := list(encode_clips(group, vae, text, index, bar)):
                write_shard(path, index, samples, plan=plan)
                files[path.name] = len(samples)
                written += len(samples)
                write_index(output, index, files)
    return Summary(written, kept, len(clips) - written - kept), files


def tell_cut(clips: Sequence[Clip], text: TextEncoder) -> None:
    """Warns of captions that are longer than the text encoder reads, once for all of them."""
    found = [(clip.source, line) for clip in clips if (line := text.tokenizer.cut(clip.caption))]
    if found:
        source, line = found[0]
        logging.warning(
            "%d of %d captions are cut, the first is that of %s: it has %s", len(found), len(clips), source, line
        )


def check_folder(output: Path, index: Index) -> None:
    """Raises UserError if a folder holds data of other settings."""
    try:
        before = read_index(output)[0] if (output / INDEX).exists() else index
    except CheckpointError as error:
        logging.warning("%s is written anew: %s", output / INDEX, error)
        return
    for name, value in dataclasses.asdict(index).items():
        if (there := getattr(before, name)) != value:
            raise UserError(f"{output} holds data made with {name}={there!r}, not {value!r}; choose another folder")


def digest(index: Index, clips: Sequence[Clip]) -> str:
    """Tells whether a shard was made of these clips with these settings."""
    plan = [dataclasses.asdict(index), [(clip.source, clip.caption) for clip in clips]]
    return hashlib.sha256(json.dumps(plan).encode()).hexdigest()


def finished(path: Path, index: Index, plan: str) -> int:
    """Counts the samples of a shard made to this plan before; 0 if there is none, or a damaged or different one."""
    if not path.exists():
        return 0
    try:
        if file_metadata(path).get("plan") == plan:
            return len(open_shard(path, index)["latents"])
        logging.info("%s is of other clips and is made again", path)
    except CheckpointError as error:
        logging.warning("Made again: %s", error)
    return 0


def encode_clips(clips: Sequence[Clip], vae: WanVAE, text: TextEncoder, index: Index, bar: tqdm) -> Iterator[Sample]:
    """Yields the samples of those clips that can be read; further ones are read while one is encoded."""

    size = {name: getattr(index, name) for name in ("num_frames", "height", "width", "fps")}

    def read(clip: Clip) -> np.ndarray | UserError:
        try:
            return read_video(clip.path, **size)
        except UserError as error:
            return error

    grain = import_grain()
    videos = grain.MapDataset.source(clips).map(read).to_iter_dataset(grain.ReadOptions(READERS, READERS))
    for clip, video in zip(clips, videos, strict=True):
        if isinstance(video, UserError):
            logging.warning("Left out: %s", video)
        else:
            yield encode_clip(clip, video, vae, text, index)
        bar.update()


def encode_clip(clip: Clip, video: np.ndarray, vae: WanVAE, text: TextEncoder, index: Index) -> Sample:
    """Encodes a video, uint8 `[T, H, W, 3]`, and its caption."""
    latents = np.asarray(vae_model.encode(vae, as_pixels(video)[None])[0]).astype(DTYPES[index.dtype])
    sample = Sample(latents, embed(text, [clip.caption], index)[0], clip.source, clip.caption)
    if not np.isfinite(sample.latents).all() or not np.isfinite(sample.text).all():
        raise UserError(f"the VAE or the text encoder gives NaN for {clip.path}; check the weights, or try float32")
    return sample


def embed(text: TextEncoder, prompts: list[str], index: Index, *, length: int = TEXT_LEN) -> list[np.ndarray]:
    """Returns each prompt's rows [R, D], without the zero rows past its end; length: tokens that the encoder sees."""
    ids, mask = text.tokenizer(prompts, length)
    embeddings = np.asarray(encode_text(text.encoder, text.table, ids, mask, length=length)).astype(DTYPES[index.dtype])
    return [rows[:count] for rows, count in zip(embeddings, mask.sum(axis=1), strict=True)]
