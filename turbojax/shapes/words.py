"""The words of the world of shapes, and a tokenizer of words."""

import re
from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

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


def unigram_tokenizer(words: Iterable[str]) -> Tokenizer:
    """Makes a Unigram tokenizer of whole words and single characters, laid out as umT5's: <pad> 0, </s> 1, <unk> 2."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -4.0)]
    pieces += [(f"\u2581{word}", -2.0) for word in words]
    pieces += [(chr(code), -6.0) for code in range(33, 127)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return tokenizer
