"""Reading and writing checkpoint files: safetensors, and PyTorch's zip format without PyTorch.

Reading gives read-only views of the memory-mapped file: opening a 28 GB checkpoint takes no memory, and a
tensor is read from disk when it is used. Every bad file gives one CheckpointError that says what to do.
"""

import contextlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from turbojax.errors import CheckpointError, quoted
from turbojax.files import user_path, whole_file
from turbojax.json_reader import FileName, Map, Object, read_json
from turbojax.weights import pth, safetensors
from turbojax.weights.mapped import AGAIN, map_file
from turbojax.weights.safetensors import ShapeDtype

INDEX_SUFFIX = ".safetensors.index.json"
PTH_SUFFIXES = (".pth", ".pt", ".bin")
INDEX = Object({"weight_map": Map(FileName())}, others="left out")
MAX_TENSORS, MAX_NAME = 20_000, 500  # published checkpoints have some 1,000, with names of some 100 characters


def read_tensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads all tensors of a checkpoint by name, as read-only views of the memory-mapped file.

    `path` is a .safetensors file, a *.safetensors.index.json of a sharded one, a .pth, .pt or .bin file of
    PyTorch 1.6 or later, or a folder with one index or one .safetensors file. bfloat16 and float8 come as
    ml_dtypes. The file must not be changed while the views are in use.

    Raises CheckpointError if the file is missing, damaged, not a checkpoint, or a pickle that asks for more
    than tensors.
    """
    path = user_path(path)
    with as_checkpoint_error(path):
        path = checkpoint_file(path)
        if path.name.endswith(INDEX_SUFFIX):
            return _read_sharded(path)
        if path.suffix == ".safetensors":
            return _checked(path, safetensors.parse(path, map_file(path)))
        if path.suffix in PTH_SUFFIXES:
            return _checked(path, _read_pth(path))
    raise CheckpointError(
        f"{path} has the unknown extension {path.suffix!r}; give a .safetensors, *{INDEX_SUFFIX}, "
        f"{', '.join(PTH_SUFFIXES)} file or a folder with one"
    )


@contextlib.contextmanager
def as_checkpoint_error(path: Path) -> Iterator[None]:
    """Turns whatever a parser raises on a damaged file into one CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"{error.filename or path} does not exist") from error
    except PermissionError as error:
        raise CheckpointError(f"{error.filename or path} may not be read; check its permissions") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {reason(error)}") from error
    except Exception as error:  # the file decides which of the many parser errors comes; none is a bug's trace
        raise CheckpointError(f"{path} is damaged or cut off ({reason(error)}); {AGAIN}") from error


def reason(error: BaseException) -> str:
    """The first line of an error, or the system's own words where TensorStore has put them behind paths."""
    if error.__cause__ and "See full TensorStore details" in str(error):  # Orbax', with pages of settings
        error = error.__cause__
    text = str(error).strip()
    if wrapped := re.search(r": ([^:]+) \[os_error_code", text):
        return wrapped[1]
    line = (text.splitlines() or [type(error).__name__])[0][:200]
    return line if line.isprintable() else ascii(line)[1:-1]


def checkpoint_file(folder: Path) -> Path:
    """Finds the one checkpoint of a folder; returns a path that is no folder as it is. Raises CheckpointError."""
    if not folder.is_dir():
        return folder
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_file() and entry.name[0] != ".")
    indexes = [name for name in names if name.endswith(INDEX_SUFFIX)]
    singles = [name for name in names if name.endswith(".safetensors")]
    chosen = indexes or singles
    if len(chosen) == 1:
        return folder / chosen[0]
    others = [name for name in names if name.endswith(PTH_SUFFIXES)]
    found = ", ".join(chosen or others or names) or "nothing"
    raise CheckpointError(
        f"{folder} must contain one *{INDEX_SUFFIX} or one .safetensors file, found {found}; "
        "give the path of the file to read"
    )


