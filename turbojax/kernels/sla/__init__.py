"""Sparse-linear attention; the equations are in `turbojax.kernels.sla.reference`."""

from turbojax.kernels.sla.api import Implementation, sparse_linear_attention
from turbojax.kernels.sla.reference import block_table, linear_branch, num_selected, sparse_softmax

__all__ = [
    "Implementation",
    "block_table",
    "linear_branch",
    "num_selected",
    "sparse_linear_attention",
    "sparse_softmax",
]
