"""Products with sparse weights over several devices: each multiplies the part that it holds.

A weight (N, K) may be split over outputs (column-parallel: nothing is sent), over inputs
(row-parallel: products are summed over devices), or both. No device ever asks for the blocks or
values of another. On meshes with Explicit axes the types of arrays say how they are split; on Auto
axes a traced function cannot know it, and has to be told.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxcomp.kernels import chips
from jaxcomp.kernels.meshes import Axes, count, names, padded, split_as
from jaxcomp.kernels.sparse_matmul import layers as layers_of
from jaxcomp.kernels.sparse_matmul.blocks import BlockSparse
from jaxcomp.kernels.sparse_matmul.nm import NMSparse

Weight = BlockSparse | NMSparse


@dataclasses.dataclass(frozen=True)
class Placement:
    """How a product is split over a mesh.

    Attributes:
      mesh: the mesh.
      rows: for each axis of x but the last the mesh axes that split it.
      outputs: mesh axes that split N.
      inputs: mesh axes that split K.
    """

    mesh: jax.sharding.AbstractMesh
    rows: tuple[Axes, ...]
    outputs: Axes
    inputs: Axes

    @property
    def parts(self) -> tuple[int, int]:
        """Of the outputs and of the inputs."""
        sizes = dict(self.mesh.shape)
        return count(self.outputs, sizes), count(self.inputs, sizes)


def placement(
    x: jax.Array,
    weight: Weight,
    weight_spec: PartitionSpec | NamedSharding | None = None,
    x_spec: PartitionSpec | None = None,
) -> Placement | None:
    """How a product is to be split.

    Args:
      x: ``(.., K)``.
      weight: block-sparse or N:M sparse.
      weight_spec: mesh axes of N and K, on a mesh of Auto axes; a NamedSharding where no array
        tells the mesh.
      x_spec: mesh axes of x, for a mesh with Auto axes; None splits the first axis over the mesh
        axes that the weight leaves, where they divide it.

    Returns:
      The placement; None where one device computes alone, or where the sharding is not known.

    Raises:
      ValueError: the mesh does not divide the weight where it can be divided; or x and the weight
        are split in ways that do not belong together.
    """
    mesh = chips.mesh_of(x, weight.values)
    if isinstance(weight_spec, NamedSharding):
        mesh, weight_spec = weight_spec.mesh.abstract_mesh, weight_spec.spec
    if mesh is None:
        return None
    if weight_spec is None and AxisType.Explicit in mesh.axis_types:
        weight_spec = _typed_spec(weight, dict(mesh.shape))
        x_spec = jax.typeof(x).sharding.spec if x_spec is None else x_spec
    if weight_spec is None:
        return None
    sizes = dict(mesh.shape)
    outputs, inputs = padded(weight_spec, 2, "weight_spec", sizes)
    taken = {*names(outputs), *names(inputs)}
    rows: list[Axes] = [None] * (x.ndim - 1)
    if x_spec is None:
        free = tuple(name for name in mesh.axis_names if name not in taken)
        if rows and free and x.shape[0] % count(free, sizes) == 0:
            rows[0] = free
    else:
        *rows, last = padded(x_spec, x.ndim, "x_spec", sizes)
        clash = taken & {name for axes in rows for name in names(axes)}
        if clash or last not in (None, inputs):
            raise ValueError(
                f"x {x.shape} is split as {x_spec} and the weight {weight.shape} as {weight_spec}: "
                "the last axis of x must be split as K or not at all, and its other axes by none "
                f"of {sorted(taken)}; jax.reshard x"
            )
    place = Placement(mesh, tuple(rows), outputs, inputs)
    (_check_blocks if isinstance(weight, BlockSparse) else _check_nm)(weight, place)
    return place


def matmul(
    call: Callable[[jax.Array, Weight, jax.Array | None], jax.Array],
    finish: Callable[[jax.Array, jax.Array | None], jax.Array],
    x: jax.Array,
    weight: Weight,
    bias: jax.Array | None,
    place: Placement,
) -> jax.Array:
    """The product, each device on its own part.

    Args:
      call: gives one device's result from its rows, weight and bias.
      finish: gives the result from the sum of unfinished float32 products and the bias, where K is
        split; ``call`` is then given no bias and must leave its result unfinished.
      x: ``(.., K)``.
      weight: block-sparse or N:M sparse.
      bias: ``(N,)`` or None.
      place: from ``placement``.

    Returns:
      ``(.., N)``, split as the rows of x and the outputs of the weight are.
    """
    blocks = isinstance(weight, BlockSparse)
    specs = _block_specs(weight, place) if blocks else _nm_specs(weight, place)

    def body(x, weight, bias):
        weight = _own_blocks(weight, place) if blocks else _own_columns(weight, place)
        if not place.inputs:
            return call(x, weight, bias)
        return finish(jax.lax.psum(call(x, weight, None), place.inputs), bias)

    in_specs = (
        PartitionSpec(*place.rows, place.inputs),
        specs,
        PartitionSpec(place.outputs),
    )
    return jax.shard_map(
        body,
        mesh=place.mesh,
        in_specs=in_specs,
        out_specs=PartitionSpec(*place.rows, place.outputs),
        check_vma=False,
    )(*split_as((x, weight, bias), in_specs, place.mesh))


def _typed_spec(weight: Weight, sizes: dict[str, int]) -> PartitionSpec:
    """Mesh axes of N and K, from the type of the weight's values."""
    spec = jax.typeof(weight.values).sharding.spec
    spec = padded(spec, weight.values.ndim, "the values' sharding", sizes)
    if isinstance(weight, NMSparse):
        return PartitionSpec(*spec[-2:])
    # The parts of the outputs come first, so the first mesh axes are theirs.
    outputs, inputs = [], list(names(spec[0]))
    while inputs and count(tuple(outputs), sizes) < weight.parts[0]:
        outputs.append(inputs.pop(0))
    return PartitionSpec(_entry(outputs), _entry(inputs))