def _checked(path: Path, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the tensors; raises CheckpointError for too many or too long names, which would take time everywhere."""
    if len(tensors) > MAX_TENSORS:
        raise CheckpointError(f"{path} holds {len(tensors)} tensors; a checkpoint has {MAX_TENSORS} at most")
    if long := next((name for name in tensors if len(name) > MAX_NAME), None):
        raise CheckpointError(f"{path} holds a tensor with a name of {len(long)} characters, {quoted(long)}; {AGAIN}")
    return tensors


def read_index(index: Path) -> dict[str, str]:
    """Reads the file of each tensor from an index of shards, which lie beside it; raises CheckpointError."""
    return read_json(index, INDEX, suggestion=AGAIN)["weight_map"]


def _read_sharded(index: Path) -> dict[str, np.ndarray]:
    map_file(index)  # words what is no checkpoint at all
    shard_of = read_index(index)
    shards = sorted(set(shard_of.values()))
    if missing := [shard for shard in shards if not (index.parent / shard).exists()]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"{index} needs {quoted(missing[0])}{more}, not found next to it; {AGAIN}")
    tensors: dict[str, np.ndarray] = {}
    for shard in shards:
        with as_checkpoint_error(index.parent / shard):
            part = safetensors.parse(index.parent / shard, map_file(index.parent / shard))
        if twice := sorted(part.keys() & tensors.keys()):
            raise CheckpointError(f"{index}: {shard} repeats {twice[0]!r} of another shard; {AGAIN}")
        if lost := [name for name, home in shard_of.items() if home == shard and name not in part]:
            raise CheckpointError(f"{index}: {shard} lacks {lost[0]!r}; {AGAIN}")
        tensors |= part
    return _checked(index, tensors)


def _read_pth(path: Path) -> dict[str, np.ndarray]:
    data = map_file(path)
    magic = data[:4].tobytes()
    if magic[:1] == b"\x80":
        raise CheckpointError(
            f"{path} is a bare pickle, the PyTorch format before 1.6; save it again with a recent PyTorch "
            "or convert it to safetensors"
        )
    if magic != b"PK\x03\x04":
        raise CheckpointError(f"{path} is not a PyTorch checkpoint (it starts with {magic!r}); {AGAIN}")
    tensors, stored = pth.parse(path, data)
    data.stored = sorted(stored)
    return tensors


def file_metadata(path: str | os.PathLike) -> dict[str, str]:
    """Reads the text entries in the header of a safetensors file; empty for other files."""
    path = user_path(path)
    if path.suffix != ".safetensors":
        return {}
    with as_checkpoint_error(path):
        return safetensors.read_header(path, map_file(path))[1]


def write_safetensors(
    path: str | os.PathLike,
    tensors: Iterable[tuple[str, np.ndarray]],
    specs: Mapping[str, ShapeDtype],
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes named arrays as they come; one array in memory at a time, and `path` appears only when complete.

    The header comes before the data, so `specs` gives every shape and dtype in the order of `tensors`.
    Raises CheckpointError if the tensors are not exactly those, UserError if the file cannot be written.
    """
    header = safetensors.make_header(specs, metadata)
    with whole_file(user_path(path), durable=True) as part, part.open("wb") as file:
        file.write(header)
        expected = iter(specs.items())
        for name, value in tensors:
            wanted, spec = next(expected, (None, None))
            array = np.asarray(value, order="C")
            if name != wanted or spec is None:
                raise CheckpointError(f"{path}: tensor {name!r} came where specs has {wanted!r}")
            if array.shape != tuple(spec.shape) or array.dtype != spec.dtype:
                raise CheckpointError(f"{path}: {name!r} is {described(array)}, specs has {described(spec)}")
            file.write(array.reshape(-1).view(np.uint8).data)
        if missing := [name for name, _ in expected]:
            raise CheckpointError(f"{path}: {len(missing)} tensors of specs did not come, first {missing[0]!r}")


def write_pth(path: str | os.PathLike, tensors: Iterable[tuple[str, np.ndarray]]) -> None:
    """Writes named arrays as a PyTorch checkpoint, as they come; `path` appears only when complete.

    torch.load(path, weights_only=True) gives an OrderedDict of CPU tensors. Raises CheckpointError for a
    repeated name or a dtype PyTorch lacks, UserError if the file cannot be written.
    """
    with whole_file(user_path(path), durable=True) as part, part.open("wb") as file:
        pth.write(file, tensors)


def described(spec: ShapeDtype) -> str:
    """An array's dtype and shape, as in float32(2, 3)."""
    return f"{np.dtype(spec.dtype)}{tuple(spec.shape)}"
