"""Training data: latents and text embeddings on disk, and the reader that feeds them to the training loop.

    shards = open_shards("data")
    data = batches(shards, batch_size=64, seed=0)
    batch = next(data)        # {"latents": [64, t, h, w, c], "text": [64, 512, D]}, NumPy arrays
    state = data.get_state()  # a few numbers; data.set_state(state) goes on from there, to the bit

A folder of shards, as `scripts/make_shards.py` writes it. N samples of a shard, `t h w c` latents of a video (the same
in all shards), R rows of text, D width of the text encoder:

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
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np

from turbojax.errors import CheckpointError, UserError
from turbojax.models.umt5 import TEXT_LEN
from turbojax.video import whole_file
from turbojax.weights.io import file_metadata, read_tensors, write_safetensors

FORMAT, VERSION = "turbojax-latents", 1
INDEX, NEGATIVE = "index.json", "negative.safetensors"
DTYPES: dict[str, np.dtype] = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}
AGAIN = "make it again with scripts/make_shards.py"

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Index:
    """What all shards of a folder have in common.

    latents: shape [t, h, w, c] of one video's latents; text_dim: width of the text embedding.
    dtype: of latents and text, "bfloat16" or "float32".
    num_frames, height, width, fps: of the videos, in frames, pixels and frames a second.
    vae, text_encoder: which weights made them, as `turbojax.train.make_shards.identity` tells it.
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


class Sample(NamedTuple):
    """One video: latents [t, h, w, c], the prompt's rows of text [R, D], and where they come from."""

    latents: np.ndarray
    text: np.ndarray
    source: str
    caption: str


class Shards:
    """A folder's samples by number; `shards[i]` is {"latents": [t, h, w, c], "text": [512, D]}.

    A sample is read from disk when it is asked for, and no file stays open.
    """

    def __init__(self, folder: Path, index: Index, files: Mapping[str, int]):
        self.folder, self.index, self.files = folder, index, dict(files)
        self._ends = list(itertools.accumulate(files.values()))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, i: int) -> Batch:
        raise NotImplementedError

    @property
    def negative(self) -> np.ndarray:
        """The negative prompt's embedding, [512, D]."""
        raise NotImplementedError


def open_shards(folder: str | os.PathLike) -> Shards:
    """Reads a folder's index and checks each shard against it: names, shapes, dtypes and the length of the file.

    Raises UserError if there are no shards, CheckpointError if one is missing, cut off or foreign.
    """
    raise NotImplementedError


class Batches(Iterator[Batch]):
    """Endless batches {"latents": [b, t, h, w, c], "text": [b, 512, D]} with a state; made by `batches`."""

    def __next__(self) -> Batch:
        raise NotImplementedError

    def get_state(self) -> dict[str, int]:
        """Where the next batch is; plain numbers, for JSON."""
        raise NotImplementedError

    def set_state(self, state: Mapping[str, int]) -> None:
        """Goes on where `get_state` was called; raises UserError for a state of other data or settings."""
        raise NotImplementedError


def batches(
    shards: Shards,
    *,
    batch_size: int,
    seed: int,
    process_index: int | None = None,
    process_count: int | None = None,
    num_threads: int = 4,
    prefetch: int = 2,
) -> Batches:
    """The samples, shuffled anew each epoch, without end.

    batch_size: samples of all processes together; each process gets its share [batch_size / process_count, ...]. The
      samples of a batch do not depend on the number of processes, and epochs follow each other inside a batch.
    process_index, process_count: JAX's own if not given.
    num_threads, prefetch: threads that read, and the batches that they read ahead.

    Raises UserError for settings that cannot be.
    """
    raise NotImplementedError
