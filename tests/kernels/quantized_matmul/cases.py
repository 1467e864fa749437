"""Random quantized weights and what float64 NumPy makes of them."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxcomp.kernels.quantized_matmul import NF4

BITS = {"int8": 8, "int4": 4, "int2": 2, "fp8": 8, "codebook": 4}
# Largest error of y over the largest |y|, by the dtype that the factors are rounded to.
TOLERANCE = {"float32": 2e-6, "bfloat16": 1e-2}


@dataclasses.dataclass
class Case:
    """Arguments of quantized_matmul, and the dense weight in float64."""

    codes: jax.Array
    scales: jax.Array
    zeros: jax.Array | None
    options: dict
    dense: np.ndarray

    def arguments(self) -> tuple:
        return self.codes, self.scales, self.zeros


def value_of(codes: np.ndarray, format: str, table: np.ndarray) -> np.ndarray:
    """float64 values of unsigned codes."""
    if format == "codebook":
        return table[codes]
    if format == "fp8":
        return codes.astype(np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    half = 1 << (BITS[format] - 1)
    return ((codes.astype(np.int64) + half) % (2 * half) - half).astype(np.float64)


def make(
    rng: np.random.Generator,
    format: str,
    shape: tuple[int, int],
    group_size: int,
    zeros: bool = False,
    scale_dtype: str = "float32",
    stack: tuple[int, ...] = (),
) -> Case:
    """A weight of random codes: all of them for 4 bits and fewer."""
    (n, k), bits = shape, BITS[format]
    codes = rng.integers(0, 1 << bits, (*stack, n, k))
    if format == "fp8":
        codes = np.where((codes & 0x7F) == 0x7F, 0, codes)  # not a number
    table = np.sort(rng.normal(size=16)).astype(np.float32) if rng.random() < 0.5 else None
    values = value_of(codes, format, np.array(NF4 if table is None else table, np.float64))
    per = 8 // bits
    weights = 1 << (bits * np.arange(per))
    packed = (codes.reshape(*stack, n, k // per, per) * weights).sum(-1).astype(np.uint8)
    scales = jnp.asarray(rng.uniform(0.5, 1.5, (*stack, k // group_size, n)), scale_dtype)
    points = jnp.asarray(rng.normal(size=scales.shape), scale_dtype) if zeros else None

    def spread(array):
        return np.repeat(np.swapaxes(np.asarray(array, np.float64), -1, -2), group_size, axis=-1)

    dense = (values - (spread(points) if zeros else 0.0)) * spread(scales)
    options = {"format": format, "group_size": group_size}
    if format == "codebook" and table is not None:
        options["table"] = jnp.asarray(table)
    return Case(jnp.asarray(packed), scales, points, options, dense)


def rows(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> jax.Array:
    """Rows of very different sizes, with outliers, as activations have them."""
    x = rng.normal(size=shape) * np.exp(rng.normal(size=(*shape[:-1], 1)))
    x[..., 3] *= 30.0
    return jnp.asarray(x, dtype)


def product(x: jax.Array, case: Case, bias=None, activation: str | None = None) -> np.ndarray:
    """The answer in float64."""
    x = np.asarray(x, np.float64)
    y = np.einsum("...mk,...nk->...mn", x, case.dense)
    if bias is not None:
        y = y + np.asarray(bias, np.float64)[..., None, :]
    return activate(y, activation)


def activate(z: np.ndarray, name: str | None) -> np.ndarray:
    if name == "relu":
        return np.maximum(z, 0.0)
    if name == "silu":
        return z / (1.0 + np.exp(-z))
    if name == "gelu":
        return 0.5 * z * (1.0 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))
    return z


def quantized_rows(x: jax.Array, dtype: str) -> np.ndarray:
    """Rows as their dynamic quantization represents them, in float64."""
    x = np.asarray(x, np.float32)
    top = np.float32(127.0 if dtype == "int8" else 448.0)
    largest = np.abs(x).max(-1, keepdims=True)
    scale = np.where(largest > 0, largest / top, np.float32(1.0))
    scaled = x / scale
    if dtype == "int8":
        return np.round(scaled).astype(np.float64) * scale
    return scaled.astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale


def assert_close(actual, expected: np.ndarray, dtype: str) -> None:
    """Each row within the tolerance of its own largest entry."""
    actual = np.asarray(actual, np.float64)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    size = np.abs(expected).max(-1, keepdims=True) + 1e-30
    worst = (np.abs(actual - expected) / size).max()
    assert worst <= TOLERANCE[dtype], f"error {worst:.2e}, tolerance {TOLERANCE[dtype]:.0e}"
