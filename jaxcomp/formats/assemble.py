"""Putting compressed slices together, and saying in words what they are."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.errors import JaxcompError
from jaxcomp.formats.affine import Affine
from jaxcomp.formats.codebook import CodebookPart
from jaxcomp.formats.compressed import CompressedArray, is_compressed
from jaxcomp.formats.dense import Dense, DenseColumns, LowRankPart
from jaxcomp.formats.floating import FloatPart
from jaxcomp.formats.sparse import NMPart, SparsePart
from jaxcomp.formats.transforms import InputQuant, InputScale


def stack_arrays(
    arrays: Sequence[CompressedArray], stack: Callable[[Sequence[Any]], Any] = np.stack
) -> CompressedArray:
    """Compressed slices of a stacked weight as one array with a new leading axis.

    Dense outlier columns are padded to the widest slice.

    Args:
      arrays: slices with the same parts.
      stack: of leaves on the host.

    Returns:
      An array whose leaves are the slices' leaves stacked, on the host if they lie there.

    Raises:
      JaxcompError: the slices have parts that cannot be stacked.
    """
    arrays = _padded(list(arrays))
    first = jax.tree.structure(arrays[0])
    for array in arrays[1:]:
        if jax.tree.structure(array) != first:
            raise JaxcompError(
                f"layers of one stacked weight were compressed to different formats: "
                f"{describe(arrays[0])} and {describe(array)}; unstack the weight or use one recipe"
            )

    def stacked(*leaves):
        if len({leaf.shape for leaf in leaves}) > 1:
            raise JaxcompError(
                f"layers of one stacked weight hold parts of different shapes "
                f"{sorted({leaf.shape for leaf in leaves})}; use a pattern with equal counts a "
                f"layer"
            )
        host = not any(isinstance(leaf, jax.Array) for leaf in leaves)
        return stack(leaves) if host else jnp.stack([jnp.asarray(v) for v in leaves])

    return jax.tree.map(stacked, *arrays)


def _padded(arrays: list[CompressedArray]) -> list[CompressedArray]:
    """Slices whose outlier columns and kept values are padded to the longest."""
    columns = zip(*(array.parts for array in arrays), strict=True)
    parts = zip(*(_padded_parts(list(parts)) for parts in columns), strict=True)
    return [array.replace(parts=tuple(p)) for array, p in zip(arrays, parts, strict=True)]


def _padded_parts(parts: list[Any]) -> list[Any]:
    if len({type(part) for part in parts}) > 1:
        return parts
    if isinstance(parts[0], (InputScale, InputQuant)):
        inner = _padded_parts([part.part for part in parts])
        return [part.replace(part=i) for part, i in zip(parts, inner, strict=True)]
    if isinstance(parts[0], DenseColumns):
        width = max(part.indices.shape[-1] for part in parts)
        return [_widened(part, width) for part in parts]
    if isinstance(parts[0], SparsePart):
        kept = max(part.kept for part in parts)
        return [part if part.kept == kept else part.padded(kept) for part in parts]
    return parts


def _widened(part: DenseColumns, width: int) -> DenseColumns:
    more = width - part.indices.shape[-1]
    if not more:
        return part
    edge = [(0, 0)] * (part.values.ndim - 1) + [(0, more)]
    return part.replace(
        values=jnp.pad(jnp.asarray(part.values), edge),
        indices=jnp.pad(jnp.asarray(part.indices), edge[1:], constant_values=part.in_size),
    )


def describe(value: Any) -> str:
    """A compressed array's format in words, like "int4 g128" or "2:4 of int4 g128"."""
    if not is_compressed(value):
        return str(jnp.dtype(value.dtype))
    return " + ".join(_words(part) for part in value.parts)


def _words(part: Any) -> str:
    if isinstance(part, InputScale):
        return f"{_words(part.part)}, scaled input"
    if isinstance(part, InputQuant):
        spec = part.spec
        how = f"{spec.format} input a {spec.granularity}"
        return f"{_words(part.part)}, {how}{'' if spec.dynamic else ' (static)'}"
    if isinstance(part, Affine):
        kind = f"int{part.bits}" if part.symmetric else f"uint{part.bits}"
        if part.group_index is not None:
            return f"{kind} by activation order"
        return kind + _group(part)
    if isinstance(part, FloatPart):
        return part.kind + ("" if part.kind[:2] in ("mx", "nv") else _group(part))
    if isinstance(part, CodebookPart):
        return f"codebook of {part.levels.shape[-1]}"
    if isinstance(part, NMPart):
        return f"{part.n}:{part.m} of {_words(part.values)}"
    if isinstance(part, SparsePart):
        kept = part.kept / (part.shape[-2] * part.in_size)
        return f"{1 - kept:.0%} sparse {_element(part.element, part.values.dtype)}"
    if isinstance(part, DenseColumns):
        return f"{part.indices.shape[-1]} columns of {jnp.dtype(part.values.dtype)}"
    if isinstance(part, LowRankPart):
        return f"rank {part.rank}"
    if isinstance(part, Dense):
        return f"dense {jnp.dtype(part.values.dtype)}"
    return type(part).__name__


def _element(element: Any, dtype: Any) -> str:
    if element is None:
        return str(jnp.dtype(dtype))
    name = f"int{element.bits}" if hasattr(element, "bits") else element.kind
    return name if element.group_size is None else f"{name} g{element.group_size}"


def _group(part: Any) -> str:
    rows = "" if part.out_group_size == 1 else f"x{part.out_group_size} rows"
    return (
        f" a row{rows}"
        if part.group_size == part.in_size and not rows
        else f" g{part.group_size}{rows}"
    )
