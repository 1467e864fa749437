"""``compress(.., save_to=..)``: a checkpoint that is written while the weights are compressed.

Finished weights leave memory when the pass has gone on with them, in files as the checkpoint will
have them (``jaxcomp.io.staged``). At the end these are linked to their places. What is left is read
from files and written piece by piece, by all processes, each its share: slices of stacks of which a
file holds several, what channel scales were folded into, and leaves that stay dense.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxcomp.assembly import Assembly
from jaxcomp.formats import is_compressed
from jaxcomp.io.later import Later
from jaxcomp.io.stacked import Stacked
from jaxcomp.io.staged import staged_files


def leaves(assembly: Assembly, named: Sequence[tuple[str, Any]]) -> tuple[list[Any], list[Any]]:
    """What stands for the leaves of a result that is in no memory.

    Args:
      assembly: makes them.
      named: leaves of the model by path.

    Returns:
      Leaves of shapes, and leaves of ``Later`` to be written. Device arrays of the model stay.
    """
    current = functools.lru_cache(maxsize=1)(assembly.leaf)
    shapes, stored = [], []
    for path, leaf in named:
        if not assembly.is_changed(path):
            stored.append(jax.tree.map(_unread, leaf))
            shapes.append(jax.tree.map(_shape, leaf))
            continue
        made = current(path)
        shapes.append(jax.tree.map(_shape, made))
        if isinstance(leaf, jax.Array) and not is_compressed(made):
            # To read one that is spread over processes all would have to, not only its writer.
            read = functools.partial(lambda value: value, made)
        else:
            read = functools.partial(current, path)
        flat, structure = jax.tree.flatten(made)
        later = [Later.of(a, functools.partial(_nth, read, k)) for k, a in enumerate(flat)]
        for each, array in zip(later, flat, strict=True):
            each.files = staged_files(array)
        stored.append(jax.tree.unflatten(structure, later))
    return shapes, stored


def _nth(read: Any, k: int) -> Any:
    value = jax.tree.leaves(read())[k]
    return value if isinstance(value, Stacked) else np.asarray(value)


def _unread(value: Any) -> Any:
    return Later.of(value) if isinstance(value, np.ndarray | Stacked) else value


def _shape(value: Any) -> Any:
    return jax.ShapeDtypeStruct(value.shape, value.dtype) if hasattr(value, "shape") else value
