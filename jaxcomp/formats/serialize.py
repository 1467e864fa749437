"""Compressed arrays as named arrays and a JSON-able structure, and back, bit for bit.

The structure holds classes by name, static fields, and for every array its name, dtype and shape. A
container that cannot hold a dtype (fp8, int4 in safetensors' NumPy loader) may store the same bytes
as uint8: ``from_arrays`` views them as the dtype that the structure names.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import msgspec
import numpy as np

from jaxcomp.errors import JaxcompError
from jaxcomp.formats import spec
from jaxcomp.formats.affine import Affine
from jaxcomp.formats.codebook import CodebookPart
from jaxcomp.formats.compressed import CompressedArray
from jaxcomp.formats.dense import Dense, DenseColumns, LowRankPart
from jaxcomp.formats.floating import FloatPart
from jaxcomp.formats.sparse import NMPart, SparsePart
from jaxcomp.formats.transforms import InputQuant, InputScale
from jaxcomp.step import Activation

VERSION = 1
PARTS = {
    cls.__name__: cls
    for cls in (
        Affine,
        CodebookPart,
        Dense,
        DenseColumns,
        FloatPart,
        InputQuant,
        InputScale,
        LowRankPart,
        NMPart,
        SparsePart,
    )
}
SPECS = {
    cls.__name__: cls
    for cls in (
        spec.Int,
        spec.Float,
        spec.Codebook,
        spec.NM,
        spec.Sparse,
        spec.LowRank,
        Activation,
    )
}


def to_arrays(ca: CompressedArray) -> tuple[dict[str, Any], dict[str, Any]]:
    """Takes a compressed array apart.

    Args:
      ca: the compressed array.

    Returns:
      Arrays by name ("0/values", "0/part/scale", ..) as they are held, and the structure: dicts,
      lists, strings, numbers, booleans and None only.
    """
    arrays: dict[str, Any] = {}
    parts = [_part_out(part, str(i), arrays) for i, part in enumerate(ca.parts)]
    structure = {
        "version": VERSION,
        "dtype": jnp.dtype(ca.dtype).name,
        "dims": list(ca.dims),
        "out_axes": list(ca.out_axes),
        "in_axes": list(ca.in_axes),
        "stack_axes": list(ca.stack_axes),
        "parts": parts,
    }
    return arrays, structure


def _part_out(part: Any, prefix: str, arrays: dict[str, Any]) -> dict[str, Any]:
    name = type(part).__name__
    if PARTS.get(name) is not type(part):
        raise JaxcompError(f"a part of type {name} cannot be saved; known parts: {sorted(PARTS)}.")
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        at = f"{prefix}/{field.name}"
        if field.metadata.get("static"):
            fields[field.name] = _static_out(value)
        elif value is None:
            fields[field.name] = None
        elif dataclasses.is_dataclass(value):
            fields[field.name] = _part_out(value, at, arrays)
        else:
            arrays[at] = value
            fields[field.name] = {
                "array": at,
                "dtype": jnp.dtype(value.dtype).name,
                "shape": list(value.shape),
            }
    return {"part": name, "fields": fields}


def _static_out(value: Any) -> Any:
    if isinstance(value, msgspec.Struct):
        return {"spec": type(value).__name__, "value": msgspec.to_builtins(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise JaxcompError(f"a static field of type {type(value).__name__} cannot be saved.")


def from_arrays(arrays: dict[str, Any], structure: dict[str, Any]) -> CompressedArray:
    """Puts a compressed array together, the inverse of ``to_arrays``.

    Args:
      arrays: NumPy or JAX arrays by name; each of the dtype that the structure names, or uint8 of
        the same bytes. They are kept as they are (memory-mapped ones stay so).
      structure: what ``to_arrays`` returned, also after JSON.

    Returns:
      The compressed array.

    Raises:
      JaxcompError: for another version, an unknown part, or an array that is missing or of the
      wrong
        shape.
    """
    version = structure.get("version")
    if version != VERSION:
        raise JaxcompError(
            f"compressed arrays of version {version} cannot be read, only {VERSION}; "
            "compress again or use the release of jaxcomp that wrote them."
        )
    return CompressedArray(
        tuple(_part_in(part, arrays) for part in structure["parts"]),
        dtype=jnp.dtype(structure["dtype"]),
        **{name: tuple(structure[name]) for name in ("dims", "out_axes", "in_axes", "stack_axes")},
    )


def _part_in(described: dict[str, Any], arrays: dict[str, Any]) -> Any:
    name = described.get("part")
    if name not in PARTS:
        raise JaxcompError(f"unknown part {name!r}; this release knows {sorted(PARTS)}.")
    return PARTS[name](**{k: _field_in(v, arrays) for k, v in described["fields"].items()})


def _field_in(value: Any, arrays: dict[str, Any]) -> Any:
    if not isinstance(value, dict):
        return value
    if "part" in value:
        return _part_in(value, arrays)
    if "spec" in value:
        return msgspec.convert(value["value"], SPECS[value["spec"]])
    return _array_in(value, arrays)


def _array_in(described: dict[str, Any], arrays: dict[str, Any]) -> Any:
    name, shape = described["array"], tuple(described["shape"])
    dtype = jnp.dtype(described["dtype"])
    if name not in arrays:
        raise JaxcompError(f"array {name!r} {shape} is missing; the checkpoint is incomplete.")
    array = arrays[name]
    if array.dtype != dtype and array.dtype == np.uint8:
        array = np.ascontiguousarray(array)
        if array.nbytes == dtype.itemsize * int(np.prod(shape)):
            array = array.reshape(-1).view(dtype).reshape(shape)
    if array.dtype != dtype or tuple(array.shape) != shape:
        raise JaxcompError(
            f"array {name!r} is {array.dtype} {tuple(array.shape)}, but {dtype.name} {shape} was "
            "saved; the checkpoint is damaged or belongs to another model."
        )
    return array
