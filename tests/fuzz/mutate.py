"""Damage of every kind, drawn from a random number generator."""

import itertools
import json
import pickletools
import struct
from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np

from tests.fuzz.files import Tensors, plain_pickle
from turbojax.weights import safetensors

# Numbers that are just within, just outside and far outside of what fits.
NUMBERS = (
    0,
    1,
    -1,
    2,
    3,
    7,
    64,
    127,
    128,
    255,
    256,
    65535,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**53 + 1,
    2**62,
    2**63,
    10**30,
)
STRINGS = (
    "",
    "x",
    "x" * 70_000,
    "a\nb",
    "\x00",
    "\x1b[31m",
    "../x",
    "/etc/passwd",
    "é\u2028",
    "\ud800",
    "9" * 5000,
    "nan",
)
CODES = (*safetensors.DTYPES, "F4", "C64", "f32", "", "F32 ", "BOOLEAN")


def value(rng: Random) -> Any:
    """Any value of JSON."""
    return rng.choice(
        (
            lambda: rng.choice(NUMBERS),
            lambda: -rng.choice(NUMBERS),
            lambda: rng.choice((0.5, -0.0, 1e-320, 1e308, float("inf"), float("nan"))),
            lambda: rng.choice(STRINGS),
            lambda: rng.choice((None, True, False, [], {}, [[]], [0] * 70, {"a": {"b": []}})),
            lambda: [rng.choice(NUMBERS) for _ in range(rng.randrange(6))],
        )
    )()


def damaged_bytes(rng: Random, content: bytes, *, spans: list[range] | None = None) -> bytes:
    """One to three accidents: wrong bits and bytes, parts missing, doubled or zero; or one, within one of `spans`."""
    out = bytearray(content)
    for _ in range(1 if spans else rng.randrange(1, 4)):
        if not out:
            break
        span = rng.choice(spans) if spans else range(len(out))
        at = rng.choice(span)
        length = min(rng.choice((1, 2, 4, 8, 30, 100)), span.stop - at)
        match rng.randrange(10):
            case 0 | 1 | 2 | 3:
                out[at] ^= 1 << rng.randrange(8)
            case 4:
                out[at] = rng.randrange(256)
            case 5:
                number = struct.pack("<q", min(rng.choice(NUMBERS), 2**63 - 1))[:length]
                out[at : at + len(number)] = number
            case 6:
                del out[at : at + length]
            case 7:
                out[at:at] = rng.choice((out[at : at + length], bytes(length), rng.randbytes(length)))
            case 8:
                out[at : at + length] = bytes(len(out[at : at + length]))
            case 9:
                del out[at:]
    return bytes(out)


def damaged_json(rng: Random, content: Any) -> bytes:
    """Wrong values, names and types at any depth; or text that is no JSON."""
    content = json.loads(json.dumps(content))
    for _ in range(rng.randrange(1, 4)):
        place = content
        while isinstance(place, dict | list) and place:
            key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
            if isinstance(place[key], dict | list) and place[key] and rng.random() < 0.8:
                place = place[key]
                continue
            match rng.randrange(5):
                case 0:
                    del place[key]
                case 1 if isinstance(place, dict):
                    place[rng.choice((*STRINGS[:3], "surprise", "num_heads"))] = place.pop(key)
                case 2 if isinstance(place, dict):
                    place[rng.choice(STRINGS)] = value(rng)
                case _:
                    place[key] = value(rng)
            break
    text = json.dumps(content)
    match rng.randrange(16):
        case 0:
            return damaged_bytes(rng, text.encode())
        case 1:
            return text.encode(rng.choice(("utf-16", "utf-8-sig", "utf-32")))
        case 2:
            opening = rng.choice(("[", '{"a":', '[{"a":'))
            return (opening * rng.choice((40, 2000, 100_000)) + text).encode()
        case 3:
            first = text.find(":")
            return (
                text[:first] + ":" + rng.choice(("1e999", "9" * 10_000, "-", "0x10", "1" + "0" * 400)) + "}"
            ).encode()
        case 4 if text.startswith("{") and len(text) > 2:
            return ("{" + text[1:-1] + "," + text[1:-1] + "}").encode()
    return text.encode()


