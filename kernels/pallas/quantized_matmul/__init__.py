"""Products with quantized weights that stay packed in memory."""

from jaxcomp.kernels.quantized_matmul.api import prepare, quantized_matmul
from jaxcomp.kernels.quantized_matmul.grouped import grouped_quantized_matmul
from jaxcomp.kernels.quantized_matmul.weights import NF4, Weight, layer_of

__all__ = [
    "NF4",
    "Weight",
    "grouped_quantized_matmul",
    "layer_of",
    "prepare",
    "quantized_matmul",
]
