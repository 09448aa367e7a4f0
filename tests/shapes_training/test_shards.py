"""Drawn videos become shards that training reads; what is there is not made again."""

import threading

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from turbojax.errors import UserError
from turbojax.models.vae import VAEConfig
from turbojax.pipeline.text import TextEncoder
from turbojax.shapes.examples import example
from turbojax.shapes.text import ENCODER, Reader, text_config, word_tokenizer, write_text_encoder
from turbojax.shapes.words import vocabulary
from turbojax.shapes_training.shards import write_shapes_shards
from turbojax.train.data import open_shards
from turbojax.train.make_shards import make_index
from turbojax.weights.random import random_module
from turbojax.weights.skeleton import vae_skeleton

pytest.importorskip("sklearn")

VAE = VAEConfig(dim=4, dim_mult=(1, 1), temporal_downsample=(True,), num_res_blocks=1, dtype=jnp.float32)
SIZE = dict(num_frames=3, height=80, width=80)


def test_written_stopped_and_gone_on_with(tmp_path):
    vae, words = random_module(vae_skeleton(VAE)), word_tokenizer(vocabulary())
    encoder = tmp_path / "text"
    write_text_encoder(encoder, words, Reader(text_config(words, dim=32, num_layers=1), rngs=nnx.Rngs(0)))
    text = TextEncoder.from_files(encoder / ENCODER, encoder / "google" / "umt5-xxl", dtype=jnp.float32, cache=False)
    index = make_index(vae, text, ("a", "b"), fps=16, shard_size=2, **SIZE)
    settings = dict(seed=3, workers=0)
    stop = threading.Event()
    stop.set()
    with pytest.raises(KeyboardInterrupt):
        write_shapes_shards(tmp_path, vae, text, index, count=4, stop=stop, **settings)
    shards = open_shards(write_shapes_shards(tmp_path, vae, text, index, count=4, **settings))
    assert len(shards) == 4
    assert [shards.describe(i) for i in range(4)] == [
        (f"shapes {i}", example(i, seed=3, **SIZE).caption) for i in range(4)
    ]
    rows = [int((shards[i]["text"] != 0).any(axis=-1).sum()) for i in range(4)]
    np.testing.assert_allclose(shards[2]["text"][: rows[2]], text([shards.describe(2)[1]])[0, : rows[2]], atol=1e-2)
    assert not (shards[0]["latents"] == shards[1]["latents"]).all()
    files = sorted(tmp_path.glob("shard-*"))
    content, times = files[1].read_bytes(), files[0].stat().st_mtime_ns
    files[1].unlink()
    write_shapes_shards(tmp_path, vae, text, index, count=4, **settings)
    assert files[1].read_bytes() == content
    assert files[0].stat().st_mtime_ns == times
    with pytest.raises(UserError, match="multiple of 2"):
        write_shapes_shards(tmp_path, vae, text, index, count=3, **settings)
