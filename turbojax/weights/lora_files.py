"""From a LoRA file's tensors to the changes of parameters: which names are read, and what each part may be.

Whatever belongs to the network or to LoRAs and is not read is refused by its name: without it the rest would be merged
to something that nobody trained.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from turbojax.errors import CheckpointError, quoted
from turbojax.json_reader import Boolean, Integer, Map, Nullable, Number, Object, Schema, parse_json, read_json
from turbojax.models.wan import WanConfig
from turbojax.weights.io import file_metadata
from turbojax.weights.layouts import diffusers_layout, wan_layout
from turbojax.weights.rules import Rule, TensorKey, relaid, rename, same_kind, shorten
from turbojax.weights.skeleton import wan_skeleton
from turbojax.weights.wan import DIFFUSERS, OFFICIAL, clean_name


class LowRank(NamedTuple):
    """scale * up down; up `[out, rank]`, down `[rank, in]`."""

    up: np.ndarray
    down: np.ndarray
    scale: float

    def changes_nothing(self) -> bool:
        return self.scale == 0 or not (self.up.any() and self.down.any())


class Difference(NamedTuple):
    """scale * value, in the parameter's shape."""

    value: np.ndarray
    scale: float

    def changes_nothing(self) -> bool:
        return self.scale == 0 or not self.value.any()


Change = LowRank | Difference

# What a name ends in: half of a product, its alpha, or a difference and the kind of parameter that it belongs to.
_SUFFIX = re.compile(
    r"\.(?:lora_(?P<half>A|B|down|up)(?:\.\w+)?\.weight|(?P<alpha>alpha)|(?P<difference>diff(?:_b|_m)?))$"
)
_HALVES = {"A": "down", "down": "down", "B": "up", "up": "up"}
_PARAMETERS = {"diff": "weight", "diff_b": "bias", "diff_m": "modulation"}
# Words of methods of which nothing, or not this part, is read: DoRA, LoKr, LoHa, OFT, biases of factors and so on.
_METHODS = re.compile(r"(?i)lora|dora|magnitude|lokr|loha|hada|oft_|ia3|lycoris")
_PREFIX = re.compile(r"^(?:base_model\.model\.|transformer_2\.)+")
_KOHYA = "lora_unet_"

MOST_PARTS = 8  # of a module's dotted name
MOST_ALPHA = 1e6
_ALPHA = Nullable(Number(-MOST_ALPHA, MOST_ALPHA))
_SWITCH = Nullable(Boolean())
# What PEFT says of all modules; diffusers puts it into the header, with the network's name before each.
_ADAPTER: dict[str, Schema] = {
    "lora_alpha": _ALPHA,
    "alpha_pattern": Nullable(Map(_ALPHA)),
    "rank_pattern": Nullable(Map(Integer(1, 2**20))),
    "use_rslora": _SWITCH,
    "use_dora": _SWITCH,
}
_UNREAD_SETTINGS = ("alpha_pattern", "use_rslora", "use_dora")
_PEFT_CONFIG = "adapter_config.json"


class Unfit(ValueError):
    """A part of a file that cannot be merged; the text goes behind the parameter's name."""


def changes_of(
    path: Path, tensors: Mapping[str, np.ndarray], config: WanConfig, *, strength: float, network: str
) -> tuple[dict[TensorKey, Change], list[str]]:
    """Returns the changes of parameters in a file's tensors, and the names that belong to another network.

    network: diffusers' name of the network, for the settings in the header.
    Raises CheckpointError for what cannot be merged.
    """
    config = dataclasses.replace(config, quant=None)  # LoRAs change the network before quantization
    parts, others, unfit = by_parameter(tensors, config)
    if not parts:
        return {}, others
    check_dtypes(path, {name: tensor for name, tensor in tensors.items() if name not in others})
    if unread := unread_parts(others, config):
        raise CheckpointError(
            f"{path.name} has parts that are not read ({shorten(unread)}): DoRA, LoKr, LoHa and biases of factors "
            "cannot be merged; give a plain LoRA"
        )
    alpha = stored_alpha(path, network)
    shapes = {key: spec.shape for key, spec in wan_skeleton(config).tensor_specs().items()}  # of one layer
    changes: dict[TensorKey, Change] = {}
    for name, given in parts.items():
        hit = rename(name, OFFICIAL) or rename(name, DIFFUSERS)
        if hit is None or hit[0] not in shapes:
            others.append(name)
        elif hit[0] in changes:
            unfit.append(f"{name} is given twice")
        else:
            try:
                changes[hit[0]] = change_of(given, hit[1], shapes[hit[0]], strength, alpha)
            except Unfit as error:
                unfit.append(f"{name} {error}")
    if unfit:
        raise CheckpointError(f"{path.name} does not fit this network: {shorten(unfit)}; give a LoRA made for it")
    return changes, others


