"""Draws scenes as videos, uint8 `[T, H, W, 3]`, with smooth edges.

`place` takes all decisions that a scene leaves open; `turbojax.shapes.render_jax` draws from there on a GPU.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from turbojax.errors import UserError
from turbojax.shapes.scene import COLOURS, DIGITS, DIRECTIONS, SHAPES, Scene, Thing

Array = Any  # NumPy's or JAX's
Outline = Callable[[Array, Array], Array]  # signed distance of points (x, y) in units of the radius

BACKGROUND_LEVELS = {"black": (12, 12), "white": (242, 242), "gray": (128, 128), "checkered": (190, 225)}
CHECKS = 8  # squares along the shorter side
# Of one thing alone, and of one of two, which have less room: radius and the way of a thing that moves straight ahead,
# as fractions of the shorter side.
RADIUS = ((0.14, 0.19), (0.115, 0.14))
TRAVEL = ((0.3, 0.42), (0.25, 0.34))
GROWTH = (1.9, 2.3)  # last radius over first
TURN = (1.2, 2.0)  # radians
ROOM = 1.35  # of a thing's radius: the farthest point of its shape, but for digits with ink in their corners
CORNER = 1.8  # likewise, of all that may have ink
INK = (12, 12)  # pixels of a handwritten digit with its margin


@dataclasses.dataclass(frozen=True)
class Path:
    """Where a thing is in each frame: centre `[T, 2]` (x, y) and radius `[T]` in pixels, angle `[T]` in radians."""

    centre: np.ndarray
    radius: np.ndarray
    angle: np.ndarray


class Placed(NamedTuple):
    """One thing as it is drawn, or with leading axes many.

    outline: index into `outlines`; ink: the handwriting of a digit, `[12, 12]`, 0 to 1; colour: levels `[3]`; centre
    `[T, 2]`, radius `[T]` and angle `[T]` are those of its Path.
    """

    outline: Array
    ink: Array
    colour: Array
    centre: Array
    radius: Array
    angle: Array


def place(
    scene: Scene,
    rng: np.random.Generator,
    *,
    num_frames: int,
    height: int,
    width: int,
    writers: np.ndarray | None = None,
) -> list[Placed]:
    """Gives the scene's things the sizes, places, speeds and handwriting that rng chooses; else as `render`."""
    placed = []
    for thing, path in zip(scene.things, paths(scene, rng, num_frames, height, width), strict=True):
        digit = thing.shape in DIGITS
        outline = DIGIT if digit else SHAPES.index(thing.shape)
        ink = handwriting(thing, rng, writers) if digit else np.zeros(INK, np.float32)
        colour = np.array(COLOURS[thing.colour], np.float32)
        placed.append(Placed(outline, ink, colour, path.centre, path.radius, path.angle))
    return placed


def render(
    scene: Scene,
    rng: np.random.Generator,
    *,
    num_frames: int = 33,
    height: int = 128,
    width: int = 128,
    writers: np.ndarray | None = None,
) -> np.ndarray:
    """Draws a video of the scene, uint8 `[T, H, W, 3]`; rng chooses sizes, places and speeds.

    writers: indices of the handwritten digits that may be drawn, all if not given.
    """
    things = place(scene, rng, num_frames=num_frames, height=height, width=width, writers=writers)
    return draw(things, scene.background, height, width)


def draw(things: Sequence[Placed], behind: str, height: int, width: int) -> np.ndarray:
    """Draws the video of placed things before a background, uint8 `[T, H, W, 3]`."""
    shape = (len(things[0].radius), height, width, 3)
    video = np.broadcast_to(background(behind, height, width)[None, ..., None], shape).astype(np.float32)
    for thing in things:
        distance = outlines(thing.ink)[thing.outline]
        for t in range(len(video)):
            # The part of the frame that the thing reaches.
            reach = CORNER * thing.radius[t] + 1
            rows, columns = (slice(max(0, int(c - reach)), int(c + reach) + 2) for c in thing.centre[t, ::-1])
            window = video[t, rows, columns]
            y, x = np.mgrid[rows.start : rows.start + window.shape[0], columns.start : columns.start + window.shape[1]]
            covered = coverage(thing, t, x, y, distance)[..., None].astype(np.float32)
            window += covered * (thing.colour - window)
    return np.round(video).astype(np.uint8)


def coverage(thing: Placed, t: Array, x: Array, y: Array, distance: Outline) -> Array:
    """Returns the fraction of each pixel (x, y) that a thing covers in frame t; an edge is a pixel wide."""
    xp = thing.ink.__array_namespace__()
    radius, sine, cosine = thing.radius[t], xp.sin(thing.angle[t]), xp.cos(thing.angle[t])
    dx, dy = (x - thing.centre[t, 0]) / radius, (y - thing.centre[t, 1]) / radius
    return xp.clip(0.5 - radius * distance(cosine * dx + sine * dy, cosine * dy - sine * dx), 0, 1)


def background(name: str, height: int, width: int) -> np.ndarray:
    """Returns gray levels `[H, W]`."""
    dark, light = BACKGROUND_LEVELS[name]
    return np.where(squares(height, width) % 2, dark, light).astype(np.float32)


def squares(height: int, width: int) -> np.ndarray:
    """Returns column plus row of the square that each pixel `[H, W]` lies in."""
    y, x = np.mgrid[:height, :width] // max(1, min(height, width) // CHECKS)
    return x + y