def _entry(axes: list[str]) -> Axes:
    return axes[0] if len(axes) == 1 else tuple(axes) or None


# -- block-sparse weights ------------------------------------------------------------------------


def _check_blocks(weight: BlockSparse, place: Placement) -> None:
    if place.parts != weight.parts and place.parts != (1, 1):
        raise ValueError(
            f"the mesh axes {place.outputs} and {place.inputs} give N and K of the block-sparse "
            f"weight {weight.shape} {place.parts} parts, and its list has {weight.parts}: use "
            f"split_blocks(w, outputs={place.parts[0]}, inputs={place.parts[1]}) on the whole "
            "weight, before it is put on the mesh"
        )


def _block_specs(weight: BlockSparse, place: Placement) -> BlockSparse:
    lists = PartitionSpec((*names(place.outputs), *names(place.inputs)) or None)
    leaves = {name: lists for name in ("values", "rows", "columns")}
    scales = None if weight.scales is None else lists
    layers = layers_of.specs(weight.layers, (lists,))
    return dataclasses.replace(weight, **leaves, scales=scales, layers=layers)


def _own_blocks(weight: BlockSparse, place: Placement) -> BlockSparse:
    """The part of a device as a weight of its own."""
    if place.parts == (1, 1):
        return weight
    leaves = {"shape": _part(weight.shape, place), "parts": (1, 1)}
    lists = {"rows": place.outputs, "columns": place.inputs}
    for (name, axes), size, parts in zip(lists.items(), weight.grid, place.parts, strict=True):
        if axes:
            start = jax.lax.axis_index(axes) * (size // parts)
            leaves[name] = getattr(weight, name) - start.astype(jnp.int32)
    return dataclasses.replace(weight, **leaves)


# -- N:M sparse weights --------------------------------------------------------------------------


def _check_nm(weight: NMSparse, place: Placement) -> None:
    axes = place.outputs, place.inputs
    for name, size, parts, by in zip("NK", weight.shape, place.parts, axes, strict=True):
        if size % parts:
            raise ValueError(
                f"the mesh axes {by} of {parts} devices do not divide {name} = {size} of the "
                f"weight {weight.shape}; split the other axis, or fewer ways"
            )
    local = weight.shape[1] // place.parts[1]
    unit = weight.m
    if weight.layout == "stored":
        # The positions of a device are whole bytes, and so are its codes.
        sizes = [(weight.m - 1).bit_length(), 8 if weight.scales is None else 4]
        while any(unit // weight.m * weight.n * bits % 8 for bits in sizes):
            unit += weight.m
    if _groups(weight) > 1:
        unit = math.lcm(unit, weight.group_size)
    if place.inputs and local % unit:
        raise ValueError(
            f"the mesh axes {place.inputs} give each device {local} of the K = {weight.shape[1]} "
            f"inputs, which splits groups of {unit} (values of {weight.n}:{weight.m} sparsity, "
            "whole bytes, scales); split K fewer ways, or split N"
        )


def _groups(weight: NMSparse) -> int:
    """Groups of inputs with scales of their own."""
    return 1 if weight.group_size is None else weight.shape[1] // weight.group_size


def _nm_specs(weight: NMSparse, place: Placement) -> NMSparse:
    matrix = PartitionSpec(place.outputs, place.inputs)
    groups = place.inputs if _groups(weight) > 1 else None
    stored = weight.layout == "stored"
    scales = (
        PartitionSpec(groups, place.outputs) if stored else PartitionSpec(place.outputs, groups)
    )
    values = matrix if stored else PartitionSpec(None, *matrix)
    return dataclasses.replace(
        weight,
        values=values,
        positions=matrix,
        scales=None if weight.scales is None else scales,
        layers=layers_of.specs(weight.layers, (values, matrix)),
    )


def _own_columns(weight: NMSparse, place: Placement) -> NMSparse:
    """The part of a device as a weight of its own."""
    shape = _part(weight.shape, place)
    one = weight.group_size is not None and _groups(weight) == 1
    return dataclasses.replace(
        weight, shape=shape, group_size=shape[1] if one else weight.group_size
    )


def _part(shape: tuple[int, int], place: Placement) -> tuple[int, int]:
    return tuple(size // parts for size, parts in zip(shape, place.parts, strict=True))
