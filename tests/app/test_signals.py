"""Stopping a command: by Ctrl-C, SIGTERM, SIGHUP and SIGKILL, in order where that is possible."""

import os
import signal
import sys
import threading

import pytest

from tests.app.test_generate import CONVERT, run_all
from tests.weights.checkpoints import save, small, turbo
from turbojax.app.session import interactive
from turbojax.app.signals import Terminated, ending_in_order, exit_code
from turbojax.config import base_config
from turbojax.weights.convert import convert

AT_A_TENSOR = """
import os, runpy, sys
from turbojax.weights import convert, converted

number, stop_at = int(sys.argv[1]), int(sys.argv[2])
real = convert.progress

def progress(specs, text):
    for i, item in enumerate(real(specs, text)):
        if i == stop_at:
            os.kill(os.getpid(), number)
        yield item

convert.progress = converted.progress = progress
sys.argv = sys.argv[3:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(autouse=True)
def signals_as_at_a_terminal():
    """What runs in the background or under nohup ignores some, and so do the processes that it starts."""
    wanted = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in wanted.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_block_once(number):
    before, removed = signal.getsignal(number), []

    def work():
        try:
            signal.raise_signal(number)
        finally:
            signal.raise_signal(number)  # a second one does not disturb what is done in the end
            removed.append(True)

    with pytest.raises(Terminated, match=number.name) as stop, ending_in_order():
        work()
    assert removed
    assert exit_code(stop.value) == 128 + number
    assert signal.getsignal(number) is before
    assert exit_code(KeyboardInterrupt()) == 130


def test_what_is_ignored_stays_so():
    """As nohup has it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ending_in_order():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


class Stopping:
    def __init__(self, number: int):
        self.number = number

    def __del__(self):
        signal.raise_signal(self.number)


@pytest.mark.parametrize(("number", "error"), [(signal.SIGTERM, Terminated), (signal.SIGINT, KeyboardInterrupt)])
def test_a_stop_in_a_destructor_is_not_lost(number, error):
    """Python reports what destructors and callbacks raise, and goes on."""
    hook = sys.unraisablehook

    def work():
        Stopping(number)
        threading.Event().wait(60)

    with pytest.raises(error), ending_in_order():
        work()
    assert sys.unraisablehook is hook


def test_a_session_ends():
    """Ctrl-C stops a video there, SIGTERM the session."""
    asked, shown = [KeyboardInterrupt(), Terminated()], []

    def read(prompt):
        raise asked.pop(0)

    with pytest.raises(Terminated):
        interactive(base_config(), read=read, write=shown.append)
    assert shown[1:] == ["\nstopped; /quit ends the session"]


STOPS = [
    (signal.SIGINT, "orbax", "x"),
    (signal.SIGTERM, "safetensors", "x.safetensors"),
    (signal.SIGHUP, "pth", "x.pth"),
    (signal.SIGKILL, "orbax", "x"),
    (signal.SIGKILL, "safetensors", "x.safetensors"),
]


def test_a_conversion_that_is_stopped_leaves_nothing(tmp_path):
    """Nothing that the next one does not remove, where it was killed."""
    source = save(tmp_path / "source.pth", turbo(small()))
    (tmp_path / "stop.py").write_text(AT_A_TENSOR)
    cases = {}
    for number, kind, name in STOPS:
        flags = [f"--input={source}", f"--output={tmp_path / f'{number.name} {kind}' / name}", f"--format={kind}"]
        cases[number, kind, name] = [str(tmp_path / "stop.py"), str(int(number)), "3", CONVERT, *flags]
    for (number, kind, name), (code, _, said) in run_all(cases, tmp_path).items():
        folder = tmp_path / f"{number.name} {kind}"
        left = os.listdir(folder)
        if number == signal.SIGKILL:
            assert code == -number
            assert [file.partition("turbojax")[0] for file in left] == [".x."]
            convert(source, folder / name, format=kind)
            assert os.listdir(folder) == [name]
        else:
            assert code == 128 + number, said
            assert said.splitlines()[-1] == "stopped"
            assert left == []
