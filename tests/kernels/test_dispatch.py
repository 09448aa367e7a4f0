"""Which implementation every op takes by itself on each generation of GPUs; here none is there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from turbojax.errors import UserError
from turbojax.kernels import attention, dispatch, int8, norms, sage, sla
from turbojax.kernels.dispatch import has_kernels, slow_gpu

BF16, BLOCK128 = jnp.bfloat16, int8.QUANT_SCHEMES["block128"]

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
    monkeypatch.setattr(dispatch, "compute_capability", lambda: capability)
    q = jax.ShapeDtypeStruct((1, 1024, 2, 128), jnp.bfloat16)
    blocks = {"block_q": 128, "block_k": 64}
    chosen = (
        int8.api.choose_matmul(None, q.dtype, BLOCK128, (1024, 512, 1536)),
        sla.api.choose(None, q, **blocks),
        sage.api.choose(None, q, **blocks, values="exact"),
        norms.choose(None, q.dtype, 128),
        attention.cudnn_unsupported(q) is None,
    )
    assert chosen == GPUS[capability]
    assert has_kernels(capability) == (chosen[0] != "reference")


KERNELS = {  # of every op that has implementations
    "dense": ["cudnn"],
    "sla": ["mosaic", "triton"],
    "sage": ["triton"],
    "rotary norm": ["triton"],
    "quantize": ["triton"],
    "norm_quantize": ["triton"],
    "matmul": ["mosaic", "triton"],
    "matmul_requantize": ["mosaic", "triton"],
    "dequantizing_matmul": ["triton"],
}


def run(op: str, name: str | None):
    """The result of an op by an implementation, on small arrays."""
    q, x = jnp.ones((1, 128, 1, 128), BF16), jnp.ones((1, 128, 128), BF16)
    row, table = jnp.ones((1, 1, 128)), (jnp.ones((128, 64)),) * 2
    sparse = (q, q, q, jnp.ones((128, 128)), jnp.ones(128))
    quantized = int8.Quantized(jnp.ones((128, 1024), jnp.int8), jnp.ones((1, 8)))
    weight = jnp.ones((128, 1024), jnp.int8), jnp.ones((1, 8)), None, BLOCK128
    small = jnp.ones((128, 128), jnp.int8), jnp.ones((1, 1)), None, int8.QUANT_SCHEMES["block128_weights"]
    calls = {
        "dense": lambda: attention.dot_product_attention(q, q, q, implementation=name),
        "sla": lambda: sla.sparse_linear_attention(*sparse, topk=1.0, implementation=name),
        "sage": lambda: sage.sage_sparse_linear_attention(*sparse, topk=1.0, implementation=name),
        "rotary norm": lambda: norms.rms_norm_rotate(x, row[0, 0], table, eps=1e-6, implementation=name),
        "quantize": lambda: int8.quantize(x, BLOCK128, implementation=name),
        "norm_quantize": lambda: int8.norm_quantize(x, row, row, BLOCK128, eps=1e-6, implementation=name),
        "matmul": lambda: int8.matmul(quantized, *weight, implementation=name),
        "matmul_requantize": lambda: int8.matmul_requantize(quantized, *weight, implementation=name),
        "dequantizing_matmul": lambda: int8.dequantizing_matmul(x, *small, implementation=name),
    }
    return calls[op]()


@pytest.mark.parametrize("op", KERNELS)
def test_a_named_implementation_runs_or_raises(op):
    jax.tree.map(np.testing.assert_array_equal, run(op, "reference"), run(op, None))  # no GPU here
    for name in KERNELS[op]:
        with pytest.raises(UserError, match=r"takes an NVIDIA GPU of compute capability 8\.0 or later; None chooses"):
            run(op, name)
    known = ", ".join([*KERNELS[op], "reference"])
    for name in {"cuda", "Reference", "", "mosaic", "triton", "cudnn"}.difference(KERNELS[op]):
        with pytest.raises(UserError, match=f"is unknown; choose {known} or None"):
            run(op, name)


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
