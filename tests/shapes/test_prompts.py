"""Prompts outside the world of shapes get a line that says what it knows."""

import numpy as np
import pytest

from turbojax.shapes.prompts import remark
from turbojax.shapes.scene import caption, knows, random_scene


def test_captions_are_understood():
    rng = np.random.default_rng(0)
    assert [remark(caption(random_scene(rng, two=0.5), rng)) for _ in range(200)] == [None] * 200
    assert remark("A Red star that moves left, please.") is None


@pytest.mark.parametrize(
    ("prompt", "line"),
    [
        ("A cat surfing a wave at sunset", "names no shape"),
        ("a red trangle moving left", "perhaps triangle"),
        ("a red circle moving left over a city at night", "words that it never learnt (over, city, night)"),
        ("A Red ball jumps!", "(ball, jumps), try 'a red circle bouncing up and down on a black background'; "),
        ("", "names no shape"),
    ],
)
def test_others_get_a_line(prompt, line):
    said = remark(prompt)
    assert line in said
    assert said.endswith(knows())
    assert "\n" not in said
