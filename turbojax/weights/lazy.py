"""Tensors that are computed, or checked, on access."""

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
from absl import logging

from turbojax.models.sizes import size_of
from turbojax.weights.mapped import check_stored
from turbojax.weights.rules import TensorKey, describe, shorten
from turbojax.weights.safetensors import ShapeDtype

K = TypeVar("K")


class LazyTensors(Mapping[K, np.ndarray]):
    """Tensors that are computed on access; `specs` has the shapes and dtypes of all."""

    specs: Mapping[K, ShapeDtype]

    def __contains__(self, key: object) -> bool:
        return key in self.specs

    def __iter__(self) -> Iterator[K]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)


def specs_of(tensors: Mapping[K, np.ndarray]) -> Mapping[K, ShapeDtype]:
    """Shapes and dtypes, without reading: memory-mapped arrays know their own."""
    return tensors.specs if isinstance(tensors, LazyTensors) else tensors


class CheckedTensors(LazyTensors[K]):
    """A checkpoint's tensors, each checked when it is asked for, as it is read anyway.

    One of zeros alone is noted, see `warn`. checksums: check the CRC-32 that a .pth file has, too, for which all of it
    is read; raises CheckpointError where it is wrong.
    """

    def __init__(self, tensors: Mapping[K, np.ndarray], *, checksums: bool = False):
        self.tensors, self.specs, self.checksums = tensors, specs_of(tensors), checksums
        self.zeros: set[K] = set()

    def __getitem__(self, key: K) -> np.ndarray:
        tensor = self.tensors[key]
        if self.checksums:
            check_stored(tensor)
        if may_not_be_zero(name_of(key)) and all_zero(tensor):
            self.zeros.add(key)
        return tensor

    def warn(self, what: str) -> None:
        """Warns of the tensors that were all zero, see `warn_of_zeros`."""
        names = [name_of(key) for key in self.specs if key in self.zeros]
        total, zero = (sum(size_of(self.specs[key]) for key in keys) for keys in (self.specs, self.zeros))
        warn_of_zeros(what, names, tensors=len(self.specs), share=zero / max(total, 1))


def warn_of_zeros(what: str, names: list[str], *, tensors: int, share: float) -> None:
    """Warns of tensors that are all zero by name, how many of how many, and their share of the bytes; not of none."""
    if names:
        counts = f"{len(names)} of {tensors} tensors are all zero, {100 * share:.1f} % of the bytes"
        advice = "a download that was not finished looks like this, so download it again unless you know why"
        logging.warning("%s: %s: %s; %s", what, counts, shorten(names), advice)


def name_of(key: Any) -> str:
    return describe(key) if isinstance(key, TensorKey) else str(key)


def may_not_be_zero(name: str) -> bool:
    """Returns True if no trained network has this parameter all zero; biases and SLA's projection may be."""
    return ".proj_l." not in name and not name.partition("[")[0].endswith(".bias")


def all_zero(tensor: np.ndarray) -> bool:
    """Returns True if every number is zero; reads no further than the first thousand where one of them is not."""
    if not tensor.size or np.any(tensor.flat[:1024]):
        return False
    return not np.any(tensor.reshape(-1).view(np.uint8) if tensor.flags.c_contiguous else tensor)
