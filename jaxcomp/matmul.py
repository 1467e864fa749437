"""Products with compressed weights in plain JAX, part by part."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from jaxcomp import formats, packed
from jaxcomp.quantization.activation import (
    input_scales,
    quantize_input,
    quantized_matmul,
    rounded_input,
)
from jaxcomp.step import Activation


def wrappers(part: Any) -> tuple[list[Any], Any]:
    """The input transforms around a part, outermost first, and the part itself."""
    around = []
    while isinstance(part, (formats.InputScale, formats.InputQuant)):
        around.append(part)
        part = part.part
    return around, part


def quantizers(leaf: formats.CompressedArray) -> list[Any]:
    """The input quantizations of all parts."""
    return [w for p in leaf.parts for w in wrappers(p)[0] if isinstance(w, formats.InputQuant)]


def activation(part: Any) -> Activation | None:
    """How a part's input is quantized, or None."""
    found = [w.spec for w in wrappers(part)[0] if isinstance(w, formats.InputQuant)]
    return found[-1] if found else None


def integer(part: Any) -> bool:
    """Whether a part holds integers that an int8 matmul can take."""
    return isinstance(part, formats.Affine) and part.bits <= 8 and part.group_index is None


def float8(part: Any) -> bool:
    """Whether a part holds float8 values."""
    return isinstance(part, formats.FloatPart) and part.kind in ("e4m3", "e5m2")


def matmul(
    x: jax.Array,
    weight: formats.CompressedArray,
    implementation: str = "parts",
    split: NamedSharding | None = None,
    out_dtype: jax.typing.DTypeLike = jnp.float32,
) -> jax.Array:
    """Product of an input with a compressed weight, part by part.

    Args:
      x: ``(*stack, tokens, in)``.
      weight: with matrices ``(*stack, out, in)``.
      implementation: "int8" or "fp8" multiply codes where a part has them, "kernel" reads packed
        parts where a kernel does; "parts" simulates.
      split: mesh axes of the weight's stack, out and in, for kernels on a mesh of Auto axes.
      out_dtype: what the caller rounds to: a kernel may do so for a weight of one part.

    Returns:
      ``(*stack, tokens, out)`` in float32 (float64 for float64 inputs), or ``out_dtype``.
    """
    if x.dtype not in (jnp.bfloat16, jnp.float64) or implementation != "kernel":
        x = x.astype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)
    total = None
    out_dtype = out_dtype if len(weight.parts) == 1 else jnp.float32
    for part in weight.parts:
        y = _part_matmul(x, part, implementation, split, out_dtype)
        total = y if total is None else total + y
    return total


def _part_matmul(
    x: jax.Array, part: Any, implementation: str, split: NamedSharding | None, out_dtype: Any
) -> jax.Array:
    if isinstance(part, formats.InputScale):
        if activation(part) is not None:  # A rounded product could be another code.
            x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        scaled = x * part.scale[..., None, :].astype(x.dtype)
        return _part_matmul(scaled, part.part, implementation, split, out_dtype)
    if isinstance(part, formats.InputQuant):
        return _quantized_part(x, part, implementation, split, out_dtype)
    if implementation == "kernel":
        if packed.problem(part) is None and x.dtype != jnp.float64:
            return packed.matmul(x, part, split, out_dtype=out_dtype)
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if isinstance(part, formats.LowRankPart):
        inner = jnp.matmul(x, jnp.swapaxes(part.b, -1, -2).astype(x.dtype))
        return jnp.matmul(inner, jnp.swapaxes(part.a, -1, -2).astype(x.dtype))
    if isinstance(part, formats.DenseColumns):
        columns = jnp.take_along_axis(
            x, part.indices[..., None, :].astype(jnp.int32), axis=-1, mode="clip"
        )
        return jnp.matmul(columns, jnp.swapaxes(part.values, -1, -2).astype(x.dtype))
    return jnp.matmul(x, jnp.swapaxes(part.materialize(x.dtype), -1, -2))


def _quantized_part(
    x: jax.Array,
    part: formats.InputQuant,
    implementation: str,
    split: NamedSharding | None,
    out_dtype: Any,
) -> jax.Array:
    scale, zero = part.scale, part.zero_point
    if scale is not None:
        scale = scale[..., None, None]
        zero = None if zero is None else zero[..., None, None]
    inner, spec = part.part, part.spec
    if implementation == "kernel":
        if packed.problem(inner, activation=spec) is None and x.dtype != jnp.float64:
            # The scale is that of the whole row, also where devices hold a part of it each.
            scale = input_scales(x, spec)[0] if scale is None else scale
            scale = scale.astype(jnp.float32)
            return packed.matmul(x, inner, split, spec, scale, out_dtype)
        implementation = "int8" if spec.format in ("int8", "int4") else "fp8"
    codable = (implementation == "int8" and integer(inner)) or (
        implementation == "fp8" and float8(inner)
    )
    if not codable:
        rounded = rounded_input(x, spec, scale, zero)
        return _part_matmul(rounded, inner, implementation, None, jnp.float32)
    codes, scale, zero = quantize_input(x, spec, scale, zero)
    stack = codes.shape[:-2]
    scale, zero = (
        None if a is None else jnp.broadcast_to(a, (*stack, *a.shape[-2:])) for a in (scale, zero)
    )
    if integer(inner):
        weight = (inner.codes(), inner.scale, inner.zero_point)
    else:
        weight = (inner.values, inner.effective_scale(), None)
    arguments = (codes, scale, zero, *weight)
    product = quantized_matmul
    for _ in stack:
        product = jax.vmap(product, in_axes=tuple(None if a is None else 0 for a in arguments))
    return product(*arguments)


def rows(part: Any, index: jax.Array | None) -> Any:
    """Some rows of a part of one matrix; for no index whether that is possible."""
    if isinstance(part, (formats.InputScale, formats.InputQuant)):
        inner = rows(part.part, index)
        return inner if index is None else part.replace(part=inner)
    if isinstance(part, formats.Dense):
        return True if index is None else part.replace(values=part.values[index])
    if isinstance(part, formats.Affine):
        able = part.group_index is None and part.out_group_size == 1
        if index is None or not able:
            return able
        zero = None if part.zero_point is None else part.zero_point[:, index]
        return part.replace(values=part.values[index], scale=part.scale[:, index], zero_point=zero)
    if isinstance(part, formats.FloatPart):
        able = part.out_group_size == 1
        if index is None or not able:
            return able
        return part.replace(values=part.values[index], scale=part.scale[:, index])
    return False
