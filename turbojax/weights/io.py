"""Reading and writing checkpoint files: safetensors, PyTorch's zip format (without PyTorch) and Orbax.

Reading gives read-only views of the memory-mapped file: opening a 28 GB checkpoint takes no memory, and a
tensor is read from disk when it is used. Every bad file gives one CheckpointError that says what to do.
"""

import contextlib
import functools
import json
import logging as standard_logging
import mmap
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import jax
import ml_dtypes
import numpy as np
from absl import logging
from safetensors import safe_open

from turbojax.errors import CheckpointError
from turbojax.files import whole_file
from turbojax.weights import pth

# The dtype codes of the safetensors header.
SAFETENSORS_DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
INDEX_SUFFIX = ".safetensors.index.json"
PTH_SUFFIXES = (".pth", ".pt", ".bin")
CHUNK_BYTES = 2**25  # of Orbax
_AGAIN = "download it again, for example with `hf download`"


class ShapeDtype(Protocol):
    """Anything with a shape and a dtype, such as jax.ShapeDtypeStruct or an array."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> Any: ...


def read_tensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """All tensors of a checkpoint by name, as read-only views of the memory-mapped file.

    `path` is a .safetensors file, a *.safetensors.index.json of a sharded one, a .pth, .pt or .bin file of
    PyTorch 1.6 or later, or a folder with one index or one .safetensors file. bfloat16 and float8 come as
    ml_dtypes. The file must not be changed while the views are in use.

    Raises CheckpointError if the file is missing, damaged, not a checkpoint, or a pickle that asks for more
    than tensors.
    """
    path = Path(path)
    with _one_sentence(path):
        if path.is_dir():
            path = _file_of_folder(path)
        if path.name.endswith(INDEX_SUFFIX):
            return _read_sharded(path)
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        if path.suffix in PTH_SUFFIXES:
            return _read_pth(path)
    raise CheckpointError(
        f"{path} has the unknown extension {path.suffix!r}; give a .safetensors, *{INDEX_SUFFIX}, "
        f"{', '.join(PTH_SUFFIXES)} file or a folder with one"
    )


@contextlib.contextmanager
def _one_sentence(path: Path) -> Iterator[None]:
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
        raise CheckpointError(f"{path} is damaged or cut off ({reason(error)}); {_AGAIN}") from error


def reason(error: BaseException) -> str:
    """The first line of an error, or the system's own words where TensorStore has put them behind paths."""
    text = str(error).strip()
    if wrapped := re.search(r": ([^:]+) \[os_error_code", text):
        return wrapped[1]
    return (text.splitlines() or [type(error).__name__])[0][:200]


def _file_of_folder(folder: Path) -> Path:
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


def _map(path: Path) -> np.memmap:
    """The file's bytes, uint8, read-only; refuses what is plainly not a checkpoint."""
    with path.open("rb") as file:
        head = file.read(512).lstrip().lower()
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path} is empty; {_AGAIN}")
    if head.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        raise CheckpointError(
            f"{path} looks like an HTML page, not a checkpoint: the download was probably refused; {_AGAIN}"
        )
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a git-lfs pointer, not the checkpoint itself; run `git lfs pull` or {_AGAIN}")
    return np.memmap(path, np.uint8, mode="r")


def _load_json(text: bytes) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if len(set(keys)) != len(keys):
            raise ValueError(f"{max(keys, key=keys.count)!r} is given twice in its header")
        return dict(pairs)

    return json.loads(text, object_pairs_hook=unique)


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    data = _map(path)
    # The library checks sizes, overlaps and the file's length; it has no bfloat16 or float8 arrays for numpy.
    with safe_open(str(path), framework="np"):
        pass
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    header = _load_json(data[8:start].tobytes())
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in SAFETENSORS_DTYPES:
            raise CheckpointError(
                f"{path}: {name!r} has dtype {entry['dtype']}; readable are {', '.join(SAFETENSORS_DTYPES)}"
            )
        dtype = SAFETENSORS_DTYPES[entry["dtype"]]
        tensors[name] = np.ndarray(entry["shape"], dtype, data, start + entry["data_offsets"][0])
    return tensors


