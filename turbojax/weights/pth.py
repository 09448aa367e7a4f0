"""PyTorch's zip checkpoint format (PyTorch 1.6 and later), read and written without PyTorch.

Such a file is an uncompressed zip: `<prefix>/data.pkl` is a pickle of the dictionary, and each storage it
refers to lies as raw little-endian bytes in `<prefix>/data/<key>`.

A pickle is a program, and the usual unpickler runs it. Here it is only tokenized (`pickletools.genops` runs
nothing) and a small stack machine builds dictionaries, lists, tuples, numbers, strings and tensor records
from it. There is no way to import or call anything, so a hostile file can at worst be refused.

`turbojax.weights.io` has the functions to use: they open the files and word the errors of damaged ones.
"""

import math
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from turbojax.errors import CheckpointError

# PyTorch's names (as in `torch.bfloat16`).
DTYPES: dict[str, np.dtype] = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "int64": np.dtype(np.int64),
    "int32": np.dtype(np.int32),
    "int16": np.dtype(np.int16),
    "int8": np.dtype(np.int8),
    "uint64": np.dtype(np.uint64),
    "uint32": np.dtype(np.uint32),
    "uint16": np.dtype(np.uint16),
    "uint8": np.dtype(np.uint8),
    "bool": np.dtype(np.bool_),
}

# Only the older dtypes have a storage class; tensors of the others name their dtype and use UntypedStorage.
STORAGES: dict[str, np.dtype] = {
    "DoubleStorage": DTYPES["float64"],
    "FloatStorage": DTYPES["float32"],
    "HalfStorage": DTYPES["float16"],
    "BFloat16Storage": DTYPES["bfloat16"],
    "LongStorage": DTYPES["int64"],
    "IntStorage": DTYPES["int32"],
    "ShortStorage": DTYPES["int16"],
    "CharStorage": DTYPES["int8"],
    "ByteStorage": DTYPES["uint8"],
    "BoolStorage": DTYPES["bool"],
}

# Keys under which training scripts commonly put the weights.
WRAPPERS = ("state_dict", "model", "model_state", "module", "ema")


@dataclass(frozen=True)
class _Global:
    """A Python object the pickle names; only its name is known here."""

    name: str


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: np.dtype
    numel: int


@dataclass(frozen=True)
class _Tensor:
    """offset and strides count elements of dtype."""

    storage: _Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


_CALLABLES = {
    "collections.OrderedDict",
    "torch.Size",
    "torch.device",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
    "torch._utils._rebuild_parameter",
}
_GLOBAL_DTYPES = (
    {f"torch.{name}": dtype for name, dtype in DTYPES.items()}
    | {f"torch.{name}": dtype for name, dtype in STORAGES.items()}
    | {f"torch.{module}UntypedStorage": DTYPES["uint8"] for module in ("", "storage.")}
)

_LITERALS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES"),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLE_SIZES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def parse(where: Path, data: np.memmap) -> dict[str, np.ndarray]:
    """Tensors of the zip checkpoint `where` as read-only views into `data`, its mapped bytes (uint8).

    Raises CheckpointError if the pickle asks for anything but plain tensors or a tensor lies outside its
    storage. A damaged file may also raise what `zipfile`, `pickletools`, `struct` or numpy raise.
    """
    program, storages = _entries(where, data)
    records = _pick_tensors(where, _decode_pickle(where, program))
    return {name: _view(where, name, record, storages, data) for name, record in records.items()}


