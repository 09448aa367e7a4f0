"""Which implementation every op takes by itself on each generation of GPUs; here none is there."""

import jax
import jax.numpy as jnp
import pytest

from turbojax.kernels import attention, dispatch, int8, norms, sage, sla
from turbojax.kernels.dispatch import has_kernels, slow_gpu

GPUS = {  # int8 matmul, SLA, SageSLA, rotary norm, dense attention
    None: ("reference", "reference", "reference", "reference", False),
    (7, 0): ("reference", "reference", "reference", "reference", False),
    (7, 5): ("reference", "reference", "reference", "reference", False),  # T4
    (8, 0): ("triton", "triton", "triton", "triton", True),
    (8, 9): ("triton", "triton", "triton", "triton", True),
    (9, 0): ("mosaic", "mosaic", "triton", "triton", True),
    (10, 0): ("triton", "triton", "triton", "triton", True),
    (12, 0): ("triton", "triton", "triton", "triton", True),
}


@pytest.mark.parametrize("capability", GPUS)
def test_choice_by_compute_capability(monkeypatch, capability):
    for module in (attention, int8, norms, sage, sla):
        monkeypatch.setattr(module, "compute_capability", lambda: capability)
    q = jax.ShapeDtypeStruct((1, 1024, 2, 128), jnp.bfloat16)
    x, table = jax.ShapeDtypeStruct((1, 1024, 256), jnp.bfloat16), (jax.ShapeDtypeStruct((1024, 64), jnp.float32),) * 2
    blocks = {"block_q": 128, "block_k": 64}
    chosen = (
        int8.choose(None, dtype=q.dtype, sizes=(1024, 512, 1536)),
        sla.choose(None, q, **blocks),
        sage.choose(None, q, **blocks, values="exact"),
        norms.choose(None, x, table),
        attention.cudnn_takes(q),
    )
    assert chosen == GPUS[capability]
    assert has_kernels(capability) == (chosen[0] != "reference")


def test_a_slow_gpu_is_told_of():
    assert slow_gpu((7, 5)).startswith("The GPU has compute capability 7.5: ")
    assert [slow_gpu(capability) for capability in GPUS if capability is None or has_kernels(capability)] == [None] * 6


def test_compute_capability(monkeypatch):
    class Device:
        platform, compute_capability = "gpu", "12.0"

    assert dispatch.compute_capability() is None  # on a CPU
    monkeypatch.setattr(jax, "devices", lambda: [Device])
    assert dispatch.compute_capability() == (12, 0)
    Device.compute_capability = "gfx90a"
    Device.platform = "cpu"
    assert dispatch.compute_capability() is None
