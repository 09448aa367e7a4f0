"""Sharding on a mesh of 8 simulated devices against one device.

Collected by test_sharding.py in a process of its own, with 8 CPU devices in XLA_FLAGS.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from tests.weights.checkpoints import small
from turbojax import sharding
from turbojax.errors import UserError
from turbojax.kernels import sla
from turbojax.models.wan import WanConfig
from turbojax.weights.load import wan_skeleton
from turbojax.weights.random import random_module

TOKENS = 3 * 4 * 6  # half of them is no multiple of a block
BLOCKS = {"block_q": 16, "block_k": 8}
CONFIGS = {
    "dense": small(dim=64, ffn_dim=96, num_heads=4),
    "sla": small(dim=64, ffn_dim=96, num_heads=4, attention_type="sla", sla_topk=0.3, sla_blocks=(16, 8)),
}
OPTIMIZER = optax.adamw(1e-3)


@pytest.fixture
def mesh():
    return sharding.make_mesh(data=2, fsdp=2, sequence=2)


def parameters(config: WanConfig):
    return nnx.state(random_module(wan_skeleton(config)))


def batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"latents": (4, 3, 8, 12, 16), "noise": (4, 3, 8, 12, 16), "text": (4, 5, 64)}
    drawn = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    return drawn | {"time": np.float32([0.1, 0.4, 0.7, 0.9])}


def velocity(config: WanConfig, params, noisy: jax.Array, time: jax.Array, text: jax.Array) -> jax.Array:
    return nnx.merge(wan_skeleton(config).graph, params)(noisy, 1000 * time, text)


def noisy_latents(batch: dict) -> jax.Array:
    time = batch["time"][:, None, None, None, None]
    return (1 - time) * batch["latents"] + time * batch["noise"]


def train_step(config: WanConfig, state: dict, batch: dict):
    """Loss, gradients and the next state of flow matching."""

    def loss_of(params):
        out = velocity(config, params, noisy_latents(batch), batch["time"], batch["text"])
        return jnp.mean((out - (batch["noise"] - batch["latents"])) ** 2)

    loss, gradients = jax.value_and_grad(loss_of)(state["params"])
    with jax.numpy_dtype_promotion("standard"):  # which optax counts on
        updates, moments = OPTIMIZER.update(gradients, state["moments"], state["params"])
    return loss, gradients, {"params": optax.apply_updates(state["params"], updates), "moments": moments}


def tangent(config: WanConfig, params, batch: dict):
    """The velocity and its tangent along the trajectory."""
    x, time = noisy_latents(batch), batch["time"]
    function = functools.partial(velocity, config, params, text=batch["text"])
    return jax.jvp(function, (x, time), (batch["noise"] - batch["latents"], jnp.ones_like(time)))


def named(tree) -> dict[str, jax.Array]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def assert_equal(got, expected, tolerance: float = 1e-5):
    """Each array, by its norm."""
    got, expected = named(got), named(expected)
    assert got.keys() == expected.keys()
    errors = {
        name: float(np.linalg.norm(got[name] - expected[name]) / max(np.linalg.norm(expected[name]), 1e-30))
        for name in got
    }
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] < tolerance, (worst, errors[worst])


@pytest.mark.parametrize("name", CONFIGS)
def test_train_step(name, mesh):
    config = CONFIGS[name]
    params = parameters(config)
    step = jax.jit(functools.partial(train_step, config))
    expected = step({"params": params, "moments": OPTIMIZER.init(params)}, batch())
    with jax.set_mesh(mesh):
        shapes = {"params": params, "moments": jax.eval_shape(OPTIMIZER.init, params)}
        shardings = sharding.state_shardings(shapes)
        state = {
            "params": jax.device_put(params, shardings["params"]),
            "moments": jax.jit(OPTIMIZER.init, out_shardings=shardings["moments"])(params),
        }
        step = jax.jit(functools.partial(train_step, config), out_shardings=(None, None, shardings))
        got = step(state, sharding.put_batch(batch()))
    assert_equal(got, expected)