def by_parameter(
    tensors: Mapping[str, np.ndarray], config: WanConfig
) -> tuple[dict[str, dict[str, np.ndarray]], list[str], list[str]]:
    """Sorts tensors by the parameter that they change and what they are ("up", "down", "alpha" or "diff").

    Returns them, the other names, and a line for each that is given twice.
    """
    kohya = {_KOHYA + module.replace(".", "_"): module for module in modules_of(wan_layout(config))}
    parts: dict[str, dict[str, np.ndarray]] = {}
    others, twice = [], []
    for name, tensor in tensors.items():
        match = _SUFFIX.search(name)
        if match is None:
            others.append(name)
            continue
        module = clean_name(_PREFIX.sub("", name[: match.start()]))
        parameter = f"{kohya.get(module, module)}.{_PARAMETERS.get(match['difference'], 'weight')}"
        kind = "diff" if match["difference"] else match["alpha"] or _HALVES[match["half"]]
        if kind in parts.setdefault(parameter, {}):
            twice.append(f"{parameter} has its {kind} twice")
        parts[parameter][kind] = tensor
    return parts, others, twice


def unread_parts(names: Iterable[str], config: WanConfig) -> list[str]:
    """Finds names that are not read and belong to the network's modules, or to methods that change modules."""
    own = modules_of(wan_layout(config))
    modules = own | modules_of(diffusers_layout(config)) | {_KOHYA + module.replace(".", "_") for module in own}

    def of_network(name: str) -> bool:
        parts = clean_name(_PREFIX.sub("", name)).split(".")[:MOST_PARTS]
        return any(".".join(parts[:count]) in modules for count in range(1, 1 + len(parts)))

    return sorted(name for name in names if _METHODS.search(name) or of_network(name))


def change_of(
    parts: Mapping[str, np.ndarray], rule: Rule, shape: tuple[int, ...], strength: float, alpha: float | None
) -> Change:
    """Makes the change of a parameter from its tensors; raises Unfit. alpha: of all modules, where they have none."""
    for kind, tensor in parts.items():
        if kind != "alpha" and 0 in tensor.shape:
            raise Unfit(f"has no values: {kind} is {list(tensor.shape)}")
    if "diff" in parts:
        if len(parts) > 1:
            raise Unfit(f"has {' and '.join(parts)}, and only a difference alone can be merged")
        value = relaid(rule, parts["diff"])
        if value.shape != shape:
            raise Unfit(f"{list(value.shape)} instead of {list(shape)}")
        return Difference(finite(value, "difference"), strength)
    if not {"up", "down"} <= parts.keys():
        raise Unfit(f"has {' and '.join(parts)} only")
    up, down = parts["up"], parts["down"]
    if min(up.ndim, down.ndim) < 2 or math.prod(up.shape[1:]) != len(down):
        raise Unfit(f"has factors of shapes {list(up.shape)} and {list(down.shape)}, which have no product")
    rank, product = len(down), (len(up), math.prod(down.shape[1:]))
    if product != shape:
        raise Unfit(f"{list(product)} instead of {list(shape)}")
    if rank > max(shape):
        raise Unfit(f"has rank {rank}, more than the sizes of {list(shape)}")
    own = alpha_of(parts["alpha"]) if "alpha" in parts else alpha
    up, down = finite(up, "up").reshape(len(up), rank), finite(down, "down").reshape(rank, -1)
    return LowRank(up, down, strength * (1.0 if own is None else own / rank))


def alpha_of(tensor: np.ndarray) -> float:
    if tensor.ndim > 1 or tensor.size != 1:
        raise Unfit(f"has an alpha of shape {list(tensor.shape)}, which must be one number")
    value = float(tensor.reshape(()))
    if not abs(value) <= MOST_ALPHA:
        raise Unfit(f"has the alpha {value:g}, which must be a number up to {MOST_ALPHA:g}")
    return value


def finite(tensor: np.ndarray, kind: str) -> np.ndarray:
    if not np.isfinite(tensor).all():
        raise Unfit(f"holds NaN or infinity in its {kind}")
    return tensor


def check_dtypes(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Raises CheckpointError unless all are floating point, alphas floating point or whole numbers."""
    for name, tensor in tensors.items():
        whole = name.endswith(".alpha") and jnp.issubdtype(tensor.dtype, jnp.integer)
        if not (whole or same_kind(tensor.dtype, np.float32)):
            raise CheckpointError(f"{path.name}: {quoted(name)} is {tensor.dtype} and must be floating point numbers")


def modules_of(layout: Mapping[str, tuple[int, ...]]) -> set[str]:
    return {name.rpartition(".")[0] for name in layout if not name.endswith(("modulation", "scale_shift_table"))}


def stored_alpha(path: Path, network: str) -> float | None:
    """Reads alpha of all modules from the file's header or PEFT's configuration beside it; None stands for the rank."""
    again = "download it again"
    if (text := file_metadata(path).get("lora_adapter_metadata")) is not None:
        named = {f"{prefix}{name}": schema for name, schema in _ADAPTER.items() for prefix in ("", f"{network}.")}
        where, schema = f"{path.name}, lora_adapter_metadata in its header", Object({}, named, others="left out")
        found = parse_json(text.encode(), schema, name=where, suggestion=again)
        settings = {name.removeprefix(f"{network}."): value for name, value in found.items()}
    elif path.stem == "adapter_model" and (beside := path.with_name(_PEFT_CONFIG)).exists():
        settings = read_json(beside, Object({}, _ADAPTER, others="left out"), suggestion=again)
    else:
        return None
    if unread := [name for name in _UNREAD_SETTINGS if settings.get(name)]:
        raise CheckpointError(
            f"{path.name} says {unread[0]}={quoted(settings[unread[0]])}, a scale of its own for each module, which is "
            "not read; merge it first"
        )
    return settings.get("lora_alpha")
