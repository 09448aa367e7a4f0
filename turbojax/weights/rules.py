"""Renaming rules: from the names in a checkpoint to the parameters of a module, checked as a whole.

A table is a tuple of rules. A rule's pattern must match a whole name. Every parameter of the module has to be filled
exactly once; whatever is missing, unknown, misshapen or doubled is reported in one error.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np

from turbojax.errors import CheckpointError

MAX_LISTED = 8  # names listed a kind of problem; the rest is counted


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


class Entry(NamedTuple):
    """Where one tensor goes: the parameter's path, and the layer if the parameter is stacked."""

    target: str
    layer: int | None


def conv3d_kernel(weight: np.ndarray) -> np.ndarray:
    """PyTorch's [out, in, t, h, w] to [t, h, w, in, out]."""
    return weight.transpose(2, 3, 4, 1, 0)


def conv2d_kernel(weight: np.ndarray) -> np.ndarray:
    """PyTorch's [out, in, h, w] to [h, w, in, out]."""
    return weight.transpose(2, 3, 1, 0)


def rename(name: str, rules: Iterable[Rule]) -> tuple[Entry, Rule] | None:
    """The first rule that matches `name` and where it sends it; None if no rule does."""
    for rule in rules:
        if match := re.fullmatch(rule.pattern, name):
            if rule.target is None:
                return Entry("", None), rule
            layer = match.groupdict().get("layer")
            return Entry(match.expand(rule.target), None if layer is None else int(layer)), rule
    return None


def relaid(rule: Rule, tensor: np.ndarray) -> np.ndarray:
    """The tensor in our layout; as it is where it has too few axes for that, to be reported as misshapen."""
    if rule.transform is None or tensor.ndim < 2:
        return tensor
    try:
        return rule.transform(tensor)
    except ValueError:
        return tensor


def assign(
    tensors: Mapping[str, np.ndarray],
    rules: Iterable[Rule],
    expected: Mapping[Entry, tuple[int, ...]],
    *,
    what: str,
    published: Iterable[str] = (),
) -> dict[Entry, np.ndarray]:
    """Sends every tensor to its parameter.

    tensors: the checkpoint, by name; only shapes are looked at, nothing is read from a memory-mapped file.
    expected: the shape of each parameter (of one layer of it, where it is stacked).
    what: names the checkpoint in the error, for instance "transformer.safetensors".
    published: the names that the whole checkpoint should hold, to tell what is missing in its own words.

    Raises CheckpointError with all missing, unknown, misshapen and doubled names.
    """
    rules = tuple(rules)
    found: dict[Entry, np.ndarray] = {}
    origin: dict[Entry, str] = {}
    unknown, misshapen, doubled = [], [], []
    for name, tensor in tensors.items():
        hit = rename(name, rules)
        if hit is None:
            unknown.append(name)
            continue
        entry, rule = hit
        if rule.target is None:
            continue
        if entry not in expected:
            unknown.append(name)
        elif entry in found:
            doubled.append(f"{name} and {origin[entry]}")
        else:
            value = relaid(rule, tensor)
            found[entry], origin[entry] = value, name
            if value.shape != expected[entry]:
                misshapen.append(f"{name} {list(value.shape)} instead of {list(expected[entry])}")
    missing = [entry for entry in expected if entry not in found]
    names = {hit[0]: name for name in published if missing and (hit := rename(name, rules))}
    problems = [
        f"{len(listed)} {kind}: {shorten(listed)}"
        for kind, listed in (
            ("missing", [names.get(entry) or describe(entry) for entry in missing]),
            ("unknown", unknown),
            ("misshapen", misshapen),
            ("given twice", doubled),
        )
        if listed
    ]
    if problems:
        raise CheckpointError(
            f"{what} does not fit this model; {'; '.join(problems)}. "
            "Check that the file and the model (size, text or image to video) belong together."
        )
    return found


def describe(entry: Entry) -> str:
    return entry.target if entry.layer is None else f"{entry.target}[layer {entry.layer}]"


def shorten(names: list[str]) -> str:
    rest = len(names) - MAX_LISTED
    return ", ".join(names[:MAX_LISTED]) + (f" and {rest} more" if rest > 0 else "")
