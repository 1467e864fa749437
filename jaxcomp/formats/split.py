"""How the arrays of a part are split over a mesh when its matrix is.

A matrix ``(*stack, out, in)`` is split over mesh axes by stack axis, by outputs and by inputs. Each
array follows as far as its axes allow: groups and packed bytes stay whole on a device, and what
belongs to the whole matrix (tables of levels, one scale for all) is replicated.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

from jax.sharding import PartitionSpec

from jaxcomp.errors import JaxcompError
from jaxcomp.formats.affine import Affine
from jaxcomp.formats.codebook import CodebookPart
from jaxcomp.formats.dense import Dense, DenseColumns, LowRankPart
from jaxcomp.formats.floating import ELEMENTS, FloatPart
from jaxcomp.formats.sparse import NMPart, SparsePart
from jaxcomp.formats.transforms import InputQuant, InputScale

Axes = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class Split:
    """How a matrix is split over a mesh.

    Attributes:
      stack: for each stack axis the mesh axes that split it.
      out: mesh axes that split the outputs.
      inputs: mesh axes that split the inputs.
      sizes: devices along each mesh axis.
      path: name of the weight, for errors.
    """

    stack: tuple[Axes, ...]
    out: Axes
    inputs: Axes
    sizes: Mapping[str, int]
    path: str = "weight"

    def spec(self, *axes: Axes) -> PartitionSpec:
        """The spec of an array with the stack axes and then ``axes``."""
        return PartitionSpec(*self.stack, *axes)

    def count(self, axes: Axes) -> int:
        """Devices over which mesh axes split an axis."""
        return math.prod(self.sizes[name] for name in names_of(axes))

    def along(self, axis: str, size: int, unit: int, shape: tuple[int, ...], what: str) -> Axes:
        """The mesh axes of ``out`` or ``in`` for an array, once each shard holds whole units.

        Args:
          axis: "out" or "in".
          size: length of that axis of the matrix.
          unit: how many consecutive positions must stay together.
          shape: of the matrix, for the error.
          what: the units are, for the error.

        Raises:
          JaxcompError: a shard would hold part of a unit.
        """
        axes = self.out if axis == "out" else self.inputs
        count = self.count(axes)
        if count == 1 or size % (count * unit) == 0:
            return axes
        most = max((n for n in range(1, count + 1) if size % (n * unit) == 0), default=1)
        other = "in" if axis == "out" else "out"
        raise JaxcompError(
            f"{self.path} {tuple(shape)}: the mesh axis {describe(axes)} of {count} devices splits "
            f"the {axis} axis of {size} inside {what} of {unit}; split it at most {most} ways, "
            f"split the {other} axis instead, or use a smaller group_size."
        )

    def groups(self, part: Any, scale: Any) -> PartitionSpec:
        """The spec of scales ``(*stack, in_groups, out_groups)``; one group for all is replicated.

        With a ``group_index`` any input may be in any group, so every device has all groups.
        """
        shape, (in_groups, out_groups) = part.shape, scale.shape[-2:]
        out, size = shape[-2:]
        inputs = outputs = None
        if in_groups > 1 and getattr(part, "group_index", None) is None:
            inputs = self.along("in", size, size // in_groups, shape, "groups")
        if out_groups > 1:
            outputs = self.along("out", out, out // out_groups, shape, "groups")
        return self.spec(inputs, outputs)

    def packed(self, shape: tuple[int, ...], bits: int) -> Axes:
        """Mesh axes of the bytes of a row of codes, once each shard holds whole bytes."""
        return self.along("in", shape[-1], 8 // math.gcd(bits, 8), shape, "packed bytes")


def names_of(axes: Axes) -> tuple[str, ...]:
    """Mesh axes of an entry of a PartitionSpec as a tuple."""
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def describe(axes: Axes) -> str:
    """Mesh axes for a message."""
    return " x ".join(repr(name) for name in names_of(axes))


@functools.singledispatch
def part_specs(part: Any, split: Split) -> Any:
    """The PartitionSpec of each array of a part.

    Args:
      part: arrays or shapes of them.
      split: how the part's matrix is split.

    Returns:
      A part of the same structure that holds PartitionSpecs.

    Raises:
      JaxcompError: a group or a packed byte would lie on two devices, or nothing is known of the
        part.
    """
    raise JaxcompError(
        f"{split.path}: nothing says how a {type(part).__name__} is split over a mesh; register a "
        "function with jaxcomp.formats.split.part_specs.register."
    )


def _optional(array: Any, spec: PartitionSpec) -> PartitionSpec | None:
    return None if array is None else spec


@part_specs.register
def _(part: Dense, split: Split) -> Dense:
    return Dense(split.spec(split.out, split.inputs))


@part_specs.register
def _(part: DenseColumns, split: Split) -> DenseColumns:
    # The columns lie anywhere along the inputs: every device has all of them.
    return part.replace(values=split.spec(split.out, None), indices=split.spec(None))


@part_specs.register
def _(part: LowRankPart, split: Split) -> LowRankPart:
    return part.replace(a=split.spec(split.out, None), b=split.spec(None, split.inputs))


@part_specs.register
def _(part: Affine, split: Split) -> Affine:
    groups = split.groups(part, part.scale)
    return part.replace(
        values=split.spec(split.out, split.packed(part.shape, part.bits)),
        scale=groups,
        zero_point=_optional(part.zero_point, groups),
        group_index=_optional(part.group_index, split.spec(split.inputs)),
    )


@part_specs.register
def _(part: FloatPart, split: Split) -> FloatPart:
    return part.replace(
        values=split.spec(split.out, split.packed(part.shape, ELEMENTS[part.element].bits)),
        scale=split.groups(part, part.scale),
        tensor_scale=_optional(part.tensor_scale, split.spec()),
    )


@part_specs.register
def _(part: CodebookPart, split: Split) -> CodebookPart:
    # The blocks of double quantization run over all scales of a matrix, so over several devices.
    return part.replace(
        indices=split.spec(split.out, split.packed(part.shape, part.bits)),
        levels=split.spec(split.out if part.levels.shape[-2] > 1 else None, None),
        scale=None if part.scale is None else split.groups(part, part.scale),
        scale_mean=_optional(part.scale_mean, split.spec()),
        scale_step=_optional(part.scale_step, split.spec(None)),
    )


@part_specs.register
def _(part: NMPart, split: Split) -> NMPart:
    size = part.shape[-1]
    split.along("in", size, part.m, part.shape, "blocks")
    inputs = split.packed(part.values.shape, part.index_bits)
    return part.replace(
        indices=split.spec(split.out, inputs), values=part_specs(part.values, split)
    )


@part_specs.register
def _(part: SparsePart, split: Split) -> SparsePart:
    # Rows keep different numbers of values, which follow each other: no device's are a range that
    # is known without the mask. They are replicated within a matrix.
    groups = None if part.scale is None else split.groups(part, part.scale)
    return part.replace(
        mask=split.spec(split.out, split.packed(part.shape, 1)),
        values=split.spec(None),
        scale=groups,
        zero_point=_optional(part.zero_point, groups),
        tensor_scale=_optional(part.tensor_scale, split.spec()),
        group_index=_optional(part.group_index, split.spec(split.inputs)),
    )


@part_specs.register
def _(part: InputScale, split: Split) -> InputScale:
    return part.replace(part=part_specs(part.part, split), scale=split.spec(split.inputs))


@part_specs.register
def _(part: InputQuant, split: Split) -> InputQuant:
    return part.replace(
        part=part_specs(part.part, split),
        scale=_optional(part.scale, split.spec()),
        zero_point=_optional(part.zero_point, split.spec()),
    )
