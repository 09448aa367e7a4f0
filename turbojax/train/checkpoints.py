"""Checkpoints of a training run: written in the background, whole or not at all, resumed from the newest whole one.

A folder a step: the state as Orbax writes arrays, and as JSON the position in the data and what kind of run it is.
"""

import contextlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import logging
from jax.experimental import multihost_utils

from turbojax.errors import CheckpointError
from turbojax.train.state import TrainState
from turbojax.weights.io import CHUNK_BYTES, orbax, reason

Manager = Any  # orbax.checkpoint.CheckpointManager, which takes a second to import


@contextlib.contextmanager
def open_checkpoints(folder: Path, *, keep: int = 2) -> Iterator[Manager]:
    """The checkpoints in a folder, which is made if need be; the newest `keep` stay.

    What a killed run left half written is removed. Raises CheckpointError on leaving where the last one could not be
    written.
    """
    ocp = orbax()
    handlers = {
        "state": ocp.PyTreeCheckpointHandler(use_ocdbt=False),
        "position": ocp.JsonCheckpointHandler(),
        "run": ocp.JsonCheckpointHandler(),
    }
    # Orbax can remove them, too, but in the background, where two managers of one folder disturb each other.
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            for half in folder.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
                shutil.rmtree(half, ignore_errors=True)
        manager = ocp.CheckpointManager(folder.resolve(), options=options, item_handlers=handlers)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot hold checkpoints: {error.strerror or error}") from error
    try:
        yield manager
        check_written(manager, wait=True)
    finally:
        with contextlib.suppress(Exception):  # of a write whose failure has been told, or a stop that cannot wait
            manager.close()


def save_checkpoint(manager: Manager, state: TrainState, *, position: Any, run: Mapping[str, Any]) -> None:
    """Begins to write a checkpoint: the arrays are copied to the host now and written behind the next steps.

    position: where the data reader is; run: what `restore_newest` compares, both as JSON holds them.
    Raises CheckpointError where this one or the one before cannot be written; older ones stay.
    """
    ocp = orbax()
    chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), state)
    items = ocp.args.Composite(
        state=ocp.args.PyTreeSave(state, save_args=chunks),
        position=ocp.args.JsonSave(position),
        run=ocp.args.JsonSave(dict(run)),
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
    """The newest whole checkpoint and the position of its data; None where there is none yet.

    like: the state's shapes, dtypes and shardings.
    run: what kind of run this is; a checkpoint of another kind is refused.

    A damaged checkpoint is set aside under another name. Raises CheckpointError if all are damaged, or the newest is
    of another kind of run.
    """
    ocp = orbax()
    steps = sorted(manager.all_steps(), reverse=True)
    damaged = []
    for step in steps:
        try:
            text = ocp.args.Composite(position=ocp.args.JsonRestore(), run=ocp.args.JsonRestore())
            saved = manager.restore(step, args=text)
            check_same_run(manager.directory, saved.run, run)
            arguments = ocp.args.PyTreeRestore(like, restore_args=ocp.checkpoint_utils.construct_restore_args(like))
            state = manager.restore(step, args=ocp.args.Composite(state=arguments)).state
        except CheckpointError:
            raise
        except Exception as error:  # a cut, changed or missing file shows in many ways
            logging.warning("The checkpoint of step %d is damaged (%s); trying the one before", step, reason(error))
            damaged.append(step)
        else:
            set_aside(manager, damaged)
            logging.info("Resuming from step %d of %s", step, manager.directory)
            return state, saved.position
    if steps:
        raise CheckpointError(f"all {len(steps)} checkpoints in {manager.directory} are damaged; name another workdir")
    return None


def check_same_run(folder: Any, saved: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    for name in {**run, **saved}:
        there, here = saved.get(name), run.get(name)
        if there != here:
            raise CheckpointError(
                f"{folder} is of a run with {name}={there}, this one has {name}={here}; name another workdir"
            )


def set_aside(manager: Manager, steps: Sequence[int]) -> None:
    """Renames damaged checkpoints: the run will write some of these steps again."""
    if not steps:
        return
    if jax.process_index() == 0:
        for step in steps:
            (Path(manager.directory) / str(step)).rename(Path(manager.directory) / f"damaged-{step}")
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("damaged checkpoints set aside")
    manager.reload()
