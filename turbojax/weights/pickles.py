"""Reads pickles that hold containers, numbers, strings and PyTorch tensors, and runs nothing.

A pickle is a program, and the usual unpickler runs it. Here it is only tokenized (`pickletools.genops` runs nothing)
and a small stack machine builds dictionaries, lists, tuples, numbers, strings and tensor records from it. There is no
way to import or call anything, so a hostile file can at worst be refused. What it may ask for is bounded: the length
of the program and its number of instructions, each of which makes one object and copies none.
"""

import pickletools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from turbojax.errors import CheckpointError, quoted
from turbojax.weights import safetensors

MAX_BYTES, MAX_INSTRUCTIONS = 2**24, 500_000  # a checkpoint of 1,000 tensors has 200 kB and 45,000 instructions
MAX_AXES = 64  # of a NumPy array

# By PyTorch's names (as in `torch.bfloat16`), which are NumPy's.
DTYPES: dict[str, np.dtype] = {dtype.name: dtype for dtype in safetensors.DTYPES.values()}

# Only the older dtypes have a storage class; tensors of the others name their dtype and use UntypedStorage.
_STORED = {
    **{"Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Long": "int64"},
    **{"Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool"},
}
STORAGES: dict[str, np.dtype] = {f"{kind}Storage": DTYPES[name] for kind, name in _STORED.items()}


class Global(NamedTuple):
    """A Python object the pickle names; only its name is known here."""

    name: str


class Storage(NamedTuple):
    """Numbers in an entry of the zip file."""

    key: str
    dtype: np.dtype
    numel: int


class Tensor(NamedTuple):
    """A view of a storage; offset and strides count elements of dtype."""

    storage: Storage
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
_DTYPE_OF = (
    {f"torch.{name}": dtype for name, dtype in DTYPES.items()}
    | {f"torch.{name}": dtype for name, dtype in STORAGES.items()}
    | {f"torch.{module}UntypedStorage": DTYPES["uint8"] for module in ("", "storage.")}
)

_LITERALS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES"),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLE_SIZES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def decode(where: Path, program: bytes) -> Any:
    """Returns the value of a pickle made of plain containers and tensors (`Tensor`).

    Raises CheckpointError for anything else, by name; what is damaged may also raise what `pickletools` does.
    """
    if len(program) > MAX_BYTES:
        raise CheckpointError(
            f"{where} has a pickle of {len(program)} bytes, more than any of weights has; nothing was run"
        )
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def pop(count: int) -> list[Any]:
        if not 0 <= count <= len(stack):
            raise IndexError("pickle stack is empty")
        items = stack[len(stack) - count :]
        del stack[len(stack) - count :]
        return items

    def pop_mark() -> list[Any]:
        return pop(len(stack) - marks.pop())

    arg: Any
    for number, (opcode, arg, _) in enumerate(pickletools.genops(program)):
        if number == MAX_INSTRUCTIONS:
            raise _refusal(where, f"for more than {number} instructions")
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
            case "APPEND" | "APPENDS" as name:
                _extend(stack, pop(1) if name == "APPEND" else pop_mark())
            case "EMPTY_DICT":
                stack.append({})
            case "SETITEM" | "SETITEMS" as name:
                _update(stack, pop(2) if name == "SETITEM" else pop_mark())
            case "GLOBAL" | "STACK_GLOBAL" as name:
                stack.append(_global(where, *(arg.split(" ", 1) if name == "GLOBAL" else pop(2))))
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
    # Hashing a deeply nested tuple can take for ever, and large integers can all have one hash.
    if not all(type(key) is str or (type(key) is int and key.bit_length() < 64) for key in items[::2]):
        raise TypeError("a dictionary key is not a string or a number of 64 bits")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if key in stack[-1]:
            raise ValueError(f"{quoted(key)} is given twice")
        stack[-1][key] = value


def _global(where: Path, module: Any, name: Any) -> Global:
    if type(module) is not str or type(name) is not str:
        raise _refusal(where, "for an object whose name is not text")
    full = f"{module}.{name}"
    if full not in _CALLABLES and full not in _DTYPE_OF:
        raise _refusal(where, f"to run {quoted(full)}")
    return Global(full)


def _dtype(where: Path, named: Any) -> np.dtype:
    if not isinstance(named, Global) or named.name not in _DTYPE_OF:
        raise CheckpointError(f"{where} is damaged: a dtype or storage class is missing; download it again")
    return _DTYPE_OF[named.name]


def _storage(where: Path, reference: Any) -> Storage:
    kind, storage_class, key, _, numel = reference if type(reference) is tuple and len(reference) == 5 else (None,) * 5
    if kind != "storage" or type(key) is not str or type(numel) is not int or numel < 0:
        raise CheckpointError(f"{where} is damaged: bad storage reference; download it again")
    return Storage(key, _dtype(where, storage_class), numel)


def _call(where: Path, function: Any, args: Any) -> Any:
    """Returns what the named PyTorch function would, for the few names that `_global` lets through."""
    match function, args:
        case Global("collections.OrderedDict"), ():
            return {}
        case Global("torch.Size"), (tuple() | list() as sizes,):
            return _axes(where, sizes)
        case Global("torch.device"), _:
            return None
        case Global("torch._utils._rebuild_parameter"), (Tensor() as tensor, *_):
            return tensor
        case Global("torch._utils._rebuild_tensor_v2"), (Storage() as storage, offset, shape, strides, *_):
            return Tensor(storage, storage.dtype, offset, _axes(where, shape), _axes(where, strides))
        case Global("torch._utils._rebuild_tensor_v3"), (Storage() as storage, offset, shape, strides, _, _, dtype, *_):
            return Tensor(storage, _dtype(where, dtype), offset, _axes(where, shape), _axes(where, strides))
    called = function.name if isinstance(function, Global) else type(function).__name__
    raise _refusal(where, f"to call {called!r} with unexpected arguments")


def _axes(where: Path, sizes: Any) -> tuple[int, ...]:
    """A shape or strides; a copy of what may be shared, so its length is bounded."""
    listed = isinstance(sizes, tuple | list) and len(sizes) <= MAX_AXES
    if not listed or not all(type(n) is int and n >= 0 for n in sizes):
        raise CheckpointError(f"{where} is damaged: {quoted(sizes)} is no shape and no strides; download it again")
    return tuple(sizes)
