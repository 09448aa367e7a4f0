"""Checkpoints of a training run: written in the background, whole or not at all, resumed from the newest whole one.

A folder a step: the state as Orbax writes arrays, and as JSON the position in the data, what kind of run it is, and
checksums of all three. A checkpoint that does not give back what was saved is damaged, whatever has happened to it.
"""

import contextlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from turbojax.errors import CheckpointError
from turbojax.json_reader import Map, Object, String, read_json
from turbojax.train.state import TrainState
from turbojax.weights.io import reason
from turbojax.weights.orbax import CHUNK_BYTES
from turbojax.weights.quiet_orbax import orbax

Manager = Any  # orbax.checkpoint.CheckpointManager, which takes a second to import
TEXTS = ("position", "run", "checksums")
METADATA = "_CHECKPOINT_METADATA"  # Orbax' own file
ITEMS = Object({"item_handlers": Map(String())}, others="left out")  # of METADATA
DAMAGED = "damaged-"  # what the names of damaged checkpoints begin with


@contextlib.contextmanager
def open_checkpoints(folder: Path, *, keep: int = 2) -> Iterator[Manager]:
    """Opens the checkpoints in a folder, which is made if need be; the newest `keep` stay.

    What a killed run left half written is removed, and what Orbax must not look at is set aside. Raises CheckpointError
    on leaving where the last one could not be written.
    """
    ocp = orbax()
    handlers = {"state": ocp.PyTreeCheckpointHandler(use_ocdbt=False)}
    handlers |= {name: ocp.JsonCheckpointHandler() for name in TEXTS}
    # Orbax can remove them, too, but in the background, where two managers of one folder disturb each other.
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            for half in folder.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
                shutil.rmtree(half, ignore_errors=True)
            for path in folder.iterdir():
                if path.is_dir() and path.name.isdigit() and (problem := unreadable(path)):
                    set_aside(path, problem)
        all_processes("checkpoint folder prepared")
        manager = ocp.CheckpointManager(folder.resolve(), options=options, item_handlers=handlers)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot hold checkpoints: {error.strerror or error}") from error
    try:
        yield manager
        check_written(manager, wait=True)
    finally:
        with contextlib.suppress(Exception):  # of a write whose failure has been raised, or a stop that cannot wait
            manager.close()


def save_checkpoint(manager: Manager, state: TrainState, *, position: Any, run: Mapping[str, Any]) -> None:
    """Begins to write a checkpoint: the arrays are copied to the host now and written behind the next steps.

    position: where the data reader is; run: what `restore_newest` compares, both as JSON holds them.
    Raises CheckpointError where this one or the one before cannot be written; older ones stay.
    """
    ocp = orbax()
    chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), state)
    texts = {"position": position, "run": dict(run)}
    texts["checksums"] = {name: json_checksum(text) for name, text in texts.items()} | {"state": checksums(state)}
    items = ocp.args.Composite(
        state=ocp.args.PyTreeSave(state, save_args=chunks),
        **{name: ocp.args.JsonSave(text) for name, text in texts.items()},
    )
    try:
        manager.save(int(state.step), args=items)
    except Exception as error:  # whatever the file system, TensorStore or Orbax raises
        raise unwritten(manager, error) from error


def check_written(manager: Manager, *, wait: bool = False) -> None:
    """Raises CheckpointError where a write in the background has failed; wait: not before it has ended."""
    if wait or not manager.is_saving_in_progress():
        try:
            manager.wait_until_finished()
        except Exception as error:
            raise unwritten(manager, error) from error


def unwritten(manager: Manager, error: Exception) -> CheckpointError:
    steps = manager.all_steps(read=True)
    last = f"the last whole one is of step {max(steps)}" if steps else "there is none yet"
    return CheckpointError(
        f"a checkpoint cannot be written to {manager.directory}: {reason(error)}; {last}. "
        "Make room and run the same command again."
    )