def _entries(where: Path, data: np.memmap) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The bytes of data.pkl, and the (start, size) in bytes of each storage by its key."""
    with zipfile.ZipFile(where) as archive:
        infos = archive.infolist()
        names = [info.filename for info in infos]
        pickles = [name for name in names if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise CheckpointError(f"{where} is a zip file but not a PyTorch checkpoint: {len(pickles)} data.pkl in it")
        if len(set(names)) != len(names):
            raise CheckpointError(f"{where} holds several entries of one name; download it again")
        if any(info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 for info in infos):
            raise CheckpointError(
                f"{where} is a compressed zip or a TorchScript program, not a plain tensor file; "
                "write its state_dict with torch.save"
            )
        spans = {info.filename: _span(where, info, data) for info in infos}
        prefix = pickles[0].removesuffix("data.pkl")
        byteorder = archive.read(f"{prefix}byteorder") if f"{prefix}byteorder" in spans else b"little"
        if byteorder != b"little":
            raise CheckpointError(f"{where} has byte order {byteorder[:20]!r}; save it on a little-endian machine")
        program = archive.read(pickles[0])
    folder = f"{prefix}data/"
    return program, {n.removeprefix(folder): span for n, span in spans.items() if n.startswith(folder)}


def _span(where: Path, info: zipfile.ZipInfo, data: np.memmap) -> tuple[int, int]:
    """(start, size) of an entry's bytes; the local header's padding differs from the central directory's."""
    magic, name_length, extra_length = struct.unpack_from("<4s22xHH", data.data, info.header_offset)
    start = info.header_offset + 30 + name_length + extra_length
    if magic != b"PK\x03\x04" or start + info.file_size > len(data):
        raise CheckpointError(f"{where} is damaged: {info.filename!r} lies outside the file; download it again")
    return start, info.file_size


