"""Training data: latents and text embeddings on disk, and the reader that feeds them to the training loop.

    shards = open_shards("data")
    data = batches(shards, batch_size=64, seed=0)
    batch = next(data)        # {"latents": [64, t, h, w, c], "text": [64, S, D]}, NumPy arrays
    state = data.get_state()  # a few numbers; data.set_state(state) goes on from there, to the bit

A folder of shards, as `scripts/make_shards.py` writes it. N samples of a shard, `t h w c` latents of a video (the same
in all shards), R rows of text, D width of the text encoder, S rows that hold the longest prompt of a folder:

    index.json                see `Index`; with the shards as [{"file": NAME, "samples": N}, ...]
    negative.safetensors      text [R, D]: the negative prompt's embedding
    shard-00000.safetensors   latents [N, t, h, w, c]: normalised, as `turbojax.models.vae.encode` returns them
                              text [R, D]: the rows of one prompt after another, without the zero rows past its end
                              text_lengths int32 [N]: how many rows each prompt has
                              metadata "samples": a JSON list of {"source": FILE, "caption": TEXT}

Latents and text are bfloat16 or float32, as the index says. Every file appears whole or not at all; shards that the
index does not list are not read.
"""

import bisect
import dataclasses
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
from absl import logging

from turbojax.errors import CheckpointError, UserError
from turbojax.files import user_path, write_json
from turbojax.json_reader import Array, Enum, FileName, Integer, Object, String, parse_json, read_json
from turbojax.kernels.sizes import cdiv
from turbojax.models.umt5 import TEXT_LEN
from turbojax.weights.io import file_metadata, read_tensors, write_safetensors

FORMAT, VERSION = "turbojax-latents", 1
INDEX, NEGATIVE = "index.json", "negative.safetensors"
OPEN = 128  # shards
ENDLESS = 2**40  # batches
TILE = 16  # keys, of a tensor core
MOST_SAMPLES = 2**24  # of a shard
DTYPES: dict[str, np.dtype] = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}
AGAIN = "make it again with scripts/make_shards.py"

SCHEMA = Object(
    {
        "format": Enum(FORMAT),
        "version": Enum(VERSION),
        "latents": Array(Integer(1, 2**16), 4, 4),
        **dict.fromkeys(("text_dim", "num_frames", "height", "width"), Integer(1, 2**16)),
        "dtype": Enum(*DTYPES),
        "fps": Integer(1, 2**31),
        **dict.fromkeys(("vae", "text_encoder", "negative_prompt"), String()),
        "shard_size": Integer(1, MOST_SAMPLES),
        "shards": Array(Object({"file": FileName(), "samples": Integer(1, MOST_SAMPLES)})),
    }
)
DESCRIBED = Array(Object({"source": String(), "caption": String()}))
MOST_TEXT = 2**28  # bytes of an index, and of the captions of a shard
Signature = tuple[int, int, int]  # of a file as it is now

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Index:
    """Properties that all shards of a folder have in common.

    latents: shape [t, h, w, c] of one video's latents; text_dim: width of the text embedding.
    dtype: of latents and text, "bfloat16" or "float32".
    num_frames, height, width, fps: of the videos, in frames, pixels and frames a second.
    vae, text_encoder: which weights made them, as `turbojax.train.make_shards.identity` tells it.
    negative_prompt: what `Shards.negative` is the embedding of.
    shard_size: samples a shard, at most.
    """

    latents: tuple[int, int, int, int]
    text_dim: int
    dtype: str
    num_frames: int
    height: int
    width: int
    fps: int
    vae: str
    text_encoder: str
    negative_prompt: str = ""
    shard_size: int = 64


class Sample(NamedTuple):
    """One video: latents [t, h, w, c], the rows of its prompt [R, D], and where they come from."""

    latents: np.ndarray
    text: np.ndarray
    source: str
    caption: str