def restore_newest(manager: Manager, like: TrainState, *, run: Mapping[str, Any]) -> tuple[TrainState, Any] | None:
    """Returns the newest whole checkpoint and the position of its data; None where there is none yet.

    like: the state's shapes, dtypes and shardings.
    run: what kind of run this is; a checkpoint of another kind is refused.

    Damaged checkpoints are logged and set aside under another name. Raises CheckpointError if all are damaged, or the
    newest that is not is of another kind of run.
    """
    folder = Path(manager.directory)
    damaged: dict[int, str] = {}
    for step in sorted(manager.all_steps(), reverse=True):
        found, problem = None, ""
        try:
            found = read_checkpoint(manager, step, like, run=run)
        except (WrongRunError, MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:  # a cut, changed or missing file shows in many ways
            problem = reason(error)
        if any_process(bool(problem)):
            damaged[step] = problem or "another process cannot read it"
            continue
        if jax.process_index() == 0:
            for number, why in damaged.items():
                set_aside(folder / str(number), why)
        if damaged:
            all_processes("damaged checkpoints set aside")
            manager.reload()
        logging.info("Resuming from step %d of %s", step, folder)
        return found
    aside = sorted(path.name for path in folder.glob(f"{DAMAGED}*"))
    if damaged or aside:
        names = ", ".join([*map(str, sorted(damaged)), *aside])
        why = f" ({next(iter(damaged.values()))})" if damaged else ""
        raise CheckpointError(
            f"all checkpoints in {folder} are damaged: {names[:100]}{why}; name another workdir to begin anew"
        )
    return None


def read_checkpoint(manager: Manager, step: int, like: TrainState, *, run: Mapping[str, Any]) -> tuple[TrainState, Any]:
    """Reads state and position of one checkpoint; raises WrongRunError, or anything at all where it is damaged."""
    ocp = orbax()
    has = read_json(Path(manager.directory) / str(step) / METADATA, ITEMS, suggestion="Orbax needs it")["item_handlers"]
    texts = manager.restore(
        step, args=ocp.args.Composite(**{name: ocp.args.JsonRestore() for name in TEXTS if name in has})
    )
    checked = "checksums" in has
    for name in ("position", "run") if checked else ():
        if json_checksum(texts[name]) != texts.checksums[name]:
            raise ValueError(f"its {name} is not what was written")
    check_same_run(manager.directory, texts.run, run)
    arguments = ocp.args.PyTreeRestore(like, restore_args=ocp.checkpoint_utils.construct_restore_args(like))
    state = manager.restore(step, args=ocp.args.Composite(state=arguments)).state
    if checked:
        wanted, found = texts.checksums["state"], checksums(state)
        if different := [name for name in found if found[name] != wanted.get(name)]:
            raise ValueError(f"{different[0]} is not what was written")
    else:
        logging.warning(
            "The checkpoint of step %d is of an earlier version, without checksums: it is not checked", step
        )
    if int(state.step) != step:
        raise ValueError(f"it holds step {int(state.step)}")
    return state, texts.position


class WrongRunError(CheckpointError):
    """A checkpoint is of another kind of run."""


def check_same_run(folder: Any, saved: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    for name in {**run, **saved}:
        there, here = saved.get(name), run.get(name)
        if there != here:
            raise WrongRunError(
                f"{folder} is of a run with {name}={there}, this one has {name}={here}; name another workdir"
            )


def json_checksum(content: Any) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def checksums(state: TrainState) -> dict[str, int]:
    """Computes a number for each array by its path, from every bit of it; the same on any devices."""
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(state)]
    return dict(zip(names, np.asarray(array_checksums(state)).tolist(), strict=True))


@jax.jit
def array_checksums(tree: Any) -> jax.Array:
    """Returns uint32 `[arrays]`: sums, modulo 2^32, of each value's bits mixed with its place."""

    def one(a: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(a, jnp.dtype(f"uint{8 * a.dtype.itemsize}")).astype(jnp.uint32)
        mixed = bits
        for axis in range(a.ndim):  # not one count over all, which no device has
            place = jax.lax.broadcasted_iota(jnp.uint32, a.shape, axis)
            mixed = mixed * jnp.uint32(0x01000193) + place * jnp.uint32(0x9E3779B9)
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):  # MurmurHash3's last steps
            mixed = (mixed ^ mixed >> shift) * jnp.uint32(factor)
        return jnp.sum(mixed ^ mixed >> 16, dtype=jnp.uint32)

    return jnp.stack([one(a) for a in jax.tree.leaves(tree)])


def unreadable(folder: Path) -> str:
    """Says why Orbax must not look at a checkpoint (it would wait for ever, or give up on all); "" if it may."""
    odd = [path for path in folder.rglob("*") if not (path.is_file() or path.is_dir())]
    if odd:
        return f"{odd[0].relative_to(folder.parent)} is no file"
    try:
        read_json(folder / METADATA, Object({}, others="left out"), suggestion="Orbax needs it")
    except CheckpointError as error:
        return str(error)
    return ""


def set_aside(folder: Path, problem: str) -> None:
    """Renames a damaged checkpoint, since the run may write this step again, and tells of it in a line."""
    number = 1
    while (aside := folder.with_name(f"{DAMAGED}{folder.name}" + (f"-{number}" if number > 1 else ""))).exists():
        number += 1
    os.rename(folder, aside)
    logging.warning(
        "The checkpoint of step %s is damaged (%s); it is kept as %s, and the one before is taken",
        *(folder.name, problem, aside.name),
    )


def any_process(flag: bool) -> bool:
    """Tells whether the flag is set in any process, so that all do the same."""
    return flag if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.asarray(flag)).any())


def all_processes(where: str) -> None:
    """Waits until every process is there."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)
