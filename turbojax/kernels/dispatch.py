"""What the device can run."""

import jax

Capability = tuple[int, int]
KERNELS_FROM: Capability = (8, 0)  # Ampere: bfloat16 and int8 tensor cores, asynchronous copies


def compute_capability() -> Capability | None:
    """(9, 0) for Hopper and so on; None without an NVIDIA GPU."""
    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", None)
    if device.platform != "gpu" or not isinstance(capability, str):
        return None
    major, minor = capability.split(".")
    return int(major), int(minor)


def has_kernels(capability: Capability | None) -> bool:
    """Whether the project's kernels and cuDNN's attention run there; else XLA computes everything."""
    return capability is not None and capability >= KERNELS_FROM


def slow_gpu(capability: Capability | None) -> str | None:
    """What to tell of a GPU without kernels, such as a T4 (7.5); None for others and without one."""
    if capability is None or has_kernels(capability):
        return None
    has, needed = (".".join(map(str, c)) for c in (capability, KERNELS_FROM))
    return (
        f"The GPU has compute capability {has}: bfloat16 tensor cores and turbojax's kernels begin at {needed}, "
        "so XLA computes everything, with the same results and more slowly"
    )
