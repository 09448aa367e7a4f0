"""Orbax checkpoints: read back as they were, refused where anything differs, and written without a word of Orbax'."""

import logging
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from absl import logging as absl_logging

from turbojax.errors import CheckpointError
from turbojax.weights.orbax import load_orbax, save_orbax
from turbojax.weights.quiet_orbax import orbax


def test_round_trip(tmp_path):
    tree = {
        "a": {"w": np.ones((3, 4), ml_dtypes.bfloat16), "b": jax.numpy.arange(5)},
        "q": np.ones(2, np.int8),
    }
    save_orbax(tmp_path / "x", tree)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    for placed, kind in ((None, np.ndarray), (sharding, jax.Array)):
        abstract = jax.tree.map(lambda x, s=placed: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree)
        got = load_orbax(tmp_path / "x", abstract)
        assert all(isinstance(leaf, kind) for leaf in jax.tree.leaves(got))
        jax.tree.map(np.testing.assert_array_equal, got, tree)
        assert jax.tree.map(lambda x: x.dtype, got) == jax.tree.map(lambda x: x.dtype, tree)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"a": (2,), "b": (3,)}, r"b: saved float32\(2,\), wanted float32\(3,\)"),
        ({"a": (2,)}, r"b: saved float32\(2,\), wanted nothing"),
        ({"a": (2,), "b": (2,), "c": (1,)}, r"c: saved nothing, wanted float32\(1,\)"),
    ],
)
def test_mismatch(tmp_path, wanted, message):
    save_orbax(tmp_path / "x", {"a": np.zeros(2, np.float32), "b": np.zeros(2, np.float32)})
    with pytest.raises(CheckpointError, match=message):
        load_orbax(tmp_path / "x", {k: jax.ShapeDtypeStruct(s, np.float32) for k, s in wanted.items()})


def test_dtype_is_not_cast(tmp_path):
    save_orbax(tmp_path / "x", {"a": np.zeros(2, np.int8)})
    with pytest.raises(CheckpointError, match=r"a: saved int8\(2,\), wanted float32\(2,\)"):
        load_orbax(tmp_path / "x", {"a": jax.ShapeDtypeStruct((2,), np.float32)})


def test_bad_folders(tmp_path):
    tree = {"a": np.zeros(2, np.float32)}
    abstract = {"a": jax.ShapeDtypeStruct((2,), np.float32)}
    with pytest.raises(CheckpointError, match="not an Orbax checkpoint"):
        load_orbax(tmp_path / "none", abstract)
    with pytest.raises(CheckpointError, match="not an Orbax checkpoint"):
        load_orbax(tmp_path, abstract)
    save_orbax(tmp_path / "x", tree)
    with pytest.raises(CheckpointError, match="already exists"):
        save_orbax(tmp_path / "x", tree)
    (tmp_path / "x" / "_METADATA").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        load_orbax(tmp_path / "x", abstract)


def test_it_says_nothing_and_others_do(tmp_path, caplog):
    save_orbax(tmp_path / "before", {"a": np.zeros(2, np.float32)})
    with caplog.at_level(logging.INFO, logger="absl"):
        save_orbax(tmp_path / "x", {"a": np.zeros(2, np.float32)})
        absl_logging.info("ours")
    with caplog.at_level(logging.INFO, logger="asyncio"):
        logging.getLogger("asyncio").error("Task exception was never retrieved: .../orbax/checkpoint/handler.py")
        logging.getLogger("asyncio").error("another task's")
    assert caplog.messages == ["ours", "another task's"]


def test_coroutines_of_others_are_reported(monkeypatch):
    """The hook drops what Orbax' coroutines end with, and passes all else on."""
    reported = []
    monkeypatch.setattr(sys, "unraisablehook", reported.append)
    for logger in (absl_logging.get_absl_logger(), logging.getLogger("asyncio")):
        monkeypatch.setattr(logger, "filters", [*logger.filters])
    orbax.__wrapped__()  # anew, on top of that hook

    class Report:
        object = None
        exc_value: Exception = ValueError("a bug")

    class Closed(Report):
        exc_value = RuntimeError("Event loop is closed")

    for report in (Report, Closed):
        sys.unraisablehook(report)
    assert reported == [Report]
