"""The benchmark of a training step at toy size: its figures are there, and count what the network computes."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from tests.marks import slow
from turbojax.bench.training import forward_flops, measure_train_step
from turbojax.train.toy import toy_config
from turbojax.weights.skeleton import wan_skeleton

LATENTS = (2, 8, 8, 16)


@pytest.mark.parametrize("recipe", [slow("sla"), "scm"])
def test_train_step(recipe):
    config = toy_config(dim=32, ffn_dim=64, num_layers=1, dtype=jnp.float32, remat=True)
    result = measure_train_step(recipe=recipe, config=config, latents=LATENTS, text_len=8, steps=1)
    assert result["seconds"] > 0
    assert result["seconds_of_the_first"] > 0
    assert result["tokens"] == 32
    assert [set(item) for item in result["largest_items"]] == [{"name", "ms", "calls", "share"}] * 3
    assert 0 < sum(item["share"] for item in result["largest_items"]) <= 1
    assert all(value == value for value in result["metrics"].values())


def test_forward_flops():
    """Against what XLA counts, which has norms, activations and gates besides."""
    config = toy_config(dim=256, num_heads=2, ffn_dim=1024, num_layers=1, text_dim=256, dtype=jnp.float32)
    skeleton = wan_skeleton(config)
    state = nnx.state(nnx.eval_shape(lambda: skeleton.fill(skeleton.specs)))
    shapes = ((1, 4, 32, 32, 16), jnp.float32), ((1,), jnp.float32), ((1, 512, 256), jnp.float32)
    arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    run = jax.jit(lambda state, *arguments: nnx.merge(skeleton.graph, state)(*arguments))
    counted = run.lower(state, *arguments).cost_analysis()["flops"]
    assert 0.9 < forward_flops(config, (4, 32, 32, 16), 512) / counted < 1
