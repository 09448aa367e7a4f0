"""The Triton kernels without a GPU: run in the interpreter, and compiled ahead of time for each generation."""

import pytest

pytest.importorskip("triton")

from tests.kernels.ahead_of_time import BF16, CAPABILITIES, F32, INT8, SHARED_MEMORY, usage
from tests.kernels.interpreter_process import run_in_the_interpreter
from turbojax.kernels.int8 import triton_matmul, triton_quantize

MATMUL = {"x": INT8, "x_scale": F32, "w": INT8, "w_scale": F32, "bias": BF16, "residual": BF16, "gate": F32}
MATMUL |= {"y": BF16, "y_scale": F32}
SHAPE = {"M": 75600, "N": 5120, "K": 5120}
BLOCK, CHANNEL, WEIGHTS = triton_matmul.BLOCK_TILES, triton_matmul.CHANNEL_TILES, triton_matmul.DEQUANTIZING_TILES


def tile_constants(tiles: triton_matmul.Tiles) -> dict[str, int]:
    return {"TILE_M": tiles.rows, "TILE_N": tiles.columns, "BAND": tiles.band}


def matmul(scheme: str, tiles, *, group=128, gelu=False, requantize=False, samples=0):
    constants = {"SCHEME": scheme, "GROUP": group, "HAS_BIAS": True, "GELU": gelu, "REQUANTIZE": requantize}
    constants |= {"RESIDUAL": samples > 0, "BATCH": max(1, samples)}
    pointers = MATMUL | ({"y": INT8} if requantize else {})
    return triton_matmul.int8_matmul_kernel, pointers, SHAPE | constants | tile_constants(tiles), tiles


KERNELS = {
    "block128": matmul("block128", BLOCK),
    "block128_rows": matmul("block128", BLOCK, group=1),
    "block128_gelu": matmul("block128", BLOCK, gelu=True),
    "block128_requantize": matmul("block128", BLOCK, gelu=True, requantize=True),
    "block128_residual": matmul("block128", BLOCK, samples=1),
    "block128_residual_of_two": matmul("block128", BLOCK, samples=2),
    "channel": matmul("channel", CHANNEL),
    "channel_residual": matmul("channel", CHANNEL, samples=1),
    "dequantizing": (
        triton_matmul.dequantizing_matmul_kernel,
        {"x": BF16, "w": INT8, "w_scale": F32, "bias": BF16, "y": BF16},
        SHAPE | {"SCHEME": "block128", "HAS_BIAS": True, "GELU": False} | tile_constants(WEIGHTS),
        WEIGHTS,
    ),
    "quantize_blocks": (
        triton_quantize.quantize_blocks_kernel,
        {"x": BF16, "q": INT8, "scale": F32},
        {"M": 75600, "K": 5120, "GROUP": 128},
        triton_matmul.Tiles(128, 128, 16, 1),
    ),
    "norm_quantize": (
        triton_quantize.norm_quantize_kernel,
        {"x": BF16, "statistics": F32, "gain": F32, "shift": F32, "q": INT8, "q_scale": F32},
        {"M": 75600, "L": 75600, "D": 5120, "GROUP": 128},
        triton_matmul.Tiles(128, 128, 16, 1),
    ),
}


def test_kernels_in_the_interpreter(pytestconfig):
    run_in_the_interpreter("interpreted_int8.py", pytestconfig)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", KERNELS)
def test_kernel_compiles_within_limits(name, capability):
    """No spilled registers, and no more shared memory than a block may have."""
    kernel, pointers, constants, tiles = KERNELS[name]
    spilled = 72 if (name, capability) == ("channel_residual", 90) else 0  # in the epilogue; Hopper has its own kernel
    used = usage(kernel, pointers, constants, warps=tiles.warps, stages=tiles.stages, capability=capability)
    assert used.shared <= SHARED_MEMORY[capability] * 1024
    assert used.stack <= spilled
