"""The form of a quantized weight that the TPU kernels read, made once from the stored one."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxcomp.kernels import arguments
from jaxcomp.kernels.quantized_matmul.weights import FORMATS, Weight, grouped

LAYOUT = "mosaic_tpu/1"
GPU_LAYOUT = "mosaic_gpu/1"
# Dtypes of prepared codes: those that the chips load and convert by themselves. Codes of two bits
# share a byte in fours, each from another 128 of 512 inputs, so that unpacking moves nothing.
NATIVE = {
    "int8": "int8",
    "int4": "int4",
    "int2": "int8",
    "fp8": "float8_e4m3fn",
    "codebook": "int4",
}
LANES = 128


def prepare(weight: Weight) -> Weight:
    """Stored codes as arrays of a native dtype ``(*stack, N, K)``; int2 ``(*stack, N, K / 4)``.

    The bytes of int8, int4, fp8 and codebook weights stay what they are. A group in which a code of
    fp8 is not a number gets a scale that is not one: kernels need not tell such codes apart.

    Args:
      weight: in the stored layout.

    Returns:
      The weight in this layout.
    """
    native = jnp.dtype(NATIVE[weight.format])
    codes = weight.codes
    if weight.format == "int2":
        codes = _transpose_fields(codes, (4, LANES))
    if native == jnp.int4:
        # Of codes that are constants of a program, jaxlib 0.10 would fold this conversion, and take
        # every byte for one int4.
        codes = jax.lax.optimization_barrier(codes)
    codes = jax.lax.bitcast_convert_type(codes, native).reshape(*weight.stack, weight.shape[0], -1)
    scales = weight.scales
    if weight.format == "fp8":
        undefined = jnp.any(jnp.isnan(grouped(codes, weight)), axis=-1)
        scales = jnp.where(jnp.swapaxes(undefined, -1, -2), jnp.nan, scales)
    return dataclasses.replace(weight, codes=codes, scales=scales, layout=LAYOUT)


def restore(weight: Weight) -> Weight:
    """Inverse of ``prepare``; a stored weight is returned as it is."""
    if weight.layout == "stored":
        return weight
    n, k = weight.shape
    codes = weight.codes
    if codes.dtype == jnp.int4:
        codes = codes.reshape(*weight.stack, n, k // 2, 2)
    codes = jax.lax.bitcast_convert_type(codes, jnp.uint8)
    if weight.format == "int2":
        codes = _transpose_fields(codes, (LANES, 4))
    return dataclasses.replace(weight, codes=codes, layout="stored")


def _transpose_fields(codes: jax.Array, old: tuple[int, int]) -> jax.Array:
    """Moves the codes of 512 inputs, seen as ``old`` and transposed, among their 128 bytes."""
    shifts = jnp.arange(0, 8, 2, dtype=jnp.uint8).reshape((1,) * codes.ndim + (4,))
    fields = (codes[..., None] >> shifts) & jnp.uint8(3)
    fields = jnp.swapaxes(fields.reshape(*codes.shape[:-1], -1, *old), -1, -2)
    return jnp.sum(fields.reshape(*codes.shape, 4) << shifts, axis=-1, dtype=jnp.uint8)


def check(weight: Weight) -> None:
    """Refuses a weight that another version prepared, or whose arrays do not belong together.

    Args:
      weight: stored or prepared; arrays or tracers.

    Raises:
      TypeError: a dtype is wrong.
      ValueError: naming both layouts or both shapes.
    """
    if weight.layout not in ("stored", LAYOUT, GPU_LAYOUT):
        raise ValueError(
            f"the weight {weight.shape} was prepared in layout {weight.layout!r}, and these "
            f"kernels read {LAYOUT!r} and {GPU_LAYOUT!r}; prepare it again from its stored codes"
        )
    if weight.format not in FORMATS:
        raise ValueError(f"format {weight.format!r} of a weight is none of {', '.join(FORMATS)}")
    (n, k), group_size = weight.shape, weight.group_size
    group_size = arguments.integer("group_size", group_size)
    if group_size < min(k, 1) or (k and k % group_size):
        raise ValueError(f"group_size {group_size} of a weight does not divide K of {(n, k)}")
    groups = (*weight.stack, k // group_size if group_size else 1, n)
    layers = weight.codes.shape[:1] if weight.layer is not None else ()
    codes, dtype = _codes(weight)
    for name, array, expected in (
        ("codes", weight.codes, (*layers, *weight.stack, n, codes)),
        ("scales", weight.scales, groups),
        ("zeros", weight.zeros, groups),
    ):
        if array is not None and array.shape != expected:
            again = "" if weight.layout == "stored" else "; prepare it again from its stored codes"
            raise ValueError(
                f"{name} {array.shape} of a {weight.layout} {weight.format} weight (N, K) = "
                f"{weight.shape} in groups of {group_size} must be {expected}{again}"
                f"{arguments.in_parts('shape and group_size')}"
            )
    if weight.codes.dtype != dtype:
        raise TypeError(
            f"codes {weight.codes.shape} of a {weight.layout} {weight.format} weight are "
            f"{weight.codes.dtype}, and must be {dtype}"
        )
    if weight.scales.dtype not in (jnp.bfloat16, jnp.float32):
        raise TypeError(
            f"scales {weight.scales.shape} are {weight.scales.dtype}; use bfloat16 or float32"
        )
    table = None if weight.table is None else weight.table.shape
    if table != ((16,) if FORMATS[weight.format].kind == "codebook" else None):
        raise ValueError(f"table {table} of a {weight.format} weight: (16,) is a codebook's")


def _codes(weight: Weight) -> tuple[int, jax.typing.DTypeLike]:
    """Codes of an output as they lie in memory: how many, and their dtype."""
    k = weight.shape[1]
    if weight.layout == LAYOUT:
        return k // 4 if weight.format == "int2" else k, jnp.dtype(NATIVE[weight.format])
    return k * FORMATS[weight.format].bits // 8, jnp.dtype(jnp.uint8)
