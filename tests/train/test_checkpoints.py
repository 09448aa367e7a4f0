"""Checkpoints of training: what was saved comes back to the bit, and whatever goes wrong, the last good one stays."""

import contextlib
import dataclasses
import gc
import itertools
import json
import os
import random
import re
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from turbojax.errors import CheckpointError
from turbojax.train.checkpoints import check_written, checksums, open_checkpoints, restore_newest, save_checkpoint
from turbojax.train.state import TrainState, initial_state
from turbojax.weights.io import reason

RUN = {"recipe": "teacher", "dim": 64}


def state(step: int) -> TrainState:
    """A state with a number of its own in every array, larger than the least that Orbax writes at once."""
    keys = jax.random.split(jax.random.key(step), 2)
    params = {"blocks.weight": jax.random.normal(keys[0], (2, 64, 64)), "bias": jax.random.normal(keys[1], (64,))}
    optimizer = optax.adamw(1e-3)
    return dataclasses.replace(initial_state(params, optimizer, optimizer), step=jnp.int32(step))


def like() -> TrainState:
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where), state(0))


def save(folder, *steps: int, keep: int = 3) -> None:
    with open_checkpoints(folder, keep=keep) as checkpoints:
        for step in steps:
            save_checkpoint(checkpoints, state(step), position={"batch": step}, run=RUN)


def restored_step(folder, run=RUN) -> int:
    """The step that is restored, of which every array and the position must be what was saved."""
    with open_checkpoints(folder) as checkpoints:
        got, position = restore_newest(checkpoints, like(), run=run)
    step = int(got.step)
    jax.tree.map(np.testing.assert_array_equal, got, state(step))
    assert position == {"batch": step}
    return step


def test_newest_comes_back_and_old_ones_go(tmp_path):
    save(tmp_path / "checkpoints", 3, 6, 9, keep=2)
    assert restored_step(tmp_path / "checkpoints") == 9
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["6", "9"]


def test_nothing_to_restore(tmp_path):
    with open_checkpoints(tmp_path) as checkpoints:
        assert restore_newest(checkpoints, like(), run=RUN) is None


def flip(path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= 1 << position % 8
    path.write_bytes(content)


def damage_cut(folder):
    for path in folder.glob("state/*blocks.weight/0*"):
        path.write_bytes(path.read_bytes()[:100])


def damage_missing(folder):
    shutil.rmtree(folder / "state" / "ema.bias")


def damage_position(folder):
    (folder / "position" / "metadata").write_text('{"bat')


def damage_name(folder):
    """Another letter in a key: JSON that can be read, and a run of another kind."""
    path = folder / "run" / "metadata"
    path.write_text(path.read_text().replace("recipe", "recipf"))


def damage_number(folder):
    path = folder / "position" / "metadata"
    path.write_text(path.read_text().replace("6", "7"))


def damage_bit(folder):
    """One bit of a number, which zstd does not see."""
    flip(folder / "state" / "student.params.bias" / "0", 100)


def damage_nesting(folder):
    (folder / "_CHECKPOINT_METADATA").write_text(100_000 * "[")


def damage_pipe(folder):
    (folder / "run" / "metadata").unlink()
    os.mkfifo(folder / "run" / "metadata")


def damage_step(folder):
    """A whole checkpoint under the name of another step."""
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name("3"), folder)


DAMAGES = [value for name, value in globals().items() if name.startswith("damage_")]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside(tmp_path, damage, caplog, capfd):
    save(tmp_path, 3, 6)
    damage(tmp_path / "6")
    assert restored_step(tmp_path) == 3
    gc.collect()  # reads that failed beside the first are told of where they are collected
    said = [record.getMessage() for record in caplog.records if record.levelname != "INFO"]
    assert len(said) == 1
    assert re.fullmatch(
        r"The checkpoint of step 6 is damaged \([^\n]{1,220}\); it is kept as damaged-6, and .*", said[0]
    )
    assert "bound method" not in said[0]
    assert not capfd.readouterr().err
    save(tmp_path, 6)  # the run comes there again
    assert restored_step(tmp_path) == 6
    damage(tmp_path / "6")
    assert restored_step(tmp_path) == 3
    assert {path.name for path in tmp_path.iterdir()} == {"3", "damaged-6", "damaged-6-2"}


@pytest.mark.filterwarnings("ignore:coroutine '_read_array:RuntimeWarning")  # pytest has filters of its own
def test_a_flipped_bit_in_any_file(tmp_path, caplog, capfd):
    """What is restored is what was saved, to the bit, or of the step before."""
    save(tmp_path / "whole", 3, 6)
    files = [path.relative_to(tmp_path / "whole") for path in sorted((tmp_path / "whole" / "6").rglob("*"))]
    files = [path for path in files if (tmp_path / "whole" / path).is_file() and "optimizer" not in str(path)]
    rng = random.Random(0)
    steps = []
    for path in files:
        shutil.rmtree(tmp_path / "flipped", ignore_errors=True)
        shutil.copytree(tmp_path / "whole", tmp_path / "flipped")
        flip(tmp_path / "flipped" / path, rng.randrange(2**16))
        steps.append(restored_step(tmp_path / "flipped"))
    assert set(steps) == {3, 6}
    gc.collect()
    assert "Traceback" not in caplog.text + capfd.readouterr().err


