"""Orbax checkpoints: folders that hold a pytree of arrays, written and read with all of it checked."""

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from turbojax.errors import CheckpointError
from turbojax.files import user_path
from turbojax.weights.io import as_checkpoint_error, described, reason
from turbojax.weights.quiet_orbax import orbax
from turbojax.weights.safetensors import ShapeDtype

CHUNK_BYTES = 2**25  # of a file of an array


def save_orbax(path: str | os.PathLike, tree: Any) -> None:
    """Saves a pytree of arrays as the Orbax checkpoint folder `path`, which appears only when complete.

    Raises CheckpointError if `path` exists or cannot be written.
    """
    ocp = orbax()
    target = user_path(path).absolute()  # Orbax takes no relative paths
    if target.exists():
        raise CheckpointError(f"{target} already exists; remove it or choose another path")
    # One file a chunk: OCDBT, and chunks as large as their array, take two more copies of it in memory.
    chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), tree)

    def save() -> None:
        with ocp.PyTreeCheckpointer(use_ocdbt=False) as checkpointer:
            checkpointer.save(target, tree, save_args=chunks)

    try:
        # In the main thread Ctrl-C may be lost in Orbax' event loop, or leave writers behind that nobody waits for.
        with ThreadPoolExecutor(1, thread_name_prefix="orbax") as thread:
            thread.submit(save).result()
    except (OSError, ValueError) as error:  # TensorStore's are ValueErrors
        raise CheckpointError(f"{path} cannot be written: {reason(error)}") from error


def load_orbax(path: str | os.PathLike, abstract_tree: Any) -> Any:
    """Loads the checkpoint of `save_orbax` as a tree like `abstract_tree`, whose leaves are jax.ShapeDtypeStruct.

    A leaf with a sharding becomes a jax.Array placed by it, one without becomes a numpy array. Raises
    CheckpointError if there is no such checkpoint, it is damaged, or a name, shape or dtype differs.
    """
    ocp = orbax()
    target = user_path(path).absolute()
    if not (target / "_CHECKPOINT_METADATA").exists():
        raise CheckpointError(f"{target} is not an Orbax checkpoint folder")

    def restore_args(leaf: Any) -> Any:
        if leaf.sharding is None:
            return ocp.RestoreArgs(restore_type=np.ndarray)
        return ocp.ArrayRestoreArgs(sharding=leaf.sharding)

    with as_checkpoint_error(target), ocp.PyTreeCheckpointer() as checkpointer:
        saved = checkpointer.metadata(target).item_metadata
        _check_same(target, _by_path(saved.tree), _by_path(abstract_tree))
        args = ocp.args.PyTreeRestore(item=abstract_tree, restore_args=jax.tree.map(restore_args, abstract_tree))
        return checkpointer.restore(target, args=args)


def check_orbax(folder: Path, specs: Mapping[str, ShapeDtype]) -> None:
    """Checks that `folder` has a checkpoint of `save_orbax` of each array by its name; no values are read.

    Raises CheckpointError that names what is missing, damaged or of another shape or dtype.
    """
    saved: dict[str, str] = {}
    with as_checkpoint_error(folder), orbax().PyTreeCheckpointer() as checkpointer:
        for name in specs:
            if (folder / name / "_CHECKPOINT_METADATA").is_file():
                saved |= _by_path(checkpointer.metadata(folder.absolute() / name).item_metadata.tree)
    _check_same(folder, saved, _by_path(dict(specs)))


def _by_path(tree: Any) -> dict[str, str]:
    """Dtype and shape of each leaf by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): described(leaf) for path, leaf in leaves}


def _check_same(path: Path, saved: dict[str, str], wanted: dict[str, str]) -> None:
    # Orbax itself casts a differing dtype silently and, for numpy leaves, ignores a differing shape.
    names = sorted(saved.keys() | wanted.keys())
    problems = [
        f"{name}: saved {saved.get(name, 'nothing')}, wanted {wanted.get(name, 'nothing')}"
        for name in names
        if saved.get(name) != wanted.get(name)
    ]
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise CheckpointError(f"{path} does not fit: {'; '.join(problems[:8])}{more}")