def _decode_pickle(where: Path, program: bytes) -> Any:
    """The value of a pickle made of plain containers and tensors; anything else is refused by name."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def pop(count: int) -> list[Any]:
        if count > len(stack):
            raise IndexError("pickle stack is empty")
        items = stack[len(stack) - count :]
        del stack[len(stack) - count :]
        return items

    def pop_mark() -> list[Any]:
        return pop(len(stack) - marks.pop())

    arg: Any
    for opcode, arg, _ in pickletools.genops(program):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                break
            case name if name in _LITERALS:
                stack.append(arg)
            case name if name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            case "BINPUT" | "LONG_BINPUT":
                memo[arg] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[arg])
            case "MARK":
                marks.append(len(stack))
            case name if name in _TUPLE_SIZES:
                stack.append(tuple(pop(_TUPLE_SIZES[name])))
            case "TUPLE":
                stack.append(tuple(pop_mark()))
            case "EMPTY_LIST":
                stack.append([])
            case "APPEND":
                _extend(stack, pop(1))
            case "APPENDS":
                _extend(stack, pop_mark())
            case "EMPTY_DICT":
                stack.append({})
            case "SETITEM":
                _update(stack, pop(2))
            case "SETITEMS":
                _update(stack, pop_mark())
            case "GLOBAL":
                stack.append(_global(where, arg.replace(" ", ".", 1)))
            case "STACK_GLOBAL":
                stack.append(_global(where, "{}.{}".format(*pop(2))))
            case "BINPERSID":
                stack.append(_storage(where, *pop(1)))
            case "REDUCE":
                stack.append(_call(where, *pop(2)))
            case "BUILD":
                pop(1)  # attributes, such as a state dict's _metadata: not weights
                if not isinstance(stack[-1], dict):
                    raise _refusal(where, "to set the state of an object")
            case name:
                raise _refusal(where, f"for the pickle instruction {name}")
    return stack.pop()


def _refusal(where: Path, request: str) -> CheckpointError:
    return CheckpointError(f"{where} asks {request}; it is not a plain tensor file. Nothing was run.")


def _extend(stack: list[Any], items: list[Any]) -> None:
    if not isinstance(stack[-1], list):
        raise TypeError("APPENDS to something not a list")
    stack[-1].extend(items)


def _update(stack: list[Any], items: list[Any]) -> None:
    if not isinstance(stack[-1], dict):
        raise TypeError("SETITEMS to something not a dictionary")
    # Hashing a deeply nested tuple can take for ever.
    if not all(isinstance(key, str | int | float | None) for key in items[::2]):
        raise TypeError("a dictionary key is not a string or number")
    stack[-1].update(zip(items[::2], items[1::2], strict=True))


def _global(where: Path, name: str) -> _Global:
    if name not in _CALLABLES and name not in _GLOBAL_DTYPES:
        raise _refusal(where, f"to run {name!r}")
    return _Global(name)


def _dtype(where: Path, named: Any) -> np.dtype:
    if not isinstance(named, _Global) or named.name not in _GLOBAL_DTYPES:
        raise CheckpointError(f"{where} is damaged: a dtype or storage class is missing; download it again")
    return _GLOBAL_DTYPES[named.name]


def _storage(where: Path, reference: Any) -> _Storage:
    kind, storage_class, key, _, numel = reference
    if kind != "storage" or not isinstance(key, str) or not isinstance(numel, int) or numel < 0:
        raise CheckpointError(f"{where} is damaged: bad storage reference; download it again")
    return _Storage(key, _dtype(where, storage_class), numel)


def _call(where: Path, function: Any, args: Any) -> Any:
    """What the named PyTorch function would return, for the few names that `_global` lets through."""
    match function, args:
        case _Global("collections.OrderedDict"), ():
            return {}
        case _Global("torch.Size"), (tuple() | list(),):
            return tuple(args[0])
        case _Global("torch.device"), _:
            return None
        case _Global("torch._utils._rebuild_parameter"), (_Tensor() as tensor, *_):
            return tensor
        case _Global("torch._utils._rebuild_tensor_v2"), (_Storage() as storage, offset, shape, strides, *_):
            return _Tensor(storage, storage.dtype, offset, tuple(shape), tuple(strides))
        case (
            _Global("torch._utils._rebuild_tensor_v3"),
            (_Storage() as storage, offset, shape, strides, _, _, dtype, *_),
        ):
            return _Tensor(storage, _dtype(where, dtype), offset, tuple(shape), tuple(strides))
    called = function.name if isinstance(function, _Global) else type(function).__name__
    raise _refusal(where, f"to call {called!r} with unexpected arguments")


def _pick_tensors(where: Path, tree: Any) -> dict[str, _Tensor]:
    """The tensors of the one wrapper the dictionary has, else its own."""

    def tensors(value: Any) -> dict[str, _Tensor]:
        items = value.items() if isinstance(value, dict) else ()
        return {name: item for name, item in items if isinstance(name, str) and isinstance(item, _Tensor)}

    wrapped = {key: tensors(tree[key]) for key in WRAPPERS if isinstance(tree, dict) and key in tree}
    wrapped = {key: found for key, found in wrapped.items() if found}
    if len(wrapped) > 1:
        raise CheckpointError(
            f"{where} holds several sets of weights ({', '.join(wrapped)}); save the one to use as a file of its own"
        )
    found = next(iter(wrapped.values()), None) or tensors(tree)
    if not found:
        kind = type(tree).__name__.strip("_").lower()
        keys = f" with the keys {list(tree)[:8]}" if isinstance(tree, dict) else ""
        raise CheckpointError(f"{where} holds a {kind}{keys}, not a dictionary of tensors")
    return found


def _view(where: Path, name: str, tensor: _Tensor, storages: dict[str, tuple[int, int]], data: np.memmap) -> np.ndarray:
    storage, size = tensor.storage, tensor.dtype.itemsize
    start, nbytes = storages.get(storage.key, (0, -1))
    if storage.numel * storage.dtype.itemsize > nbytes:
        raise CheckpointError(f"{where} is damaged: the data of {name!r} is missing or too short; download it again")
    numbers = (tensor.offset, *tensor.shape, *tensor.strides)
    if len(tensor.shape) != len(tensor.strides) or not all(type(n) is int and n >= 0 for n in numbers):
        raise CheckpointError(f"{where} is damaged: the shape or strides of {name!r} are not valid")
    if 0 in tensor.shape:
        return np.ndarray(tensor.shape, tensor.dtype, data, start)
    last = tensor.offset + sum((d - 1) * s for d, s in zip(tensor.shape, tensor.strides, strict=True))
    if (last + 1) * size > storage.numel * storage.dtype.itemsize:
        raise CheckpointError(f"{where} is damaged: {name!r} reaches beyond its storage")
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
