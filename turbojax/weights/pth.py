"""PyTorch's zip checkpoint format (PyTorch 1.6 and later), read and written without PyTorch.

Such a file is an uncompressed zip: `<prefix>/data.pkl` is a pickle of the dictionary, and each storage it
refers to lies as raw little-endian bytes in `<prefix>/data/<key>`.

Nothing of it is run, see `turbojax.weights.pickles`, and its headers must agree, see `turbojax.weights.zip_entries`.

`turbojax.weights.io` has the functions to use: they open the files and word the errors of damaged ones.
"""

import math
import pickle
import struct
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from turbojax.errors import CheckpointError, quoted
from turbojax.weights.pickles import DTYPES, STORAGES, Tensor, decode
from turbojax.weights.zip_entries import AGAIN, Stored, read_entries

MAX_SHARING = 4  # bytes of tensors for each of the file: some share their storage, such as tied embeddings
# Keys under which training scripts commonly put the weights.
WRAPPERS = ("state_dict", "model", "model_state", "module", "ema")


def parse(where: Path, data: np.ndarray) -> tuple[dict[str, np.ndarray], list[Stored]]:
    """Returns tensors of the zip checkpoint `where` as views into `data`, its mapped bytes (uint8), and their storages.

    Raises CheckpointError if the pickle asks for anything but plain tensors, a tensor lies outside its storage, or all
    together are larger than a file of this size can mean. A damaged file may also raise what `pickletools`, `struct`
    or numpy raise.
    """
    program, storages = _entries(where, data)
    records = _pick_tensors(where, decode(where, program))
    total = sum(math.prod(record.shape) * record.dtype.itemsize for record in records.values())
    if total > MAX_SHARING * len(data) + 2**20:  # strides of zero make a terabyte of a few numbers
        raise CheckpointError(f"{where} has {len(data)} bytes and tensors of {total}: they repeat its values; {AGAIN}")
    tensors = {name: _view(where, name, record, storages, data) for name, record in records.items()}
    return tensors, list(storages.values())


