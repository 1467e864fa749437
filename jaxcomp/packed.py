"""Compressed weights as operands of the kernels that read them packed."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding

from jaxcomp import formats, packed_sparse
from jaxcomp.formats import base
from jaxcomp.kernels import chips, tuning
from jaxcomp.kernels import quantized_matmul as kernels
from jaxcomp.kernels.chips import Chip
from jaxcomp.kernels.quantized_matmul import api, layout, reference, sharding, weights
from jaxcomp.step import Activation

_ACTIVATION_DTYPES = {"int8": "int8", "e4m3": "float8_e4m3fn"}


@base.part
class Prepared(base.Part):
    """A part as the kernels of a chip read it, for running and not for storing.

    Of the same size, but for zero points, which become bfloat16.

    Attributes:
      weight: from ``prepare`` of the kernels, without its table.
      table: ``(*stack, 16)`` values of a codebook, the same for a whole stack; or None.
    """

    weight: weights.Weight
    table: jax.Array | None = None

    @classmethod
    def of(cls, weight: weights.Weight, chip: Chip | None = None) -> "Prepared":
        """The part that holds a weight, stored so far, in the layout of a chip; TPUs' if None."""
        table = weight.table
        if table is not None:
            table = jnp.broadcast_to(table, (*weight.stack, *table.shape))
        if chip is not None and chip.platform == "gpu":
            from jaxcomp.kernels.quantized_matmul import gpu  # Pallas takes a while to import.

            ready = gpu.prepare(weight)
        else:
            ready = layout.prepare(weight)
        return cls(dataclasses.replace(ready, table=None), table)

    @property
    def whole(self) -> weights.Weight:
        """The weight with its table."""
        table = None if self.table is None else self.table.reshape(-1, self.table.shape[-1])[0]
        return dataclasses.replace(self.weight, table=table)

    @property
    def shape(self) -> tuple[int, ...]:
        """``(*stack, out, in)``."""
        return (*self.weight.stack, *self.weight.shape)

    def materialize(self, dtype: Any = jnp.float32) -> jax.Array:
        """The dense matrix ``(*stack, out, in)`` in ``dtype``."""
        return weights.dequantize(api.restored(self.whole)).astype(dtype)


def operand(part: Any) -> weights.Weight | str:
    """A part of a compressed weight as the kernels take it.

    Args:
      part: without input transforms.

    Returns:
      The packed weight, made of the part's own arrays; or why there is no kernel for it.
    """
    return _OPERANDS.get(type(part), _other)(part)


def prepared(part: Any, chip: Chip, activation: Activation | None = None) -> Any:
    """A part, also inside of input transforms, in the layout of a chip's kernels if it has one.

    Args:
      part: arrays.
      chip: from ``chip_of``.
      activation: how the part's input is quantized, or None.

    Returns:
      The part with a ``Prepared`` in its place, or as it is where no kernel reads it.
    """
    if isinstance(part, formats.InputScale):
        return part.replace(part=prepared(part.part, chip, activation))
    if isinstance(part, formats.InputQuant):
        return part.replace(part=prepared(part.part, chip, part.spec))
    if isinstance(part, packed_sparse.PARTS):
        return part if activation is not None else packed_sparse.prepared(part, chip)
    if problem(part, chip, activation=activation) is not None or isinstance(part, Prepared):
        return part
    if chip.platform == "gpu" and activation is not None:
        return part  # Its products of codes read the stored layout.
    return Prepared.of(operand(part), chip)


def _other(part: Any) -> str:
    return f"no kernel reads a {type(part).__name__}"


def _affine(part: formats.Affine) -> weights.Weight | str:
    if part.bits not in (2, 4, 8):
        return f"no kernel reads {part.bits} bits"
    if part.group_index is not None:
        return "its groups are scattered (activation order without static groups)"
    problem = _layout(part)
    if problem:
        return problem
    codes = part.values
    if part.bits == 8:
        codes = _bytes(codes)
    return _stored(codes, part.scale, part.zero_point, None, f"int{part.bits}", part.group_size)


def _float(part: formats.FloatPart) -> weights.Weight | str:
    if part.kind != "e4m3":
        return f"no kernel reads {part.kind}"
    problem = _layout(part)
    if problem:
        return problem
    return _stored(_bytes(part.values), part.scale, None, None, "fp8", part.group_size)


def _codebook(part: formats.CodebookPart) -> weights.Weight | str:
    if part.bits != 4 or part.levels.shape[-1] != 16:
        return f"no kernel reads a table of {part.levels.shape[-1]} levels"
    known = part.kind == "nf4"  # Then every matrix of a stack has the same table.
    if part.levels.shape[-2] != 1 or (part.levels.ndim > 2 and not known):
        return "it has more than one table of levels"
    if part.scale is None:
        return "it has no scales"
    problem = _layout(part)
    if problem:
        return problem
    table = None if known else part.levels[0]
    return _stored(part.indices, part.effective_scale(), None, table, "codebook", part.group_size)


