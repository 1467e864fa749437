"""Mesh axes as specs name them: none, one, or several."""

from collections.abc import Sequence

from jax.sharding import PartitionSpec

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


def padded(spec: PartitionSpec, rank: int) -> tuple[Axes, ...]:
    """A spec with an entry for each axis, without empty tuples."""
    entries = (*spec, *(None,) * (rank - len(spec)))
    return tuple(e or None for e in entries)
