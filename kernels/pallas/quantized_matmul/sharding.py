"""Products over several devices: every device multiplies the part of the weight that it holds.

A weight (N, K) may be split over outputs (column-parallel: nothing is sent), over inputs
(row-parallel: products are summed over devices), or both, and a stack of experts by expert. No
device ever asks for the codes of another. On meshes with Explicit axes the types of arrays say how
they are split; on Auto axes a traced function cannot know it, and has to be told.
"""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxcomp.kernels import chips
from jaxcomp.kernels.meshes import Axes, count, names, padded, split_as
from jaxcomp.kernels.quantized_matmul.layout import LANES
from jaxcomp.kernels.quantized_matmul.weights import Weight


@dataclasses.dataclass(frozen=True)
class Placement:
    """How a product is split over a mesh.

    Attributes:
      mesh: the mesh.
      stack: for each stack axis of the weight (and of x) the mesh axes that split it.
      rows: for each further axis of x but the last the mesh axes that split it.
      outputs: mesh axes that split N.
      inputs: mesh axes that split K.
    """

    mesh: jax.sharding.AbstractMesh
    stack: tuple[Axes, ...]
    rows: tuple[Axes, ...]
    outputs: Axes
    inputs: Axes


def placement(
    x: jax.Array,
    weight: Weight,
    weight_spec: PartitionSpec | NamedSharding | None = None,
    x_spec: PartitionSpec | None = None,
    by_expert: bool = False,
) -> Placement | None:
    """How a product is to be split.

    Args:
      x: ``(*stack, .., K)``.
      weight: stored or prepared.
      weight_spec: mesh axes of the weight's stack axes, N and K, on a mesh of Auto axes; a
        NamedSharding where no array tells the mesh.
      x_spec: mesh axes of x, for a mesh with Auto axes; None splits the first axis after the stack
        over the mesh axes that the weight leaves, where they divide it.
      by_expert: x is ``(M, K)`` of rows sorted by expert, without the weight's stack axis.

    Returns:
      The placement; None where one device computes alone, or where the sharding is not known.

    Raises:
      ValueError: the mesh does not divide the weight, or splits a group of inputs; or x and the
        weight are split in ways that do not belong together.
    """
    mesh = chips.mesh_of(x, weight.codes)
    if isinstance(weight_spec, NamedSharding):
        mesh, weight_spec = weight_spec.mesh.abstract_mesh, weight_spec.spec
    if mesh is None:
        return None
    if weight_spec is None and AxisType.Explicit in mesh.axis_types:
        weight_spec = jax.typeof(weight.codes).sharding.spec
        if weight.layer is not None:
            weight_spec = PartitionSpec(*weight_spec[1:])
        x_spec = jax.typeof(x).sharding.spec if x_spec is None else x_spec
    if weight_spec is None:
        return None
    sizes, depth = dict(mesh.shape), len(weight.stack)
    shared = 0 if by_expert else depth  # stack axes that x has too
    *stack, outputs, inputs = padded(weight_spec, depth + 2, "weight_spec", sizes)
    taken = {name for axes in (*stack, outputs, inputs) for name in names(axes)}
    rows: list[Axes] = [None] * (x.ndim - 1 - shared)
    if x_spec is None:
        free = tuple(name for name in mesh.axis_names if name not in taken)
        if rows and free and x.shape[shared] % count(free, sizes) == 0:
            rows[0] = free
    else:
        entries = padded(x_spec, x.ndim, "x_spec", sizes)
        rows = list(entries[shared:-1])
        clash = taken & {name for axes in rows for name in names(axes)}
        if clash or list(entries[:shared]) != stack[:shared] or entries[-1] not in (None, inputs):
            raise ValueError(
                f"x {x.shape} is split as {x_spec} and the weight {(*weight.stack, *weight.shape)} "
                f"as {weight_spec}: stack axes must be split alike, the last axis of x as K or not "
                f"at all, and its other axes by none of {sorted(taken)}; jax.reshard x"
            )
    named = [*(("a stack axis", n) for n in weight.stack), ("N", weight.shape[0])]
    for (name, size), axes in zip(
        [*named, ("K", weight.shape[1])], (*stack, outputs, inputs), strict=True
    ):
        if size % count(axes, sizes):
            raise ValueError(
                f"the mesh axes {axes} of {count(axes, sizes)} devices do not divide {name} = "
                f"{size} of the weight {weight.shape}; split another axis, or fewer ways"
            )
    local = weight.shape[1] // count(inputs, sizes)
    unit = weight.group_size if weight.scales.shape[-2] > 1 else 1
    if weight.format == "int2" and weight.layout != "stored":
        unit = max(unit, 4 * LANES)
    if inputs and local % unit:
        raise ValueError(
            f"the mesh axes {inputs} give each device {local} of the K = {weight.shape[1]} inputs, "
            f"which splits groups of {unit}; split K fewer ways, or split N"
        )
    return Placement(mesh, tuple(stack), tuple(rows), outputs, inputs)


