"""The words of the world of shapes."""

import re
from collections.abc import Iterable

from turbojax.shapes.scene import BACKGROUNDS, BEFORE, COLOURS, SHAPES, SYNONYMS, VERBS, noun


def caption_words() -> set[str]:
    """Returns every word of captions, which are all that the networks learn from."""
    sentences = [*BEFORE, *(form for forms in VERBS.values() for form in forms), *COLOURS, *BACKGROUNDS, "a an"]
    return words_of([*sentences, *(noun(shape, form) for shape in SHAPES for form in range(3))])


def vocabulary() -> list[str]:
    """Returns every word of captions, and of prompts that `scene.parse` understands in full."""
    others = [pattern for pattern, _ in SYNONYMS if re.fullmatch(r"\w+", pattern)]
    others += ["spins spinning rotates bounces jumps jumping grows expanding left right up down upwards downwards"]
    return sorted(caption_words() | words_of(others))


def words_of(sentences: Iterable[str]) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", " ".join(sentences).replace("{things}", "").replace("{background}", "")))