class Shards:
    """A folder's samples by number; `shards[i]` is {"latents": [t, h, w, c], "text": [S, D]}.

    A sample is read from disk when it is asked for; the OPEN files that were used last stay mapped.
    longest: rows of the longest prompt, the negative one among them. signatures: of the files when they were checked;
    one that has changed since is a CheckpointError when it is read.
    """

    def __init__(
        self, folder: Path, index: Index, files: Mapping[str, int], longest: int, signatures: Mapping[str, Signature]
    ):
        self.folder, self.index, self.files, self._signatures = folder, index, dict(files), dict(signatures)
        self.text_rows = rows_for(longest)
        self._names, self._ends = list(files), list(itertools.accumulate(files.values()))
        self._open = functools.lru_cache(OPEN)(functools.partial(open_shard, index=index))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, i: int) -> Batch:
        return {name: value[0] for name, value in self.read([i]).items()}

    def read(self, numbers: Sequence[int]) -> Batch:
        """Samples by number, {"latents": [b, t, h, w, c], "text": [b, S, D]}, zero rows past each prompt's end."""
        dtype = DTYPES[self.index.dtype]
        latents = np.empty((len(numbers), *self.index.latents), dtype)
        text = np.zeros((len(numbers), self.text_rows, self.index.text_dim), dtype)
        places: dict[Path, list[tuple[int, int]]] = {}  # of each shard, rows of the batch and of the shard
        for i, number in enumerate(numbers):
            path, row = self._locate(int(number))
            places.setdefault(path, []).append((i, row))
        for path, pairs in places.items():
            if signature(path) != self._signatures[path.name]:  # a file that was cut would end the process
                raise CheckpointError(f"{path} has changed while it was in use; run the same command again")
            tensors = self._open(path)
            at, rows = np.array(pairs).T
            latents[at] = tensors["latents"][rows]
            ends = tensors["text_lengths"].cumsum()[rows]
            for i, end, length in zip(at, ends, tensors["text_lengths"][rows], strict=True):
                text[i, :length] = tensors["text"][end - length : end]
        batch = {"latents": latents, "text": text}
        for name, values in batch.items():
            if not finite(values):
                first = next(i for i, value in enumerate(values) if not finite(value))
                path, row = self._locate(int(numbers[first]))
                raise CheckpointError(f"{path}: the {name} of sample {row} hold NaN or infinity; {AGAIN}")
        return batch

    def describe(self, i: int) -> tuple[str, str]:
        """Returns source and caption of a sample."""
        path, row = self._locate(i)
        text = file_metadata(path).get("samples", "").encode()
        name = f"samples in the header of {path}"
        described = parse_json(text, DESCRIBED, name=name, suggestion=AGAIN, most_bytes=MOST_TEXT)
        if row >= len(described):
            raise CheckpointError(f"{name} tell of {len(described)}, not of sample {row}; {AGAIN}")
        return described[row]["source"], described[row]["caption"]

    def identity(self) -> str:
        """Returns a digest of what `describe` does not tell: the index, with the number of samples in each shard."""
        content = [dataclasses.asdict(self.index), self.files]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    def negative(self) -> np.ndarray:
        """Reads the negative prompt's embedding, [S, D]."""
        text = read_negative(self.folder, self.index)
        return np.concatenate((text, np.zeros((self.text_rows - len(text), text.shape[1]), text.dtype)))

    def _locate(self, i: int) -> tuple[Path, int]:
        """Finds the shard that holds sample i, and its row there."""
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        shard = bisect.bisect_right(self._ends, i)
        return self.folder / self._names[shard], i - (self._ends[shard - 1] if shard else 0)


def open_shards(folder: str | os.PathLike) -> Shards:
    """Reads a folder's index and checks each shard against it: names, shapes, dtypes and the length of the file.

    Raises UserError if there are no shards, CheckpointError if one is missing, cut off or foreign.
    """
    folder = user_path(folder)
    if not (folder / INDEX).exists():
        raise UserError(f"{folder} holds no {INDEX}, so no training data; write some with scripts/make_shards.py")
    index, files = read_index(folder)
    if not files:
        raise UserError(f"{folder / INDEX} lists no shards; write some with scripts/make_shards.py")
    longest, signatures = len(read_negative(folder, index)), {}
    for name, samples in files.items():
        signatures[name] = signature(folder / name)
        tensors = open_shard(folder / name, index)
        if len(tensors["latents"]) != samples:
            found = len(tensors["latents"])
            raise CheckpointError(f"{folder / name} holds {found} samples and {INDEX} says {samples}; {AGAIN}")
        longest = max(longest, int(tensors["text_lengths"].max()))
    return Shards(folder, index, files, longest, signatures)


