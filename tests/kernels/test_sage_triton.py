"""The Triton kernels of SageSLA without a GPU: run in the interpreter, and compiled ahead of time."""

import jax.numpy as jnp
import pytest

pytest.importorskip("triton")

from tests.kernels.ahead_of_time import BF16, CAPABILITIES, F32, INT8, INT32, SHARED_MEMORY, usage
from tests.kernels.interpreter_process import run_in_the_interpreter
from turbojax.errors import UserError
from turbojax.kernels import dispatch, sage, sla
from turbojax.kernels.sage import triton_forward, triton_quantize
from turbojax.kernels.sage.triton_forward import Tiles

E4M3 = "*fp8e4nv"
SHAPE = {"L": 75600, "N": 40}  # the last blocks are partial
FORWARD = {"q_code": INT8, "q_scale": F32, "k_code": INT8, "k_scale": F32, "v_scale": F32, "table": INT32} | {
    "q": BF16,
    "projected": BF16,
    "normalizer": F32,
    "bias": F32,
    "out": BF16,
}
QUANTIZE = {"x": BF16, "mean": F32, "code": INT8, "scale": F32, "means": F32}
QUANTIZERS = {
    "quantize_q": (triton_quantize.quantize_rows_kernel, QUANTIZE, {"BLOCK": 64, "CENTRED": False, "MEANS": True}),
    "quantize_k": (triton_quantize.quantize_rows_kernel, QUANTIZE, {"BLOCK": 128, "CENTRED": True, "MEANS": False}),
    "channel_amax": (triton_quantize.channel_amax_kernel, {"v": BF16, "amax": F32}, {"CHUNK": 1024, "ROWS": 64}),
    "quantize_v": (
        triton_quantize.quantize_values_kernel,
        {"v": BF16, "amax": F32, "code": E4M3},
        {"ROWS": 128, "LARGEST": 2.25},
    ),
}


def test_kernels_in_the_interpreter(pytestconfig):
    run_in_the_interpreter("interpreted_sage.py", pytestconfig)


def check(kernel, pointers, constants, capability: int, tiles: Tiles):
    """No spilled registers, and no more shared memory than a block may have."""
    used = usage(kernel, pointers, constants, warps=tiles.warps, stages=tiles.stages, capability=capability)
    assert used.stack == 0
    assert used.shared <= SHARED_MEMORY[capability] * 1024


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(("block_q", "block_k"), sla.api.BLOCKS)
@pytest.mark.parametrize(("values", "dim"), [("float8", 128), ("exact", 128), ("float8", 64)])
def test_forward_compiles_within_limits(values, dim, block_q, block_k, capability):
    if values == "float8" and capability < 89:
        pytest.skip("no float8 there")
    constants = {"H": dim, "COUNT": 59, "BLOCK_Q": block_q, "BLOCK_K": block_k, "VALUES": values, "SCALE": 0.1275}
    pointers = FORWARD | {"v": E4M3 if values == "float8" else BF16}
    tiles = triton_forward.forward_tiles(divmod(capability, 10), block_q=block_q, block_k=block_k, values=values)
    check(triton_forward.sage_forward_kernel, pointers, SHAPE | constants, capability, tiles)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", QUANTIZERS)
def test_quantizer_compiles_within_limits(name, capability):
    kernel, pointers, constants = QUANTIZERS[name]
    if E4M3 in pointers.values() and capability < 89:
        pytest.skip("no float8 there")
    warps = constants.get("BLOCK", 64) // 8
    check(kernel, pointers, SHAPE | {"H": 128} | constants, capability, Tiles(warps, 1))


def choose(
    capability, monkeypatch, implementation=None, *, dtype=jnp.bfloat16, dim=128, blocks=(64, 128), values="float8"
):
    monkeypatch.setattr(dispatch, "compute_capability", lambda: capability)
    q = jnp.zeros((1, 8, 1, dim), dtype)
    return sage.api.choose(implementation, q, block_q=blocks[0], block_k=blocks[1], values=values)


def test_none_takes_the_kernels_where_they_run(monkeypatch):
    assert choose((9, 0), monkeypatch) == "triton"
    assert choose((8, 0), monkeypatch, values="exact") == "triton"
    assert choose((8, 9), monkeypatch, values="float8_values") == "triton"
    assert choose(None, monkeypatch) == "reference"
    assert choose((7, 5), monkeypatch) == "reference"
    assert choose((9, 0), monkeypatch, dtype=jnp.float32) == "reference"
    assert choose((8, 0), monkeypatch, "reference") == "reference"


@pytest.mark.parametrize(
    ("capability", "options", "message"),
    [
        (None, {"implementation": "triton"}, "takes an NVIDIA GPU"),
        ((9, 0), {"implementation": "triton", "dtype": jnp.float32}, "takes bfloat16, not float32"),
        ((9, 0), {"implementation": "triton", "blocks": (32, 64)}, r"not \(32, 64\)"),
        ((9, 0), {"implementation": "cuda"}, "choose triton, reference or None"),
        ((8, 6), {"implementation": "triton"}, 'needs compute capability 8.9, not 8.6; set sage_values="exact"'),
        ((8, 0), {}, 'needs compute capability 8.9, not 8.0; set sage_values="exact"'),
        ((8, 6), {"values": "float8_values"}, '^sage_values="float8_values" needs compute capability 8.9, not 8.6; '),
    ],
)
def test_what_cannot_run_raises(capability, options, message, monkeypatch):
    with pytest.raises(UserError, match=message):
        choose(capability, monkeypatch, **options)