def test_an_earlier_version_wrote_no_checksums(tmp_path, caplog):
    save(tmp_path, 3)
    metadata = tmp_path / "3" / "_CHECKPOINT_METADATA"
    items = json.loads(metadata.read_text())
    shutil.rmtree(tmp_path / "3" / "checksums")
    with pytest.raises(CheckpointError, match="damaged"):
        restored_step(tmp_path)
    del items["item_handlers"]["checksums"]
    metadata.write_text(json.dumps(items))
    assert restored_step(tmp_path) == 3
    assert "without checksums" in caplog.text


def test_all_damaged(tmp_path):
    save(tmp_path, 3)
    damage_cut(tmp_path / "3")
    for _ in range(2):  # never a new start beside what may be mended
        with pytest.raises(CheckpointError, match=r"all checkpoints in .* are damaged: 3 \(.*; name another workdir"):
            restored_step(tmp_path)
    damage_nesting(tmp_path / "3")
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"all checkpoints in .* are damaged: damaged-3; name another"):
            restored_step(tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8"])
def test_checksums(dtype):
    """Every change of bits or places gives another number, for all zeros too."""
    values = np.zeros((3, 4), dtype)
    numbers = [checksums({"a": values})["['a']"]]
    for row, bit in itertools.product(range(3), range(8 * values.itemsize)):
        changed = values.view(f"u{values.itemsize}").copy()
        changed[row, 1] ^= 1 << bit
        numbers.append(checksums({"a": changed.view(dtype)})["['a']"])
    both = values.view(f"u{values.itemsize}").copy()
    both[:2, 1] ^= 1 << (8 * values.itemsize - 1)
    numbers += [checksums({"a": both.view(dtype)})["['a']"], checksums({"a": values[:, :3]})["['a']"]]
    assert len(set(numbers)) == len(numbers)


def test_a_half_written_checkpoint_is_removed(tmp_path):
    """A kill leaves the temporary folder that Orbax writes to."""
    save(tmp_path, 3)
    half = tmp_path / "9.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "3" / "state", half / "state")
    assert restored_step(tmp_path) == 3
    save(tmp_path, 6)  # at the latest
    assert not half.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipe": "rcm"}, "is of a run with recipe=teacher, this one has recipe=rcm; name another workdir"),
        ({"dim": 1536}, "is of a run with dim=64, this one has dim=1536"),
    ],
)
def test_another_run(tmp_path, change, message):
    save(tmp_path, 3)
    with pytest.raises(CheckpointError, match=message):
        restored_step(tmp_path, RUN | change)


@pytest.fixture
def small_files():
    """While this is entered, no file grows beyond a few kB: no array can be written."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    @contextlib.contextmanager
    def limited():
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    return limited


def save_and_look(checkpoints, *, wait: bool) -> None:
    save_checkpoint(checkpoints, state(6), position={"batch": 6}, run=RUN)
    while True:  # training goes on behind a save
        check_written(checkpoints, wait=wait)


# TensorStore's other writes fail unheard.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("wait", [True, False])
def test_full_disk(tmp_path, small_files, wait, caplog):
    """One sentence, and the checkpoint before stays."""
    save(tmp_path, 3, keep=1)
    # Which of the failed writes is told of is chance: the system may say of a later one that its folder has gone.
    sentence = r"a checkpoint cannot be written to .*; the last whole one is of step 3. Make room"
    with small_files(), open_checkpoints(tmp_path, keep=1) as checkpoints:  # noqa: SIM117
        with pytest.raises(CheckpointError, match=sentence):
            save_and_look(checkpoints, wait=wait)
    assert not caplog.records
    assert restored_step(tmp_path) == 3
    save(tmp_path, 6, keep=1)
    assert restored_step(tmp_path) == 6


def test_full_disk_at_the_end(tmp_path, small_files):
    """A failed save is told on leaving, too."""
    with pytest.raises(CheckpointError, match="; there is none yet"), small_files():
        save(tmp_path, 6)


def test_reason_of_a_full_disk():
    """TensorStore's words on Linux, as a disk of 1 MB gave them."""
    error = ValueError(
        'RESOURCE_EXHAUSTED: Error writing local file "/a/b": Failed writing: "/a/b.__lock": Failed to write 9 bytes '
        "to file 8: No space left on device [os_error_code='28']"
    )
    assert reason(error) == "No space left on device"


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(CheckpointError, match="file/checkpoints cannot hold checkpoints"),
        open_checkpoints(tmp_path / "file" / "checkpoints"),
    ):
        pass