def _read_sharded(index: Path) -> dict[str, np.ndarray]:
    shard_of = _load_json(_map(index).tobytes())["weight_map"]
    shards = sorted(set(shard_of.values()))
    if foreign := [shard for shard in shards if Path(shard).name != shard]:
        raise CheckpointError(f"{index} names shards outside its own folder: {', '.join(map(repr, foreign))}")
    if missing := [shard for shard in shards if not (index.parent / shard).exists()]:
        raise CheckpointError(f"{index} needs {', '.join(map(repr, missing))}, not found next to it; {_AGAIN}")
    tensors: dict[str, np.ndarray] = {}
    for shard in shards:
        with _one_sentence(index.parent / shard):
            part = _read_safetensors(index.parent / shard)
        if twice := sorted(part.keys() & tensors.keys()):
            raise CheckpointError(f"{index}: {shard} repeats {twice[0]!r} of another shard; {_AGAIN}")
        if lost := [name for name, home in shard_of.items() if home == shard and name not in part]:
            raise CheckpointError(f"{index}: {shard} lacks {lost[0]!r}; {_AGAIN}")
        tensors |= part
    return tensors


def _read_pth(path: Path) -> dict[str, np.ndarray]:
    data = _map(path)
    magic = data[:4].tobytes()
    if magic[:1] == b"\x80":
        raise CheckpointError(
            f"{path} is a bare pickle, the PyTorch format before 1.6; save it again with a recent PyTorch "
            "or convert it to safetensors"
        )
    if magic != b"PK\x03\x04":
        raise CheckpointError(f"{path} is not a PyTorch checkpoint (it starts with {magic!r}); {_AGAIN}")
    return pth.parse(path, data)


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
    header = _safetensors_header(specs, metadata)
    with whole_file(Path(path), durable=True) as part, part.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        expected = iter(specs.items())
        for name, value in tensors:
            wanted, spec = next(expected, (None, None))
            array = np.asarray(value, order="C")
            if name != wanted or spec is None:
                raise CheckpointError(f"{path}: tensor {name!r} came where specs has {wanted!r}")
            if array.shape != tuple(spec.shape) or array.dtype != spec.dtype:
                raise CheckpointError(
                    f"{path}: {name!r} is {_described_leaf(array)}, specs has {_described_leaf(spec)}"
                )
            file.write(array.reshape(-1).view(np.uint8).data)
        if missing := [name for name, _ in expected]:
            raise CheckpointError(f"{path}: {len(missing)} tensors of specs did not come, first {missing[0]!r}")


