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
    """Request to end by SIGTERM or SIGHUP, as KeyboardInterrupt is one by Ctrl-C."""

    def __init__(self, number: int = signal.SIGTERM):
        super().__init__(signal.Signals(number).name)
        self.number = number


def exit_code(stop: KeyboardInterrupt) -> int:
    """Returns 128 plus the signal's number, as shells do."""
    return 128 + (stop.number if isinstance(stop, Terminated) else signal.SIGINT)


@contextlib.contextmanager
def ending_in_order() -> Iterator[None]:
    """Makes the first SIGTERM or SIGHUP raise Terminated in the block; signals that are ignored (nohup) stay ignored.

    A stop that Python could only report, because it was raised in a destructor or a callback, is raised again; so is
    Ctrl-C.
    For the main thread, in which Python handles signals.
    """
    received: list[int] = []

    def end(number: int, frame: object) -> None:
        if not received:  # a closed terminal sends several, and the second must not stop the removal
            received.append(number)
            raise Terminated(number)

    def report(unraisable: Any) -> None:
        if not isinstance(unraisable.exc_value, KeyboardInterrupt):
            reported(unraisable)
            return
        number = received.pop() if received else signal.SIGINT
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
