"""The safetensors format: a header in JSON that says which bytes of the file are which tensor."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np
from safetensors import safe_open

from turbojax.errors import CheckpointError, quoted
from turbojax.json_reader import unique

# NumPy's names of dtypes, which are PyTorch's, by the codes of the safetensors header.
_NAMES = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"},
    **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8"},
    **{"U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool"},
}
DTYPES: dict[str, np.dtype] = {code: jnp.dtype(name) for code, name in _NAMES.items()}
MAX_HEADER = 2**23  # bytes, or an eighth of a larger file; it takes ten times as much once it is parsed


class ShapeDtype(Protocol):
    """Anything with a shape and a dtype, such as jax.ShapeDtypeStruct or an array."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> Any: ...


def read_header(where: Path, data: np.ndarray) -> tuple[dict[str, Any], dict[str, str], int]:
    """Reads the header of the file `where`: its tensors, its metadata, and where the tensors' bytes start.

    data: the file's bytes, uint8. Raises CheckpointError for a header out of proportion, what the library or the parser
    of JSON raise for a damaged one.
    """
    length = int.from_bytes(data[:8].tobytes(), "little")
    if length > max(MAX_HEADER, len(data) // 8):
        raise CheckpointError(
            f"{where} has a header of {length} bytes, more than any of weights has; download it again"
        )
    # The library checks types, sizes, gaps, overlaps and the file's length.
    with safe_open(str(where), framework="np"):
        pass
    header = json.loads(data[8 : 8 + length].tobytes(), object_pairs_hook=unique)
    metadata = header.pop("__metadata__", None) or {}
    return header, metadata, 8 + length


def parse(where: Path, data: np.ndarray) -> dict[str, np.ndarray]:
    """Returns tensors of the file `where` as views into `data`, its mapped bytes (uint8); raises as `read_header` does.

    The library itself has no bfloat16 or float8 arrays for NumPy.
    """
    header, _, start = read_header(where, data)
    tensors = {}
    for name, entry in header.items():
        dtype = DTYPES.get(entry["dtype"])
        if dtype is None:
            found = f"{quoted(name)} has dtype {entry['dtype']}"
            raise CheckpointError(f"{where}: {found}; readable are {', '.join(DTYPES)}")
        tensors[name] = np.ndarray(entry["shape"], dtype, data, start + entry["data_offsets"][0])
    return tensors


def make_header(specs: Mapping[str, ShapeDtype], metadata: Mapping[str, str] | None) -> bytes:
    """Makes the header of a file of tensors with these shapes and dtypes, which follow in this order without a gap."""
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, spec in specs.items():
        dtype = np.dtype(spec.dtype)
        if dtype not in codes or name == "__metadata__":
            raise CheckpointError(f"safetensors cannot hold {quoted(name)} of dtype {dtype}")
        start, end = end, end + int(np.prod(spec.shape, dtype=object)) * dtype.itemsize
        header[name] = {"dtype": codes[dtype], "shape": list(spec.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
