"""Tells what a video of the world of shapes shows, to compare with what its prompt asked for.

Colours, motions and backgrounds are read by rules from the pixels, shapes by a small classifier that was trained on
renderings. `Judge.accuracy` is its fraction of right answers on renderings of handwriting that it has not seen.
"""

import dataclasses
from typing import Any

import numpy as np
from scipy.ndimage import label

from turbojax.errors import UserError
from turbojax.shapes.render import BACKGROUND_LEVELS, digit_images, render, squares
from turbojax.shapes.scene import COLOURS, DIRECTIONS, SHAPES, Scene, Thing, random_scene

CHROMA = 45.0  # distance from gray, 0 to 255, from which on a pixel has a colour
GRAY = 20  # difference of a pixel's channels below which it has none
OFF = 30.0  # levels that a background may be off
SMALLEST = 0.004  # fraction of the picture that a thing covers at least
STILL = 0.1  # a centre that strays less, in units of the shorter side, stays where it is
CROP = 16  # side of the picture that the classifier sees
SPECK = 0.1  # parts of a thing that are smaller, as a fraction of the largest, are not of it: edges mix colours


@dataclasses.dataclass(frozen=True)
class Seen:
    """One thing as seen; motion is None where no rule applies."""

    shape: str
    colour: str
    motion: str | None


def colour_masks(video: np.ndarray) -> dict[str, np.ndarray]:
    """Returns booleans `[T, H, W]` for each colour: pixels away from gray, each of the colour of nearest direction."""
    palette = np.array(list(COLOURS.values()), np.float32)
    directions = palette - palette.mean(axis=1, keepdims=True)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    chroma = video.astype(np.float32)
    chroma -= chroma.mean(axis=-1, keepdims=True)
    coloured = np.linalg.norm(chroma, axis=-1) > CHROMA
    nearest = (chroma @ directions.T).argmax(axis=-1)
    return {name: coloured & (nearest == i) for i, name in enumerate(COLOURS)}


def background(video: np.ndarray) -> str | None:
    """Finds the one of BACKGROUNDS whose levels are nearest to the pixels without a colour; None if none is."""
    gray = np.ptp(video.astype(np.int16), axis=-1) < GRAY
    odd = squares(*video.shape[1:3]) % 2 == 1
    seen = [video[gray & own].mean() if (gray & own).any() else np.nan for own in (odd, ~odd)]
    off = {name: np.abs(np.subtract(seen, levels)).max() for name, levels in BACKGROUND_LEVELS.items()}
    nearest = min(off, key=lambda name: off[name])
    return nearest if off[nearest] < OFF else None


def centres(mask: np.ndarray) -> np.ndarray:
    """Returns centres (x, y) of each frame's pixels, in units of the shorter side, `[T, 2]`; NaN if it has none."""
    total = mask.sum(axis=(1, 2)).astype(np.float64)
    total[total == 0] = np.nan
    y, x = np.arange(mask.shape[1]), np.arange(mask.shape[2])
    centre = np.stack((mask.sum(axis=1) @ x, mask.sum(axis=2) @ y), axis=1) / total[:, None]
    return centre / min(mask.shape[1:])


