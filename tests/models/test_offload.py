"""Streamed blocks give the resident model's numbers, bit for bit, from host memory and three layers at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from turbojax.models.offload import LAYERS_ON_DEVICE, HostBlocks, Streamed
from turbojax.models.umt5 import UMT5Config, UMT5Encoder, encode_text
from turbojax.models.wan import WanConfig
from turbojax.weights.load import load_wan
from turbojax.weights.options import NetworkOptions
from turbojax.weights.random import random_module
from turbojax.weights.skeleton import Skeleton, wan_skeleton

LAYERS = 5
CONFIG = WanConfig(dim=256, ffn_dim=512, num_heads=2, num_layers=LAYERS, text_dim=64)


def inputs() -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (1, 2, 4, 6, 16), jnp.float32)
    return x, jnp.full(1, 500.0), jax.random.normal(keys[1], (1, 512, 64), jnp.float32)


def resident(model: nnx.Module, *arrays: jax.Array) -> jax.Array:
    graph, state = nnx.split(model)
    return jax.jit(lambda state, *arrays: nnx.merge(graph, state)(*arrays))(state, *arrays)


def both(skeleton: Skeleton) -> tuple[nnx.Module, Streamed]:
    whole, streamed = (random_module(skeleton, streamed=streamed) for streamed in (False, True))
    assert isinstance(streamed, Streamed)
    return whole, streamed


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": jnp.float32},
        {"dtype": jnp.bfloat16, "attention_type": "sla"},
        {"quant_linear": True},
        {"quant_linear": True, "quant_scheme": "channel"},
    ],
    ids=["float32", "bfloat16, sla", "block128", "channel"],
)
def test_transformer(options):
    model, streamed = both(wan_skeleton(NetworkOptions(**options).apply(CONFIG)))
    expected = resident(model, *inputs())
    np.testing.assert_array_equal(streamed(*inputs()), expected)
    assert np.asarray(expected).std() > 0.1


def test_text_encoder():
    config = UMT5Config(512, dim=128, attention_dim=128, ffn_dim=256, num_heads=4, num_layers=3, dtype=jnp.float32)
    model, streamed = both(Skeleton.of(lambda: UMT5Encoder(config, rngs=nnx.Rngs(0))))
    table = np.random.default_rng(0).standard_normal((512, 128), np.float32)
    ids, mask = np.arange(12, dtype=np.int32).reshape(2, 6), np.array([[1] * 6, [1] * 4 + [0] * 2], np.int32)
    expected = encode_text(model, table, ids, mask)
    for _ in range(2):  # inputs are not given away
        np.testing.assert_array_equal(encode_text(streamed, table, ids, mask), expected)


@pytest.mark.parametrize("options", [{}, {"quant_linear": True}], ids=["as stored", "quantized while loading"])
def test_from_a_file(demo, options):
    path = demo / "TurboWan-demo.pth"
    model, streamed = (load_wan(path, NetworkOptions(**options), streamed=streamed) for streamed in (False, True))
    assert streamed.config == model.config
    np.testing.assert_array_equal(streamed(*inputs()), resident(model, *inputs()))


def test_what_lies_where(monkeypatch):
    """Matrices on the host, and on the device never more than three layers of them."""
    _, streamed = both(wan_skeleton(NetworkOptions(quant_linear=True).apply(CONFIG)))
    blocks = streamed.blocks
    assert {a.sharding.memory_kind for a in jax.tree.leaves(blocks.layers)} == {"pinned_host"}
    assert {a.sharding.memory_kind for a in jax.tree.leaves((streamed.state, blocks.resident))} == {"device"}
    assert len(blocks.layers) == LAYERS
    assert all(len(jax.tree.leaves(layer)) == 10 for layer in blocks.layers)  # q, k, v, o, q, k, v, o, fc1, fc2
    counts, prefetch = [], HostBlocks.prefetch

    def counting(self, i):
        layer = prefetch(self, i)
        shapes = [(a.shape, a.dtype) for a in jax.live_arrays() if a.sharding.memory_kind == "device"]
        counts.append(shapes.count(((512, 256), jnp.int8)))
        return layer

    monkeypatch.setattr(HostBlocks, "prefetch", counting)
    streamed(*inputs())
    assert max(counts) == LAYERS_ON_DEVICE
