"""Mesh axes as specs name them: none, one, or several; and those over which values vary."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

Axes = str | tuple[str, ...] | None


def names(axes: Axes) -> Sequence[str]:
    """Mesh axes as a sequence."""
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def count(axes: Axes, sizes: dict[str, int]) -> int:
    """Parts that mesh axes of these sizes make."""
    parts = 1
    for name in names(axes):
        parts *= sizes[name]
    return parts


def padded(spec: PartitionSpec, rank: int, name: str, sizes: dict[str, int]) -> tuple[Axes, ...]:
    """A spec with an entry for each axis, without empty tuples.

    Args:
      spec: of an array.
      rank: axes of the array.
      name: of the spec, for errors.
      sizes: devices along each axis of the mesh.

    Raises:
      TypeError: it is no ``PartitionSpec``.
      ValueError: more entries than axes, or an axis that the mesh does not have.
    """
    if not isinstance(spec, PartitionSpec):
        raise TypeError(f"{name} is a {type(spec).__name__}; give a jax.sharding.PartitionSpec")
    if len(spec) > rank:
        raise ValueError(f"{name} {spec} has {len(spec)} entries, the array has {rank} axes")
    entries = tuple(e or None for e in (*spec, *(None,) * (rank - len(spec))))
    unknown = [n for e in entries for n in _named(e, name, spec) if n not in sizes]
    if unknown:
        raise ValueError(f"{name} {spec} names {unknown[0]!r}; the mesh has the axes {list(sizes)}")
    return entries


def split_as(operands: Any, specs: Any, mesh: jax.sharding.AbstractMesh) -> Any:
    """Operands as the specs of a shard_map say: on Explicit axes it takes no others.

    Weights lie so already. What does not, such as rows that are whole where the weight's inputs are
    split, is small.

    Args:
      operands: pytree of arrays; None for one that there is not.
      specs: a spec for each array, or for a whole subtree.
      mesh: the mesh; on one of Auto axes nothing is done.

    Returns:
      The operands.
    """
    if AxisType.Explicit not in mesh.axis_types:
        return operands

    def one(spec, part):
        return jax.tree.map(lambda a: jax.reshard(a, NamedSharding(mesh, spec)), part)

    return jax.tree.map(one, specs, operands, is_leaf=lambda x: isinstance(x, PartitionSpec))


def varying(*operands: Any) -> frozenset[str]:
    """Mesh axes over which any array varies, inside a shard_map that keeps account of it.

    Args:
      *operands: pytrees of arrays.

    Returns:
      Names of axes; none outside of a shard_map, or in one with ``check_vma=False``.
    """
    types = [jax.typeof(array).manual_axis_type for array in jax.tree.leaves(operands)]
    return frozenset().union(*(each.varying for each in types))


def vary_alike(*operands: Any) -> tuple[Any, ...]:
    """Operands that all vary over the mesh axes over which any of them does.

    What has a derivative of its own takes such operands only: the cotangent of each then varies as
    it does. Of one that was the same on several devices, the cotangents are summed over them.

    Args:
      *operands: pytrees of arrays; None for one that there is not.

    Returns:
      The operands.
    """
    axes = varying(operands)
    if not axes:
        return operands
    return vary_over(operands, axes)


def vary_over(operands: Any, axes: frozenset[str]) -> Any:
    """A pytree of arrays, each of which varies over mesh axes of a shard_map, as all do or not."""

    def cast(array):
        missing = tuple(sorted(axes - varying(array)))
        return jax.lax.pcast(array, missing, to="varying") if missing else array

    return jax.tree.map(cast, operands)


def varied(results: Any, *operands: Any) -> Any:
    """Results of operands, from a kernel that does not know how they vary.

    Args:
      results: pytree of arrays.
      *operands: pytrees of arrays.

    Returns:
      The results, which vary as the operands do.
    """
    return vary_over(results, varying(operands))


def _named(axes: Axes, name: str, spec: PartitionSpec) -> Sequence[str]:
    if axes is PartitionSpec.UNCONSTRAINED:
        raise ValueError(f"{name} {spec} leaves an axis open; say how it is split, or None")
    return names(axes)
