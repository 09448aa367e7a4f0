"""Modules go back to the checkpoints that they came from."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.weights.checkpoints import load_umt5
from turbojax.shapes.demo import demo_configs
from turbojax.weights import layouts
from turbojax.weights.encoders import load_vae
from turbojax.weights.io import read_tensors
from turbojax.weights.layouts import layout_tensors
from turbojax.weights.load import load_wan
from turbojax.weights.options import NetworkOptions
from turbojax.weights.umt5 import UMT5_OFFICIAL
from turbojax.weights.vae import VAE_OFFICIAL
from turbojax.weights.wan import OFFICIAL

WAN, VAE, T5 = demo_configs()


def load_transformer(path, dtype):
    return load_wan(path, NetworkOptions(dtype=dtype))


@pytest.mark.parametrize(
    ("file", "load", "layout", "rules"),
    [
        ("TurboWan-demo.pth", load_transformer, layouts.wan_layout(WAN), OFFICIAL),
        ("Wan2.1_VAE.pth", load_vae, layouts.vae_layout(VAE), VAE_OFFICIAL),
        ("models_t5_umt5-xxl-enc-bf16.pth", load_umt5, layouts.umt5_layout(T5), UMT5_OFFICIAL),
    ],
)
def test_module_to_checkpoint(demo, file, load, layout, rules):
    stored = read_tensors(demo / file)
    written = dict(layout_tensors(load(demo / file, dtype=jnp.float32), layout, rules))
    assert written.keys() == stored.keys() - {"token_embedding.weight"}  # no parameter of the encoder
    for name, value in written.items():
        np.testing.assert_array_equal(value, np.asarray(stored[name], np.float32), name)
