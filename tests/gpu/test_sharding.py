"""The network on several GPUs of one host, by each kind of attention and its kernels, against one of them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.closeness import relative_error
from turbojax import sharding
from turbojax.kernels.int8 import QuantConfig
from turbojax.models.wan import WanConfig
from turbojax.train.state import parameters
from turbojax.weights.random import random_module
from turbojax.weights.skeleton import wan_skeleton

GPUS = jax.device_count()
pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu" or GPUS not in (2, 4, 8), reason="needs 2, 4 or 8 GPUs")

SIZES = dict(dim=1024, ffn_dim=2048, num_heads=8, num_layers=2, text_dim=256)
CONFIGS = {
    "dense": WanConfig(**SIZES),
    "sla": WanConfig(**SIZES, attention_type="sla"),
    "int8 sagesla": WanConfig(**SIZES, attention_type="sagesla", quant=QuantConfig()),
}
MESHES = {"sequence": {"data": 1, "sequence": GPUS}, "fsdp": {"data": 1, "fsdp": GPUS}}


def drawn() -> tuple[jax.Array, jax.Array, jax.Array]:
    """Latents of 5 x 32 x 32 patches, timesteps and text of a sample for each GPU."""
    x, text = (jax.random.key(i) for i in (1, 2))
    shapes = (GPUS, 5, 64, 64, 16), (GPUS, 512, 256)
    times = jnp.linspace(100, 900, GPUS, dtype=jnp.float32)
    return jax.random.normal(x, shapes[0]), times, jax.random.normal(text, shapes[1])


def run(config: WanConfig, weights: dict[str, jax.Array], *arguments: jax.Array):
    """The velocity, and, where the network has them, the gradients of its mean square."""

    def loss(weights):
        out = wan_skeleton(config).fill(weights)(*arguments)
        return jnp.mean(out**2), out

    if config.quant:
        return loss(weights)[1], {}
    gradients, out = jax.grad(loss, has_aux=True)(weights)
    return out, sharding.as_sharded(gradients)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", CONFIGS)
def test_as_on_one(name, mesh):
    """Gradients are as far from float32's as those of one: some are sums that cancel down to their rounding."""
    config = CONFIGS[name]
    weights = {name: np.asarray(value) for name, value in parameters(random_module(wan_skeleton(config))).items()}
    arguments = [np.asarray(array) for array in drawn()]
    step = jax.jit(functools.partial(run, config))
    out, gradients = jax.tree.map(np.asarray, step(weights, *arguments))
    with jax.set_mesh(sharding.make_mesh(**MESHES[mesh])):
        placed = jax.device_put(weights, sharding.state_shardings(weights))
        got_out, got = jax.tree.map(np.asarray, step(placed, *arguments))
    assert relative_error(got_out, out) < 2e-2
    if not gradients:
        return
    exact = jax.jit(functools.partial(run, dataclasses.replace(config, dtype=jnp.float32)))
    with jax.default_matmul_precision("float32"):
        _, expected = exact({name: value.astype(np.float32) for name, value in weights.items()}, *arguments)
    for name, value in jax.tree.map(np.asarray, expected).items():
        assert relative_error(got[name], value) < 1.5 * relative_error(gradients[name], value), name
