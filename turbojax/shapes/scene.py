"""Scenes that a video of the world of shapes shows, and the sentences that say so.

A scene is one or two things before a background. A thing has a shape, a colour and a motion. A tenth of the kinds of
things (`held_out`) is never drawn by `random_scene`, so that a model can be asked for what it has not seen.
"""

import dataclasses
import difflib
import functools
import hashlib
import itertools
import re
from typing import Literal

import numpy as np

from turbojax.errors import UserError

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SHAPES = ("circle", "square", "triangle", "star", *DIGITS)
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 39, 40),
    "orange": (255, 140, 0),
    "yellow": (250, 220, 40),
    "green": (44, 160, 70),
    "blue": (40, 90, 230),
    "purple": (150, 50, 190),
}
BACKGROUNDS = ("black", "white", "gray", "checkered")
# Directions as (right, down) of the picture.
DIRECTIONS: dict[str, tuple[int, int]] = {
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
    "up left": (-1, -1),
    "up right": (1, -1),
    "down left": (-1, 1),
    "down right": (1, 1),
}
MOTIONS = (*DIRECTIONS, "bouncing", "growing", "rotating")

HELD_OUT_SHARE = 10  # one kind in so many
Split = Literal["train", "held out"]
# Of things, how many are digits, and of scenes, how many have two things: what is hardest is learnt most.
DIGIT_SHARE: dict[Split, float] = {"train": 0.65, "held out": 0.5}
TWO_SHARE: dict[Split, float] = {"train": 0.6, "held out": 0.3}


@dataclasses.dataclass(frozen=True)
class Thing:
    """One moving thing; the values are those of SHAPES, COLOURS and MOTIONS."""

    shape: str
    colour: str
    motion: str

    def __post_init__(self):
        for value, known in ((self.shape, SHAPES), (self.colour, COLOURS), (self.motion, MOTIONS)):
            if value not in known:
                raise UserError(f"{value!r} is not in the world of shapes; it knows {', '.join(known)}")
        if (self.shape, self.motion) == ("circle", "rotating"):
            raise UserError("a rotating circle looks like one at rest; choose another shape or motion")


@dataclasses.dataclass(frozen=True)
class Scene:
    """One or two things, of different colours, before a background."""

    things: tuple[Thing, ...]
    background: str

    def __post_init__(self):
        if self.background not in BACKGROUNDS:
            raise UserError(f"background {self.background!r} is unknown; it can be {', '.join(BACKGROUNDS)}")
        if len({thing.colour for thing in self.things}) != len(self.things) or not 1 <= len(self.things) <= 2:
            raise UserError("a scene has one thing, or two of different colours")


def held_out(thing: Thing) -> bool:
    """Returns True if this kind of thing is kept from training; by a hash, so the same on every machine."""
    digest = hashlib.sha256(f"{thing.shape} {thing.colour} {thing.motion}".encode()).digest()
    return digest[0] % HELD_OUT_SHARE == 0


@functools.cache
def kinds(split: Split) -> tuple[Thing, ...]:
    """Returns all kinds of things of one split."""
    every = itertools.product(SHAPES, COLOURS, MOTIONS)
    things = (Thing(*values) for values in every if (values[0], values[2]) != ("circle", "rotating"))
    return tuple(thing for thing in things if held_out(thing) == (split == "held out"))


def random_scene(rng: np.random.Generator, *, split: Split = "train", two: float | None = None) -> Scene:
    """Draws a scene of things of one split; two is the probability of a second thing, TWO_SHARE if not given."""

    def draw(colours: set[str]) -> Thing:
        digit = rng.random() < DIGIT_SHARE[split]
        choices = [a for a in kinds(split) if a.colour in colours and (a.shape in DIGITS) == digit]
        return choices[rng.integers(len(choices))]

    first = draw(set(COLOURS))
    things = [first]
    if rng.random() < (TWO_SHARE[split] if two is None else two):
        things.append(draw(set(COLOURS) - {first.colour}))
    return Scene(tuple(things), BACKGROUNDS[rng.integers(len(BACKGROUNDS))])


