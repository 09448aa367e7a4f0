"""Draws scenes as videos, uint8 `[T, H, W, 3]`, with smooth edges."""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from turbojax.errors import UserError
from turbojax.shapes.scene import COLOURS, DIGITS, DIRECTIONS, Scene, Thing

Outline = Callable[[np.ndarray, np.ndarray], np.ndarray]  # signed distance of points (x, y) in units of the radius

BACKGROUND_LEVELS = {"black": (12, 12), "white": (242, 242), "gray": (128, 128), "checkered": (190, 225)}
CHECKS = 8  # squares along the shorter side
# Of one thing alone, and of one of two, which have less room: radius as a share of the shorter side, and the way of a
# thing that moves straight ahead, likewise.
RADIUS = ((0.14, 0.19), (0.115, 0.14))
TRAVEL = ((0.3, 0.42), (0.25, 0.34))
GROWTH = (1.9, 2.3)  # last radius over first
TURN = (1.2, 2.0)  # radians
ROOM = 1.35  # of a thing's radius: the farthest point of its shape


@dataclasses.dataclass(frozen=True)
class Path:
    """Where a thing is in each frame: centre `[T, 2]` (x, y) and radius `[T]` in pixels, angle `[T]` in radians."""

    centre: np.ndarray
    radius: np.ndarray
    angle: np.ndarray


def render(
    scene: Scene,
    rng: np.random.Generator,
    *,
    num_frames: int = 33,
    height: int = 128,
    width: int = 128,
    writers: np.ndarray | None = None,
) -> np.ndarray:
    """A video of the scene, uint8 `[T, H, W, 3]`; rng chooses sizes, places and speeds.

    writers: indices of the handwritten digits that may be drawn, all if not given.
    """
    video = np.broadcast_to(
        background(scene.background, height, width)[None, ..., None], (num_frames, height, width, 3)
    )
    video = video.astype(np.float32)
    for thing, path in zip(scene.things, paths(scene, rng, num_frames, height, width), strict=True):
        colour = np.array(COLOURS[thing.colour], np.float32)
        shape = digit_coverage(thing, rng, writers) if thing.shape in DIGITS else OUTLINES[thing.shape]
        for t in range(num_frames):
            (cx, cy), radius = path.centre[t], path.radius[t]
            sine, cosine = np.sin(path.angle[t]), np.cos(path.angle[t])
            reach = ROOM * radius + 1
            rows, columns = (slice(max(0, int(c - reach)), int(c + reach) + 2) for c in (cy, cx))
            window = video[t, rows, columns]
            y, x = np.mgrid[rows.start : rows.start + window.shape[0], columns.start : columns.start + window.shape[1]]
            dx, dy = (x - cx) / radius, (y - cy) / radius
            # The shape gives signed distances in units of its radius; an edge is a pixel wide.
            distance = shape(cosine * dx + sine * dy, cosine * dy - sine * dx) * radius
            window += np.clip(0.5 - distance, 0, 1)[..., None].astype(np.float32) * (colour - window)
    return np.round(video).astype(np.uint8)


def background(name: str, height: int, width: int) -> np.ndarray:
    """Gray levels `[H, W]`."""
    dark, light = BACKGROUND_LEVELS[name]
    return np.where(squares(height, width) % 2, dark, light).astype(np.float32)


def squares(height: int, width: int) -> np.ndarray:
    """Column plus row of the square that each pixel `[H, W]` lies in."""
    y, x = np.mgrid[:height, :width] // max(1, min(height, width) // CHECKS)
    return x + y


def paths(scene: Scene, rng: np.random.Generator, num_frames: int, height: int, width: int) -> list[Path]:
    """A path for each thing, inside the picture; two things start in halves of their own."""
    for _ in range(1000):
        others = len(scene.things) - 1
        found = [path(thing, rng, num_frames, height, width, others=others) for thing in scene.things]
        if len(found) == 1 or apart(*found):
            return found
    raise UserError(f"two things find no room in {width} x {height} pixels; take a larger picture")


def apart(a: Path, b: Path) -> bool:
    """Whether two things never cover each other."""
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


def circle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.hypot(x, y) - 1


def square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(x), np.abs(y)) - 0.88


def triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return polygon(x, y, corners=3, inner=None, radius=1.3)


def star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return polygon(x, y, corners=5, inner=0.45, radius=1.3)


def polygon(x: np.ndarray, y: np.ndarray, *, corners: int, inner: float | None, radius: float) -> np.ndarray:
    """Signed distance to the edge lines of a regular polygon, or of a star with its inner corners at `inner`."""
    half = np.pi / corners
    angle = np.abs((np.arctan2(x, -y) + half) % (2 * half) - half)  # folded to one half edge; a corner is up
    r = np.hypot(x, y)
    px, py = r * np.cos(angle), r * np.sin(angle)
    tip = np.array((radius, 0.0))
    depth = radius * np.cos(half) if inner is None else radius * inner
    other = depth * np.array((np.cos(half), np.sin(half)))
    edge = other - tip
    normal = np.array((edge[1], -edge[0])) / np.hypot(*edge)
    return (px - tip[0]) * normal[0] + (py - tip[1]) * normal[1]


OUTLINES: dict[str, Outline] = {"circle": circle, "square": square, "triangle": triangle, "star": star}


@functools.cache
def digit_images() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's handwritten digits, float32 `[1797, 8, 8]` in 0..1, and their values."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("digits come with scikit-learn; pip install 'turbojax[shapes]'") from error
    data = load_digits()
    return data.images.astype(np.float32) / 16, data.target


def digit_coverage(thing: Thing, rng: np.random.Generator, writers: np.ndarray | None) -> Outline:
    """A handwritten digit as a function like the outlines: negative where there is ink."""
    images, values = digit_images() if writers is None else tuple(a[writers] for a in digit_images())
    chosen = images[values == DIGITS.index(thing.shape)]
    image = np.pad(chosen[rng.integers(len(chosen))], 2)

    def distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        column, row = (np.clip((a / 1.25 + 1) * 4 + 1.5, 0, image.shape[0] - 1.001) for a in (x, y))
        i, j = row.astype(int), column.astype(int)
        u, v = row - i, column - j
        ink = (
            image[i, j] * (1 - u) * (1 - v)
            + image[i, j + 1] * (1 - u) * v
            + image[i + 1, j] * u * (1 - v)
            + image[i + 1, j + 1] * u * v
        )
        return (0.45 - ink) * 0.5  # ink falls from 1 to 0 over about two of the image's pixels, a quarter radius each

    return distance
