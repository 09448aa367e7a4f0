"""Metrics of a run: on the disk at once, in both files alike, also behind a kill; a full disk is one sentence."""

import json
import os
import resource
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from turbojax.errors import UserError
from turbojax.train.metrics import CURVES, metrics_writer, read_curves


def events(folder: Path) -> list[Event]:
    """What TensorBoard's files hold: records of a length, a checksum, an Event and a checksum."""
    found = []
    for path in sorted(folder.iterdir()):
        content, position = path.read_bytes(), 0
        while position < len(content):
            (length,) = struct.unpack_from("<Q", content, position)
            found.append(Event.FromString(content[position + 12 : position + 12 + length]))
            position += 16 + length
    return found


def scalars(folder: Path) -> dict[tuple[str, int], float]:
    """Values by name and step, as TensorBoard shows them: a start removes what was written from its step on."""
    shown: dict[tuple[str, int], float] = {}
    for event in events(folder):
        if event.session_log.status == SessionLog.START:
            shown = {key: value for key, value in shown.items() if key[1] < event.step}
        shown |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
    return shown


def curves(folder: Path) -> dict[tuple[str, int], float]:
    lines = read_curves(folder / CURVES)
    return {(name, line["step"]): value for line in lines for name, value in line.items() if name != "step"}


KILLED = """
import os, signal, sys
from pathlib import Path
from turbojax.train.metrics import metrics_writer

with metrics_writer(Path(sys.argv[1]), 0) as write:
    for step in (2, 4, 6):
        write(step, {"loss": step / 2, "rate": 0.5})
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_loses_none(tmp_path):
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert killed.returncode == -signal.SIGKILL
    expected = {(name, step): value for step in (2, 4, 6) for name, value in (("loss", step / 2), ("rate", 0.5))}
    assert scalars(tmp_path / "metrics") == curves(tmp_path) == expected


def test_going_on(tmp_path):
    """What was written past the step that a run goes on from no longer counts, however soon it goes on."""
    for start in (0, 4, 2):
        with metrics_writer(tmp_path, start) as write:
            for step in range(start + 1, 7):
                write(step, {"loss": 10 * start + step})
    expected = {("loss", step): step if step <= 2 else 20 + step for step in range(1, 7)}
    assert scalars(tmp_path / "metrics") == curves(tmp_path) == expected
    assert len(list((tmp_path / "metrics").iterdir())) == 3


@pytest.mark.filterwarnings("error")
def test_a_full_disk(tmp_path, capfd):
    """A sentence, nothing on the terminal beside it, and the next run goes on behind what is whole."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with metrics_writer(tmp_path, 0) as write:
            write(1, {"loss": 1.0})
            size = max(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 9, limits[1]))
            for _ in range(2):
                with pytest.raises(UserError, match=r"^metrics cannot be written to .*: File too large; make room"):
                    write(2, {f"loss {i}": 1.0 for i in range(100)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert capfd.readouterr() == ("", "")
    with metrics_writer(tmp_path, 1) as write:
        write(2, {"loss": 2.0})
    assert curves(tmp_path) == {("loss", 1): 1.0, ("loss", 2): 2.0}


def test_what_is_no_line_is_left_out(tmp_path):
    odd = [b'{"step": 2, "lo', b"\xff\xfe", b"[]", b'{"step": "3"}', b'{"loss": 1}', 100_000 * b"[", b"7", b"null", b""]
    good = json.dumps({"step": 1, "loss": 3.0}).encode()
    (tmp_path / CURVES).write_bytes(b"\n".join([*odd, good, *odd]))
    with metrics_writer(tmp_path, 5) as write:
        write(6, {"loss": 2.0})
    assert curves(tmp_path) == {("loss", 1): 3.0, ("loss", 6): 2.0}


@pytest.mark.parametrize("name", [CURVES, "metrics"])
def test_something_else_of_that_name(tmp_path, name):
    if name == CURVES:
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=rf"{name}' cannot be"):
        metrics_writer(tmp_path, 0).__enter__()
