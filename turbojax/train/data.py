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

from turbojax.errors import CheckpointError, UserError
from turbojax.files import whole_file
from turbojax.models.umt5 import TEXT_LEN
from turbojax.weights.io import file_metadata, read_tensors, write_safetensors

FORMAT, VERSION = "turbojax-latents", 1
INDEX, NEGATIVE = "index.json", "negative.safetensors"
OPEN = 128  # shards
ENDLESS = 2**40  # batches
TILE = 16  # keys, of a tensor core
DTYPES: dict[str, np.dtype] = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}
AGAIN = "make it again with scripts/make_shards.py"

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Index:
    """What all shards of a folder have in common.

    latents: shape [t, h, w, c] of one video's latents; text_dim: width of the text embedding.
    dtype: of latents and text, "bfloat16" or "float32".
    num_frames, height, width, fps: of the videos, in frames, pixels and frames a second.
    vae, text_encoder: which weights made them, as `turbojax.make_shards.identity` tells it.
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
    negative_prompt: str
    shard_size: int


class Sample(NamedTuple):
    """One video: latents [t, h, w, c], the rows of its prompt [R, D], and where they come from."""

    latents: np.ndarray
    text: np.ndarray
    source: str
    caption: str


class Shards:
    """A folder's samples by number; `shards[i]` is {"latents": [t, h, w, c], "text": [S, D]}.

    A sample is read from disk when it is asked for; the OPEN files that were used last stay mapped.
    longest: rows of the longest prompt, the negative one among them.
    """

    def __init__(self, folder: Path, index: Index, files: Mapping[str, int], longest: int):
        self.folder, self.index, self.files = folder, index, dict(files)
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
        """Source and caption of a sample."""
        path, row = self._locate(i)
        try:
            sample = json.loads(file_metadata(path)["samples"])[row]
            return sample["source"], sample["caption"]
        except (ValueError, LookupError, TypeError) as error:
            raise CheckpointError(f"{path} does not tell where its samples come from; {AGAIN}") from error

    def negative(self) -> np.ndarray:
        """The negative prompt's embedding, [S, D]."""
        text = read_negative(self.folder, self.index)
        return np.concatenate((text, np.zeros((self.text_rows - len(text), text.shape[1]), text.dtype)))

    def _locate(self, i: int) -> tuple[Path, int]:
        """The shard that holds sample i, and its row there."""
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        shard = bisect.bisect_right(self._ends, i)
        return self.folder / self._names[shard], i - (self._ends[shard - 1] if shard else 0)


def open_shards(folder: str | os.PathLike) -> Shards:
    """Reads a folder's index and checks each shard against it: names, shapes, dtypes and the length of the file.

    Raises UserError if there are no shards, CheckpointError if one is missing, cut off or foreign.
    """
    folder = Path(folder)
    if not (folder / INDEX).is_file():
        raise UserError(f"{folder} holds no {INDEX}, so no training data; write some with scripts/make_shards.py")
    index, files = read_index(folder)
    if not files:
        raise UserError(f"{folder / INDEX} lists no shards; write some with scripts/make_shards.py")
    longest = len(read_negative(folder, index))
    for name, samples in files.items():
        tensors = open_shard(folder / name, index)
        if samples < 1 or len(tensors["latents"]) != samples:
            found = len(tensors["latents"])
            raise CheckpointError(f"{folder / name} holds {found} samples and {INDEX} says {samples}; {AGAIN}")
        longest = max(longest, int(tensors["text_lengths"].max()))
    return Shards(folder, index, files, longest)


def open_shard(path: Path, index: Index) -> dict[str, np.ndarray]:
    """A shard's tensors as views of the memory-mapped file; raises CheckpointError where they do not fit the index."""
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
        raise CheckpointError(f"{path} is missing; {AGAIN}")
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
    """Whether bfloat16 or float32 values are, from their bits: NumPy's isfinite is slow for bfloat16."""
    bits = values.view(np.dtype(f"u{values.itemsize}"))
    exponent = 0x7F80 << 8 * (values.itemsize - 2)
    return not bits.size or int((bits & bits.dtype.type(exponent)).max()) < exponent


def rows_for(longest: int) -> int:
    """Rows S of text in a batch: with the one that a network adds for those left out, a multiple of TILE."""
    return min(TEXT_LEN, -(-(longest + 1) // TILE) * TILE - 1)


def read_negative(folder: Path, index: Index) -> np.ndarray:
    """The negative prompt's rows [R, D]."""
    path = folder / NEGATIVE
    text = read(path).get("text", np.empty(0))
    if text.ndim != 2 or len(text) > TEXT_LEN or text.shape[1] != index.text_dim:
        raise CheckpointError(f"{path} holds no text of width {index.text_dim}; {AGAIN}")
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
    with whole_file(folder / INDEX) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


def read_index(folder: Path) -> tuple[Index, dict[str, int]]:
    """The index and the samples of each shard; raises CheckpointError if it is damaged or of another format."""
    path = folder / INDEX
    try:
        content = json.loads(path.read_text())
        if (content.pop("format"), content.pop("version")) != (FORMAT, VERSION):
            raise CheckpointError(f"{path} is not of the format {FORMAT} {VERSION}; {AGAIN}")
        files = {shard["file"]: int(shard["samples"]) for shard in content.pop("shards")}
        index = Index(**(content | {"latents": tuple(map(int, content["latents"]))}))
        if len(index.latents) != 4 or index.dtype not in DTYPES or any(Path(name).name != name for name in files):
            raise ValueError
    except CheckpointError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged; {AGAIN}") from error
    return index, files


class Batches(Iterator[Batch]):
    """Endless batches {"latents": [b, t, h, w, c], "text": [b, S, D]} with a state; made by `batches`."""

    def __init__(self, iterator: Any, **settings: int):
        self._iterator, self._settings = iterator, settings

    def __next__(self) -> Batch:
        return next(self._iterator)

    def get_state(self) -> dict[str, int]:
        """Where the next batch is; plain numbers, for JSON."""
        return {"batch": self._iterator.get_state()["next_index"], **self._settings}

    def set_state(self, state: Mapping[str, int]) -> None:
        """Goes on where `get_state` was called; raises UserError for a state of other data or settings."""
        for name, value in self._settings.items():
            if state.get(name) != value:
                raise UserError(f"the data's state is of {name}={state.get(name)}, not {value}; resume as it was begun")
        if not isinstance(batch := state.get("batch"), int) or batch < 0:
            raise UserError(f"the data's state has {batch=}, no number of batches; start without it")
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
    process_index: int | None = None,
    process_count: int | None = None,
    num_threads: int = 4,
    prefetch: int = 4,
) -> Batches:
    """The samples in batches, shuffled anew for each epoch, without end.

    batch_size: samples of all processes together; each process gets its share, [batch_size / process_count, ...]. The
      samples of a batch do not depend on the number of processes, and one epoch follows another inside a batch.
    process_index, process_count: JAX's own if not given.
    num_threads, prefetch: threads that read, and the batches that they read ahead.

    Raises UserError for settings that cannot be, or if grain is not installed.
    """
    grain = import_grain()
    index = jax.process_index() if process_index is None else process_index
    count = jax.process_count() if process_count is None else process_count
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
    return Batches(iterator, samples=len(shards), batch_size=batch_size, seed=seed)
