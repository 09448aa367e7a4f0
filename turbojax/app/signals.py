"""Signals that end a command: as Ctrl-C, SIGTERM and SIGHUP have what was begun removed before it ends."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

REPEAT_SECONDS = 0.05


class Terminated(KeyboardInterrupt):
    """The command was asked to end by SIGTERM or SIGHUP, as Ctrl-C asks it by KeyboardInterrupt."""

    def __init__(self, number: int = signal.SIGTERM):
        super().__init__(signal.Signals(number).name)
        self.number = number


def exit_code(stop: KeyboardInterrupt) -> int:
    """128 and the signal's number, as shells say it."""
    return 128 + (stop.number if isinstance(stop, Terminated) else signal.SIGINT)


@contextlib.contextmanager
def ending_in_order() -> Iterator[None]:
    """SIGTERM and SIGHUP raise Terminated in the block, the first of them; those that are ignored (nohup) stay so.

    What Python could only report, because it was raised in a destructor or a callback, is raised again; so is Ctrl-C.
    For the main thread, in which Python handles signals.
    """
    asked: list[int] = []

    def end(number: int, frame: object) -> None:
        if not asked:  # a closed terminal sends several, and the second must not stop the removal
            asked.append(number)
            raise Terminated(number)

    def report(unraisable: Any) -> None:
        if not isinstance(unraisable.exc_value, KeyboardInterrupt):
            reported(unraisable)
            return
        number = asked.pop() if asked else signal.SIGINT
        # Not at once: what is raised here is lost, too.
        repeat = threading.Timer(REPEAT_SECONDS, os.kill, (os.getpid(), number))
        repeat.daemon = True
        repeat.start()

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    reported, sys.unraisablehook = sys.unraisablehook, report
    try:
        for number, handler in before.items():
            if handler is signal.SIG_DFL:
                signal.signal(number, end)
        yield
    finally:
        sys.unraisablehook = reported
        for number, handler in before.items():
            if signal.getsignal(number) is end:
                signal.signal(number, handler)