def _safetensors_header(specs: Mapping[str, ShapeDtype], metadata: Mapping[str, str] | None) -> bytes:
    codes = {dtype: code for code, dtype in SAFETENSORS_DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, spec in specs.items():
        dtype = np.dtype(spec.dtype)
        if dtype not in codes or name == "__metadata__":
            raise CheckpointError(f"safetensors cannot hold {name!r} of dtype {dtype}")
        start, end = end, end + int(np.prod(spec.shape, dtype=object)) * dtype.itemsize
        header[name] = {"dtype": codes[dtype], "shape": list(spec.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def write_pth(path: str | os.PathLike, tensors: Iterable[tuple[str, np.ndarray]]) -> None:
    """Writes named arrays as a PyTorch checkpoint, as they come; `path` appears only when complete.

    torch.load(path, weights_only=True) gives an OrderedDict of CPU tensors. Raises CheckpointError for a
    repeated name or a dtype PyTorch lacks, UserError if the file cannot be written.
    """
    with whole_file(Path(path), durable=True) as part, part.open("wb") as file:
        pth.write(file, tensors)


@functools.cache
def orbax() -> ModuleType:
    """Orbax, without its reports: 25 lines a file, and tracebacks beside the error that it raises."""
    import orbax.checkpoint as ocp  # takes a second or more to import

    logging.get_absl_logger().addFilter(lambda record: "orbax" not in Path(record.pathname).parts)
    standard_logging.getLogger("asyncio").addFilter(lambda record: "orbax" not in record.getMessage())
    hook = sys.unraisablehook

    def without_coroutines(unraisable: Any) -> None:
        """Of many reads or writes at once the first that fails is raised; the others are told by the collector."""
        code = getattr(unraisable.object, "cr_code", None)
        of_orbax = code is not None and "orbax" in Path(code.co_filename).parts
        if not of_orbax and str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    sys.unraisablehook = without_coroutines
    warnings.filterwarnings("ignore", message="coroutine '(async_serialize|_read_array)")
    return ocp


def save_orbax(path: str | os.PathLike, tree: Any) -> None:
    """Saves a pytree of arrays as the Orbax checkpoint folder `path`, which appears only when complete.

    Raises CheckpointError if `path` exists or cannot be written.
    """
    ocp = orbax()
    target = Path(os.path.abspath(path))  # Orbax takes no relative paths
    if target.exists():
        raise CheckpointError(f"{path} already exists; remove it or choose another path")
    try:
        # One file a chunk: OCDBT, and chunks as large as their array, take two more copies of it in memory.
        chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), tree)
        with ocp.PyTreeCheckpointer(use_ocdbt=False) as checkpointer:
            checkpointer.save(target, tree, save_args=chunks)
    except (OSError, ValueError) as error:  # TensorStore's are ValueErrors
        raise CheckpointError(f"{path} cannot be written: {reason(error)}") from error


def load_orbax(path: str | os.PathLike, abstract_tree: Any) -> Any:
    """The checkpoint of `save_orbax` as a tree like `abstract_tree`, whose leaves are jax.ShapeDtypeStruct.

    A leaf with a sharding becomes a jax.Array placed by it, one without becomes a numpy array. Raises
    CheckpointError if there is no such checkpoint, it is damaged, or a name, shape or dtype differs.
    """
    ocp = orbax()
    target = Path(os.path.abspath(path))
    if not (target / "_CHECKPOINT_METADATA").exists():
        raise CheckpointError(f"{path} is not an Orbax checkpoint folder")

    def restore_args(leaf: Any) -> Any:
        if leaf.sharding is None:
            return ocp.RestoreArgs(restore_type=np.ndarray)
        return ocp.ArrayRestoreArgs(sharding=leaf.sharding)

    with _one_sentence(target), ocp.PyTreeCheckpointer() as checkpointer:
        saved = checkpointer.metadata(target).item_metadata
        _check_same(target, _described(saved.tree), _described(abstract_tree))
        args = ocp.args.PyTreeRestore(item=abstract_tree, restore_args=jax.tree.map(restore_args, abstract_tree))
        return checkpointer.restore(target, args=args)


def release(tensor: np.ndarray) -> None:
    """Gives the memory of a memory-mapped tensor's file back to the system; it is read again when used again.

    Called after each tensor, so that reading a 28 GB file does not fill 28 GB of this process.
    """
    base: Any = tensor
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, mmap.mmap):
        base.madvise(mmap.MADV_DONTNEED)


def file_metadata(path: str | os.PathLike) -> dict[str, str]:
    """The text entries in the header of a safetensors file; empty for other files."""
    if Path(path).suffix != ".safetensors":
        return {}
    with _one_sentence(Path(path)), safe_open(path, "np") as file:
        return file.metadata() or {}


def _described_leaf(leaf: ShapeDtype) -> str:
    return f"{np.dtype(leaf.dtype)}{tuple(leaf.shape)}"


def _described(tree: Any) -> dict[str, str]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): _described_leaf(leaf) for path, leaf in leaves}


def _check_same(path: Path, saved: dict[str, str], wanted: dict[str, str]) -> None:
    # Orbax itself casts a differing dtype silently and, for numpy leaves, ignores a differing shape.
    names = sorted(saved.keys() | wanted.keys())
    problems = [
        f"{name}: saved {saved.get(name, 'nothing')}, wanted {wanted.get(name, 'nothing')}"
        for name in names
        if saved.get(name) != wanted.get(name)
    ]
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise CheckpointError(f"{path} does not fit: {'; '.join(problems[:8])}{more}")
