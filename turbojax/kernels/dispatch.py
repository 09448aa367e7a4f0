"""Capabilities of the device, and the choice of an op's implementation."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from turbojax.errors import UserError
from turbojax.kernels import triton_call

Capability = tuple[int, int]
Shaped = jax.Array | jax.ShapeDtypeStruct  # choices look at shapes and dtypes alone
KERNELS_FROM: Capability = (8, 0)  # Ampere: bfloat16 and int8 tensor cores, asynchronous copies


def compute_capability() -> Capability | None:
    """Returns (9, 0) for Hopper and so on; None without an NVIDIA GPU."""
    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", None)
    if device.platform != "gpu" or not isinstance(capability, str):
        return None
    major, minor = capability.split(".")
    return int(major), int(minor)


def has_kernels(capability: Capability | None) -> bool:
    """Returns True if the project's kernels and cuDNN's attention run there; else XLA computes everything."""
    return capability is not None and capability >= KERNELS_FROM


def choose(op: str, implementation: str | None, kernels: Mapping[str, str | None]) -> Any:
    """Returns the implementation that runs: the named one, or for None the first kernel that can, or else "reference".

    op: what errors call it. kernels: fastest first; each with what it requires where it cannot run, None where it can.
    Raises UserError for a name that is unknown, and where what is named cannot run.
    """
    if implementation not in (None, *kernels, "reference"):
        known = ", ".join((*kernels, "reference"))
        raise UserError(f"{implementation=} of {op} is unknown; choose {known} or None")
    for name, takes in kernels.items():
        if implementation == name and takes:
            raise UserError(f"{implementation=} of {op} takes {takes}; None chooses another")
        if implementation in (None, name) and not takes:
            return name
    return "reference"


def no_kernels() -> str | None:
    """Names the device to take instead of this one, see `choose`; None where kernels run."""
    return None if has_kernels(compute_capability()) else "an NVIDIA GPU of compute capability 8.0 or later"


def triton_unsupported(dtype: Any) -> str | None:
    """Names what our Triton kernels require instead of a dtype or device, see `choose`; None where they run."""
    if triton_call.override is None and (takes := no_kernels()):
        return takes
    return None if dtype == jnp.bfloat16 else f"bfloat16, not {jnp.dtype(dtype)}"


def slow_gpu(capability: Capability | None) -> str | None:
    """Warning about a GPU without kernels, such as a T4 (7.5); None for others and without one."""
    if capability is None or has_kernels(capability):
        return None
    has, needed = (".".join(map(str, c)) for c in (capability, KERNELS_FROM))
    return (
        f"The GPU has compute capability {has}: bfloat16 tensor cores and turbojax's kernels begin at {needed}, "
        "so XLA computes everything, with the same results and more slowly"
    )
