"""What the device can run."""

import jax


def compute_capability() -> tuple[int, int] | None:
    """(9, 0) for Hopper and so on; None without an NVIDIA GPU."""
    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", None)
    if device.platform != "gpu" or not isinstance(capability, str):
        return None
    major, minor = capability.split(".")
    return int(major), int(minor)
