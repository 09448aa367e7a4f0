"""From prompts to embeddings: a text encoder that is loaded when it is needed, and a cache of its embeddings."""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx

from turbojax.errors import CheckpointError, UserError
from turbojax.files import user_cache
from turbojax.models.offload import Streamed
from turbojax.models.tokenizer import Tokenizer
from turbojax.models.umt5 import TEXT_LEN, UMT5Config, UMT5Encoder, encode_text, run_encoder, zero_past_end
from turbojax.weights.encoders import load_encoder, open_umt5
from turbojax.weights.io import file_metadata, read_tensors, write_safetensors
from turbojax.weights.umt5 import token_table

CACHE_VERSION = 1  # raise it when embeddings change
SAMPLE = 1024  # numbers in each of the places where `fingerprint` looks


@dataclasses.dataclass(eq=False)
class TextEncoder:
    """Everything between a prompt and its embedding; the token table `[vocab, D]` stays on the host.

    abstract: the network without its parameters. load: gives the network, `streamed` or not; called at the first prompt
    that the cache does not hold, and again after `drop`. streamed: leave its blocks in host memory.
    """

    tokenizer: Tokenizer
    abstract: UMT5Encoder
    table: np.ndarray
    load: Callable[..., UMT5Encoder | Streamed]
    _: dataclasses.KW_ONLY
    streamed: bool = False
    cache: "PromptCache | None" = None
    _encoder: UMT5Encoder | Streamed | None = dataclasses.field(default=None, init=False)

    @classmethod
    def from_files(
        cls, encoder: str | Path, tokenizer: str | Path, *, dtype: Any = jnp.bfloat16, cache: bool = True
    ) -> "TextEncoder":
        """Opens and checks the files, published or converted; reads the weights later.

        cache: keep embeddings in the user's cache folder. Raises CheckpointError for what does not fit.
        """
        checkpoint, tensors = open_umt5(encoder, dtype=dtype), read_tensors(encoder)
        return cls(
            Tokenizer.from_path(tokenizer),
            checkpoint.skeleton.abstract(),
            token_table(tensors),
            functools.partial(load_encoder, checkpoint),
            cache=PromptCache.of_user(fingerprint(tensors, jnp.dtype(dtype).name, CACHE_VERSION)) if cache else None,
        )

    @property
    def config(self) -> UMT5Config:
        return self.abstract.config

    @property
    def encoder(self) -> UMT5Encoder | Streamed:
        """Returns the network, loaded now if it was not."""
        if self._encoder is None:
            self._encoder = self.load(streamed=self.streamed)
        return self._encoder

    @property
    def loaded(self) -> bool:
        return self._encoder is not None

    def drop(self) -> None:
        """Frees the network's memory; it is loaded again when it is needed."""
        self._encoder = None

    def compile(self) -> None:
        """Compiles what a prompt runs; needs no parameters."""
        x = jax.ShapeDtypeStruct((1, TEXT_LEN, self.config.dim), self.table.dtype)
        mask = jax.ShapeDtypeStruct((1, TEXT_LEN), jnp.int32)
        if not self.streamed:
            run_encoder.lower(*nnx.split(self.abstract), x, mask).compile()
        out = jax.ShapeDtypeStruct(x.shape, self.config.dtype)
        zero_past_end.lower(out, mask, length=TEXT_LEN).compile()

    def cut(self, prompts: Sequence[str]) -> list[str]:
        """Returns a line for each prompt that is too long, with the words from where it is cut."""
        found = map(self.tokenizer.cut, prompts)
        return [f"the prompt has {line}; what follows has no effect" for line in found if line]

    def __call__(self, prompts: Sequence[str]) -> np.ndarray:
        """Returns embeddings `[B, 512, D]` on the host, zero rows past each prompt's end.

        Prompts are encoded one at a time, so that a prompt's embedding does not depend on the others'. Those that are
        too long are cut with a warning.
        """
        for line in self.cut(prompts):
            logging.warning("%s", line)
        out = np.zeros((len(prompts), TEXT_LEN, self.config.dim), self.config.dtype)
        for row, ids, mask in zip(out, *self.tokenizer(list(prompts)), strict=True):
            tokens = ids[mask > 0]
            embedding = self.cache.get(tokens, self.config) if self.cache else None
            if embedding is None:
                if zero := int((~np.asarray(self.table[tokens] != 0).any(axis=1)).sum()):
                    advice = "a download that was not finished looks like this, so download the text encoder again"
                    logging.warning("the token table is all zero for %d of %d tokens; %s", zero, len(tokens), advice)
                embedding = np.asarray(encode_text(self.encoder, self.table, ids[None], mask[None]))[0, : len(tokens)]
                if self.cache:
                    self.cache.put(tokens, embedding)
            row[: len(tokens)] = embedding
        return out


