"""The rotary norm: its choice of implementation, its kernel in the interpreter and compiled ahead of time.

What it computes: tests/parity/norms.py.
"""

import jax.numpy as jnp
import pytest

pytest.importorskip("triton")

from tests.kernels.ahead_of_time import BF16, CAPABILITIES, F32, usage
from tests.kernels.interpreter_process import run_in_the_interpreter
from turbojax.errors import UserError
from turbojax.kernels import dispatch, norms, norms_triton
from turbojax.kernels.sizes import next_power_of_2


def test_kernel_in_the_interpreter(pytestconfig):
    run_in_the_interpreter("interpreted_norms.py", pytestconfig)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(("width", "head_dim"), [(5120, 128), (1536, 128), (256, 64)])
def test_kernel_compiles_within_limits(width, head_dim, capability):
    """No spilled registers, and no shared memory beyond that of one sum: pairs are split and joined within threads."""
    pointers = {"x": BF16, "weight": F32, "cos": F32, "sin": F32, "y": BF16}
    constants = {"L": 75600, "D": width, "H": head_dim, "EPS": 1e-6, "WIDTH": next_power_of_2(width)}
    warps = norms_triton.warps(width)
    used = usage(norms_triton.rms_norm_rotate_kernel, pointers, constants, warps=warps, stages=1, capability=capability)
    assert used.stack == 0
    assert used.shared <= 4 * warps


@pytest.mark.parametrize(
    ("changes", "takes"),
    [
        ({}, "an NVIDIA GPU of compute capability 8.0 or later"),
        ({"capability": (7, 5)}, "an NVIDIA GPU of compute capability 8.0 or later"),
        ({"capability": (8, 0), "dtype": jnp.float32}, "bfloat16, not float32"),
        ({"capability": (8, 0), "head_dim": 32}, "a head dim of 64 or 128, not 32"),
        ({"capability": (8, 0)}, None),
    ],
)
def test_choice_of_implementation(monkeypatch, changes, takes):
    case = {"capability": None, "dtype": jnp.bfloat16, "head_dim": 128} | changes
    monkeypatch.setattr(dispatch, "compute_capability", lambda: case["capability"])
    sizes = case["dtype"], case["head_dim"]
    assert norms.choose(None, *sizes) == ("reference" if takes else "triton")
    if takes:
        with pytest.raises(UserError, match=takes):
            norms.choose("triton", *sizes)