def signature(path: Path) -> Signature:
    """Tells whether a file is the one that it was; raises CheckpointError if there is none."""
    try:
        found = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path} is missing or cannot be read: {error.strerror}; {AGAIN}") from error
    return found.st_ino, found.st_size, found.st_mtime_ns


def open_shard(path: Path, index: Index) -> dict[str, np.ndarray]:
    """Maps a shard's tensors into memory; raises CheckpointError where they do not fit the index."""
    tensors = read(path)
    lengths = tensors.get("text_lengths")
    if lengths is None or lengths.dtype != np.int32 or lengths.ndim != 1:
        raise CheckpointError(f"{path} is no shard of training data, it has no text_lengths; {AGAIN}")
    if ((lengths < 0) | (lengths > TEXT_LEN)).any():
        raise CheckpointError(f"{path} holds prompts that do not have 0 to {TEXT_LEN} rows; {AGAIN}")
    for name, spec in shard_specs(index, len(lengths), int(lengths.sum())).items():
        tensor = tensors.get(name)
        if tensor is None or (tensor.shape, tensor.dtype) != (spec.shape, spec.dtype):
            found = "nothing" if tensor is None else f"{tensor.dtype}{list(tensor.shape)}"
            raise CheckpointError(f"{path} holds {found} as {name}, expected {spec.dtype}{list(spec.shape)}; {AGAIN}")
    return tensors