class PromptCache:
    """Text embeddings on disk, a safetensors file for each prompt and text encoder, with a checksum in its metadata.

    fingerprint: tells text encoders apart. max_bytes: beyond it the entries that were used longest ago are deleted.
    What cannot be read or has changed counts as absent, what cannot be written is a warning.
    """

    def __init__(self, fingerprint: str, folder: Path, *, max_bytes: int = 512 * 2**20):
        self.fingerprint, self.folder, self.max_bytes = fingerprint, folder, max_bytes

    @classmethod
    def of_user(cls, fingerprint: str) -> "PromptCache | None":
        """Returns the one in the user's cache folder; None, with a warning, where there is no home folder."""
        try:
            return cls(fingerprint, user_cache() / "prompts")
        except UserError as error:
            logging.warning("Embeddings of prompts are not kept: %s", error)
            return None

    def path(self, ids: np.ndarray) -> Path:
        """Returns the file of a prompt, given as its token ids int32 `[n]` without padding."""
        name = hashlib.sha256(self.fingerprint.encode() + np.asarray(ids, "<i4").tobytes()).hexdigest()
        return self.folder / f"{name}.safetensors"

    def get(self, ids: np.ndarray, config: UMT5Config) -> np.ndarray | None:
        """Returns the embedding `[n, D]` of n tokens; None if it is not there or damaged."""
        path = self.path(ids)
        try:
            if not path.is_file():
                return None
            embedding = np.array(read_tensors(path)["embedding"])
            intact = file_metadata(path).get("sha256") == checksum(path, embedding)
            os.utime(path)
        except (CheckpointError, KeyError, OSError):
            return None
        fits = embedding.shape == (len(ids), config.dim) and embedding.dtype == jnp.dtype(config.dtype)
        return embedding if intact and fits and np.isfinite(embedding).all() else None

    def put(self, ids: np.ndarray, embedding: np.ndarray) -> None:
        path = self.path(ids)
        try:
            metadata = {"sha256": checksum(path, embedding)}
            write_safetensors(path, [("embedding", embedding)], {"embedding": embedding}, metadata=metadata)
            self.shrink()
        except (UserError, OSError) as error:
            logging.warning("The prompt's embedding is not kept: %s", error)

    def shrink(self) -> None:
        """Deletes the entries that were used longest ago until the rest takes max_bytes."""
        files = [(file.stat(), file) for file in self.folder.glob("[!.]*.safetensors")]
        total = sum(stat.st_size for stat, _ in files)
        for stat, file in sorted(files, key=lambda entry: entry[0].st_mtime_ns):
            if total <= self.max_bytes:
                break
            file.unlink(missing_ok=True)
            total -= stat.st_size


def checksum(path: Path, embedding: np.ndarray) -> str:
    """Returns a digest of an entry's numbers and its name, so that another prompt's file is none of this one."""
    return hashlib.sha256(path.name.encode() + embedding.tobytes()).hexdigest()


def fingerprint(tensors: Mapping[str, np.ndarray], *settings: object) -> str:
    """Returns a hash of a checkpoint (names, shapes, the beginning, middle and end of every tensor) and of `settings`.

    The whole contents would take seconds for gigabytes, and training or casting changes every part of a tensor.
    """
    digest = hashlib.sha256(repr(settings).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        flat = tensor.reshape(-1)
        for start in (0, flat.size // 2, max(0, flat.size - SAMPLE)):
            digest.update(flat[start : start + SAMPLE].tobytes())
    return digest.hexdigest()
