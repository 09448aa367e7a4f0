"""Renaming rules: from the names in a checkpoint to the parameters of a module, checked as a whole.

A table is a tuple of rules. A rule's pattern must match a whole name. Every parameter of the module has to be filled
exactly once; whatever is missing, unknown, misshapen or doubled is reported in one error.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from turbojax.errors import CheckpointError, quoted
from turbojax.weights.safetensors import ShapeDtype

MAX_LISTED = 8  # names listed a kind of problem; the rest is counted
MAX_LENGTH = 120  # characters of what is listed
LAYER_NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")  # as it is written in names


class Rule(NamedTuple):
    """One kind of tensor.

    pattern: regular expression for the full name in the checkpoint. A group called `layer` says which layer of a
      stacked parameter `[layers, ...]` the tensor is.
    target: the parameter's dotted path in the module, may use the pattern's groups; None for names to be ignored.
    transform: layout change, for instance the transposing of a convolution; must return a view or a new array.
    """

    pattern: str
    target: str | None
    transform: Callable[[np.ndarray], np.ndarray] | None = None


class TensorKey(NamedTuple):
    """The place of one tensor: the parameter's path, and the layer if the parameter is stacked."""

    target: str
    layer: int | None


def conv3d_kernel(weight: np.ndarray) -> np.ndarray:
    """PyTorch's [out, in, t, h, w] to [t, h, w, in, out]."""
    return weight.transpose(2, 3, 4, 1, 0)


def conv2d_kernel(weight: np.ndarray) -> np.ndarray:
    """PyTorch's [out, in, h, w] to [h, w, in, out]."""
    return weight.transpose(2, 3, 1, 0)


def patch_linear(weight: np.ndarray) -> np.ndarray:
    """A convolution over patches [out, in, p, ...] as the linear layer [out, in p ...]."""
    return weight.reshape(len(weight), -1)


def rename(name: str, rules: Iterable[Rule]) -> tuple[TensorKey, Rule] | None:
    """Returns where the first rule that matches sends `name`, and that rule; None if no rule does."""
    for rule in rules:
        if match := re.fullmatch(rule.pattern, name):
            if rule.target is None:
                return TensorKey("", None), rule
            layer = match.groupdict().get("layer")
            if layer is None:
                return TensorKey(match.expand(rule.target), None), rule
            if not LAYER_NUMBER.fullmatch(layer):
                return None
            return TensorKey(match.expand(rule.target), int(layer)), rule
    return None


def count_layers(layers: Iterable[int]) -> int:
    """Counts a checkpoint's layers, from the layer of each of its tensors.

    A layer counts if it has more than half as many tensors as the fullest. Up to as many again are counted as missing
    between them, so that gaps are reported, but a number in a name costs nothing.
    """
    tensors_in = Counter(layers)
    most = max(tensors_in.values(), default=0)
    whole = [layer for layer, count in tensors_in.items() if 2 * count > most]
    return min(1 + max(whole, default=-1), 2 * len(whole))


def same_kind(dtype: Any, wanted: Any) -> bool:
    """Returns True if a dtype can stand for the wanted one: int8 codes are int8, all else is floating point."""
    return dtype == np.int8 if wanted == np.int8 else bool(jnp.issubdtype(dtype, jnp.floating))


def relaid(rule: Rule, tensor: np.ndarray) -> np.ndarray:
    """Changes a tensor to our layout, or leaves it where it has too few axes, to be reported as misshapen."""
    if rule.transform is None or tensor.ndim < 2:
        return tensor
    try:
        return rule.transform(tensor)
    except (ValueError, IndexError):
        return tensor


def assign(
    tensors: Mapping[str, np.ndarray],
    rules: Iterable[Rule],
    expected: Mapping[TensorKey, ShapeDtype],
    *,
    what: str,
    layout: Iterable[str] = (),
) -> dict[TensorKey, np.ndarray]:
    """Sends every tensor to its parameter.

    tensors: the checkpoint, by name; only shapes and dtypes are looked at, nothing is read from a memory-mapped file.
    expected: shape and dtype of each parameter (of one layer of it, where it is stacked). A tensor must have the shape,
      and a dtype of the same kind, see `same_kind`.
    what: names the checkpoint in the error, for instance "transformer.safetensors".
    layout: the names that the whole checkpoint should hold, to name what is missing as the file would.

    Raises CheckpointError with all missing, unknown, misshapen, mistyped and doubled names.
    """
    rules = tuple(rules)
    found: dict[TensorKey, np.ndarray] = {}
    origin: dict[TensorKey, str] = {}
    kinds = ("missing", "unknown", "misshapen", "of the wrong type", "given twice")
    problems: dict[str, list[str]] = {kind: [] for kind in kinds}
    for name, tensor in tensors.items():
        hit = rename(name, rules)
        key, rule = hit or (None, None)
        if rule and rule.target is None:
            continue
        if key is None or rule is None or key not in expected:
            problems["unknown"].append(name)
        elif key in found:
            problems["given twice"].append(f"{name} and {origin[key]}")
        else:
            value = relaid(rule, tensor)
            found[key], origin[key] = value, name
            spec = expected[key]
            if value.shape != spec.shape:
                problems["misshapen"].append(f"{name} {list(value.shape)} instead of {list(spec.shape)}")
            elif not same_kind(value.dtype, spec.dtype):
                wanted = "int8" if spec.dtype == np.int8 else "floating point"
                problems["of the wrong type"].append(f"{name} {value.dtype} instead of {wanted}")
    missing = [key for key in expected if key not in found]
    names = {hit[0]: name for name in layout if missing and (hit := rename(name, rules))}
    problems["missing"] = [names.get(key) or describe(key) for key in missing]
    if texts := [f"{len(listed)} {kind}: {shorten(listed)}" for kind, listed in problems.items() if listed]:
        raise CheckpointError(
            f"{what} does not fit this model; {'; '.join(texts)}. "
            "Check that the file and the model (size, text or image to video) belong together."
        )
    return found


def describe(key: TensorKey) -> str:
    return key.target if key.layer is None else f"{key.target}[layer {key.layer}]"


def shorten(names: list[str]) -> str:
    rest = len(names) - MAX_LISTED
    listed = (n if n.isprintable() and 0 < len(n) <= MAX_LENGTH else quoted(n) for n in names[:MAX_LISTED])
    return ", ".join(listed) + (f" and {rest} more" if rest > 0 else "")
