"""SageSLA, quantized sparse-linear attention; the equations are in `turbojax.kernels.sage.reference`."""

from turbojax.kernels.sage.api import sage_sparse_linear_attention
from turbojax.kernels.sage.reference import VALUES, Values

__all__ = ["VALUES", "Values", "sage_sparse_linear_attention"]