def paths(scene: Scene, rng: np.random.Generator, num_frames: int, height: int, width: int) -> list[Path]:
    """Chooses a path for each thing, inside the picture; two things start in halves of their own."""
    for _ in range(1000):
        others = len(scene.things) - 1
        found = [path(thing, rng, num_frames, height, width, others=others) for thing in scene.things]
        if len(found) == 1 or apart(*found):
            return found
    raise UserError(f"two things find no room in {width} x {height} pixels; take a larger picture")


def apart(a: Path, b: Path) -> bool:
    """Returns True if two things never cover each other."""
    gap = np.linalg.norm(a.centre - b.centre, axis=1) - ROOM * (a.radius + b.radius)
    return bool((gap > 0).all())


def path(thing: Thing, rng: np.random.Generator, num_frames: int, height: int, width: int, *, others: int = 0) -> Path:
    side, time = min(height, width), np.linspace(0, 1, num_frames)
    radius = np.full(num_frames, side * rng.uniform(*RADIUS[others]))
    angle = np.full(num_frames, rng.uniform(-0.2, 0.2))
    move = np.zeros((num_frames, 2))
    if thing.motion in DIRECTIONS:
        step = np.array(DIRECTIONS[thing.motion], np.float64)
        move = np.outer(time, side * rng.uniform(*TRAVEL[others]) * step / np.linalg.norm(step))
    elif thing.motion == "bouncing":  # falls and is thrown back, twice
        height_of_fall, beat = side * rng.uniform(0.25, 0.35), (2 * time + rng.uniform(0, 0.3)) % 1
        move[:, 1] = -height_of_fall * 4 * beat * (1 - beat)
    elif thing.motion == "growing":
        radius = 0.7 * radius * rng.uniform(*GROWTH) ** time
    else:
        angle = angle + rng.choice((-1, 1)) * rng.uniform(*TURN) * time
    margin = ROOM * radius.max() + 1
    low = margin - move.min(axis=0)
    high = np.array((width, height)) - margin - move.max(axis=0)
    if (high < low).any():
        raise UserError(f"{thing.motion!r} finds no room in {width} x {height} pixels; take at least 64 x 64")
    return Path(rng.uniform(low, high) + move, radius, angle)


def circle(x: Array, y: Array) -> Array:
    return (x * x + y * y) ** 0.5 - 1


def square(x: Array, y: Array) -> Array:
    xp = x.__array_namespace__()
    return xp.maximum(xp.abs(x), xp.abs(y)) - 0.88


def polygon(x: Array, y: Array, *, corners: int, inner: float | None, radius: float) -> Array:
    """Returns the signed distance to the edges of a regular polygon, or of a star with inner corners at `inner`."""
    xp, half = x.__array_namespace__(), np.pi / corners
    angle = xp.abs((xp.atan2(x, -y) + half) % (2 * half) - half)  # folded to one half edge; a corner is up
    r = (x * x + y * y) ** 0.5
    px, py = r * xp.cos(angle), r * xp.sin(angle)
    tip = np.array((radius, 0.0))
    depth = radius * np.cos(half) if inner is None else radius * inner
    other = depth * np.array((np.cos(half), np.sin(half)))
    edge = other - tip
    normal = np.array((edge[1], -edge[0])) / np.hypot(*edge)
    return (px - tip[0]) * normal[0] + (py - tip[1]) * normal[1]


def inked(ink: Array, x: Array, y: Array) -> Array:
    """Returns a handwritten digit as a function like the outlines: negative where there is ink."""
    xp = ink.__array_namespace__()
    column, row = (xp.clip((a / 1.25 + 1) * 4 + 1.5, 0, ink.shape[-1] - 1.001) for a in (x, y))
    i, j = row.astype(int), column.astype(int)
    u, v = row % 1, column % 1
    level = (
        ink[i, j] * (1 - u) * (1 - v)
        + ink[i, j + 1] * (1 - u) * v
        + ink[i + 1, j] * u * (1 - v)
        + ink[i + 1, j + 1] * u * v
    )
    return (0.45 - level) * 0.5  # ink falls from 1 to 0 over about two of the image's pixels, a quarter radius each


def outlines(ink: Array) -> tuple[Outline, ...]:
    """Returns those of the first of SHAPES, and the digit that the ink shows."""
    triangle = functools.partial(polygon, corners=3, inner=None, radius=1.3)
    star = functools.partial(polygon, corners=5, inner=0.45, radius=1.3)
    return circle, square, triangle, star, functools.partial(inked, ink)


DIGIT = SHAPES.index(DIGITS[0])  # its place among the outlines


@functools.cache
def digit_images() -> tuple[np.ndarray, np.ndarray]:
    """Loads scikit-learn's handwritten digits, float32 `[1797, 8, 8]` in 0..1, and their values."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("digits come with scikit-learn; pip install 'turbojax[shapes]'") from error
    data = load_digits()
    return data.images.astype(np.float32) / 16, data.target


def handwriting(thing: Thing, rng: np.random.Generator, writers: np.ndarray | None) -> np.ndarray:
    """Chooses one way to write a digit, float32 `[12, 12]` with a margin of two pixels."""
    images, values = digit_images() if writers is None else tuple(a[writers] for a in digit_images())
    chosen = images[values == DIGITS.index(thing.shape)]
    return np.pad(chosen[rng.integers(len(chosen))], 2)
