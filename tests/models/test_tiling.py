"""The autoencoder in tiles: no seams, and nothing but what a tile's neighbourhood can change."""

import itertools

import jax
import numpy as np
import pytest

from tests.golden_io import GOLDEN, load
from tests.parity.vae import fixture_vae
from turbojax import UserError
from turbojax.models.tiling import Tiling, blend_weights, cut, decode_tiled, encode_tiled
from turbojax.models.vae import WanVAE, decode, encode


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    return fixture_vae(load(GOLDEN / "vae.safetensors")[1])


def waves(frames: int, height: int, width: int, channels: int, *, length: float) -> np.ndarray:
    """Smooth content, float32 `[1, t, h, w, c]`."""
    t, y, x = np.ogrid[:frames, :height, :width]
    each = [np.sin((x * (1 + 0.1 * i) + 0.7 * y) / length + i + 0.4 * t) for i in range(channels)]
    return np.stack(each, axis=-1)[None].astype(np.float32)


def errors(tiled: np.ndarray, whole: jax.Array) -> np.ndarray:
    whole = np.asarray(whole)
    assert (tiled.shape, tiled.dtype) == (whole.shape, whole.dtype)
    return np.abs(tiled - whole) / np.ptp(whole)


def test_decoding_has_no_seams(vae):
    """Four tiles of one frame."""
    latents = waves(1, 40, 44, 16, length=8)
    error = errors(decode_tiled(vae, latents, tiling=Tiling(32, 16)), decode(vae, latents))
    assert error.max() < 3e-3
    assert np.sqrt(np.mean(error**2)) < 2e-4


def test_encoding_has_no_seams(vae):
    video = waves(5, 32, 352, 3, length=60)
    error = errors(encode_tiled(vae, video, tiling=Tiling(32, 16)), encode(vae, video))
    assert error.max() < 1e-4


def test_a_tile_is_exact_away_from_its_cuts(vae):
    """13 latents from where a tile ends everything is as if it went on."""
    latents = waves(1, 4, 64, 16, length=8)
    error = errors(decode_tiled(vae, latents, tiling=Tiling(40, 16)), decode(vae, latents))
    assert cut(64, Tiling(40, 16)) == (40, (0, 24))
    first, second = 8 * (40 - 13), 8 * (24 + 13)  # the first tile is exact up to here, the second one from here on
    assert error[..., first:second, :].max() > 1e-5
    assert np.concatenate((error[..., :first, :], error[..., second:, :]), axis=3).max() < 1e-5


def test_levels_of_several_frames(vae):
    latents = waves(3, 4, 44, 16, length=8)
    levels = decode_tiled(vae, latents, tiling=Tiling(32, 16), as_uint8=True)
    whole = np.asarray(decode(vae, latents, as_uint8=True))
    assert (levels.shape, levels.dtype) == (whole.shape, whole.dtype) == ((1, 9, 32, 352, 3), np.uint8)
    difference = np.abs(levels.astype(np.int32) - whole.astype(np.int32))
    assert difference.max() <= 3
    assert difference.mean() < 0.05


def test_cuts():
    assert cut(48, Tiling(48, 16)) == (48, (0,))
    assert cut(49, Tiling(48, 16)) == (33, (0, 16))
    assert cut(160, Tiling(48, 16)) == (45, (0, 28, 57, 86, 115))
    for length in range(1, 200):
        for tiling in (Tiling(48, 16), Tiling(20, 10), Tiling(7, 0)):
            side, starts = cut(length, tiling)
            assert side <= tiling.size
            assert (starts[0], starts[-1] + side) == (0, length)
            assert all(a + side - b >= tiling.overlap for a, b in itertools.pairwise(starts))
    weights = blend_weights(16)
    assert (weights[:4] == 0).all()
    assert (weights[-4:] == 1).all()
    np.testing.assert_allclose(weights + weights[::-1], 1)
    for size, overlap in ((0, 0), (16, 9), (16, -1)):
        with pytest.raises(UserError, match=f"a tile of {size} latents cannot overlap by {overlap}"):
            Tiling(size, overlap)
