"""LoRA files: what they add to a transformer's parameters, merged while it loads.

    W' = W + strength * (alpha / rank) * up down

Read are the diffusers naming (`transformer.blocks.0.attn1.to_q.lora_A.weight`), the original one
(`diffusion_model.blocks.0.self_attn.q.lora_down.weight`, `.alpha`, and the full differences `.diff`, `.diff_b`,
`.diff_m` of weights, biases and modulation) and kohya's (`lora_unet_blocks_0_self_attn_q.lora_down.weight`).
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax import lax

from turbojax.errors import CheckpointError, quoted
from turbojax.files import user_path
from turbojax.models.wan import WanConfig
from turbojax.weights.io import file_metadata, read_tensors
from turbojax.weights.published import wan_layout
from turbojax.weights.rules import Entry, Rule, of_kind, relaid, rename, shorten
from turbojax.weights.wan import DIFFUSERS, OFFICIAL, clean_name

Expert = Literal["high", "low"]


class LoRA(NamedTuple):
    """A file and how strongly it counts; expert: the one of two networks that it is for, None for both."""

    path: str | Path
    strength: float = 1.0
    expert: Expert | None = None


class LowRank(NamedTuple):
    """scale * up down; up `[out, rank]`, down `[rank, in]`."""

    up: np.ndarray
    down: np.ndarray
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.up), self.down.shape[1])


class Difference(NamedTuple):
    """scale * value, in the parameter's shape."""

    value: np.ndarray
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape


Change = LowRank | Difference
Changes = dict[Entry, list[Change]]

# What a name ends in: half of a product, its alpha, or a difference and the kind of parameter that it belongs to.
_SUFFIX = re.compile(
    r"\.(?:lora_(?P<half>A|B|down|up)(?:\.\w+)?\.weight|(?P<alpha>alpha)|(?P<difference>diff(?:_b|_m)?))$"
)
_HALVES = {"A": "down", "down": "down", "B": "up", "up": "up"}
_PARAMETERS = {"diff": "weight", "diff_b": "bias", "diff_m": "modulation"}
_UNREADABLE = ("dora_scale", "lora_magnitude_vector")  # DoRA normalises the sum, which is no difference of weights
_SECOND = "transformer_2."  # diffusers' name of the low-noise expert
_PREFIX = re.compile(r"^(?:base_model\.model\.|transformer_2\.)+")
_KOHYA = "lora_unet_"


def merge(value: Any, changes: Sequence[Change]) -> jax.Array:
    """The parameter with its changes, in float32."""
    value = jnp.asarray(value, jnp.float32)
    for change in changes:
        if isinstance(change, LowRank):
            value = add_product(value, jnp.asarray(change.up), jnp.asarray(change.down), change.scale)
        else:
            value = value + change.scale * jnp.asarray(change.value, jnp.float32)
    return value


@jax.jit
def add_product(weight: jax.Array, up: jax.Array, down: jax.Array, scale: float) -> jax.Array:
    product = jnp.matmul(up.astype(jnp.float32), down.astype(jnp.float32), precision=lax.Precision.HIGHEST)
    return weight + scale * product


def read_loras(loras: Sequence[LoRA], config: WanConfig, *, expert: Expert | None = None) -> Changes:
    """What the files change in this network, an expert of two or the only one.

    Raises CheckpointError for a file that is damaged, of another network, or of a kind that cannot be merged; warns of
    tensors that have no place.
    """
    changes: Changes = {}
    for lora in loras:
        if lora.expert in (None, expert):
            for entry, change in read_lora(lora, config, expert=expert).items():
                changes.setdefault(entry, []).append(change)
    return changes


