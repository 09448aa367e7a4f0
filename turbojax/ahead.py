"""Programs that compile in the background, while weights load."""

from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any


class Programs:
    """Compiled programs by name; each is built once, here or ahead of time in a thread."""

    def __init__(self):
        self._futures: dict[Hashable, Future] = {}
        self._pool = ThreadPoolExecutor(4, thread_name_prefix="compile")

    def __len__(self) -> int:
        return len(self._futures)

    def start(self, name: Hashable, build: Callable[[], Any]) -> None:
        """Builds a program in the background; what building raises is raised by `get`."""
        self._futures[name] = self._pool.submit(build)

    def get(self, name: Hashable, build: Callable[[], Any]) -> Any:
        """The program, once it is there; built now if it was not started."""
        if name not in self._futures:
            future: Future = Future()
            future.set_result(build())
            self._futures[name] = future
        return self._futures[name].result()

    def wait(self, name: Hashable) -> None:
        """Waits for a program that was started; of use for what ends up in a cache of JAX's."""
        if name in self._futures:
            self._futures[name].result()

    @contextmanager
    def needed(self) -> Iterator[None]:
        """If the block raises, programs that still wait for a thread are not begun: nobody will call them."""
        try:
            yield
        except BaseException:
            self._pool.shutdown(wait=False, cancel_futures=True)
            raise
