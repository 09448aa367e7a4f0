"""int8 linear layers; the equations are in `reference`."""

from turbojax.kernels.int8.api import dequantizing_matmul, matmul, matmul_requantize, norm_quantize, quantize
from turbojax.kernels.int8.reference import (
    BLOCK,
    QUANT_SCHEMES,
    QuantConfig,
    Quantized,
    Scheme,
    dequantize_weight,
    quant_scheme,
    quantize_blocks,
    quantize_weight,
    scheme_name,
)

__all__ = [
    "BLOCK",
    "QUANT_SCHEMES",
    "QuantConfig",
    "Quantized",
    "Scheme",
    "dequantize_weight",
    "dequantizing_matmul",
    "matmul",
    "matmul_requantize",
    "norm_quantize",
    "quant_scheme",
    "quantize",
    "quantize_blocks",
    "quantize_weight",
    "scheme_name",
]
