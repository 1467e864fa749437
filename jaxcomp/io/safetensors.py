"""safetensors files: memory-mapped reading, streamed writing.

The format: eight bytes with the little-endian length of a JSON header, the header
(``{name: {dtype, shape, data_offsets}}``), the tensors' bytes one after another.

Source: https://huggingface.co/docs/safetensors.
"""

import json
import math
import mmap
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jaxcomp.errors import JaxcompError, ModelError
from jaxcomp.io.stacked import Stacked

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LARGEST_HEADER = 100_000_000
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def read(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The tensors of one file as read-only views of a memory map; nothing is copied.

    Args:
      path: a .safetensors file.

    Returns:
      Arrays by name, in the order of the file's header.

    Raises:
      ModelError: the file is missing, truncated, or not a safetensors file.
    """
    path = pathlib.Path(path)
    try:
        size = path.stat().st_size
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    again = "download or write it again"
    if size < 8:
        raise ModelError(f"{path}: {size} bytes, too short for a safetensors file; {again}")
    raw = np.memmap(path, np.uint8, mode="r")
    length = int.from_bytes(raw[:8].tobytes(), "little")
    if length > LARGEST_HEADER:
        raise ModelError(f"{path}: not a safetensors file, its header would be {length} bytes long")
    if 8 + length > size:
        raise ModelError(
            f"{path}: truncated: the header alone is {length} bytes, the file {size}; {again}"
        )
    try:
        header = json.loads(raw[8 : 8 + length].tobytes())
    except ValueError as error:
        raise ModelError(f"{path}: the header is not JSON ({error}); {again}") from error
    if not isinstance(header, dict):
        raise ModelError(f"{path}: the header is not a JSON object; {again}")
    header.pop("__metadata__", None)
    data = np.asarray(raw)[8 + length :]
    return {name: _view(path, name, entry, data) for name, entry in header.items()}


def _view(path, name, entry, data):
    try:
        kind, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        whole = all(isinstance(n, int) and n >= 0 for n in (*shape, start, end))
    except (TypeError, KeyError, ValueError):
        whole = False
    if not whole:
        raise ModelError(
            f"{path}: tensor {name}: the header's entry {entry!r} is not {{dtype, shape, "
            "data_offsets}; write the file again"
        )
    if kind not in DTYPES:
        raise ModelError(
            f"{path}: tensor {name} has dtype {kind}, which cannot be read; known are "
            f"{', '.join(DTYPES)}"
        )
    dtype = DTYPES[kind]
    if end - start != math.prod(shape) * dtype.itemsize:
        raise ModelError(
            f"{path}: tensor {name}: shape {shape} of {kind} needs "
            f"{math.prod(shape) * dtype.itemsize} bytes, the header gives it {end - start}; "
            "write the file again"
        )
    if end > data.size:
        raise ModelError(
            f"{path}: truncated: tensor {name} ends at byte {end} of the data, the file has "
            f"{data.size}; download or write it again"
        )
    return data[start:end].view(dtype).reshape(shape)


def read_folder(folder: str | os.PathLike) -> dict[str, np.ndarray]:
    """All tensors of a model folder: one ``model.safetensors``, or shards with their index.

    Args:
      folder: a folder in Hugging Face layout.

    Returns:
      Arrays by name, views of memory maps.

    Raises:
      ModelError: there are no weights, or a shard or a tensor that the index names is missing.
    """
    folder = pathlib.Path(folder)
    index = folder / INDEX
    if not index.exists():
        if (folder / SINGLE).exists():
            return read(folder / SINGLE)
        other = sorted(p.name for p in folder.glob("*.bin"))
        hint = f"; {other[0]} is a PyTorch file, convert it to safetensors" if other else ""
        raise ModelError(f"{folder}: holds neither {SINGLE} nor {INDEX}{hint}")
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        shards = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index}: not an index with a weight_map; download it again") from error
    tensors = {shard: read(folder / shard) for shard in shards}
    for name, shard in weight_map.items():
        if name not in tensors[shard]:
            raise ModelError(
                f"{folder / shard}: tensor {name} is missing, which {INDEX} says is there; "
                "download both again"
            )
    return {name: tensors[shard][name] for name, shard in weight_map.items()}


def release(array: Any) -> None:
    """Lets the system drop the memory that reading a memory-mapped array has filled.

    The array stays valid: it is read from the file again when it is used again. Does nothing to
    arrays that are not views of a memory map.

    Args:
      array: what ``read`` returned, any view of it, or a ``Stacked`` of them.
    """
    if isinstance(array, Stacked):
        for part in array.parts:
            release(part)
        return
    root = array
    while isinstance(root, np.ndarray) and not isinstance(root.base, mmap.mmap):
        root = root.base
    if not isinstance(root, np.ndarray) or not hasattr(mmap, "MADV_DONTNEED") or array.size == 0:
        return
    low, high = np.lib.array_utils.byte_bounds(array)
    start = low - root.__array_interface__["data"][0]
    page = mmap.PAGESIZE
    # Pages shared with a neighbour are dropped too: they are clean, so nothing is lost.
    first = start // page * page
    root.base.madvise(mmap.MADV_DONTNEED, first, min(start + high - low, len(root.base)) - first)


def write(
    path: str | os.PathLike,
    tensors: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a safetensors file, one tensor at a time.

    The file appears under its name only when it is complete.

    Args:
      path: the file.
      tensors: arrays by name.
      metadata: strings for the header.

    Raises:
      JaxcompError: the file cannot be written, or a dtype cannot be stored.
    """
    path = pathlib.Path(path)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in sorted(tensors):
        array = tensors[name]
        dtype = np.dtype(array.dtype)
        if dtype not in NAMES:
            raise JaxcompError(
                f"{path}: tensor {name} has dtype {dtype}, which safetensors cannot store; "
                "pack it into uint8 first"
            )
        size = math.prod(array.shape) * dtype.itemsize
        header[name] = {
            "dtype": NAMES[dtype],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(path.name + ".partial")
    try:
        with open(temporary, "wb") as f:
            f.write(len(text).to_bytes(8, "little"))
            f.write(text)
            for name in sorted(tensors):
                value = np.ascontiguousarray(np.asarray(tensors[name])).reshape(-1)
                f.write(value.view(np.uint8).data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise JaxcompError(
            f"{path}: cannot be written ({error.strerror}); it needs {8 + len(text) + offset} "
            "bytes in a folder that may be written"
        ) from error
