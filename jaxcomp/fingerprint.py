"""What tells one run of ``compress`` from another, so that no journal is continued by another.

Of arrays that are spread over processes each process reads its own parts: its journal is its own.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import msgspec
import numpy as np

import jaxcomp
from jaxcomp.graph import Graph, _compat
from jaxcomp.graph.program import Program
from jaxcomp.io.later import Shares
from jaxcomp.io.stacked import Stacked
from jaxcomp.recipe import Recipe

_CHUNK = 2**24
_SAMPLES = 8


def fingerprints(
    recipe: Recipe,
    graph: Graph,
    named: Sequence[tuple[str, Any]],
    batches: list[tuple],
    weights: dict[str, str] | None = None,
) -> dict:
    """What a journal belongs to.

    Args:
      recipe: the recipe.
      graph: the traced function.
      named: leaves of the model by name.
      batches: calibration data.
      weights: what ``weight_digests`` gave, of all processes together; None computes it here.

    Returns:
      Hashes of the recipe, of the model (the function's equations, and the names, shapes and all
      bytes of its leaves), and of the data; and versions.
    """
    model, data = hashlib.sha256(), hashlib.sha256()
    for line in equations(graph.program):
        model.update(line)
    weights = weight_digests(named) if weights is None else weights
    for path, _ in named:
        model.update(f"{path} {weights[path]}".encode())
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


def weight_digests(
    named: Sequence[tuple[str, Any]],
    shares: Shares | None = None,
    parts: Callable[[str, Any], Sequence[tuple] | None] = lambda path, leaf: None,
) -> dict[str, str]:
    """SHA-256 of the leaves of a model: names of shapes and dtypes, and all bytes.

    Args:
      named: leaves by name.
      shares: the processes that read them, each its share; None reads all here. Of a leaf that is
        spread over processes each reads its own part, and finds a digest of its own.
      parts: of a leaf that each reads its own part of: the positions that this process does; None
        for any other.

    Returns:
      Hexadecimal digests by name, of those that this process is to read.
    """
    shares, found = shares or Shares(0, 1), {}
    for path, leaf in named:
        arrays = jax.tree.leaves(leaf)  # One, or the parts of a compressed leaf.
        own = parts(path, leaf)
        if own is not None:
            arrays = [leaf[position] for position in own]
        spread = own is not None or any(
            isinstance(a, jax.Array) and not a.is_fully_addressable for a in arrays
        )
        nbytes = sum(getattr(a, "nbytes", 8) for a in arrays)
        if not spread and shares.take(nbytes) != shares.rank:
            continue
        digest = hashlib.sha256(
            f"{getattr(leaf, 'shape', leaf)} {getattr(leaf, 'dtype', '')}".encode()
        )
        for array in arrays:
            for chunk in leaf_bytes(array):
                digest.update(chunk)
            jaxcomp.io.safetensors.release(array)
        found[path] = digest.hexdigest()
    return found


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
      most: about how many bytes, in pieces from its start to its end; None is all.

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
        chosen = value.parts
        if most is not None:
            chosen = [chosen[k] for k in _spread(len(chosen), min(_SAMPLES, len(chosen)))]
            most = -(-most // len(chosen))
        for part in chosen:
            whole = most is None and not isinstance(part, Stacked)
            yield from leaf_bytes(np.ascontiguousarray(part) if whole else part, most)
            jaxcomp.io.safetensors.release(part)
        return
    array = np.asarray(value)
    if most is not None and array.nbytes > most:
        yield from _sampled(array, most)
        return
    flat = array.T if array.T.flags.c_contiguous else array
    if not flat.flags.c_contiguous or flat.ndim == 0:
        flat = np.ascontiguousarray(flat)
    raw = flat.reshape(-1).view(np.uint8)
    for start in range(0, raw.size, _CHUNK):
        yield raw[start : start + _CHUNK].tobytes()


def _sampled(array: np.ndarray, most: int) -> Iterator[bytes]:
    """Some bytes of an array, in equal pieces, the first at its start and the last at its end.

    In the order in which the elements lie in memory, so that nothing else of a memory-mapped file
    is read.
    """
    flat = array.transpose(sorted(range(array.ndim), key=lambda axis: -array.strides[axis]))
    if flat.flags.c_contiguous:
        flat = flat.reshape(-1)
    size = max(1, most // _SAMPLES // max(1, flat[:1].nbytes))
    for start in _spread(max(1, len(flat) - size + 1), _SAMPLES):
        yield np.ascontiguousarray(flat[start : start + size]).tobytes()


def _spread(count: int, samples: int) -> list[int]:
    """Positions from 0 to ``count - 1``, both among them where there are several."""
    return sorted({k * (count - 1) // max(1, samples - 1) for k in range(samples)})
