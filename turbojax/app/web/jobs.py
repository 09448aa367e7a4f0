"""A queue of calls for one device: their order, their progress, and cancelling."""

import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from turbojax.errors import UserError
from turbojax.pipeline.timing import Progress

MOST = 16  # jobs at a time, the running one included


class Job:
    """A call that waits, runs or is done. stage and share: the latest of its progress."""

    def __init__(self, owner: str, work: Callable[[Progress], Any], pool: ThreadPoolExecutor):
        self.owner, self.stage, self.share = owner, "wait", 0.0
        self._cancelled = threading.Event()
        self._future: Future = pool.submit(lambda: work(self._report))

    def _report(self, stage: str, share: float) -> None:
        if self._cancelled.is_set():
            raise CancelledError
        self.stage, self.share = stage, share

    def cancel(self) -> None:
        """Leaves the queue at once, or ends the running call when it next reports its progress."""
        self._cancelled.set()
        self._future.cancel()

    @property
    def cancelled(self) -> bool:
        """True once it is to end."""
        return self._cancelled.is_set()

    @property
    def done(self) -> bool:
        """True once it has ended."""
        return self._future.done()

    def wait(self, seconds: float) -> bool:
        """Waits for so long at most; returns True if it is done."""
        with suppress(TimeoutError, CancelledError):
            self._future.exception(seconds)
        return self.done

    def result(self) -> Any:
        """Returns or raises what the call did; raises CancelledError if it was cancelled."""
        return self._future.result()


class Jobs:
    """Runs calls one at a time, in the order in which they came."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="jobs")
        self._lock = threading.Lock()
        self._jobs: list[Job] = []

    def add(self, owner: str, work: Callable[[Progress], Any]) -> Job:
        """Queues work, which is called with a function to report its progress to; raises UserError if too many wait.

        owner: any name, for `cancel`.
        """
        with self._lock:
            self._jobs = [job for job in self._jobs if not job.done]
            if len(self._jobs) >= MOST:
                raise UserError(f"{len(self._jobs)} videos are waiting, and no more can; try again in a few minutes")
            self._jobs.append(Job(owner, work, self._pool))
            return self._jobs[-1]

    def before(self, job: Job) -> int:
        """Returns the number of jobs that come first."""
        with self._lock:
            jobs = list(self._jobs)
        return sum(not other.done for other in jobs[: jobs.index(job)]) if job in jobs else 0

    def cancel(self, owner: str | None = None) -> None:
        """Cancels all that an owner has queued, or that anybody has."""
        with self._lock:
            own = [job for job in self._jobs if owner in (None, job.owner)]
        for job in own:
            job.cancel()

    def close(self) -> None:
        """Cancels everything and waits for the running call to end."""
        self.cancel()
        self._pool.shutdown()
