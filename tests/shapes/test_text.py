"""The tokenizer and the text encoder of the world of shapes."""

import jax
import numpy as np

from turbojax.shapes import text
from turbojax.shapes.scene import SHAPES
from turbojax.shapes.words import vocabulary

WORDS = text.word_tokenizer(vocabulary())


def test_every_caption_is_made_of_known_words():
    data = text.examples(WORDS, 500, seed=0)
    assert not (data.ids == WORDS.token_to_id("<unk>")).any()
    lengths = data.mask.sum(axis=1)
    assert lengths.max() < text.LENGTH
    pieces = [WORDS.id_to_token(i) for i in data.ids[0, : lengths[0] - 1]]
    assert all(piece.startswith("\u2581") or piece == "," for piece in pieces)


def test_capitals_and_unknown_words_are_read():
    ids, mask = text.as_tokenizer(WORDS)(["A RED Star", "a red star", "a zebra"], 12)
    assert (ids[0] == ids[1]).all()
    assert mask[2].sum() > 4  # by characters


def test_answers_are_those_of_the_nouns():
    data = text.examples(WORDS, 200, seed=1)
    for row in range(200):
        for place, shape in zip(data.nouns[row], data.answers["shape"][row], strict=True):
            assert (place < 0) == (shape < 0)
            if shape >= 0:
                assert WORDS.id_to_token(data.ids[row, place]) == f"\u2581{SHAPES[shape]}"


def test_it_learns_to_name():
    """Chance is 1 in 14, 6, 11 and 4."""
    config = text.text_config(WORDS, dim=32, attention_dim=32, ffn_dim=32, num_layers=1)
    with jax.numpy_dtype_promotion("standard"):  # which optax counts on
        _, right = text.train_text_encoder(WORDS, config, steps=60, batch=64, peak=1e-2)
    assert right["shape"] > 0.9
    assert right["background"] > 0.9
    assert right["colour"] > 0.4
    assert right["motion"] > 0.3
    assert np.isfinite(list(right.values())).all()