def _entries(where: Path, data: np.ndarray) -> tuple[bytes, dict[str, Stored]]:
    """The bytes of data.pkl, and where each storage lies by its key."""
    entries = read_entries(where, data)
    pickles = [name for name in entries if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise CheckpointError(f"{where} is a zip file but not a PyTorch checkpoint: {len(pickles)} data.pkl in it")
    prefix = pickles[0].removesuffix("data.pkl")
    entry = entries.get(f"{prefix}byteorder")
    byteorder = _read(where, data, "byteorder", entry) if entry else b"little"
    if byteorder != b"little":
        raise CheckpointError(f"{where} has byte order {quoted(byteorder)}; save it on a little-endian machine")
    folder = f"{prefix}data/"
    storages = {name.removeprefix(folder): stored for name, stored in entries.items() if name.startswith(folder)}
    return _read(where, data, "data.pkl", entries[pickles[0]]), storages


def _read(where: Path, data: np.ndarray, name: str, stored: Stored) -> bytes:
    if not stored.check(data):
        raise CheckpointError(f"{where} is damaged: its {name} does not have its CRC-32; {AGAIN}")
    return data[stored.start : stored.start + stored.size].tobytes()


def _pick_tensors(where: Path, tree: Any) -> dict[str, Tensor]:
    """Returns the tensors of the one wrapper that the dictionary has, else its own."""

    def tensors(value: Any) -> dict[str, Tensor]:
        items = value.items() if isinstance(value, dict) else ()
        return {name: item for name, item in items if isinstance(name, str) and isinstance(item, Tensor)}

    wrapped = {key: tensors(tree[key]) for key in WRAPPERS if isinstance(tree, dict) and key in tree}
    wrapped = {key: found for key, found in wrapped.items() if found}
    if len(wrapped) > 1:
        raise CheckpointError(
            f"{where} holds several sets of weights ({', '.join(wrapped)}); save the one to use as a file of its own"
        )
    found = next(iter(wrapped.values()), None) or tensors(tree)
    if not found:
        kind = type(tree).__name__.lower()
        keys = f" with the keys {quoted(list(tree))}" if isinstance(tree, dict) else ""
        raise CheckpointError(f"{where} holds a {kind}{keys}, not a dictionary of tensors")
    return found


def _view(where: Path, name: str, tensor: Tensor, storages: dict[str, Stored], data: np.ndarray) -> np.ndarray:
    storage, size = tensor.storage, tensor.dtype.itemsize
    start, nbytes, _ = storages.get(storage.key, Stored(0, -1, 0))
    if storage.numel * storage.dtype.itemsize > nbytes:
        raise CheckpointError(f"{where} is damaged: the data of {quoted(name)} is missing or too short; {AGAIN}")
    if len(tensor.shape) != len(tensor.strides) or type(tensor.offset) is not int or tensor.offset < 0:
        raise CheckpointError(f"{where} is damaged: the shape or strides of {quoted(name)} are not valid; {AGAIN}")
    if 0 in tensor.shape:
        return np.ndarray(tensor.shape, tensor.dtype, data, start)
    last = tensor.offset + sum((d - 1) * s for d, s in zip(tensor.shape, tensor.strides, strict=True))
    if (last + 1) * size > storage.numel * storage.dtype.itemsize:
        raise CheckpointError(f"{where} is damaged: {quoted(name)} reaches beyond its storage; {AGAIN}")
    strides = tuple(stride * size for stride in tensor.strides)
    return np.ndarray(tensor.shape, tensor.dtype, data, start + tensor.offset * size, strides)


def write(file: BinaryIO, tensors: Iterable[tuple[str, np.ndarray]]) -> None:
    """Writes named arrays, one in memory at a time, for `parse` and torch.load(weights_only=True) to read.

    Raises CheckpointError for a repeated name or a dtype that PyTorch does not have.
    """
    program = [pickle.PROTO + b"\x02", _pickled_call("collections OrderedDict", b""), pickle.MARK]
    seen: set[str] = set()
    with zipfile.ZipFile(file, "w") as archive:
        for name, value in tensors:
            array = np.asarray(value, order="C")
            if name in seen:
                raise CheckpointError(f"tensor {name!r} is given twice")
            program += [_plain(name), _pickled_tensor(name, array, key=str(len(seen)))]
            _add(archive, file, f"archive/data/{len(seen)}", array.reshape(-1).view(np.uint8).data)
            seen.add(name)
        _add(archive, file, "archive/data.pkl", b"".join([*program, pickle.SETITEMS, pickle.STOP]))
        _add(archive, file, "archive/byteorder", b"little")
        _add(archive, file, "archive/version", b"3\n")


def _add(archive: zipfile.ZipFile, file: BinaryIO, name: str, content: bytes | memoryview) -> None:
    """Stores one entry with its bytes at a multiple of 64, as PyTorch does, so that views are aligned."""
    info = zipfile.ZipInfo(name)
    zip64_field = 20
    padding = -(file.tell() + 30 + len(name) + 4 + zip64_field) % 64
    info.extra = struct.pack("<2sH", b"FB", padding) + bytes(padding)
    with archive.open(info, "w", force_zip64=True) as entry:
        entry.write(content)


def _plain(value: Any) -> bytes:
    """Pickle instructions for a number, string or tuple, without the leading PROTO and the closing STOP."""
    return pickle.dumps(value, protocol=2)[2:-1]


def _pickled_global(name: str) -> bytes:
    return pickle.GLOBAL + name.replace(" ", "\n").encode() + b"\n"


def _pickled_call(function: str, args: bytes) -> bytes:
    return _pickled_global(function) + pickle.MARK + args + pickle.TUPLE + pickle.REDUCE


def _pickled_tensor(name: str, array: np.ndarray, *, key: str) -> bytes:
    dtype = next((n for n, d in DTYPES.items() if d == array.dtype), None)
    if dtype is None:
        raise CheckpointError(f"tensor {name!r} has dtype {array.dtype}, which PyTorch cannot store")
    storage_class = next((f"torch {n}" for n, d in STORAGES.items() if d == array.dtype), None)
    numel = array.size if storage_class else array.nbytes
    reference = _plain("storage") + _pickled_global(storage_class or "torch.storage UntypedStorage")
    reference += _plain(key) + _plain("cpu") + _plain(numel)
    strides = tuple(math.prod(array.shape[axis + 1 :]) for axis in range(array.ndim))
    args = pickle.MARK + reference + pickle.TUPLE + pickle.BINPERSID
    args += _plain(0) + _plain(array.shape) + _plain(strides)
    args += _plain(False) + _pickled_call("collections OrderedDict", b"")
    if storage_class:
        return _pickled_call("torch._utils _rebuild_tensor_v2", args)
    return _pickled_call("torch._utils _rebuild_tensor_v3", args + _pickled_global(f"torch {dtype}"))
