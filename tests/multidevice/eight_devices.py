"""Sharding on a mesh of 8 simulated devices against one device.

Collected by test_sharding.py in a process of its own, with 8 CPU devices in XLA_FLAGS and TRITON_INTERPRET=1.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tests.multidevice import two_processes
from tests.weights.checkpoints import small
from turbojax import sharding
from turbojax.errors import UserError
from turbojax.kernels import sla, triton_call
from turbojax.models.wan import WanConfig
from turbojax.train.recipes import RCM, FlowMatching, Networks
from turbojax.train.schedule import learning_rate
from turbojax.train.state import TrainState, initial_state, parameters
from turbojax.train.step import Frozen, adamw, make_step
from turbojax.train.times import LogNormal
from turbojax.weights.random import random_module
from turbojax.weights.skeleton import wan_skeleton

TOKENS = 3 * 4 * 6  # half of them is no multiple of a block
CONFIGS = {
    "dense": small(dim=64, ffn_dim=96, num_heads=4),
    "sla": small(dim=64, ffn_dim=96, num_heads=4, attention_type="sla", sla_topk=0.3, sla_blocks=(16, 8)),
}
MESH = sharding.make_mesh(data=2, fsdp=2, sequence=2)
# By attention: a recipe, its student and its teacher. In its first iteration rCM has tangents and no critic.
RECIPES = {
    "dense": (functools.partial(FlowMatching, times=LogNormal(0.0, 1.0)), CONFIGS["dense"], CONFIGS["dense"]),
    "sla": (functools.partial(RCM, times=LogNormal(0.7)), CONFIGS["sla"], CONFIGS["dense"]),
}
OPTIMIZER = adamw(learning_rate(1e-4, warm_up=0), betas=(0.9, 0.99), weight_decay=0.01)


@functools.cache
def weights(config: WanConfig) -> dict[str, np.ndarray]:
    return {name: np.asarray(value) for name, value in parameters(random_module(wan_skeleton(config))).items()}


def batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"latents": (4, 3, 8, 12, 16), "text": (4, 5, 64)}
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def initial(config: WanConfig) -> TrainState:
    """Before the first step, on the mesh in force."""
    state = initial_state(weights(config), OPTIMIZER.transform)
    return jax.device_put(state, sharding.state_shardings(state))


def named(tree) -> dict[str, jax.Array]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value"): leaf for path, leaf in leaves
    }


def assert_equal(got, expected, tolerance: float = 1e-5):
    """Each array, by its norm."""
    got, expected = named(got), named(expected)
    assert got.keys() == expected.keys()

    def error(name: str) -> float:
        return float(np.linalg.norm(got[name] - expected[name]) / max(np.linalg.norm(expected[name]), 1e-30))

    assert not {name: error(name) for name in got if not error(name) < tolerance}


@functools.cache
def one_step(name: str, *, sharded: bool) -> tuple[TrainState, dict[str, jax.Array]]:
    """What a step of a recipe gives: the next state, and its metrics."""
    recipe, student, teacher = RECIPES[name]
    step = make_step(recipe(Networks.of(student, teacher)), {"student": OPTIMIZER})
    with jax.set_mesh(MESH if sharded else None):
        params = jax.device_put(weights(teacher), sharding.state_shardings(weights(teacher)))
        frozen = Frozen(params, jnp.zeros((5, 64), jnp.float32))
        return step(0, initial(student), frozen, sharding.put_batch(batch()))


@pytest.mark.parametrize("name", RECIPES)
def test_step(name):
    """Metrics, parameters, their average and moments, of which the first is a tenth of the gradient."""
    assert_equal(one_step(name, sharded=True), one_step(name, sharded=False))


def test_state_is_split():
    """Parameters and what belongs to them, before and after a step: linear layers in halves, the rest whole."""
    wanted = {
        "student.params.patch_embedding.weight": P("fsdp"),  # [64, 64]
        "student.params.blocks.self_attn.q.weight": P(None, "fsdp"),  # [2, 64, 64]: not the layers
        "student.params.blocks.ffn.fc1.weight": P(None, "fsdp"),  # [2, 96, 64]
        "student.params.blocks.ffn.fc2.weight": P(None, None, "fsdp"),  # [2, 64, 96]
        "student.optimizer.1.0.mu.blocks.ffn.fc2.weight": P(None, None, "fsdp"),
        "student.optimizer.1.0.nu.time_projection.weight": P("fsdp"),
        "student.optimizer.1.0.count": P(),
        "ema.blocks.ffn.fc1.weight": P(None, "fsdp"),
        "ema.blocks.ffn.fc1.bias": P(),
        "ema.blocks.self_attn.norm_q.weight": P(),
        "ema.blocks.self_attn.proj_l.weight": P(),
        "ema.blocks.modulation": P(),
        "step": P(),
    }
    with jax.set_mesh(MESH):
        before = initial(CONFIGS["sla"])
    for arrays in (named(before), named(one_step("sla", sharded=True)[0])):
        for name, spec in wanted.items():
            expected = jax.NamedSharding(MESH, spec)
            assert arrays[name].sharding.is_equivalent_to(expected, arrays[name].ndim), name
        for name, array in arrays.items():
            linear = name.endswith("weight") and "norm" not in name and "proj_l" not in name
            held = [shard.data.nbytes for shard in array.addressable_shards]
            assert held == [array.nbytes // (2 if linear else 1)] * 8, name


def test_block_map():
    """Of half the heads on each device, all of whose tokens it has after the exchange: chosen as on one device."""
    settings = {"topk": 0.3, "block_q": 16, "block_k": 8}
    q, k = (jax.random.normal(key, (4, TOKENS, 4, 16)) for key in jax.random.split(jax.random.key(0)))
    expected = sla.block_table(q, k, **settings)

    def as_tokens(q, k):
        """A table's row for each token, so that it goes back the way that attention does."""
        table = sla.block_table(q, k, **settings)
        assert table.shape == (*expected.shape[:1], q.shape[2], *expected.shape[2:])
        return jnp.moveaxis(jnp.repeat(table, 16, axis=2, total_repeat_length=TOKENS), 1, 2)

    tokens = P(None, "sequence")
    over_heads = functools.partial(sharding.over_heads, as_tokens)
    with jax.set_mesh(MESH):
        rows = jax.jit(jax.shard_map(over_heads, in_specs=tokens, out_specs=tokens, check_vma=False))(q, k)
    np.testing.assert_array_equal(jnp.moveaxis(rows, 2, 1)[:, :, ::16], expected)


