"""What tells one run of ``compress`` from another, so that no journal is continued by another.

Of arrays that are spread over processes each process reads its own parts: its journal is its own.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import msgspec
import numpy as np

import jaxcomp
from jaxcomp.graph import Graph, _compat
from jaxcomp.graph.program import Program
from jaxcomp.io.stacked import Stacked
from jaxcomp.recipe import Recipe

_CHUNK = 2**24


def fingerprints(
    recipe: Recipe, graph: Graph, named: Sequence[tuple[str, Any]], batches: list[tuple]
) -> dict:
    """What a journal belongs to.

    Args:
      recipe: the recipe.
      graph: the traced function.
      named: leaves of the model by name.
      batches: calibration data.

    Returns:
      Hashes of the recipe, of the model (the function's equations, and the names, shapes and all
      bytes of its leaves), and of the data; and versions.
    """
    model, data = hashlib.sha256(), hashlib.sha256()
    for line in equations(graph.program):
        model.update(line)
    for path, leaf in named:
        model.update(f"{path} {getattr(leaf, 'shape', leaf)} {getattr(leaf, 'dtype', '')}".encode())
        for array in jax.tree.leaves(leaf):  # one, or the parts of a compressed leaf
            for chunk in leaf_bytes(array):
                model.update(chunk)
            jaxcomp.io.safetensors.release(array)
    for batch in batches:
        for value in jax.tree.leaves(batch):
            value = value if isinstance(value, jax.Array) else np.asarray(value)
            data.update(f"{value.shape} {value.dtype}".encode())
            for chunk in leaf_bytes(value):
                data.update(chunk)
    return {
        "recipe": recipe.fingerprint(),
        "recipe_text": msgspec.json.encode(recipe).decode(),
        "model": model.hexdigest(),
        "data": data.hexdigest(),
        "jax": jax.__version__,
        "jaxcomp": jaxcomp.__version__,
    }


def equations(program: Program) -> Iterator[bytes]:
    """A program's operations and constants; values are numbered alike each time it is traced."""
    for i, value in program.constants.items():
        yield f"constant {i}".encode()
        yield from leaf_bytes(value)
    for op in program.ops:
        text = _compat.printable_params(op.eqn) or op.eqn.primitive.name
        if op.bodies:  # printed with their parameters, but for the operations that name weights
            text = op.eqn.primitive.name
        yield f"{op.kind} {text} {op.inputs} {op.outputs}".encode()
        for body in op.bodies:
            yield from equations(body)


def leaf_bytes(value: Any, most: int | None = None) -> Iterator[bytes]:
    """The bytes of an array, a piece at a time, in the order in which they lie where possible.

    Args:
      value: an array; of one that is spread over processes this one's parts are read.
      most: how many bytes from its start; None is all.

    Yields:
      The bytes, those of parts after their positions.
    """
    if isinstance(value, jax.Array) and jax.dtypes.issubdtype(value.dtype, jax.dtypes.extended):
        value = jax.random.key_data(value)
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        parts = {str(s.index): s.data for s in value.addressable_shards}
        for at, part in sorted(parts.items()):
            yield at.encode()
            yield from leaf_bytes(part, most)
        return
    if isinstance(value, Stacked):  # As of the stack, without making it.
        for part in value.parts if most is None else value.parts[:1]:
            rows = part if isinstance(part, Stacked) else np.ascontiguousarray(part)
            yield from leaf_bytes(rows, most)
            jaxcomp.io.safetensors.release(part)
        return
    array = np.asarray(value)
    flat = array.T if array.T.flags.c_contiguous else array
    if not flat.flags.c_contiguous or flat.ndim == 0:
        flat = np.ascontiguousarray(flat)
    raw = flat.reshape(-1).view(np.uint8)[:most]
    for start in range(0, raw.size, _CHUNK):
        yield raw[start : start + _CHUNK].tobytes()
