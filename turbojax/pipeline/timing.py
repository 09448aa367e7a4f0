"""Wall-clock seconds by stage, with compilation apart."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
from absl import logging

# progress(stage, share): a stage has begun, share 0.0, or some of its steps or chunks are done. What it raises goes
# through to the caller of the work.
Progress = Callable[[str, float], None]


def no_progress(stage: str, share: float) -> None:
    """Ignores the progress."""


class Stopwatch:
    """Seconds by stage; what inner stages and compilation (lowering and XLA) take is counted apart."""

    COMPILING = ("/jax/core/compile/jaxpr_to_mlir_module_duration", "/jax/core/compile/backend_compile_duration")

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.progress: Progress = no_progress
        self._thread = threading.get_ident()
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event in self.COMPILING and threading.get_ident() == self._thread:  # not what compiles in the background
            self._add("compile", duration_secs)

    def _add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._thread = threading.get_ident()
        self.progress(name, 0.0)
        start, before = time.perf_counter(), dict(self.seconds)
        yield
        elapsed = time.perf_counter() - start - (sum(self.seconds.values()) - sum(before.values()))
        compiling = self.seconds.get("compile", 0.0) - before.get("compile", 0.0)
        self._add(name, elapsed)
        if elapsed + compiling > 0.01:
            logging.info("%s: %.2f s%s", name, elapsed, f", compilation {compiling:.2f} s" if compiling > 0.01 else "")

    def take(self) -> dict[str, float]:
        """Returns the seconds so far, and starts again from zero."""
        seconds, self.seconds = self.seconds, {}
        return seconds