def read(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise CheckpointError(f"{path} is {'not a regular file' if path.exists() else 'missing'}; {AGAIN}")
    try:
        return read_tensors(path)
    except CheckpointError as error:
        raise CheckpointError(f"{path} is cut off or no safetensors file; {AGAIN}") from error


def shard_specs(index: Index, samples: int, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    dtype = DTYPES[index.dtype]
    return {
        "latents": jax.ShapeDtypeStruct((samples, *index.latents), dtype),
        "text": jax.ShapeDtypeStruct((rows, index.text_dim), dtype),
        "text_lengths": jax.ShapeDtypeStruct((samples,), np.int32),
    }


def finite(values: np.ndarray) -> bool:
    """Returns True if all values are finite, by their bits: NumPy's isfinite is slow for bfloat16."""
    bits = values.view(np.dtype(f"u{values.itemsize}"))
    exponent = 0x7F80 << 8 * (values.itemsize - 2)
    return not bits.size or int((bits & bits.dtype.type(exponent)).max()) < exponent


def rows_for(longest: int) -> int:
    """Rows S of text in a batch: with the one that a network adds for those left out, a multiple of TILE."""
    return min(TEXT_LEN, cdiv(longest + 1, TILE) * TILE - 1)


def read_negative(folder: Path, index: Index) -> np.ndarray:
    """Reads the negative prompt's rows [R, D]."""
    path = folder / NEGATIVE
    text = read(path).get("text", np.empty(0))
    if text.ndim != 2 or len(text) > TEXT_LEN or text.shape[1] != index.text_dim or text.dtype != DTYPES[index.dtype]:
        raise CheckpointError(f"{path} holds no text of width {index.text_dim} in {index.dtype}; {AGAIN}")
    if not finite(text):
        raise CheckpointError(f"{path} holds NaN or infinity; {AGAIN}")
    return text


def write_shard(path: Path, index: Index, samples: Sequence[Sample], **metadata: str) -> None:
    """Writes a shard, whole or not at all; metadata: further text for its header.

    Raises CheckpointError if a sample is not as the index says, UserError if the file cannot be written.
    """
    tensors = {
        "latents": np.stack([sample.latents for sample in samples]),
        "text": np.concatenate([sample.text for sample in samples]),
        "text_lengths": np.asarray([len(sample.text) for sample in samples], np.int32),
    }
    described = [{"source": sample.source, "caption": sample.caption} for sample in samples]
    specs = shard_specs(index, len(samples), len(tensors["text"]))
    write_safetensors(path, tensors.items(), specs, metadata={"samples": json.dumps(described), **metadata})


def write_negative(folder: Path, text: np.ndarray) -> None:
    """Writes the negative prompt's rows [R, D]."""
    write_safetensors(folder / NEGATIVE, [("text", text)], {"text": text})


def write_index(folder: Path, index: Index, files: Mapping[str, int]) -> None:
    """Writes the index: what the shards have in common, and the number of samples of each."""
    shards = [{"file": name, "samples": samples} for name, samples in files.items()]
    content = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(index), "shards": shards}
    write_json(folder / INDEX, content)


def read_index(folder: Path) -> tuple[Index, dict[str, int]]:
    """Reads the index and the samples of each shard; raises CheckpointError if it is damaged or of another format."""
    path = folder / INDEX
    content = read_json(path, SCHEMA, suggestion=AGAIN, most_bytes=MOST_TEXT)
    shards = content["shards"]
    files = {shard["file"]: shard["samples"] for shard in shards}
    if len(files) < len(shards):
        raise CheckpointError(f"{path} lists a shard twice; {AGAIN}")
    return Index(**{field.name: content[field.name] for field in dataclasses.fields(Index)}), files


class Batches(Iterator[Batch]):
    """Endless batches {"latents": [b, t, h, w, c], "text": [b, S, D]} with a state; made by `batches`."""

    def __init__(self, iterator: Any, *, data: Mapping[str, Any], settings: Mapping[str, int]):
        self._iterator, self._data, self._settings = iterator, dict(data), dict(settings)

    def __next__(self) -> Batch:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """Returns where the next batch is, and of what; for JSON."""
        return {"batch": self._iterator.get_state()["next_index"], **self._settings, **self._data}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes on at the batch where `get_state` was called, in other data with a warning.

        Raises UserError for a state of another batch size or seed, by which batches are counted and drawn.
        """
        for name, value in self._settings.items():
            if (there := state.get(name)) != value:
                raise UserError(f"the run was begun with {name}={there}, not {value}; give that, or another workdir")
        if not isinstance(batch := state.get("batch"), int) or batch < 0:
            raise UserError(f"the data's state has {batch=}, no number of batches; start without it")
        if any(state.get(name) != value for name, value in self._data.items()):
            logging.warning(
                "The run was begun with other data, of %s samples; it goes on with the %d of now, in their own order",
                *(state.get("samples"), self._data["samples"]),
            )
        self._iterator.set_state({"next_index": batch})


def import_grain() -> ModuleType:
    try:
        import grain  # an extra, and a second to import
    except ImportError as error:
        raise UserError("training data needs grain; pip install 'turbojax[train]'") from error
    return grain


def batches(
    shards: Shards,
    *,
    batch_size: int,
    seed: int,
    share: tuple[int, int] | None = None,
    num_threads: int = 4,
    prefetch: int = 4,
) -> Batches:
    """Reads the samples in batches, shuffled anew for each epoch, without end.

    batch_size: samples of all processes together. The samples of a batch do not depend on the number of processes, and
      one epoch follows another inside a batch.
    share: (i, n) for the i-th of n equal shares of each batch, [batch_size / n, ...]; that of the process if not given.
    num_threads, prefetch: threads that read, and the batches that they read ahead.

    Raises UserError for settings that cannot be, or if grain is not installed.
    """
    grain = import_grain()
    index, count = share or (jax.process_index(), jax.process_count())
    if not 0 <= index < count:
        raise UserError(f"process {index} is not one of {count}")
    if batch_size < 1 or batch_size % count:
        raise UserError(f"{batch_size=} must be a multiple of the {count} processes")
    if not 0 <= seed < 2**32:
        raise UserError(f"{seed=} must be in 0..{2**32 - 1}")

    @functools.lru_cache(2)
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, epoch)).permutation(len(shards))

    # Whole batches go through the pipeline: a small sample alone takes less time to read than to get there.
    def read(batch: int) -> Batch:
        place = range(batch * batch_size + index, (batch + 1) * batch_size, count)
        return shards.read([order(i // len(shards))[i % len(shards)] for i in place])

    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
    iterator = iter(grain.MapDataset.range(ENDLESS).map(read).to_iter_dataset(options))
    data = {"samples": len(shards), "data": shards.identity()}
    return Batches(iterator, data=data, settings={"batch_size": batch_size, "seed": seed})