def damaged_header(rng: Random, content: bytes) -> bytes:
    """A safetensors file whose header says something else."""
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    for _ in range(rng.randrange(1, 3)):
        entry, other = (header[rng.choice(names)] for _ in range(2))
        if not isinstance(entry, dict) or not isinstance(other, dict):
            continue
        match rng.randrange(9):
            case 0 | 1:
                entry["dtype"] = rng.choice(CODES)
            case 2:
                entry["shape"] = rng.choice(([], [0], [1] * 70, other.get("shape"), [rng.choice(NUMBERS)] * 2))
            case 3:
                entry["data_offsets"] = rng.choice(([0, 0], [4, 0], [0, 2**63], other.get("data_offsets"), [1]))
            case 4:
                entry["data_offsets"], other["data_offsets"] = other.get("data_offsets"), entry.get("data_offsets")
            case 5:
                entry[rng.choice(("dtype", "shape", "data_offsets", "x"))] = value(rng)
            case 6:
                header[rng.choice((*STRINGS, "__metadata__"))] = rng.choice((value(rng), dict(entry)))
            case 7:
                header[rng.choice(names)] = value(rng)
            case 8:
                header["__metadata__"] = {name: value(rng) for name in ("num_heads", "sla_topk", "sigma_max")}
    text = json.dumps(header).encode()
    if rng.random() < 0.1:
        text = damaged_json(rng, header)
    size = (
        len(text) if rng.random() < 0.9 else rng.choice((0, len(text) - 1, len(text) + 1, 2**63 - 1, 2**24, len(data)))
    )
    return struct.pack("<Q", size) + text + data


def damaged_tensors(rng: Random, tensors: Tensors) -> Tensors:
    """Other types, shapes and names, in a file that is whole."""
    out = dict(tensors)
    for _ in range(rng.randrange(1, 4)):
        if not out:
            break
        name = rng.choice(list(out))
        one = out[name]
        match rng.randrange(9):
            case 0 | 1:
                dtype = rng.choice(list(safetensors.DTYPES.values()))
                out[name] = np.ones(one.shape, dtype)
            case 2:
                shape = list(one.shape)
                axis = rng.randrange(len(shape) + 1)
                size = rng.choice((0, 1, 2, 5, 4096))
                shape[axis : axis + 1] = rng.choice(([size], [], [size, 1]))
                if np.prod(shape, dtype=object) < 2**20:
                    out[name] = np.ones(shape, one.dtype)
            case 3:
                out[name] = np.ones(rng.choice(((0, 10**9), (10**9, 0), (), (1,) * 8, (0,))), one.dtype)
            case 4:
                del out[name]
            case 5:
                number = rng.choice(("7", "100000000", "9" * 30, "9" * 450, "-1", "00", "٣"))
                changed = ".".join(
                    number if part.isdigit() and rng.random() < 0.7 else part for part in name.split(".")
                )
                out[changed] = one
            case 6:
                out[rng.choice(STRINGS[:3]) + rng.choice(("", "blocks.0.", "net.", name))] = one
            case 7:
                endings = (
                    ".alpha",
                    ".lora_magnitude_vector",
                    ".dora_scale",
                    ".lora_B.bias",
                    ".scale",
                    ".diff",
                    ".lokr_w1",
                )
                out[name.rpartition(".")[0] + rng.choice(endings)] = one
            case 8:
                out[name] = np.full(one.shape, rng.choice((0, np.nan, np.inf, 1))).astype(one.dtype)
    return {name.encode("utf-8", "replace").decode(): own for name, own in out.items()}


def pickle_parts(program: bytes) -> list[bytes]:
    """Its instructions, each with its argument."""
    places = [place for _, _, place in pickletools.genops(program)] + [len(program)]
    return [program[a:b] for a, b in itertools.pairwise(places)]


def damaged_pickle(rng: Random, program: bytes) -> bytes:
    """Instructions missing, doubled, moved and from elsewhere."""
    parts = pickle_parts(program)
    foreign: tuple[Callable[[], bytes], ...] = (
        lambda: plain_pickle(rng.choice(NUMBERS)),
        lambda: plain_pickle(-rng.choice(NUMBERS)),
        lambda: b"X" + struct.pack("<i", len(text := rng.choice(STRINGS).encode("utf-8", "replace"))) + text,
        lambda: rng.choice(
            (b"(", b")", b"]", b"}", b"N", b"0", b"2", b"R", b"Q", b"b", b"\x93", b"\x94", b"t", b"u", b"e")
        ),
        lambda: b"h" + bytes([rng.randrange(40)]),
        lambda: b"c" + rng.choice((b"os\nsystem\n", b"torch\nSize\n", b"torch\nLongStorage\n", b"builtins\neval\n")),
        lambda: rng.choice(parts),
        lambda: rng.randbytes(2),
    )
    for _ in range(rng.randrange(1, 5)):
        at = rng.randrange(1, len(parts))
        match rng.randrange(5):
            case 0:
                del parts[at]
            case 1:
                parts.insert(at, rng.choice(foreign)() * rng.choice((1, 1, 1, 3, 200)))
            case 2 | 3:
                parts[at] = rng.choice(foreign)()
            case 4:
                other = rng.randrange(1, len(parts))
                parts[at], parts[other] = parts[other], parts[at]
        if len(parts) < 3:
            break
    return b"".join(parts)
