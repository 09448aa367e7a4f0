"""The text encoder of the world of shapes: a word tokenizer and a small umT5 that has learnt what captions say.

It learns by naming: from the features of a thing's noun its shape, colour and motion, from those of the end token the
background. So a noun's features tell whose colour and motion belong to it, which is all that a video model asks.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tokenizers import Tokenizer as Words
from tokenizers import normalizers
from tqdm import tqdm

from turbojax.files import whole_file
from turbojax.kernels.sizes import cdiv
from turbojax.models.layers import Dense
from turbojax.models.tokenizer import Tokenizer, build
from turbojax.models.umt5 import UMT5Config, UMT5Encoder
from turbojax.shapes.scene import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, Scene, caption, random_scene
from turbojax.shapes.words import unigram_tokenizer
from turbojax.weights.io import write_safetensors
from turbojax.weights.layouts import layout_tensors, umt5_layout
from turbojax.weights.umt5 import UMT5_OFFICIAL

ENCODER = "models_t5_umt5-xxl-enc-bf16.safetensors"
TOKENIZER = "google/umt5-xxl/tokenizer.json"
LENGTH = 32  # tokens; the longest caption has 26
ANSWERS = {"shape": SHAPES, "colour": tuple(COLOURS), "motion": MOTIONS, "background": BACKGROUNDS}


def word_tokenizer(words: list[str]) -> Words:
    """Makes the tokenizer of these words, which reads capitals as small letters."""
    tokenizer = unigram_tokenizer(words)
    tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def text_config(tokenizer: Words, **changes: Any) -> UMT5Config:
    size = cdiv(tokenizer.get_vocab_size(), 8) * 8
    widths = dict(dim=128, attention_dim=128, ffn_dim=256, num_heads=4, num_layers=3)
    settings: dict[str, Any] = {"vocab_size": size, "dtype": jnp.float32, **widths, **changes}
    return UMT5Config(**settings)


@dataclasses.dataclass(frozen=True)
class Examples:
    """Captions as ids and mask int32 `[n, LENGTH]`; nouns: places of the things' nouns `[n, 2]`, -1 for none.

    answers: int32, `[n, 2]` for each thing's shape, colour and motion, `[n]` for the background; -1 for none.
    """

    ids: np.ndarray
    mask: np.ndarray
    nouns: np.ndarray
    answers: dict[str, np.ndarray]


def examples(tokenizer: Words, count: int, *, seed: int) -> Examples:
    """Captions of random scenes in varied wording."""
    rng = np.random.default_rng(seed)
    scenes = [random_scene(rng, two=0.5) for _ in range(count)]
    sentences = [caption(scene, rng) for scene in scenes]
    ids, mask = as_tokenizer(tokenizer)(sentences, LENGTH)
    numbers = tokenizer.get_vocab()
    of_nouns = np.isin(ids, [numbers[f"\u2581{shape}"] for shape in SHAPES])
    nouns = np.full((count, 2), -1, np.int32)
    for row, places in enumerate(of_nouns):
        found = np.flatnonzero(places)
        nouns[row, : len(found)] = found
    questions = "shape", "colour", "motion"
    answers = {name: np.array([both_answers(scene, name) for scene in scenes], np.int32) for name in questions}
    answers["background"] = np.array([BACKGROUNDS.index(scene.background) for scene in scenes], np.int32)
    return Examples(ids, mask, nouns, answers)


def both_answers(scene: Scene, name: str) -> list[int]:
    """Returns the answers for both things, -1 where there is no second."""
    found = [ANSWERS[name].index(getattr(thing, name)) for thing in scene.things]
    return [*found, -1][:2]


def as_tokenizer(words: Words) -> Tokenizer:
    return build(Path("tokenizer.json"), lambda text: words.encode(text).ids, words.get_vocab_size(), words.token_to_id)


class Reader(nnx.Module):
    """Token table, encoder and a linear answer to each question."""

    def __init__(self, config: UMT5Config, *, rngs: nnx.Rngs):
        self.table = nnx.Param(jax.random.normal(rngs.params(), (config.vocab_size, config.dim), jnp.float32))
        self.encoder = UMT5Encoder(config, rngs=rngs)
        answer = lambda options: Dense(config.dim, len(options), dtype=jnp.float32, rngs=rngs)  # noqa: E731
        self.shape, self.colour, self.motion = answer(SHAPES), answer(COLOURS), answer(MOTIONS)
        self.background = answer(BACKGROUNDS)

    def __call__(self, ids: jax.Array, mask: jax.Array, nouns: jax.Array) -> dict[str, jax.Array]:
        """Computes logits: `[B, 2, options]` of shape, colour and motion, `[B, options]` of the background."""
        features = self.encoder(self.table[...][ids], mask)
        at_nouns = jnp.take_along_axis(features, jnp.maximum(nouns, 0)[..., None], axis=1)
        at_end = jnp.take_along_axis(features, mask.sum(axis=1)[:, None, None] - 1, axis=1)[:, 0]
        return {
            "shape": self.shape(at_nouns),
            "colour": self.colour(at_nouns),
            "motion": self.motion(at_nouns),
            "background": self.background(at_end),
        }


def loss_and_accuracy(reader: Reader, ids, mask, nouns, answers) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns mean cross-entropy over the questions, and the fraction of right answers to each."""
    loss, right = jnp.float32(0), {}
    for name, logits in reader(ids, mask, nouns).items():
        asked = answers[name] >= 0
        entropy = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(answers[name], 0))
        loss += jnp.mean(entropy, where=asked)
        right[name] = jnp.mean((logits.argmax(axis=-1) == answers[name]).astype(jnp.float32), where=asked)
    return loss, right


