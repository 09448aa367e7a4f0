"""The table of one layer's kernels: its arithmetic, and a whole measurement of a small layer on the CPU."""

import jax.numpy as jnp
import pytest

from turbojax.bench import hlo, layer
from turbojax.models.wan import WanConfig


def test_layer():
    config = WanConfig(dim=256, ffn_dim=512, num_heads=2, num_layers=3, text_dim=64, text_len=32, dtype=jnp.float32)
    result = layer.measure_layer(config, (2, 8, 8), calls=1)
    milliseconds = [row["ms"] for row in result["kernels"]]
    assert milliseconds == sorted(milliseconds, reverse=True)
    assert sum(milliseconds) == pytest.approx(result["explained"] * result["ms"])
    assert result["explained"] > 0  # no more: the machine may have been busier for one of the two
    assert result["bytes"] > 4 * (8 * 256 * 256 + 2 * 256 * 512)  # more than the weights
    assert not result["unnamed_ms"]


BF16, INT8, F32, INT32 = "bf16", "s8", "f32", "s32"


@pytest.mark.parametrize(
    ("opcode", "source", "inputs", "output", "count", "rate"),
    [
        ("__cublas$lt$matmul", "", [(BF16, 75600, 5120), (BF16, 13824, 5120), (BF16, 13824)], (BF16, 75600, 13824),
         2 * 75600 * 5120 * 13824, layer.BFLOAT16),
        ("mosaic_gpu_v2", "body/int8_matmul/x", [(INT8, 75600, 5120), (F32, 592, 40), (INT8, 1, 5120, 5120)],
         (BF16, 75600, 5120), 2 * 75600 * 5120 * 5120, layer.INT8),
        ("__cudnn$fmhaSoftmax", "", [(BF16, 1, 75600, 40, 128), (BF16, 1, 512, 40, 128)], (BF16, 1, 40, 75600, 128),
         4 * 75600 * 512 * 40 * 128, layer.BFLOAT16),
        ("triton_kernel_call", "", [(BF16, 1, 75600, 40, 128), (INT32, 1, 40, 591, 118)], (BF16, 1, 75600, 40, 128),
         4 * 40 * 591 * 128 * 118 * 64 * 128, layer.BFLOAT16),
        ("fusion", "", [(BF16, 75600, 5120)], (BF16, 75600, 5120), 0, layer.BFLOAT16),
    ],
)  # fmt: skip
def test_operations(opcode, source, inputs, output, count, rate):
    """At the shapes of a 14B layer at 720p."""
    arrays = tuple(hlo.Array(dtype, tuple(sizes)) for dtype, *sizes in inputs)
    kernel = hlo.Kernel("k", opcode, source, arrays, (hlo.Array(output[0], output[1:]),))
    assert layer.operations(kernel, WanConfig.t2v_14b(attention_type="sla")) == (count, rate)
