"""Quantization of one layer's weight and input: pure functions, and the steps of a recipe."""

from jaxcomp.quantization.activation import (
    dequantize_input,
    quantize_input,
    quantized_matmul,
    static_scales,
)
from jaxcomp.quantization.awq import AWQ, awq
from jaxcomp.quantization.common import relative_error
from jaxcomp.quantization.gptq import GPTQ, gptq
from jaxcomp.quantization.llm_int8 import LLMInt8, llm_int8, llm_int8_matmul
from jaxcomp.quantization.rtn import RTN, rtn
from jaxcomp.quantization.smoothquant import SmoothQuant, smoothquant_scales

__all__ = [
    "AWQ",
    "GPTQ",
    "RTN",
    "LLMInt8",
    "SmoothQuant",
    "awq",
    "dequantize_input",
    "gptq",
    "llm_int8",
    "llm_int8_matmul",
    "quantize_input",
    "quantized_matmul",
    "relative_error",
    "rtn",
    "smoothquant_scales",
    "static_scales",
]