def train_text_encoder(
    tokenizer: Words, config: UMT5Config, *, steps: int = 1500, batch: int = 128, peak: float = 2e-3, seed: int = 0
) -> tuple[Reader, dict[str, float]]:
    """Trains a reader; returns it, and its fraction of right answers on captions that it has not seen."""
    data, test = examples(tokenizer, 50 * batch, seed=seed), examples(tokenizer, 1000, seed=seed + 1)
    graph, state = nnx.split(Reader(config, rngs=nnx.Rngs(seed)))
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, steps // 20 + 1, steps)
    rate = lambda count: schedule(count.astype(jnp.float32))  # noqa: E731
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.01))

    def loss(state, *batch):
        return loss_and_accuracy(nnx.merge(graph, state), *batch)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(state, moments, *batch):
        (value, _), gradient = jax.value_and_grad(loss, has_aux=True)(state, *batch)
        updates, moments = optimizer.update(gradient, moments, state)
        return optax.apply_updates(state, updates), moments, value

    moments, rng = optimizer.init(state), np.random.default_rng(seed)
    with tqdm(range(steps), desc="Text encoder", disable=None) as bar:
        for i in bar:
            rows = rng.integers(len(data.ids), size=batch)
            answers = {name: values[rows] for name, values in data.answers.items()}
            state, moments, value = step(state, moments, data.ids[rows], data.mask[rows], data.nouns[rows], answers)
            if i % 50 == 0:
                bar.set_postfix(loss=f"{float(value):.3f}")
    _, right = jax.jit(loss)(state, test.ids, test.mask, test.nouns, test.answers)
    return nnx.merge(graph, state), {name: float(share) for name, share in right.items()}


def write_text_encoder(folder: Path, words: Words, reader: Reader) -> None:
    """Writes tokenizer and encoder, in bfloat16, under their published names; the answers are left behind."""
    layout = umt5_layout(reader.encoder.config)
    specs = {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in layout.items()}
    tensors = dict(layout_tensors(reader.encoder, layout, UMT5_OFFICIAL))
    tensors["token_embedding.weight"] = np.asarray(reader.table[...])
    rounded = ((name, tensors[name].astype(jnp.bfloat16)) for name in layout)
    tokenizer = folder / TOKENIZER
    with whole_file(tokenizer) as temporary:
        words.save(str(temporary))
    write_safetensors(folder / ENCODER, rounded, specs, metadata={"format": "turbojax"})