def motion(mask: np.ndarray) -> str | None:
    """Finds the motion of one thing's pixels `[T, H, W]`, of MOTIONS, or None."""
    frames = np.flatnonzero(mask.any(axis=(1, 2)))
    mask = mask[frames]
    centre, area = centres(mask), mask.sum(axis=(1, 2))
    moved = centre[-1] - centre[0]
    steps = np.diff(centre[:: max(1, len(centre) // 16)], axis=0)
    up, down = -steps[:, 1].clip(max=0).sum(), steps[:, 1].clip(min=0).sum()
    if min(up, down) > STILL and np.ptp(centre[:, 0]) < STILL:
        return "bouncing"
    if np.hypot(*moved) > 2 * STILL:
        straight = np.linalg.norm(steps, axis=1).sum() < 1.3 * np.hypot(*moved)
        angles = {name: np.arctan2(d[1], d[0]) for name, d in DIRECTIONS.items()}
        heading = np.arctan2(moved[1], moved[0])
        off = {name: abs((heading - angle + np.pi) % (2 * np.pi) - np.pi) for name, angle in angles.items()}
        nearest = min(off, key=lambda name: off[name])
        return nearest if straight and off[nearest] < np.pi / 8 else None
    if np.ptp(centre, axis=0).max() > STILL:
        return None
    if area[-1] > 1.8 * area[0]:
        return "growing"
    crops = [crop(frame, centre[i] * min(mask.shape[1:])) for i, frame in enumerate(mask)]
    overlap = [(a & crops[0]).sum() / max(1, (a | crops[0]).sum()) for a in crops]
    return "rotating" if min(overlap) < 0.8 else None


def crop(frame: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Cuts out the picture around a centre (x, y) in pixels, a quarter of the shorter side to each side of it."""
    reach = min(frame.shape) // 4
    padded = np.pad(frame, reach)
    x, y = (round(float(c)) for c in centre)
    return padded[y : y + 2 * reach, x : x + 2 * reach]


def features(frame: np.ndarray) -> np.ndarray:
    """Cuts out the pixels `[H, W]` of one thing, scaled to `[CROP * CROP]`, without specks beside it."""
    parts, _ = label(frame, np.ones((3, 3)))
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    frame = (sizes >= SPECK * np.max(sizes))[parts].astype(np.float32)
    rows, columns = (np.flatnonzero(frame.any(axis=axis)) for axis in (1, 0))
    frame = frame[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    side = max(frame.shape)
    pad = [((side - n) // 2, side - n - (side - n) // 2) for n in frame.shape]
    frame = np.pad(frame, pad)
    at = np.linspace(0, side, CROP + 1)
    sums = np.pad(frame.cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))  # areas by an integral image
    grid = np.arange(side + 1)
    sums = np.stack([np.interp(at, grid, column) for column in sums.T], axis=1)
    sums = np.stack([np.interp(at, grid, row) for row in sums], axis=0)
    cells = np.diff(np.diff(sums, axis=0), axis=1) / (side / CROP) ** 2
    return cells.ravel()


@dataclasses.dataclass(frozen=True)
class Judge:
    """A trained classifier of shapes, its accuracy on unseen handwriting, and how many renderings that was."""

    classifier: Any
    accuracy: float
    tested: int

    def look(self, video: np.ndarray) -> tuple[Seen, ...]:
        """Finds the things that a video, uint8 `[T, H, W, 3]`, shows, in the order of COLOURS."""
        seen = []
        for colour, mask in colour_masks(video).items():
            if (mask.mean(axis=(1, 2)) > SMALLEST).mean() >= 0.9:  # enough pixels in nine frames of ten
                moving = motion(mask)
                # The shape is read from the first frame, for it may turn, or the last of what grows.
                frame = mask[np.flatnonzero(mask.any(axis=(1, 2)))[-1 if moving == "growing" else 0]]
                shape = str(self.classifier.predict(features(frame)[None])[0])
                seen.append(Seen(shape, colour, moving))
        return tuple(seen)

    def compare(self, scene: Scene, video: np.ndarray) -> dict[str, bool]:
        """Tells whether colours, shapes, motions and background are those of the scene, and "all" of them."""
        wanted = {thing.colour: thing for thing in scene.things}
        seen = {thing.colour: thing for thing in self.look(video)}
        result = {"colour": wanted.keys() == seen.keys()}
        for name in ("shape", "motion"):
            result[name] = all(c in seen and getattr(seen[c], name) == getattr(wanted[c], name) for c in wanted)
        result["background"] = background(video) == scene.background
        return result | {"all": all(result.values())}


def train_judge(*, seed: int = 0, examples: int = 3000, tests: int = 500, size: int = 128) -> Judge:
    """Trains the classifier on renderings of two thirds of the handwriting and tests it on the rest."""
    try:
        from sklearn.svm import SVC
    except ImportError as error:
        raise UserError("the judge's classifier comes with scikit-learn; pip install 'turbojax[shapes]'") from error
    rng = np.random.default_rng(seed)
    writers = rng.permutation(len(digit_images()[1]))
    known, unseen = np.split(writers, [2 * len(writers) // 3])

    def drawn(count: int, writers: np.ndarray) -> tuple[np.ndarray, list[str]]:
        x, y = [], []
        for _ in range(count):
            thing = random_scene(rng, two=0).things[0]
            shape = SHAPES[rng.integers(len(SHAPES))]
            scene = Scene((Thing(shape, thing.colour, "left"),), "black")
            video = render(scene, rng, num_frames=1, height=size, width=size, writers=writers)
            x.append(features(colour_masks(video)[thing.colour][0]))
            y.append(shape)
        return np.stack(x), y

    classifier = SVC(C=10.0).fit(*drawn(examples, known))
    return Judge(classifier, float(classifier.score(*drawn(tests, unseen))), tests)
