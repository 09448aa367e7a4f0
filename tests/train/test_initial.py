"""The start of an autoencoder's training: what goes in keeps its directions and its place on the way out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from turbojax.models.vae import VAEConfig
from turbojax.train import autoencoder
from turbojax.train.initial import LOG_VARIANCE, transparent
from turbojax.train.state import parameters
from turbojax.weights.random import random_module
from turbojax.weights.skeleton import vae_skeleton

CONFIG = VAEConfig(dim=8, dim_mult=(2, 2, 4), temporal_downsample=(True, True), num_res_blocks=1, dtype=jnp.float32)


@pytest.fixture(scope="module")
def modules():
    skeleton = vae_skeleton(CONFIG)
    random = random_module(skeleton)
    params = {name: np.asarray(value) for name, value in parameters(random).items()}
    through = transparent(params)
    assert {n: (v.shape, v.dtype) for n, v in through.items()} == {n: (v.shape, v.dtype) for n, v in params.items()}
    return random, skeleton.fill({name: jnp.asarray(value) for name, value in through.items()})


def singular_values(vae):
    """Of the way from a latent, the same everywhere, to the features of a pixel in the middle of the last frame."""
    blocks = range(len(vae.decoder.blocks) - 1)  # without the head

    @jax.jit
    @jax.jacobian
    def way(z):
        latents = jnp.broadcast_to(z, (1, 3, 4, 4, CONFIG.z_dim))
        features, _ = vae.decoder(latents, vae.decoder.init_cache(1, 4, 4), first=True, part=blocks)
        return features[0, -1, 8, 8]

    return np.linalg.svd(way(jnp.ones(CONFIG.z_dim, jnp.float32)), compute_uv=False)


def test_directions_stay_apart(modules):
    random, through = map(singular_values, modules)
    kept = CONFIG.dim  # what the last step up leaves
    assert random[0] > 6 * random[kept - 1]
    assert through[0] < 4 * through[kept - 1]


def test_places_are_kept(modules):
    _, vae = modules
    black = -np.ones((1, 9, 16, 16, 3), np.float32)
    lit = black.copy()
    lit[:, 5:, 4:8, 8:12] = 1  # four frames of 4 x 4 pixels: the last latent in row 1, column 2
    (before, log_variance), (after, _) = (autoencoder.encode(vae, jnp.asarray(video)) for video in (black, lit))
    change = np.linalg.norm(after - before, axis=-1)[0]
    assert np.unravel_index(change.argmax(), change.shape) == (2, 1, 2)
    noise = np.exp(np.asarray(log_variance) / 2) * np.array(CONFIG.std)  # of mu
    assert np.median(noise) == pytest.approx(np.exp(LOG_VARIANCE / 2), rel=1)


def test_places_are_found_again(modules):
    def share(vae):
        """Of what a latent changes in the frames, what lies in its own 4 frames of 4 x 4 pixels."""
        z = jnp.zeros((1, 3, 4, 4, CONFIG.z_dim), jnp.float32)
        before, after = (autoencoder.decode(vae, latents) for latents in (z, z.at[:, 2, 1, 2].set(2)))
        change = np.linalg.norm(after - before, axis=-1)[0]
        return change[5:, 4:8, 8:12].sum() / change.sum()

    random, through = map(share, modules)
    assert through > 3 * random
