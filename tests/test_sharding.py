"""Sharding: on 8 simulated devices, and on those of two processes; without a mesh nothing happens."""

import faulthandler
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.multidevice import two_processes
from turbojax import sharding
from turbojax.errors import UserError

ROOT = Path(__file__).parents[1]


def devices(count: int, **changes: str) -> dict[str, str]:
    """The environment of a process with so many."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags} | changes


def test_eight_devices():
    faulthandler.cancel_dump_traceback_later()  # the limit of one test's time is that of each of them
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/multidevice/eight_devices.py"],
        cwd=ROOT,
        env=devices(8, TRITON_INTERPRET="1"),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-3000:]


def test_two_processes():
    """They find each other by the environment, read half of the batch each, and agree with one device."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.multidevice.two_processes"],
            cwd=ROOT,
            env=devices(4, JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES="2", JAX_PROCESS_ID=str(i)),
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=500)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    results = [json.loads(output.splitlines()[-1]) for output in outputs]  # Gloo writes to stdout, too
    value, gradient = jax.value_and_grad(two_processes.loss)(
        {"weight": two_processes.weights()}, two_processes.samples()
    )
    for i, result in enumerate(results):
        assert result["share"] == [i, 2]
        assert result["held"] == [[2, 4, 8]] * 4 + [[1, 6, 8]] * 4
        np.testing.assert_allclose(result["loss"], value, rtol=1e-5)
        np.testing.assert_allclose(result["gradient"], gradient["weight"], rtol=1e-5, atol=1e-7)


def test_without_a_mesh():
    state = {"blocks": {"weight": np.ones((2, 4, 4), np.float32)}}
    assert sharding.state_shardings(state) is None
    assert sharding.as_sharded(state) is state
    assert sharding.batch_share() == (0, 1)
    np.testing.assert_array_equal(sharding.put_batch(two_processes.samples()), two_processes.samples())


def test_processes_that_cannot_be_joined(monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    sharding.initialize_distributed()  # one process on one host
    assert jax.process_count() == 1
    with pytest.raises(UserError, match=r"cannot be joined: .*coordinator='localhost:1'"):
        sharding.initialize_distributed("localhost:1", num_processes=2, process_id=0)  # after JAX has been used
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(UserError, match="JAX_NUM_PROCESSES=two in the environment must be a number"):
        sharding.initialize_distributed()