def test_one_device_runs_the_same_program():
    arguments = batch()["latents"], np.ones(4, np.float32), batch()["text"]

    def program() -> str:
        run = jax.jit(lambda weights, *arguments: wan_skeleton(CONFIGS["sla"]).fill(weights)(*arguments))
        return run.lower(weights(CONFIGS["sla"]), *arguments).as_text()

    alone = program()
    with jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:1])):
        assert program() == alone
    with jax.set_mesh(MESH):
        assert program() != alone


@pytest.mark.parametrize("size", [1, 3])
def test_samples_that_do_not_divide(size):
    """Every device has all of them; each counts once in the gradient."""
    arguments = {"weight": two_processes.weights()}, two_processes.samples()[:size]
    gradient = jax.jit(jax.grad(two_processes.loss, argnums=(0, 1)))
    expected = gradient(*arguments)
    with jax.set_mesh(MESH):
        assert_equal(gradient(*arguments), expected)


def test_kernels_and_their_gradients(monkeypatch):
    """The fused kernels of SLA run on each device by itself, in the interpreter: bit for bit as on one."""
    pytest.importorskip("triton")
    from tests.kernels import interpreter

    monkeypatch.setattr(triton_call, "override", interpreter.launch)
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (1, 160, 2, 64), jnp.bfloat16) for key in keys)
    attend = functools.partial(sla.sparse_linear_attention, topk=0.5, implementation="triton")

    def with_gradients(attention):
        out, gradient = jax.vjp(attention, q, k, v)
        return out, gradient(q)

    def attention(q, k, v):
        projection = jnp.eye(64, dtype=jnp.float32), jnp.ones(64, jnp.float32)
        return sharding.over_heads(lambda *arrays: attend(*arrays, *projection), q, k, v)

    expected = jax.jit(lambda: with_gradients(attention))()
    tokens = P(None, "sequence")
    with jax.set_mesh(sharding.make_mesh(data=1, sequence=2, devices=jax.devices()[:2])):
        over_mesh = jax.shard_map(attention, in_specs=tokens, out_specs=tokens, check_vma=False)
        got = jax.jit(lambda: with_gradients(over_mesh))()
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_rules():
    """What belongs to a parameter is found by the end of its path; no axis that divides is no error."""
    cases = {
        "student.optimizer.1.0.mu.blocks.ffn.fc1.weight": ((4, 6, 10), P(None, None, "fsdp")),
        "ema.blocks.ffn.fc1.weight": ((40, 5, 7), P()),
        "text_embedding.fc1.weight": ((7, 6), P(None, "fsdp")),
        "blocks.self_attn.q.scale": ((4, 8, 8), P()),
        "step": ((), P()),
    }
    with jax.set_mesh(MESH):
        for name, (shape, spec) in cases.items():
            assert sharding.parameter_spec(name, shape) == spec


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 3}, "data=3 x fsdp=1 x sequence=1 does not fill 8 devices; choose sizes whose product is 8"),
        ({"fsdp": 3}, "data=-1 x fsdp=3 x sequence=1 does not fill 8 devices"),
        ({"fsdp": 16}, "data=-1 x fsdp=16 x sequence=1 does not fill 8 devices"),
        ({"data": 8, "fsdp": 0}, "data=8 x fsdp=0 x sequence=1 cannot be; sizes are at least 1, or once -1"),
        ({"fsdp": -1}, "data=-1 x fsdp=-1 x sequence=1 cannot be"),
    ],
)
def test_meshes_that_cannot_be(sizes, message):
    with pytest.raises(UserError, match=message):
        sharding.make_mesh(**sizes)


def test_rest_of_the_devices():
    assert dict(sharding.make_mesh(fsdp=2).shape) == {"data": 4, "fsdp": 2, "sequence": 1}
    assert dict(sharding.make_mesh(data=2, sequence=-1).shape) == {"data": 2, "fsdp": 1, "sequence": 4}


@pytest.mark.parametrize(
    ("sequence", "height", "message"),
    [
        (4, 10, "90 tokens do not divide over sequence=4; take sequence=3 or another size"),
        (8, 8, "4 heads do not divide over sequence=8; take one of 1, 2, 4"),
    ],
)
def test_sizes_that_do_not_divide(sequence, height, message):
    shapes = (1, 3, height, 12, 16), (1,), (1, 5, 64)
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    network = wan_skeleton(CONFIGS["dense"]).fill(jax.tree.map(jnp.asarray, weights(CONFIGS["dense"])))
    with jax.set_mesh(sharding.make_mesh(sequence=sequence)), pytest.raises(UserError, match=message):
        jax.eval_shape(network, *arguments)


def test_batches_that_do_not_divide():
    with jax.set_mesh(MESH), pytest.raises(UserError, match="batch of 6 does not divide over data=2 x fsdp=2"):
        sharding.put_batch({"latents": np.zeros((6, 1), np.float32)})
