"""Quantization of one layer's weight and input: pure functions, and the steps of a recipe."""

from jaxcomp.quantization import lora
from jaxcomp.quantization.activation import (
    dequantize_input,
    quantize_input,
    quantized_matmul,
    static_scales,
)
from jaxcomp.quantization.awq import AWQ, awq
from jaxcomp.quantization.binary import Binary, binary, binary_codes, binary_values
from jaxcomp.quantization.common import relative_error
from jaxcomp.quantization.gptq import GPTQ, gptq
from jaxcomp.quantization.llm_int8 import LLMInt8, llm_int8, llm_int8_matmul
from jaxcomp.quantization.lsq import lsq, lsq_input
from jaxcomp.quantization.pact import pact
from jaxcomp.quantization.rtn import RTN, rtn
from jaxcomp.quantization.smoothquant import SmoothQuant, smoothquant_scales
from jaxcomp.quantization.ste import fake_quantize, fake_quantize_input, straight_through
from jaxcomp.quantization.ternary import Ternary, ternary, ternary_codes, ternary_values
from jaxcomp.quantization.trainable import FakeQuant, FakeQuantValues, weight_quantizer

__all__ = [
    "AWQ",
    "GPTQ",
    "RTN",
    "Binary",
    "FakeQuant",
    "FakeQuantValues",
    "LLMInt8",
    "SmoothQuant",
    "Ternary",
    "awq",
    "binary",
    "binary_codes",
    "binary_values",
    "dequantize_input",
    "fake_quantize",
    "fake_quantize_input",
    "gptq",
    "llm_int8",
    "llm_int8_matmul",
    "lora",
    "lsq",
    "lsq_input",
    "pact",
    "quantize_input",
    "quantized_matmul",
    "relative_error",
    "rtn",
    "smoothquant_scales",
    "static_scales",
    "straight_through",
    "ternary",
    "ternary_codes",
    "ternary_values",
    "weight_quantizer",
]
