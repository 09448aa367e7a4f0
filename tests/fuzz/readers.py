"""Reads one damaged file, or folder of files, as the package does, and looks at what comes out."""

from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import deserialize

from tests.fuzz import files, mutate
from tests.fuzz.hostile import Files
from turbojax.train.data import open_shards
from turbojax.weights import safetensors
from turbojax.weights.convert import convert
from turbojax.weights.encoders import open_clip, open_umt5, open_vae
from turbojax.weights.io import read_tensors
from turbojax.weights.load import open_wan
from turbojax.weights.lora import LoRA, read_lora
from turbojax.weights.settings import read_configuration
from turbojax.weights.skeleton import wan_skeleton

SMALL: files.Tensors = {"a": np.arange(40, dtype=np.float32).reshape(5, 8), "b": np.arange(9, dtype=np.int8)}


class WrongValuesError(Exception):
    """A file was read, and not as what it says."""


def touch(tensors: Mapping[Any, np.ndarray]) -> None:
    """Reads every byte, as loading would."""
    for tensor in tensors.values():
        tensor.tobytes()


def one_file(folder: Path) -> Path:
    return next(path for path in folder.iterdir() if path.stem == "x")


def read_safetensors(folder: Path) -> None:
    path = folder / "x.safetensors"
    got = read_tensors(path)
    wanted = dict(deserialize(path.read_bytes()))
    if got.keys() != wanted.keys():
        raise WrongValuesError(f"tensors {list(got)[:8]} where the library has {list(wanted)[:8]}")
    for name, tensor in got.items():
        theirs = wanted[name]
        ours = (list(tensor.shape), tensor.dtype, tensor.tobytes())
        if ours != (theirs["shape"], safetensors.DTYPES[theirs["dtype"]], bytes(theirs["data"])):
            raise WrongValuesError(f"{name!r} is not what the library reads")


def read_unchanged_pth(folder: Path) -> None:
    """Reads a file whose values are whole: returns those, or refuses it."""
    got = read_tensors(folder / "unchanged.pth")
    if got.keys() != SMALL.keys() or any(not np.array_equal(got[name], value) for name, value in SMALL.items()):
        raise WrongValuesError(f"values changed without a word: {got}")


def convert_damaged(folder: Path) -> None:
    """Converts a file with wrong bytes anywhere: to what was in it before, or refuses it."""
    convert(folder / "x.pth", folder / "out.safetensors", dtype=jnp.bfloat16, overwrite=True)
    got, wanted = read_tensors(folder / "out.safetensors"), files.networks()["transformer"][0]
    if got.keys() != wanted.keys() or any(got[name].tobytes() != value.tobytes() for name, value in wanted.items()):
        raise WrongValuesError("converted to other values without a word")


def read_index(folder: Path) -> None:
    touch(read_tensors(folder / "model.safetensors.index.json"))


def read_shards(folder: Path) -> None:
    shards = open_shards(folder)
    for i in range(min(len(shards), 4)):
        batch = shards.read([i])
        touch(batch)
        if not all(np.isfinite(value.astype(np.float32)).all() for value in batch.values()):
            raise WrongValuesError(f"sample {i} is not finite")
        shards.describe(i)
    shards.negative()


READERS: dict[str, Callable[[Path], Any]] = {
    "safetensors": read_safetensors,
    "pth": lambda folder: touch(read_tensors(folder / "x.pth")),
    "unchanged pth": read_unchanged_pth,
    "transformer": lambda folder: touch(open_wan(one_file(folder)).tensors),
    "vae": lambda folder: touch(open_vae(one_file(folder)).tensors),
    "umt5": lambda folder: touch(open_umt5(one_file(folder)).tensors),
    "clip": lambda folder: touch(open_clip(one_file(folder)).tensors),
    "lora": lambda folder: read_lora(LoRA(one_file(folder)), files.WAN),
    "convert": convert_damaged,
    "config.json": lambda folder: open_wan(folder / "x.safetensors"),
    "turbojax.json": lambda folder: wan_skeleton(read_configuration(folder)),
    "header": lambda folder: open_wan(folder / "x.safetensors"),
    "index": read_index,
    "shards": read_shards,
}


