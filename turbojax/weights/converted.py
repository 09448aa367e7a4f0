"""Folders that `turbojax convert --format=orbax` writes: a configuration, and arrays as the transformer holds them.

Each array is an Orbax checkpoint of its own: Orbax takes more than twice the memory of what it saves at once.
"""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from turbojax.files import user_path, whole_folder
from turbojax.models.wan import WanConfig
from turbojax.weights.files import CONVERTED
from turbojax.weights.lazy import LazyTensors
from turbojax.weights.mapped import release
from turbojax.weights.orbax import check_orbax, load_orbax, save_orbax
from turbojax.weights.parameters import progress
from turbojax.weights.rules import TensorKey
from turbojax.weights.settings import write_configuration
from turbojax.weights.skeleton import Skeleton, is_stacked, wan_skeleton

ARRAYS = "arrays"  # the folder of the arrays


def is_converted(path: str | os.PathLike) -> bool:
    """Returns True if `path` is a folder that `turbojax convert --format=orbax` wrote."""
    return (user_path(path) / CONVERTED).is_file()


class OrbaxTensors(LazyTensors[TensorKey]):
    """The tensors of a converted folder, cut out of its stacked arrays.

    An array is read as a whole and the last two are kept: ask for the layers of one after another. Raises
    CheckpointError where the folder has other arrays than the skeleton.
    """

    def __init__(self, folder: Path, skeleton: Skeleton):
        check_orbax(folder / ARRAYS, skeleton.specs)  # first: there are as many tensors as the configuration has layers
        self.folder, self.skeleton, self.specs = folder, skeleton, skeleton.tensor_specs()
        self._array = functools.lru_cache(maxsize=2)(lambda name: load_array(folder, name, skeleton.specs[name]))

    def __getitem__(self, key: TensorKey) -> np.ndarray:
        if key not in self.specs:
            raise KeyError(key)
        array = self._array(key.target)
        return array if key.layer is None else array[key.layer]

    def load_arrays(self) -> dict[str, Any]:
        """Loads the whole arrays, one after the other straight to the device."""
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        wanted = {n: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=device) for n, s in self.skeleton.specs.items()}
        return {n: load_array(self.folder, n, spec) for n, spec in progress(wanted, f"Loading {self.folder.name}")}


def load_array(folder: Path, name: str, spec: jax.ShapeDtypeStruct) -> Any:
    """Loads an array of a converted folder: to the host, or where the sharding of `spec` says."""
    return load_orbax(folder / ARRAYS / name, {name: spec})[name]


def write_converted(output: Path, config: WanConfig, tensor: Callable[[TensorKey], Any]) -> dict[str, Any]:
    """Writes a converted folder in place of any that is there; returns the shapes and dtypes of its arrays."""
    specs = wan_skeleton(config).specs
    with whole_folder(output, overwrite=True) as temporary:
        for name, spec in progress(specs, "Converting"):
            save_orbax(temporary / ARRAYS / name, {name: stack_layers(tensor, name, spec)})
        write_configuration(temporary, config)
    return specs


def stack_layers(tensor: Callable[[TensorKey], Any], name: str, spec: jax.ShapeDtypeStruct) -> np.ndarray:
    """Puts a parameter together as the module holds it, those of the blocks with a leading axis of layers."""
    array = np.empty(spec.shape, spec.dtype)
    for layer in range(spec.shape[0]) if is_stacked(name) else (None,):
        value = np.asarray(tensor(TensorKey(name, layer)))
        array[... if layer is None else layer] = value.astype(spec.dtype)
        release(value)
    return array
