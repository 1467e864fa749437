"""The form of a quantized weight that the TPU kernels read, made once from the stored one."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxcomp.kernels.quantized_matmul.weights import Weight

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

    The bytes of int8, int4, fp8 and codebook weights stay what they are.

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
    return dataclasses.replace(weight, codes=codes, layout=LAYOUT)


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


def check_layout(weight: Weight) -> None:
    """Refuses a weight that another version prepared, or whose arrays were changed since.

    Raises:
      ValueError: naming both layouts or both shapes.
    """
    if weight.layout != LAYOUT:
        raise ValueError(
            f"the weight {weight.shape} was prepared in layout {weight.layout!r}, and these "
            f"kernels read {LAYOUT!r}; prepare it again from its stored codes"
        )
    n, k = weight.shape
    codes = (*weight.stack, n, k // 4 if weight.format == "int2" else k)
    if weight.layer is not None:
        codes = (*weight.codes.shape[:1], *codes)
    scales = (*weight.stack, k // weight.group_size, n)
    for name, array, expected in (
        ("codes", weight.codes, codes),
        ("scales", weight.scales, scales),
        ("zeros", weight.zeros, scales),
    ):
        if array is not None and array.shape != expected:
            raise ValueError(
                f"{name} {array.shape} of a prepared {weight.format} weight (N, K) = "
                f"{weight.shape} must be {expected}; prepare it again from its stored codes"
            )