def _layout(part: Any) -> str | None:
    out = part.shape[-2]
    if part.scale.shape[-1] != out:
        return "several outputs share a scale"
    if getattr(part, "padding", 0):
        return f"its {part.shape[-1]} inputs do not fill whole bytes"
    return None


def _stored(codes, scale, zeros, table, format, group_size) -> weights.Weight:
    if scale.dtype not in (jnp.bfloat16, jnp.float32):
        scale = scale.astype(jnp.float32)
    return weights.stored(codes, scale, zeros, table, format, group_size)


def _bytes(values: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(values, jnp.uint8)


_OPERANDS = {
    Prepared: lambda part: part.whole,
    formats.Affine: _affine,
    formats.FloatPart: _float,
    formats.CodebookPart: _codebook,
}


def problem(
    part: Any,
    chip: Chip | None = None,
    dtype: Any = jnp.bfloat16,
    split: NamedSharding | None = None,
    activation: Activation | None = None,
    batched: bool = False,
) -> str | None:
    """Why no kernel reads a part, from shapes alone.

    Args:
      part: arrays or shapes of them.
      chip: whose kernel; None asks only whether there is an operation for the format.
      dtype: of the input.
      split: mesh axes of stack, out and in: each device's share has to suit the kernel.
      activation: how the input is quantized, or None.
      batched: whether one product takes several matrices of the part.

    Returns:
      The reason, or None.
    """
    if isinstance(part, packed_sparse.PARTS):
        if activation is not None:
            return "no kernel multiplies quantized inputs with sparse weights"
        return packed_sparse.problem(part, chip, dtype, split, batched)
    found: list[Any] = []
    jax.eval_shape(lambda part: found.append(operand(part)), part)
    (weight,) = found
    if isinstance(weight, str):
        return weight
    quantized = None
    if activation is not None:
        quantized = _ACTIVATION_DTYPES.get(activation.format)
        if quantized not in reference.activation_dtypes(weight.format):
            return f"no kernel multiplies inputs of {activation.format} with {weight.format}"
        if not activation.symmetric:
            return "the quantized input has zero points"
    if chip is None:
        return None
    if chip.platform == "cpu":
        return f"the chip is {chip.name}, not a TPU or GPU"
    from jaxcomp.kernels.quantized_matmul import gpu, tpu  # Pallas takes a while to import.

    if split is not None:
        weight = sharding.local(weight, split)
    options = reference.Options(None, quantized, "float32")
    if chip.platform == "tpu":
        return tpu.unfit(weight, chip, options, dtype)
    if batched:
        return "the kernel for GPUs takes one matrix at a time"
    return gpu.reason(jax.ShapeDtypeStruct((1, weight.shape[1]), dtype), weight, options, chip)


def slower(
    part: Any,
    chip: Chip,
    rows: int,
    activation: Activation | None = None,
    kind: str = "products",
) -> str | None:
    """Why XLA is to multiply a part that a kernel reads: the table of measurements says so.

    On a GPU it has to speak for the kernel, elsewhere against it.

    Args:
      part: arrays or shapes, without input transforms.
      chip: whose kernel.
      rows: of the input.
      activation: how the input is quantized, or None.
      kind: "products", or "experts" on a GPU.

    Returns:
      The reason, or None.
    """
    if isinstance(part, packed_sparse.PARTS):
        return packed_sparse.slower(part, chip, rows)
    found: list[Any] = []
    jax.eval_shape(lambda part: found.append(operand(part)), part)
    (weight,) = found
    if isinstance(weight, str):
        return None
    if chip.platform == "gpu":
        from jaxcomp.kernels.quantized_matmul import gpu

        quantized = activation and _ACTIVATION_DTYPES[activation.format]
        options = reference.Options(None, quantized, "float32")
        return gpu.slower(rows, weight, options, chip, kind)
    other = "xla" if activation is None else "codes"
    kind = activation and activation.format
    shape = (rows, *weight.shape)
    fastest = tuning.fastest(
        chip.name, weight.format, kind, shape, weight.group_size, ("kernel", other)
    )
    return f"XLA was measured to be faster on this {chip.name}" if fastest == other else None


def looped(leaf: formats.CompressedArray) -> tuple[formats.CompressedArray, Any]:
    """What a loop over layers slices of a weight on a TPU, and what kernels read of all layers.

    A kernel takes its layer's codes from those of all. A slice would first be copied, and read
    again by the kernel, which could not start meanwhile. Sparse values are sliced as well, where
    anything but a kernel reads them: they have gradients.

    Args:
      leaf: with the axis of layers as its first stack axis.

    Returns:
      The weight without codes, and for each part what kernels read, or None; None if they read
      nothing so.
    """
    whole = []

    def take(part):
        arrays = _read_by_kernels(part)
        for lies in map(jax.typeof, arrays):
            split = lies.sharding
            if AxisType.Explicit in split.mesh.axis_types and split.spec[0] is not None:
                arrays = ()
        # No gradient: of float8 codes zeros of all layers would be added up.
        whole.append(jax.lax.stop_gradient(arrays) or None)
        if not arrays or not isinstance(part, Prepared):
            return part
        return part.replace(weight=dataclasses.replace(part.weight.sliced(), codes=None))

    left = leaf.replace(parts=tuple(_mapped(part, take) for part in leaf.parts))
    return (left, tuple(whole)) if any(whole) else (leaf, None)


def _read_by_kernels(part: Any) -> tuple[jax.Array, ...]:
    """The arrays of a part with layers in front that a kernel reads where they lie."""
    if isinstance(part, Prepared):
        read = part.weight.layout == layout.LAYOUT
        return (part.weight.sliced().codes,) if read else ()
    return packed_sparse.read_by_kernels(part)


def of_layer(
    leaf: formats.CompressedArray, whole: tuple[Any, ...], index: jax.Array
) -> formats.CompressedArray:
    """The weight of one layer, of both that ``looped`` returned."""
    each = iter(whole)

    def put(part):
        arrays = next(each)
        if arrays is None:
            return part
        if not isinstance(part, Prepared):
            return packed_sparse.of_layer(part, arrays, index)
        weight = dataclasses.replace(part.weight, codes=arrays[0], layer=index)
        return part.replace(weight=weight)

    return leaf.replace(parts=tuple(_mapped(part, put) for part in leaf.parts))


def sliced(leaf: formats.CompressedArray) -> formats.CompressedArray:
    """A weight of ``of_layer`` with no arrays but its own."""

    def own(part):
        if isinstance(part, Prepared):
            return part.replace(weight=part.weight.sliced())
        return packed_sparse.sliced(part)

    return leaf.replace(parts=tuple(_mapped(part, own) for part in leaf.parts))


def _mapped(part: Any, function: Any) -> Any:
    """A part with a function applied inside of its input transforms."""
    if isinstance(part, (formats.InputScale, formats.InputQuant)):
        return part.replace(part=_mapped(part.part, function))
    return function(part)


def activation_dtype(activation: Activation | None) -> str | None:
    """What the kernels call the dtype that an input is quantized to; None for a plain input."""
    return None if activation is None else _ACTIVATION_DTYPES[activation.format]


def matmul(
    x: jax.Array,
    part: Any,
    split: NamedSharding | None = None,
    activation: Activation | None = None,
    scale: jax.Array | None = None,
    out_dtype: jax.typing.DTypeLike = jnp.float32,
) -> jax.Array:
    """Product of an input with a part that ``operand`` accepts, by its kernel.

    Args:
      x: ``(*stack, tokens, in)``, bfloat16 or float32.
      part: of a weight ``(*stack, out, in)``, without input transforms.
      split: mesh axes of stack, out and in, on a mesh of Auto axes.
      activation: how the input is quantized on its way, or None.
      scale: of the quantized input, broadcasts against ``(*stack, tokens, 1)``.
      out_dtype: what the caller rounds to; the kernel for GPUs does it on its way out.

    Returns:
      ``(*stack, tokens, out)`` in float32, or from that kernel in ``out_dtype``.
    """
    chip = chips.chip_of(x, *jax.tree.leaves(part))
    mesh = None if split is not None else chips.mesh_of(x, *jax.tree.leaves(part))
    known = mesh is None or AxisType.Explicit in mesh.axis_types
    implementation, narrow = None, jnp.dtype(out_dtype).itemsize <= 4
    if chip is not None and chip.platform == "gpu" and known:
        # It was measured, or asked for: where it fits, nothing else is to run.
        batched = x.ndim > 2
        if problem(part, chip, x.dtype, split, activation, batched) is None:
            implementation = "mosaic_gpu"
    out_dtype = out_dtype if implementation and narrow else jnp.float32
    if isinstance(part, packed_sparse.PARTS):
        return packed_sparse.matmul(x, part, split, implementation, out_dtype)
    return kernels.quantized_matmul(
        x,
        operand(part),
        activation_dtype=activation_dtype(activation),
        x_scales=scale,
        out_dtype=out_dtype,
        implementation=implementation,
        weight_spec=split,
    )
