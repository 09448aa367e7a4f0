"""Training of an autoencoder: its latents end normalized, and a run that was stopped ends as one that was not."""

import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from turbojax.errors import UserError
from turbojax.models import vae as vae_model
from turbojax.models.vae import VAEConfig
from turbojax.shapes.examples import Batches
from turbojax.shapes_training.registry import REGISTRY, train
from turbojax.train import autoencoder, runs
from turbojax.train.autoencoder import latent_statistics, normalized
from turbojax.train.config import train_config
from turbojax.train.metrics import CURVES, read_curves
from turbojax.train.state import parameters
from turbojax.weights.encoders import load_vae
from turbojax.weights.io import read_tensors
from turbojax.weights.random import random_module
from turbojax.weights.skeleton import vae_skeleton

pytest.importorskip("sklearn")

SMALL = VAEConfig(dim=4, dim_mult=(1, 1), temporal_downsample=(True,), num_res_blocks=1, z_dim=16, dtype=jnp.float32)
VIDEOS = np.random.default_rng(0).integers(0, 256, (2, 5, 16, 16, 3)).astype(np.uint8)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(runs, "UNSEEN", 4)
    monkeypatch.setitem(REGISTRY.autoencoders, "small", lambda: SMALL)


def encode(vae, pixels):
    """As training does, compiled as a whole."""
    return jax.jit(functools.partial(autoencoder.encode, vae))(pixels)


def decode(vae, latents):
    return jax.jit(functools.partial(autoencoder.decode, vae))(latents)


def test_encode_and_decode_are_the_pipeline_s():
    vae = random_module(vae_skeleton(SMALL))
    pixels = autoencoder.as_pixels(VIDEOS)
    mean, log_variance = encode(vae, pixels)
    np.testing.assert_allclose(mean, vae_model.encode(vae, pixels), atol=1e-4)
    assert log_variance.shape == mean.shape
    np.testing.assert_allclose(decode(vae, mean), vae_model.decode(vae, mean), atol=1e-4)


def test_normalized_latents_are_decoded_to_the_same_frames():
    skeleton = vae_skeleton(SMALL)
    vae = random_module(skeleton)
    pixels = autoencoder.as_pixels(VIDEOS)
    mean, std = latent_statistics(vae, VIDEOS)
    assert np.abs(std - 1).max() > 0.3
    params = normalized({k: np.asarray(v) for k, v in parameters(vae).items()}, mean, std, SMALL)
    other = skeleton.fill({name: jnp.asarray(value) for name, value in params.items()})
    new_mean, new_std = latent_statistics(other, VIDEOS)
    np.testing.assert_allclose(new_mean, 0, atol=1e-4)
    np.testing.assert_allclose(new_std, 1, atol=1e-4)
    (before, log_variance), (after, log_variance_after) = (map(np.asarray, encode(m, pixels)) for m in (vae, other))
    np.testing.assert_allclose(after, (before - mean) / std, atol=1e-3)
    np.testing.assert_allclose(log_variance_after, log_variance - 2 * np.log(std), atol=1e-3)
    frames = [np.asarray(decode(m, z)) for m, z in ((vae, before), (other, after))]
    np.testing.assert_allclose(*frames, atol=1e-3)


def test_stopped_and_resumed_and_shipped(tmp_path, small, compiled_once):
    """The loss falls, a run stopped when its time was up equals a whole one, the file is read as published ones are."""
    settings = dict(
        recipe="vae", data="shapes", weights="random", model="small", num_frames=5, height=64, width=64, batch_size=2,
        num_steps=12, learning_rate=1e-2, learning_rate_end=0.5, warmup_steps=2, dtype="float32", log_every=1,
        optimizer="muon", crops=((5, 32),),
    )  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    file = train(train_config(workdir=str(whole), **settings))
    with pytest.raises(KeyboardInterrupt):
        train(train_config(workdir=str(parts), max_minutes=1e-5, **settings))
    steps = [int(path.name) for path in (parts / "checkpoints").iterdir() if path.name.isdigit()]
    assert len(steps) == 1
    assert steps[0] < 12
    resumed = read_tensors(train(train_config(workdir=str(parts), **settings)))
    for name, value in read_tensors(file).items():
        np.testing.assert_array_equal(value, resumed[name], name)
    curves = read_curves(parts / CURVES)
    assert [line["step"] for line in curves] == list(range(1, 13))
    losses = [line["loss"] for line in curves]
    assert np.mean(losses[-4:]) < 0.8 * np.mean(losses[:4])
    assert load_vae(file, dtype=jnp.float32).config == SMALL
    quality = json.loads((whole / "quality.json").read_text())
    assert quality["mean_off"] < 1e-3
    assert quality["std_off"] < 1e-3


def test_data_of_files_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--config\.data=shapes"):
        train(train_config(recipe="vae", data="clips", weights="random", workdir=str(tmp_path)))


def test_batches_go_on_and_are_shared():
    settings = dict(batch_size=4, seed=3, num_frames=2, height=80, width=80, workers=0)
    whole = [batch["video"] for batch in itertools.islice(Batches(**settings), 3)]
    later = Batches(**settings)
    later.set_state(Batches(**settings).get_state() | {"batch": 1})
    np.testing.assert_array_equal(next(later)["video"], whole[1])
    assert later.get_state()["batch"] == 2
    shares = [next(Batches(**settings, share=(i, 2)))["video"] for i in range(2)]
    np.testing.assert_array_equal(np.concatenate(shares), whole[0])
    with pytest.raises(UserError, match="seed=3, not 4"):
        Batches(**settings | {"seed": 4}).set_state(later.get_state())


def test_batches_of_crops():
    """In turn of these sizes, cut from the very videos where there is something in them; the same in each share."""
    settings = dict(batch_size=4, seed=3, num_frames=9, height=80, width=80, workers=0)
    crops = ((5, 24), (1, 48))
    whole, cut = Batches(**settings), Batches(**settings, crops=crops)
    for n in range(3):
        videos, parts = next(whole)["video"], next(cut)["video"]
        frames, side = crops[n % 2]
        assert parts.shape == (4, frames, side, side, 3)
        for video, part in zip(videos, parts, strict=True):
            windows = np.lib.stride_tricks.sliding_window_view(video, part.shape).squeeze(-5)
            assert (windows == part).all(axis=(-4, -3, -2, -1)).any()
            assert part.std() > 0
    later = Batches(**settings, crops=crops, share=(1, 2))
    later.set_state(later.get_state() | {"batch": 2})
    np.testing.assert_array_equal(next(later)["video"], parts[2:])


@pytest.mark.parametrize(
    ("crops", "message"),
    [
        (((17, 64),), "do not fit into videos of 9 x 80 x 80"),
        (((5, 88),), "do not fit"),
        (((4, 64),), "4"),
        (((5, 60),), "60"),
        ((5, 64), r"crops\[0\] is 5 and must be a list of 2 items"),
        (((5, "x"),), r"crops\[0\]\[1\] is 'x' and must be a whole number"),
    ],
)
def test_crops_that_cannot_be(tmp_path, crops, message):
    with pytest.raises(UserError, match=message):
        train(
            train_config(
                recipe="vae", data="shapes", weights="random", workdir=str(tmp_path), num_frames=9, height=80, width=80,
                crops=crops,
            )
        )  # fmt: skip


def test_workers_draw_the_same():
    settings = dict(batch_size=2, seed=3, num_frames=2, height=80, width=80)
    alone, several = Batches(**settings, workers=0), Batches(**settings, workers=1)
    for _ in range(2):
        np.testing.assert_array_equal(next(alone)["video"], next(several)["video"])
    several.close()
