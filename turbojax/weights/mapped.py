"""Checkpoint files mapped into memory: their bytes are read from disk where they are used, and given back after."""

import bisect
import mmap
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np

from turbojax.errors import CheckpointError
from turbojax.json_reader import without_waiting
from turbojax.weights.zip_entries import Stored

AGAIN = "download it again, for example with `hf download`"


class MappedFile(np.memmap):
    """A file's bytes, uint8, read-only.

    stored: the parts of which the file has the CRC-32, in the order of the file; checked: the starts of those that
    `check_stored` has read.
    """

    stored: list[Stored]
    checked: set[int]


def map_file(path: Path) -> MappedFile:
    """Maps a file; refuses what is plainly not a checkpoint."""
    with open(path, "rb", opener=without_waiting) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise CheckpointError(f"{path} is not a regular file; give the path of the checkpoint itself")
        head = file.read(512)
        start = head.lstrip().lower()
        problem = "" if head else "is empty; "
        if start.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
            problem = "looks like an HTML page, not a checkpoint: the download was probably refused; "
        elif start.startswith(b"version https://git-lfs"):
            problem = "is a git-lfs pointer, not the checkpoint itself; run `git lfs pull` or "
        if problem:
            raise CheckpointError(f"{path} {problem}{AGAIN}")
        data = MappedFile(file, np.uint8, mode="r")
    data.stored, data.checked = [], set()
    return data


def mapping_of(tensor: Any) -> MappedFile | None:
    """Returns the file that a tensor is a view of; None for others."""
    while isinstance(tensor, np.ndarray) and not isinstance(tensor, MappedFile):
        tensor = tensor.base
    return tensor if isinstance(tensor, MappedFile) else None


def check_stored(tensor: np.ndarray) -> None:
    """Checks the CRC-32 of the part of the file that a tensor is a view of, if the file has one; reads it, once.

    Raises CheckpointError where the bytes are not those that were written.
    """
    data = mapping_of(tensor)
    if data is None or not data.stored or not tensor.size:
        return
    offset = tensor.ctypes.data - data.ctypes.data
    part = data.stored[bisect.bisect_right(data.stored, offset, key=lambda stored: stored.start) - 1]
    if part.start in data.checked:
        return
    if not part.check(data):
        raise CheckpointError(
            f"{data.filename} is damaged: its bytes {part.start} to {part.start + part.size} do not have the CRC-32 "
            f"that was written with them; {AGAIN}"
        )
    data.checked.add(part.start)


def release(tensor: np.ndarray) -> None:
    """Gives the memory of a memory-mapped tensor's file back to the system; it is read again when used again.

    Called after each tensor, so that reading a 28 GB file does not fill 28 GB of this process.
    """
    base: Any = tensor
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, mmap.mmap):
        base.madvise(mmap.MADV_DONTNEED)