def draw(rng: Random) -> tuple[str, Files]:
    """A damaged file and the reader that it is for."""
    kind = rng.choice(list(READERS))
    return kind, DAMAGE[kind](rng, kind)


def damaged_safetensors(rng: Random, kind: str) -> Files:
    content = files.to_safetensors(files.networks()["tensors"][0].items(), {"a": "b"})
    damage = mutate.damaged_header if rng.random() < 0.6 else mutate.damaged_bytes
    return {"x.safetensors": damage(rng, content)}


def damaged_pth(rng: Random, kind: str) -> Files:
    program, entries = files.pickle_of(SMALL)
    match rng.randrange(4):
        case 0:
            return {"x.pth": mutate.damaged_bytes(rng, files.to_pth(SMALL))}
        case 1:
            name = rng.choice(list(entries))
            entries[rng.choice((name, "data/0", "data/7", "byteorder", "data.pkl"))] = entries.pop(name)
            return {"x.pth": files.zipped(program, entries)}
    return {"x.pth": files.zipped(mutate.damaged_pickle(rng, program), entries)}


def unchanged_pth(rng: Random, kind: str) -> Files:
    """Accidents anywhere but in the values."""
    content = files.to_pth(SMALL)
    ends, at = [], 0
    for value in SMALL.values():
        start = content.index(value.tobytes(), at)
        ends.append(range(at, start))
        at = start + value.nbytes
    return {"unchanged.pth": mutate.damaged_bytes(rng, content, spans=[*ends, range(at, len(content))])}


def damaged_copy(rng: Random, kind: str) -> Files:
    return {"x.pth": mutate.damaged_bytes(rng, files.to_pth(files.networks()["transformer"][0]))}


def damaged_network(rng: Random, kind: str) -> Files:
    tensors = rng.choice(files.networks()[kind])
    if rng.random() < 0.7:
        tensors = mutate.damaged_tensors(rng, tensors)
        if rng.random() < 0.4:
            return {"x.pth": files.to_pth(tensors)}
        return {"x.safetensors": files.to_safetensors(tensors.items())}
    content = files.to_safetensors(tensors.items())
    damage = mutate.damaged_header if rng.random() < 0.6 else mutate.damaged_bytes
    return {"x.safetensors": damage(rng, content)}


def damaged_settings(rng: Random, kind: str) -> Files:
    weights = {"x.safetensors": files.to_safetensors(files.networks()["transformer"][1].items())}
    if kind == "config.json":
        return weights | {kind: mutate.damaged_json(rng, files.PUBLISHED)}
    if kind == "turbojax.json":
        return {kind: mutate.damaged_json(rng, files.CONFIGURATION)}
    metadata = {"format": "turbojax", "num_heads": "2", "sla_topk": "0.1", "sigma_max": "80.0"}
    changed = {rng.choice(list(metadata)): str(mutate.value(rng)).encode("utf-8", "replace").decode()}
    return {"x.safetensors": files.to_safetensors(files.networks()["transformer"][1].items(), metadata | changed)}


def damaged_folder(rng: Random, kind: str) -> Files:
    folder = files.sharded(files.networks()["tensors"][0]) if kind == "index" else files.shards()
    name = rng.choice(list(folder))
    if name.endswith(".json"):
        return folder | {name: mutate.damaged_json(rng, files.json.loads(folder[name]))}
    damage = mutate.damaged_header if rng.random() < 0.6 else mutate.damaged_bytes
    return folder | {name: damage(rng, folder[name])}


DAMAGE: dict[str, Callable[[Random, str], Files]] = {
    "safetensors": damaged_safetensors,
    "pth": damaged_pth,
    "unchanged pth": unchanged_pth,
    **dict.fromkeys(("transformer", "vae", "umt5", "clip", "lora"), damaged_network),
    "convert": damaged_copy,
    **dict.fromkeys(("config.json", "turbojax.json", "header"), damaged_settings),
    **dict.fromkeys(("index", "shards"), damaged_folder),
}
