"""Two networks that share a device: which is where, and that they come back as they left."""

import jax
import numpy as np
import pytest
from flax import nnx

from tests.weights.checkpoints import small
from turbojax.diffusion import RCM
from turbojax.errors import UserError
from turbojax.kernels.int8 import QuantConfig
from turbojax.memory.experts import Experts
from turbojax.models.wan import WanModel
from turbojax.weights.random import random_module
from turbojax.weights.skeleton import wan_skeleton

PLAIN, INT8 = small(num_layers=1), small(num_layers=1, quant=QuantConfig())


def network(config, seed: int) -> WanModel:
    return random_module(wan_skeleton(config), seed=seed)


def numbers(model: WanModel) -> list[np.ndarray]:
    return [np.asarray(leaf).copy() for leaf in jax.tree.leaves(nnx.state(model))]


def places(experts: Experts) -> dict[str, int]:
    """Bytes on the device and in host memory."""
    return {
        place: sum(a.nbytes for a in jax.tree.leaves(arrays))
        for place, arrays in experts.arrays_by_memory()._asdict().items()
    }


def assert_equal(ours: list, theirs: list):
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("config", [PLAIN, INT8], ids=["float", "int8"])
@pytest.mark.parametrize("room", [0, 200_000, 2**40], ids=["no_room", "some_room", "room"])
def test_one_at_a_time(config, room):
    experts = Experts(swap_experts=True)
    expected = {}
    for name, seed in (("low", 1), ("high", 2)):
        model = network(config, seed)
        expected[name] = numbers(model)
        experts.add(name, model)
        del model
    one = sum(leaf.nbytes for leaf in expected["high"])
    both_on_host = config.quant is not None
    for name, following in (("high", "low"), ("low", "high"), ("high", "low"), ("low", "low")):
        model = experts.activate(name)
        assert_equal(numbers(model), expected[name])
        assert places(experts) == {"device": one, "host": 2 * one if both_on_host else one}
        experts.prefetch(following, room)
        extra = places(experts)["device"] - one
        assert extra <= room
        assert (extra == one) == (room > one and following != name)
        assert_equal(numbers(model), expected[name])
    del model
    experts.release()
    assert places(experts)["device"] == (0 if both_on_host else one)
    assert_equal(numbers(experts.activate("low")), expected["low"])


def test_both_stay():
    experts = Experts()
    low, high = network(PLAIN, 1), network(PLAIN, 2)
    experts.add("low", low)
    experts.add("high", high)
    for name, model in (("high", high), ("low", low), ("high", high)):
        assert_equal(numbers(experts.activate(name)), numbers(model))
    assert places(experts)["host"] == 0


def test_steps():
    assert Experts.of(network(PLAIN, 1)).step_ranges(RCM(4, 200.0)) == [("high", (0, 4))]
    experts = Experts()
    assert experts.step_ranges(RCM(4, 200.0)) == [("high", (0, 2)), ("low", (2, 4))]
    assert experts.step_ranges(RCM(1, 200.0)) == [("high", (0, 1))]
    assert experts.step_ranges(RCM(1, 1.0)) == [("low", (0, 1))]
    assert Experts(boundary=0.8).step_ranges(RCM(4, 200.0)) == [("high", (0, 3)), ("low", (3, 4))]


def test_different_kinds():
    experts = Experts()
    experts.add("low", network(PLAIN, 1))
    with pytest.raises(UserError, match="both plain or both quantized"):
        experts.add("high", network(INT8, 1))
