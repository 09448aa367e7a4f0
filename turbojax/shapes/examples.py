"""Numbered examples of the world of shapes, drawn by several processes ahead of whoever takes them."""

import collections
import functools
import itertools
import multiprocessing
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np

from turbojax.errors import UserError
from turbojax.shapes.render import Placed, digit_images, draw, place
from turbojax.shapes.scene import Scene, caption, random_scene

CANDIDATES = 4  # of which the crop with the most in it is taken
FROM_THE_START = 0.3  # fraction of crops that have a video's first frame, which an autoencoder sees apart
AHEAD = 4  # groups that are queued or drawn, for each worker
GROUP = 32  # frames that a worker draws at a time, or sketches that it makes

T = TypeVar("T")


class Example(NamedTuple):
    """A scene, a sentence that describes it, and the video, uint8 `[T, H, W, 3]`."""

    scene: Scene
    caption: str
    video: np.ndarray


class Sketch(NamedTuple):
    """An example before it is drawn."""

    scene: Scene
    caption: str
    things: list[Placed]


def sketch(number: int, *, seed: int, num_frames: int, height: int, width: int) -> Sketch:
    """Makes the example of that number: the same whoever asks for it, and independent of all others."""
    rng = np.random.default_rng((seed, number))
    scene = random_scene(rng)
    sentence = caption(scene, rng)
    return Sketch(scene, sentence, place(scene, rng, num_frames=num_frames, height=height, width=width))


def example(number: int, *, seed: int, num_frames: int, height: int, width: int) -> Example:
    """Draws the example of that number."""
    scene, sentence, things = sketch(number, seed=seed, num_frames=num_frames, height=height, width=width)
    return Example(scene, sentence, draw(things, scene.background, height, width))


def sketches(numbers: Iterable[int], *, workers: int, **settings: int) -> Generator[Sketch, None, None]:
    """Yields what `examples` does, not drawn."""
    return made(functools.partial(sketch, **settings), numbers, workers=workers, group=GROUP)


def examples(numbers: Iterable[int], *, workers: int, **settings: int) -> Generator[Example, None, None]:
    """Yields the examples of these numbers, which may be without end, in their order; without workers drawn here.

    settings: as `example` takes them.
    """
    group = max(1, GROUP // settings["num_frames"])
    return made(functools.partial(example, **settings), numbers, workers=workers, group=group)


def made(make: Callable[[int], T], numbers: Iterable[int], *, workers: int, group: int) -> Generator[T, None, None]:
    """Yields what `make` makes of each number, in groups by worker processes that work ahead."""
    digit_images()  # a missing package shows here and not in a worker
    if workers < 0:
        raise UserError(f"{workers=} must not be negative")
    if not workers:
        yield from map(make, numbers)
        return
    numbers = iter(numbers)
    groups = iter(lambda: list(itertools.islice(numbers, group)), [])
    # Spawned: a fork of a process in which JAX has threads may never return.
    executor = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        first = itertools.islice(groups, AHEAD * workers)
        queued = collections.deque(executor.submit(make_all, make, group) for group in first)
        while queued:
            result = queued.popleft().result()
            queued.extend(executor.submit(make_all, make, group) for group in itertools.islice(groups, 1))
            yield from result
    finally:
        executor.shutdown(cancel_futures=True)


def make_all(make: Callable[[int], T], numbers: Sequence[int]) -> list[T]:
    """Makes a group, in a worker process."""
    return list(map(make, numbers))


def cut(video: np.ndarray, frames: int, side: int, rng: np.random.Generator) -> np.ndarray:
    """Cuts a part out of a video, `[frames, side, side, 3]`, where there is something to be seen."""
    first = 0 if rng.random() < FROM_THE_START else rng.integers(len(video) - frames + 1)
    places = [[rng.integers(whole - side + 1) for whole in video.shape[1:3]] for _ in range(CANDIDATES)]
    crops = [video[first : first + frames, y : y + side, x : x + side] for y, x in places]
    return max(crops, key=np.std)


class Batches(Iterator[dict[str, np.ndarray]]):
    """Endless batches {"video": uint8 `[B / share count, T, H, W, 3]`}; batch n has examples n B to (n + 1) B - 1.

    share: (i, n) for the i-th of n equal shares of each batch. crops: (frames, side) that the videos of a batch are
    `cut` to, batches taking these in turn. The rest as `examples` takes it.
    """

    def __init__(
        self,
        *,
        batch_size: int,
        share: tuple[int, int] = (0, 1),
        crops: Sequence[tuple[int, int]] = (),
        **settings: int,
    ):
        part, parts = share
        if batch_size < 1 or batch_size % parts:
            raise UserError(f"{batch_size=} must be a multiple of the {parts} processes")
        self._size, self._settings, self._crops = batch_size, settings, crops
        self._own = range(part * batch_size // parts, (part + 1) * batch_size // parts)
        self._batch = 0
        self._examples: Generator[Example, None, None] | None = None

    def __next__(self) -> dict[str, np.ndarray]:
        if self._examples is None:
            numbers = (batch * self._size + i for batch in itertools.count(self._batch) for i in self._own)
            self._examples = examples(numbers, **self._settings)
        videos = [one.video for one in itertools.islice(self._examples, len(self._own))]
        if self._crops:
            crop = self._crops[self._batch % len(self._crops)]
            rngs = [np.random.default_rng((self._settings["seed"], self._batch, i)) for i in self._own]
            videos = [cut(video, *crop, rng) for video, rng in zip(videos, rngs, strict=True)]
        self._batch += 1
        return {"video": np.stack(videos)}

    def get_state(self) -> dict[str, int]:
        """Returns where the next batch is; plain numbers, for JSON."""
        return {"batch": self._batch, "batch_size": self._size, "seed": self._settings["seed"]}

    def set_state(self, state: Mapping[str, int]) -> None:
        """Goes on where `get_state` was called; raises UserError for a state of another seed or size."""
        for name, value in self.get_state().items():
            if name != "batch" and (there := state.get(name)) != value:
                raise UserError(f"the run was begun with {name}={there}, not {value}; give that, or another workdir")
        self.close()
        self._batch = int(state["batch"])

    def close(self) -> None:
        """Ends the workers."""
        if self._examples is not None:
            self._examples.close()
            self._examples = None