def local(weight: Weight, split: NamedSharding) -> Weight:
    """One device's part of a weight, as shapes: what a kernel will be given there.

    Args:
      weight: stored or prepared, arrays or shapes.
      split: mesh axes of its stack axes, N and K, which the mesh divides.

    Returns:
      Shapes of the part.
    """
    sizes = dict(split.mesh.shape)
    entries = padded(split.spec, len(weight.stack) + 2, "weight_spec", sizes)
    *stack, outputs, inputs = (count(e, sizes) for e in entries)
    groups = inputs if weight.scales.shape[-2] > 1 else 1
    layers = () if weight.layer is None else (1,)
    by = {"codes": (*layers, *stack, outputs, inputs), "scales": (*stack, groups, outputs)}
    by["zeros"] = by["scales"]

    def part(name):
        array = getattr(weight, name)
        if array is None:
            return None
        shape = tuple(int(n) for n in np.floor_divide(array.shape, by[name]))
        return jax.ShapeDtypeStruct(shape, array.dtype)

    n, k = weight.shape
    return dataclasses.replace(
        weight,
        **{name: part(name) for name in by},
        shape=(n // outputs, k // inputs),
        group_size=weight.group_size if groups == inputs else k // inputs,
    )


def parts(weight: Weight, place: Placement) -> tuple[Weight, dict]:
    """Specs of a weight's arrays, and what its fields are on one device.

    Args:
      weight: stored or prepared.
      place: from ``placement``.

    Returns:
      The weight with specs in the place of arrays; the local ``shape`` and ``group_size``.
    """
    stack, outputs, inputs = place.stack, place.outputs, place.inputs
    groups = inputs if weight.scales.shape[-2] > 1 else None
    of_scales = PartitionSpec(*stack, groups, outputs)
    layers = () if weight.layer is None else (None,)
    specs = dataclasses.replace(
        weight,
        codes=PartitionSpec(*layers, *stack, outputs, inputs),
        scales=of_scales,
        zeros=None if weight.zeros is None else of_scales,
        table=None if weight.table is None else PartitionSpec(),
        layer=None if weight.layer is None else PartitionSpec(),
    )
    sizes = dict(place.mesh.shape)
    n, k = weight.shape
    shape = n // count(outputs, sizes), k // count(inputs, sizes)
    group_size = weight.group_size if groups or not inputs else shape[1]
    return specs, {"shape": shape, "group_size": group_size}


def matmul(
    call: Callable[[jax.Array, Weight, jax.Array | None, jax.Array | None], jax.Array],
    finish: Callable[[jax.Array, jax.Array | None], jax.Array],
    x: jax.Array,
    weight: Weight,
    bias: jax.Array | None,
    x_scales: jax.Array | None,
    place: Placement,
) -> jax.Array:
    """The product, each device on its own part.

    Args:
      call: gives one device's result from its rows, weight, bias and scales of rows.
      finish: gives the result from the sum of unfinished float32 products and the bias, where K is
        split; ``call`` is then given no bias and must leave its result unfinished.
      x: ``(*stack, .., K)``.
      weight: stored or prepared.
      bias: ``(*stack, N)`` or None.
      x_scales: ``(*stack, .., 1)`` that rows are quantized with, or None.
      place: from ``placement``.

    Returns:
      ``(*stack, .., N)``, split as the rows of x and the outputs of the weight are.
    """
    stack, outputs, inputs = place.stack, place.outputs, place.inputs
    specs, part = parts(weight, place)

    def body(x, weight, bias, x_scales):
        weight = dataclasses.replace(weight, **part)
        if not inputs:
            return call(x, weight, bias, x_scales)
        return finish(jax.lax.psum(call(x, weight, None, x_scales), inputs), bias)

    in_specs = (
        PartitionSpec(*stack, *place.rows, inputs),
        specs,
        PartitionSpec(*stack, outputs),
        PartitionSpec(*stack, *place.rows, None),
    )
    return jax.shard_map(
        body,
        mesh=place.mesh,
        in_specs=in_specs,
        out_specs=PartitionSpec(*stack, *place.rows, outputs),
        check_vma=False,
    )(*split_as((x, weight, bias, x_scales), in_specs, place.mesh))
