"""The metrics of a run, on disk as soon as they are there: events for TensorBoard, and a line each of curves.jsonl."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from turbojax.errors import UserError
from turbojax.files import make_folder, whole_file

CURVES, EVENTS = "curves.jsonl", "metrics"

Write = Callable[[int, Mapping[str, float]], None]


@contextlib.contextmanager
def metrics_writer(workdir: Path, start: int) -> Iterator[Write]:
    """Yields write(step, metrics), which returns when they are on the disk, so that a kill loses none.

    What a run that was killed wrote past `start` no longer counts. Raises UserError where they cannot be written.
    """
    if jax.process_index() > 0:
        yield lambda step, metrics: None
        return
    try:
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.record_writer import RecordWriter
        from tensorboardX.summary import scalar
    except ImportError as error:
        raise UserError("metrics need tensorboardX; pip install 'turbojax[train]'") from error
    curves = workdir / CURVES
    make_folder(workdir / EVENTS)
    with one_sentence(workdir):
        keep_curves(curves, start)
        # Not SummaryWriter: its thread keeps events back for two minutes, and prints what goes wrong.
        events = RecordWriter(str(workdir / EVENTS / f"events.out.tfevents.{time.time_ns()}"))

    def add(step: int, **content: Any) -> None:
        events.write(Event(step=step, wall_time=time.time(), **content).SerializeToString())

    def write(step: int, metrics: Mapping[str, float]) -> None:
        with one_sentence(workdir):
            with curves.open("a") as file:
                file.write(json.dumps({"step": step, **metrics}) + "\n")
            for name, value in metrics.items():
                add(step, summary=scalar(name, value))
            events.flush()

    try:
        with one_sentence(workdir):
            add(start + 1, file_version="brain.Event:2")
            add(start + 1, session_log=SessionLog(status=SessionLog.START))
            events.flush()
        yield write
    finally:
        with contextlib.suppress(OSError):  # of a write whose failure has been raised
            events.close()


def keep_curves(path: Path, start: int) -> None:
    """Leaves the lines up to step `start` in a file of metrics, for others to come behind them."""
    kept = [line for line in read_curves(path) if line["step"] <= start] if path.is_file() else []
    with whole_file(path) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))


def read_curves(path: Path) -> list[dict[str, float]]:
    """Reads the metrics of a run, lines {"step": n, NAME: value, ...}; leaves out what is no such line."""
    lines = []
    for text in path.read_bytes().split(b"\n"):
        with contextlib.suppress(ValueError, RecursionError):
            line = json.loads(text)
            if isinstance(line, dict) and type(line.get("step")) is int:
                lines.append(line)
    return lines


@contextlib.contextmanager
def one_sentence(workdir: Path) -> Iterator[None]:
    """Raises UserError in place of the operating system's error."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"metrics cannot be written to {workdir}: {error.strerror or error}; make room and run the same "
            "command again: it goes on from the newest checkpoint"
        ) from error
