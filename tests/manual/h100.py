"""An H100 that is not there, for which XLA compiles all the same."""

import jax
from jax.experimental import topologies

# What XLA says of an H100 SXM.
DESCRIPTION = """
gpu_device_info {
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048  core_count: 132  fpus_per_core: 128
  shared_memory_per_block: 49152  shared_memory_per_core: 233472  shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  memory_bandwidth: 3352320000000  l2_cache_size: 52428800  clock_rate_ghz: 1.98  device_memory_size: 84978434048
  cuda_compute_capability { major: 9  minor: 0  feature_extension: ACCELERATED_FEATURES }
}
platform_name: "CUDA"
dnn_version_info { major: 9  minor: 10 }
runtime_version { major: 13  minor: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def absent_h100() -> jax.Device:
    """Returns the device to compile for; needs jax with its CUDA plugin."""
    (device,) = topologies.get_topology_desc("", "cuda", target_config=DESCRIPTION, topology="1x1x1").devices
    return device
