"""Quantized weights as plain arrays: what codes mean, how they are stored, and what is checked.

A weight W (N, K), output by input, is stored as

- codes: uint8 ``(N, K * bits / 8)``, input axis minor, the lowest bits of a byte first (4 bits: the
  low nibble is the even input), integers in two's complement;
- scales and zeros: ``(K / group_size, N)``, output axis minor;

and means W[n, k] = scale * (value(code) - zero) with the scale and zero of (k // group_size, n).
Arrays may carry leading stack axes in front of these, the same ones for all.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jaxcomp.kernels import arguments

# The quantiles of QLoRA's NormalFloat, arXiv 2305.14314, appendix E.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@dataclasses.dataclass(frozen=True)
class Format:
    """What the codes of a weight are.

    Attributes:
      bits: width of a code.
      kind: "int" (two's complement), "float" (e4m3) or "codebook" (an index into 16 values).
    """

    bits: int
    kind: str


FORMATS = {
    "int8": Format(8, "int"),
    "int4": Format(4, "int"),
    "int2": Format(2, "int"),
    "fp8": Format(8, "float"),
    "codebook": Format(4, "codebook"),
}


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scales", "zeros", "table", "layer"],
    meta_fields=["format", "group_size", "shape", "layout"],
)
@dataclasses.dataclass(frozen=True)
class Weight:
    """A quantized weight and what its arrays mean.

    Attributes:
      codes: uint8 ``(*stack, N, K * bits / 8)``, or as ``layout`` says.
      scales: ``(*stack, K / group_size, N)``.
      zeros: like scales, or None.
      table: f32 ``(16,)`` of a codebook, or None.
      format: a key of ``FORMATS``.
      group_size: inputs that share a scale.
      shape: (N, K).
      layout: "stored", or the name and version of what ``prepare`` made.
      layer: int32, whose codes these are among those of several layers, which then have an axis in
        front of all others; or None. A kernel reads them where they lie, and no slice is made.
    """

    codes: jax.Array
    scales: jax.Array
    zeros: jax.Array | None
    table: jax.Array | None
    format: str
    group_size: int
    shape: tuple[int, int]
    layout: str = "stored"
    layer: jax.Array | None = None

    @property
    def stack(self) -> tuple[int, ...]:
        """Leading axes."""
        return self.scales.shape[:-2]

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zeros, of one layer."""
        count = math.prod(self.stack) * math.prod(self.shape)
        others = sum(a.size * a.dtype.itemsize for a in (self.scales, self.zeros) if a is not None)
        return count * FORMATS[self.format].bits // 8 + others

    def map(self, function) -> "Weight":
        """The weight with a function applied to each array but the shared table."""
        zeros = None if self.zeros is None else function(self.zeros)
        return dataclasses.replace(
            self, codes=function(self.codes), scales=function(self.scales), zeros=zeros
        )

    def sliced(self) -> "Weight":
        """The weight with the codes of its own layer only."""
        if self.layer is None:
            return self
        codes = jax.lax.dynamic_index_in_dim(self.codes, self.layer, 0, keepdims=False)
        return dataclasses.replace(self, codes=codes, layer=None)

    @property
    def scalars(self) -> tuple[jax.Array, ...]:
        """What a kernel must know before it loads codes: int32 ``(1,)`` of several layers."""
        if self.layer is None:
            return ()
        return (jnp.clip(self.layer, 0, self.codes.shape[0] - 1).reshape(1),)


def layer_of(weight: Weight, index: jax.Array | int) -> Weight:
    """One of the weights that lie along the first stack axis, whose codes stay where they are.

    Args:
      weight: stored or prepared, ``(layers, *stack, N, K)``.
      index: which layer, from 0; one that is known before it runs must exist.

    Returns:
      The weight ``(*stack, N, K)``. In a loop over layers a kernel for TPUs reads its codes from
      those of all layers, where a slice would first be copied; scales and zeros are sliced.

    Raises:
      TypeError: the index is no integer.
      ValueError: the weight has no stack axes, or no such layer.
    """
    if not weight.stack:
        raise ValueError(
            f"the weight (N, K) = {weight.shape} has no stack axes, and so no layers to choose from"
        )
    of = f"the weight's scales {weight.scales.shape} are of {weight.stack[0]} layers"
    index = arguments.index("index", index, weight.stack[0], of)
    each = weight.sliced().map(
        lambda array: jax.lax.dynamic_index_in_dim(array, index, 0, keepdims=False)
    )
    return dataclasses.replace(each, codes=weight.sliced().codes, layer=index)


def stored(
    codes: jax.Array,
    scales: jax.Array,
    zeros: jax.Array | None,
    table: jax.Array | None,
    format: str,
    group_size: int | None,
) -> Weight:
    """Checks stored arrays against one another.

    Args:
      codes: uint8 ``(*stack, N, K * bits / 8)``.
      scales: bf16 or f32 ``(*stack, K / group_size, N)``.
      zeros: like scales (integers too, which become floats), or None.
      table: ``(16,)`` for the format "codebook", None for NF4's.
      format: a key of ``FORMATS``.
      group_size: inputs that share a scale; None for one group a row.

    Returns:
      The weight.

    Raises:
      TypeError: codes or scales have the wrong dtype.
      ValueError: shapes do not belong together, or the format is unknown.
    """
    if format not in FORMATS:
        nf4 = " (NF4 is 'codebook', whose table it is)" if str(format).lower() == "nf4" else ""
        raise ValueError(f"format {format!r} is unknown; use one of {', '.join(FORMATS)}{nf4}")
    for name, array in (("codes", codes), ("scales", scales), ("zeros", zeros)):
        if array is not None:
            arguments.array(name, array)
    bits = FORMATS[format].bits
    if codes.dtype != jnp.uint8:
        array = "codes" if bits == 8 else f"codes.astype(int{bits}).reshape(.., {8 // bits})"
        raise TypeError(
            f"codes {codes.shape} are {codes.dtype}; they are stored as uint8 bytes of {format}, "
            f"{8 // bits} a byte: use jax.lax.bitcast_convert_type({array}, jnp.uint8)"
        )
    if codes.ndim < 2:
        raise ValueError(f"codes {codes.shape} must be (*stack, N, K * {bits} / 8)")
    size = codes.shape[-1] * 8 // bits
    if group_size is None:
        group_size = size
    group_size = arguments.integer("group_size", group_size, " or None")
    least = min(size, 1)  # Of no inputs a row has one group, of none.
    if group_size < least or (size and size % group_size):
        raise ValueError(
            f"codes {codes.shape} of {format} have K = {size} inputs, which group_size "
            f"{group_size} does not divide; use a divisor of {size}, or None for one group a row"
        )
    groups = size // group_size if group_size else 1
    expected = (*codes.shape[:-2], groups, codes.shape[-2])
    for name, array in (("scales", scales), ("zeros", zeros)):
        if array is not None and array.shape != expected:
            raise ValueError(
                f"{name} {array.shape} do not belong to codes {codes.shape} of {format} in groups "
                f"of {group_size}: they must be (*stack, K / group_size, N) = {expected}"
            )
    if scales.dtype not in (jnp.bfloat16, jnp.float32):
        raise TypeError(f"scales {scales.shape} are {scales.dtype}; use bfloat16 or float32")
    if zeros is not None and not jnp.issubdtype(zeros.dtype, jnp.floating):
        # Integers of eight bits are exact in bf16.
        narrow = jnp.iinfo(zeros.dtype).bits <= 8
        zeros = zeros.astype(jnp.bfloat16 if narrow else jnp.float32)
    if FORMATS[format].kind == "codebook":
        table = jnp.asarray(NF4 if table is None else table, jnp.float32)
        if table.shape != (16,):
            raise ValueError(f"table {table.shape} must hold the (16,) values of a codebook")
    elif table is not None:
        raise ValueError(
            f"table {jnp.shape(table)} is for the format 'codebook', not for {format!r}"
        )
    return Weight(codes, scales, zeros, table, format, group_size, (codes.shape[-2], size))


def unpack(codes: jax.Array, format: str) -> jax.Array:
    """Codes out of their bytes.

    Args:
      codes: uint8 ``(.., K * bits / 8)``.
      format: a key of ``FORMATS``.

    Returns:
      ``(.., K)``: int8 of integers, float8_e4m3fn, or uint8 indices of a codebook.

    Example:
      >>> import jax.numpy as jnp
      >>> unpack(jnp.array([0x2F], jnp.uint8), "int4").tolist()
      [-1, 2]
    """
    bits, kind = FORMATS[format].bits, FORMATS[format].kind
    if kind == "float":
        return jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn)
    if bits < 8:
        starts = range(0, 8, bits)
        # The code is moved to the top of its byte, then down again with or without its sign.
        tops = jnp.stack([codes << jnp.uint8(8 - bits - start) for start in starts], axis=-1)
        codes = tops.reshape(*codes.shape[:-1], math.prod(tops.shape[-2:]))
        if kind == "codebook":
            return codes >> jnp.uint8(8 - bits)
    signed = jax.lax.bitcast_convert_type(codes, jnp.int8)
    return signed if bits == 8 else signed >> jnp.int8(8 - bits)


def values(codes: jax.Array, weight: Weight) -> jax.Array:
    """Unpacked codes as what they stand for: f32 of a codebook, or themselves."""
    if FORMATS[weight.format].kind == "codebook":
        return weight.table[codes]
    return codes


def grouped(values: jax.Array, weight: Weight) -> jax.Array:
    """Splits the last axis K into (groups, group_size)."""
    return values.reshape(*values.shape[:-1], -1, weight.group_size)


def dequantize(weight: Weight) -> jax.Array:
    """The weight in full.

    Args:
      weight: in the stored layout.

    Returns:
      f32 ``(*stack, N, K)``.
    """
    each = grouped(values(unpack(weight.codes, weight.format), weight), weight).astype(jnp.float32)
    scales = jnp.swapaxes(weight.scales.astype(jnp.float32), -1, -2)[..., None]
    if weight.zeros is not None:
        each = each - jnp.swapaxes(weight.zeros.astype(jnp.float32), -1, -2)[..., None]
    each = each * scales
    return each.reshape(*each.shape[:-2], weight.shape[1])
