"""Videos that show nothing are told."""

import numpy as np
import pytest

from turbojax.media.video_checks import FLAWS, flaws, warnings

RNG = np.random.default_rng(0)
PICTURE = RNG.integers(30, 220, (1, 24, 32, 3))


def moving(levels: np.ndarray) -> np.ndarray:
    return np.concatenate([np.roll(levels, 2 * t, axis=2) for t in range(5)]).astype(np.uint8)


@pytest.mark.parametrize(
    ("video", "expected"),
    [
        (moving(PICTURE), ()),
        (moving(PICTURE)[:1], ()),
        (np.zeros((5, 24, 32, 3), np.uint8), ("black", "static")),
        (moving(PICTURE // 30), ("black", "static")),
        (np.repeat(PICTURE, 5, axis=0).astype(np.uint8), ("static",)),
        (np.repeat(PICTURE, 5, axis=0).astype(np.uint8) + RNG.integers(0, 5, (5, 24, 32, 3), np.uint8), ("static",)),
        (moving(PICTURE) / 127.5 - 1, ()),
        (np.full((5, 24, 32, 3), -1.0), ("black", "static")),
        (np.where(np.arange(5)[:, None, None, None] == 3, np.nan, moving(PICTURE) / 127.5 - 1), ("not finite",)),
    ],
)
def test_flaws(video, expected):
    assert flaws(video) == expected


def test_a_small_thing_that_moves_is_enough():
    video = np.full((5, 128, 128, 3), 12, np.uint8)
    for t in range(5):
        video[t, 40:54, 40 + 8 * t : 54 + 8 * t] = (214, 39, 40)
    assert flaws(video) == ()


def test_warnings_say_which_and_what_to_do():
    black = np.zeros((5, 24, 32, 3), np.uint8)
    assert list(warnings(moving(PICTURE)[None])) == []
    assert list(warnings(black[None])) == [f"The video is {name}: {FLAWS[name]}" for name in ("black", "static")]
    assert [line.split(":")[0] for line in warnings(np.stack((moving(PICTURE), black)))] == [
        "Video 1 is black",
        "Video 1 is static",
    ]
