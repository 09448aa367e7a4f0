"""The world of shapes: captions say what scenes show, pictures show it, and the judge sees it."""

import jax.numpy as jnp
import numpy as np
import pytest

from turbojax.errors import UserError
from turbojax.shapes import judge as judging
from turbojax.shapes import scene as world
from turbojax.shapes.examples import example, sketch
from turbojax.shapes.render import paths, render
from turbojax.shapes.render_jax import draw_many, stack
from turbojax.shapes.scene import BACKGROUNDS, Scene, Thing, caption, held_out, kinds, parse, random_scene

pytest.importorskip("sklearn")


def test_captions_say_what_the_scene_shows():
    rng = np.random.default_rng(0)
    scenes = [random_scene(rng, two=0.5) for _ in range(300)]
    assert [parse(caption(scene, rng)) for scene in scenes] == scenes
    assert [parse(caption(scene)) for scene in scenes] == scenes
    assert len({caption(scenes[0], rng) for _ in range(50)}) > 10


def test_held_out_kinds_are_a_tenth_and_never_drawn():
    train, kept = set(kinds("train")), set(kinds("held out"))
    assert not train & kept
    assert 0.07 < len(kept) / len(train | kept) < 0.13
    rng = np.random.default_rng(1)
    for split, expected in (("train", False), ("held out", True)):
        for _ in range(50):
            assert {held_out(thing) for thing in random_scene(rng, split=split).things} == {expected}
    for values in (world.SHAPES, world.COLOURS, world.MOTIONS):  # every word is learnt in some other kind
        assert all(any(value in vars(thing).values() for thing in train) for value in values)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("A Red ball jumps!", Scene((Thing("circle", "red", "bouncing"),), "black")),
        ("a violet 7 spinning on a grey background", Scene((Thing("seven", "purple", "rotating"),), "gray")),
        ("blue box going upwards", Scene((Thing("square", "blue", "up"),), "black")),
        ("a green star", Scene((Thing("star", "green", "rotating"),), "black")),
        ("a green circle", Scene((Thing("circle", "green", "growing"),), "black")),
    ],
)
def test_prompts_in_other_words(prompt, expected):
    assert parse(prompt) == expected


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (
            "a cat surfing a wave",
            "names no shape; this small model knows circle, square, triangle, star and the digits",
        ),
        ("a red trangle", "perhaps triangle"),
        ("a star moving left", "names no colour for the star"),
        ("a red star and a red circle", "two of different colours"),
        ("a red circle rotating", "rotating circle looks like one at rest"),
    ],
)
def test_prompts_outside_its_world_get_a_line(prompt, message):
    with pytest.raises(UserError, match=message):
        parse(prompt)


def test_rendering_is_the_seed_s():
    scene = Scene((Thing("star", "red", "up left"), Thing("five", "blue", "growing")), "checkered")
    first, again, other = (render(scene, np.random.default_rng(seed), num_frames=5) for seed in (3, 3, 4))
    assert first.shape == (5, 128, 128, 3)
    assert first.dtype == np.uint8
    assert (first == again).all()
    assert (first != other).any()
    wide = render(scene, np.random.default_rng(3), num_frames=2, height=96, width=160)
    assert wide.shape == (2, 96, 160, 3)
    with pytest.raises(UserError, match="no room in 5 x 5 pixels"):
        render(Scene((Thing("star", "red", "left"),), "black"), np.random.default_rng(0), height=5, width=5)


def test_things_stay_inside_and_apart():
    rng = np.random.default_rng(2)
    for _ in range(50):
        scene = random_scene(rng, two=1.0)
        for path in paths(scene, rng, 33, 96, 128):
            assert (path.centre - path.radius[:, None] > 0).all()
            assert (path.centre + path.radius[:, None] < (128, 96)).all()


@pytest.fixture(scope="module")
def judge():
    return judging.train_judge(examples=700, tests=150)


def test_judge_knows_handwriting_that_it_has_not_seen(judge):
    assert judge.accuracy > 0.93


def test_judge_sees_what_was_drawn(judge):
    rng = np.random.default_rng(5)
    scenes = [random_scene(rng, split=split, two=0.4) for split in ("train", "held out") for _ in range(15)]
    results = [judge.compare(scene, render(scene, rng)) for scene in scenes]
    assert all(result["colour"] and result["motion"] and result["background"] for result in results)
    assert np.mean([result["shape"] for result in results]) > 0.9


def test_judge_sees_what_is_wrong(judge):
    scene = Scene((Thing("square", "red", "left"), Thing("star", "blue", "rotating")), "white")
    video = render(scene, np.random.default_rng(0))
    right = dict.fromkeys(("colour", "shape", "motion", "background", "all"), True)
    assert judge.compare(scene, video) == right
    wrong = {
        "motion": Scene((Thing("square", "red", "right"), scene.things[1]), "white"),
        "shape": Scene((scene.things[0], Thing("triangle", "blue", "rotating")), "white"),
        "background": Scene(scene.things, "checkered"),
    }
    for name, other in wrong.items():
        assert judge.compare(other, video) == right | {name: False, "all": False}
    one = Scene(scene.things[:1], "white")
    assert not judge.compare(one, video)["colour"]
    assert not judge.compare(scene, video[::-1])["motion"]
    still = judge.compare(scene, np.repeat(video[:1], 33, axis=0))
    assert not still["motion"]
    assert judge.look(np.zeros_like(video)) == ()
    assert judging.background(np.full_like(video, 60)) is None


def test_many_at_once_are_drawn_as_one_by_one():
    size = dict(num_frames=5, height=96, width=128)
    every = [sketch(number, seed=1, **size) for number in range(40)]
    assert {len(one.things) for one in every} == {1, 2}
    assert len({int(thing.outline) for one in every for thing in one.things}) == 5  # all outlines and handwriting
    behind = jnp.array([BACKGROUNDS.index(one.scene.background) for one in every])
    videos = np.asarray(draw_many(stack([one.things for one in every]), behind, height=96, width=128))
    alone = np.stack([example(number, seed=1, **size).video for number in range(40)])
    assert np.abs(videos.astype(int) - alone).max() <= 1
    assert (videos != alone).mean() < 1e-4