def read_lora(lora: LoRA, config: WanConfig, *, expert: Expert | None = None) -> dict[Entry, Change]:
    """One file, see `read_loras`."""
    path = user_path(lora.path)
    tensors = read_tensors(path)
    if any(name.startswith(_SECOND) for name in tensors):
        tensors = {name: value for name, value in tensors.items() if name.startswith(_SECOND) == (expert == "low")}
    if dora := [name for name in tensors if name.endswith(_UNREADABLE)]:
        raise CheckpointError(f"{path.name} is a DoRA ({dora[0]}), which cannot be merged; give a plain LoRA")
    parts, unmatched = by_parameter(tensors, config)
    for name, tensor in tensors.items():
        whole = name.endswith(".alpha") and jnp.issubdtype(tensor.dtype, jnp.integer)
        if name not in unmatched and not (whole or of_kind(tensor.dtype, np.float32)):
            raise CheckpointError(f"{path.name}: {quoted(name)} is {tensor.dtype} and must be floating point numbers")
    alpha = stored_alpha(path)
    changes: dict[Entry, Change] = {}
    problems = []
    shapes = parameter_shapes(config)
    for name, given in parts.items():
        hit = rename(name, OFFICIAL) or rename(name, DIFFUSERS)
        if hit is None or hit[0] not in shapes:
            unmatched.append(name)
            continue
        entry, rule = hit
        change = change_of(given, rule, lora.strength, alpha)
        if entry in changes:
            problems.append(f"{name} is given twice")
        elif change is None:
            problems.append(f"{name} has {' and '.join(given)} only")
        elif change.shape != shapes[entry]:
            problems.append(f"{name} {list(change.shape)} instead of {list(shapes[entry])}")
        else:
            changes[entry] = change
    if problems:
        raise CheckpointError(f"{path.name} does not fit this network: {shorten(problems)}; give a LoRA made for it")
    if not changes:
        names = shorten(sorted(tensors)) or "nothing for it"
        raise CheckpointError(f"{path.name} is no LoRA of this network: it holds {names}; see turbojax/weights/lora.py")
    if unmatched:
        left_out = shorten(sorted(unmatched))
        logging.warning("%s: %d parts fit nowhere and are left out: %s", path.name, len(unmatched), left_out)
    logging.info("LoRA %s: %d parameters changed, strength %g", path.name, len(changes), lora.strength)
    return changes


def by_parameter(
    tensors: Mapping[str, np.ndarray], config: WanConfig
) -> tuple[dict[str, dict[str, np.ndarray]], list[str]]:
    """The tensors by the parameter they change and what they are ("up", "down", "alpha" or "diff"), and the others."""
    modules = {name.rpartition(".")[0] for name in wan_layout(dataclasses.replace(config, quant=None))}
    kohya = {_KOHYA + module.replace(".", "_"): module for module in modules}
    parts: dict[str, dict[str, np.ndarray]] = {}
    others = []
    for name, tensor in tensors.items():
        match = _SUFFIX.search(name)
        if match is None:
            others.append(name)
            continue
        module = clean_name(_PREFIX.sub("", name[: match.start()]))
        parameter = f"{kohya.get(module, module)}.{_PARAMETERS.get(match['difference'], 'weight')}"
        kind = "diff" if match["difference"] else match["alpha"] or _HALVES[match["half"]]
        parts.setdefault(parameter, {})[kind] = tensor
    return parts, others


def change_of(parts: Mapping[str, np.ndarray], rule: Rule, strength: float, alpha: float | None) -> Change | None:
    """The change that a parameter's tensors say; None where half of it is missing or the halves do not belong."""
    if "diff" in parts:
        return Difference(relaid(rule, parts["diff"]), strength)
    if not {"up", "down"} <= parts.keys():
        return None
    up, down = (parts[name].reshape(len(parts[name]), -1) for name in ("up", "down"))
    rank = len(down)
    if up.shape[1] != rank:
        return None
    alpha = float(parts["alpha"].item()) if "alpha" in parts else alpha
    return LowRank(up, down, strength * (1.0 if alpha is None else alpha / rank))


def parameter_shapes(config: WanConfig) -> dict[Entry, tuple[int, ...]]:
    """The shape of each parameter of the network before quantization, of one layer where they are stacked."""
    plain = dataclasses.replace(config, quant=None)
    shapes = {}
    for name, shape in wan_layout(plain).items():
        hit = rename(name, OFFICIAL)
        assert hit is not None, name
        shapes[hit[0]] = relaid(hit[1], np.broadcast_to(np.int8(0), shape)).shape
    return shapes


def stored_alpha(path: Path) -> float | None:
    """Alpha of all modules, where diffusers put it into the file's header; None stands for the rank."""
    try:
        settings = json.loads(file_metadata(path).get("lora_adapter_metadata", "{}"))
        settings = {name.rpartition(".")[2]: value for name, value in settings.items()}
        alpha = float(settings["lora_alpha"]) if settings.get("lora_alpha") else None
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path.name} has a damaged header: {error}; download it again") from error
    if settings.get("use_rslora") or settings.get("alpha_pattern"):
        raise CheckpointError(f"{path.name} has a scale of its own for each module, which is not read; merge it first")
    return alpha
