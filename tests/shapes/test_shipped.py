"""What is shipped of the small model does what it was trained for, read as published checkpoints are."""

import jax.numpy as jnp
import numpy as np
import pytest

from turbojax.shapes.scene import caption, random_scene
from turbojax.shapes.stages import MODEL, MOST_BYTES
from turbojax.shapes.text import LENGTH
from turbojax.text import TextEncoder
from turbojax.weights.files import find_components
from turbojax.weights.plain import load_vae

GIVEN = dict.fromkeys(("vae", "text_encoder", "tokenizer"), MODEL)


def test_size():
    assert sum(path.stat().st_size for path in MODEL.rglob("*") if path.is_file()) <= MOST_BYTES


def test_autoencoder():
    pytest.importorskip("sklearn")
    from turbojax.shapes.examples import example
    from turbojax.train.autoencoder import quality

    vae = load_vae(find_components(None, GIVEN)["vae"], dtype=jnp.float32)
    found = quality(vae, [example(2**29 + i, seed=0, num_frames=9, height=80, width=80).video for i in range(3)])
    assert found.psnr > 28  # one thing fills much of so small a picture
    assert found.mean_off < 1.5
    assert found.std_off < 1


def test_text_encoder():
    where = find_components(None, GIVEN)
    text = TextEncoder.from_files(where["text_encoder"], where["tokenizer"], dtype=jnp.float32, cache=False)
    rng = np.random.default_rng(0)
    captions = [caption(random_scene(rng), rng) for _ in range(20)]
    ids, mask = text.tokenizer(captions, LENGTH)
    unknown = text.tokenizer(["qxz"], LENGTH)[0][0, 0]
    assert not (ids[mask.astype(bool)] == unknown).any()
    embeddings = np.asarray(text(captions))
    assert np.isfinite(embeddings).all()
    assert len(np.unique(embeddings.round(3), axis=0)) == len(set(captions))
