"""The Triton kernels of sparse-linear attention without a GPU: in the interpreter, and compiled ahead of time."""

import pytest

pytest.importorskip("triton")

from tests.kernels.ahead_of_time import BF16, CAPABILITIES, F32, INT32, SHARED_MEMORY, usage
from tests.kernels.interpreter_process import run_in_the_interpreter
from turbojax.kernels import sla
from turbojax.kernels.sla import triton_backward, triton_forward, triton_linear, triton_summary

SHAPE = {"L": 75600, "N": 40}  # with a partial block at the end
FORWARD = dict.fromkeys(("q", "k", "v", "projected", "out", "sparse"), BF16) | {"table": INT32}
FORWARD |= dict.fromkeys(("normalizer", "bias", "bounds", "lse"), F32)
BACKWARD = dict.fromkeys(("q", "k", "v", "sparse", "d_out", "linear", "linear_k", "linear_v"), BF16)
BACKWARD |= dict.fromkeys(("dq", "dk", "dv", "projected", "d_state"), BF16)
BACKWARD |= dict.fromkeys(("normalizer", "d_projected", "d_normalizer", "d_bias"), F32)
BACKWARD |= dict.fromkeys(("table", "queries", "begins"), INT32) | dict.fromkeys(("lse", "delta"), F32)
SUMMARY = {"k": BF16, "v": BF16, "means": F32, "states": F32, "normalizers": F32, "norms": F32}


def test_kernels_in_the_interpreter(pytestconfig):
    run_in_the_interpreter("interpreted_sla.py", pytestconfig)


def assert_within_limits(kernel, pointers, constants, *, warps: int, stages: int, capability: int, spilled: int = 0):
    """At most `spilled` bytes of registers on the stack, and no more shared memory than a block may have."""
    used = usage(kernel, pointers, constants, warps=warps, stages=stages, capability=capability)
    assert used.shared <= SHARED_MEMORY[capability] * 1024
    assert used.stack <= spilled


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(
    ("block_q", "block_k", "dim", "residuals"),
    [
        *((*blocks, dim, False) for blocks in sla.api.BLOCKS for dim in (64, 128)),
        (128, 64, 128, True),
        (64, 64, 128, True),
    ],
)
def test_sparse_forward_compiles_within_limits(block_q, block_k, dim, residuals, capability):
    tiles = triton_forward.tiles(divmod(capability, 10), block_q=block_q, block_k=block_k, dim=dim)
    blocks = {"BLOCK_Q": block_q, "BLOCK_K": block_k, "KEYS": tiles.step, "COUNT": 59}
    constants = SHAPE | blocks | {"H": dim, "SCALE": 0.1275, "RESIDUALS": residuals, "DEFERRED_PV": tiles.deferred_pv}
    settings = {"warps": tiles.warps, "stages": tiles.stages, "capability": capability}
    assert_within_limits(triton_forward.sparse_forward_kernel, FORWARD, constants, **settings)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(("block_q", "block_k", "dim"), [(128, 64, 64), (128, 64, 128), (64, 64, 128)])
def test_sparse_backward_compiles_within_limits(block_q, block_k, dim, capability):
    tiles = triton_backward.tiles(divmod(capability, 10), block_q=block_q, block_k=block_k, dim=dim)
    shared = SHAPE | {"H": dim, "BLOCK_Q": block_q, "BLOCK_K": block_k, "SCALE": 0.1275}
    constants = {"KEYS": tiles[0].step, "COUNT": 59}, {"ROWS": tiles[1].step, "ENTRIES": 59 * 591}
    kernels = triton_backward.query_gradient_kernel, triton_backward.key_gradients_kernel
    for kernel, tile, own in zip(kernels, tiles, constants, strict=True):
        pointers = {name: type for name, type in BACKWARD.items() if name in kernel.arg_names}
        settings = {"warps": tile.warps, "stages": tile.stages, "capability": capability, "spilled": 32}
        assert_within_limits(kernel, pointers, shared | own, **settings)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dim", [64, 128])
def test_small_kernels_compile_within_limits(dim, capability):
    shape = SHAPE | {"H": dim}
    for norms in (False, True):
        summary = shape | {"ROWS": triton_summary.KEY_ROWS, "GROUPS": 182, "SPLITS": 13, "NORMS": norms}
        assert_within_limits(
            triton_summary.key_summary_kernel, SUMMARY, summary, warps=8, stages=3, capability=capability
        )
    means, block = {"x": BF16, "means": F32, "norms": F32}, shape | {"BLOCK": 128}
    assert_within_limits(triton_summary.block_means_kernel, means, block, warps=4, stages=1, capability=capability)
    choose = {"BLOCKS": 4000, "COUNT": 400, "WIDTH": 4096}
    scores = {"scores": F32, "table": INT32}
    assert_within_limits(triton_summary.choose_blocks_kernel, scores, choose, warps=2, stages=1, capability=capability)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dim", [64, 128])
def test_linear_backward_compiles_within_limits(dim, capability):
    for name in ("linear_queries_kernel", "linear_state_kernel", "linear_keys_kernel"):
        kernel = getattr(triton_linear, name)
        pointers = {name: type for name, type in BACKWARD.items() if name in kernel.arg_names}
        constants = SHAPE | {"H": dim, "ROWS": triton_linear.ROWS, "GROUPS": 91, "SPLITS": 13}
        constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
        assert_within_limits(kernel, pointers, constants, warps=8, stages=2, capability=capability, spilled=32)
