"""From a module back to the tensors of its published checkpoint: names, shapes and order of axes."""

from collections.abc import Iterable, Iterator

import numpy as np
from flax import nnx

from turbojax.weights.published import Layout
from turbojax.weights.rules import Rule, rename


def published_tensors(module: nnx.Module, layout: Layout, rules: Iterable[Rule]) -> Iterator[tuple[str, np.ndarray]]:
    """The module's parameters as the checkpoint of that layout holds them, one after the other.

    rules: those that read the layout. Their transforms only move elements, so running them on the places of the
    elements tells where each one comes from. Names that no parameter stands behind are left out.
    """
    parameters = {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(module))}
    rules = tuple(rules)
    for name, shape in layout.items():
        hit = rename(name, rules)
        assert hit is not None, name
        (target, layer), rule = hit
        if rule.target is None:
            continue
        value = np.asarray(parameters[target].get_value() if layer is None else parameters[target].get_value()[layer])
        if rule.transform is not None:
            places = rule.transform(np.arange(value.size).reshape(shape))
            moved = np.empty(value.size, value.dtype)
            moved[places.ravel()] = value.ravel()
            value = moved
        yield name, value.reshape(shape)