# How captions name things, motions and backgrounds; the first form is also the canonical one.
VERBS: dict[str, tuple[str, ...]] = {
    "bouncing": ("bouncing up and down", "that bounces up and down", "bouncing"),
    "growing": ("growing", "that grows", "getting bigger"),
    "rotating": ("rotating", "that rotates", "spinning around"),
    **{name: (f"moving {name}", f"that moves {name}", f"drifting {name}") for name in DIRECTIONS},
}
BEFORE: tuple[str, ...] = (
    "{things} on a {background} background",
    "{things} in front of a {background} background",
    "on a {background} background, {things}",
    "a {background} background with {things}",
    "a video of {things} on a {background} background",
)


def noun(shape: str, form: int = 0) -> str:
    if shape in DIGITS:
        return (f"handwritten digit {shape}", f"digit {shape}", f"number {shape}")[form]
    return shape


def caption(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """Writes a sentence that says what the scene shows: in varied wording, or canonical without a generator."""

    def pick(options: tuple[str, ...]) -> str:
        return options[0 if rng is None else rng.integers(len(options))]

    things = []
    for thing in scene.things:
        name = noun(thing.shape, 0 if rng is None else int(rng.integers(3)))
        article = "an" if thing.colour[0] in "aeiou" else "a"
        things.append(f"{article} {thing.colour} {name} {pick(VERBS[thing.motion])}")
    return pick(BEFORE).format(things=" and ".join(things), background=scene.background)


# What prompts may call things besides the world's own words.
SYNONYMS = (
    (r"spin\w*|rotat\w*|turning|turns", "rotating"),
    (r"bounc\w*|jump\w*", "bouncing"),
    (r"grow\w*|getting (?:bigger|larger)|expand\w*", "growing"),
    (r"upwards?", "up"),
    (r"downwards?", "down"),
    (r"leftwards?", "left"),
    (r"rightwards?", "right"),
    (r"ball|disc|disk", "circle"),
    (r"box|cube", "square"),
    (r"grey", "gray"),
    (r"checkerboard|chequered", "checkered"),
    (r"violet", "purple"),
    *((str(i), name) for i, name in enumerate(DIGITS)),
)


def parse(prompt: str) -> Scene:
    """Finds the scene that a prompt asks for; raises UserError in a friendly line that says what the world knows.

    Words between are ignored, motions and backgrounds that are not named become "rotating" ("growing" for a circle)
    and "black".
    """
    text = prompt.lower()
    for pattern, word in SYNONYMS:
        text = re.sub(rf"\b(?:{pattern})\b", word, text)
    words = re.findall(r"[a-z]+", text.replace("bouncing up and down", "bouncing"))
    nouns = [i for i, word in enumerate(words) if word in SHAPES]
    if not nouns:
        close = [match for word in words for match in difflib.get_close_matches(word, SHAPES, n=1, cutoff=0.8)]
        raise UserError(f"{prompt!r} names no shape{f', perhaps {close[0]}' if close else ''}; {knows()}")
    things = []
    for i, end in zip(nouns, [*nouns[1:], len(words)], strict=True):
        colours = [word for word in words[:i] if word in COLOURS]
        if not colours:
            raise UserError(f"{prompt!r} names no colour for the {words[i]}; {knows()}")
        motions = [word for word in words[i + 1 : end] if word in MOTIONS]
        diagonal = " ".join(motions[:2])
        default = "growing" if words[i] == "circle" else "rotating"
        things.append(Thing(words[i], colours[-1], diagonal if diagonal in MOTIONS else (motions or [default])[0]))
    backgrounds = [a for a, b in itertools.pairwise(words) if a in BACKGROUNDS and b == "background"]
    return Scene(tuple(things[:2]), (backgrounds or ["black"])[0])


def knows() -> str:
    return (
        f"this small model knows {', '.join(SHAPES[:4])} and the digits zero to nine in {', '.join(COLOURS)}, "
        f"moving {', '.join(DIRECTIONS)}, bouncing, growing or rotating, on a {', '.join(BACKGROUNDS)} background"
    )
