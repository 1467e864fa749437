"""Small arithmetic outside of ``jit``, in NumPy where its arrays live on the CPU.

Each ``jnp`` operation that runs by itself is compiled once a shape, which takes far longer than
the operation. And what a decision outside of ``jit`` reads is fetched whole by every process, so
that all of them decide alike.

Over the CPUs of several processes the heavy arithmetic is NumPy's too: each process does its own
rows or tokens by itself, and what they found is put together afterwards.
"""

import contextlib
import ctypes
import functools
import math
import mmap
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Elements that ``any_rows`` looks at together.
_ELEMENTS = 2**18
# Elements of arrays from which on it pays to give their memory back as soon as can be.
LARGE = 2**20
# Seconds in which JAX's threads let go of the arguments of what they have computed.
_MOMENT = 0.003


def is_on_host(*arrays: Any) -> bool:
    """Whether arrays are concrete, and all of them NumPy's or on the CPU of this process.

    Args:
      *arrays: what is computed with; None is passed over.

    Returns:
      True where ``np.asarray`` costs nothing for them: not for arrays over several devices, whose
      computations are to stay on these.
    """
    return all(map(_is_on_host, arrays))


def _is_on_host(array: Any) -> bool:
    if not isinstance(array, jax.Array):
        return True
    if isinstance(array, jax.core.Tracer) or not array.is_fully_addressable:
        return False
    devices = array.devices()
    return len(devices) == 1 and all(device.platform == "cpu" for device in devices)


def is_whole(*arrays: Any) -> bool:
    """Whether this process's CPU holds all of every array; others may hold copies.

    Args:
      *arrays: what is read; None is passed over.

    Returns:
      True where ``np.asarray`` costs nothing for them. What is computed from them is this
      process's alone: see ``alone``.
    """
    return all(_is_on_host(a) or (_on_cpus(a) and a.is_fully_replicated) for a in arrays)


def _on_cpus(array: Any) -> bool:
    """Whether an array lies on CPUs, of several processes."""
    if not isinstance(array, jax.Array) or isinstance(array, jax.core.Tracer):
        return False
    if array.is_fully_addressable:
        return False
    return all(device.platform == "cpu" for device in array.sharding.device_set)


def split_by_rows(array: Any) -> bool:
    """Whether the CPUs of several processes hold a matrix's rows, each of them whole.

    Args:
      array: ``(rows, ..)``.

    Returns:
      True where ``own_rows`` can be called for it.
    """
    if not _on_cpus(array) or not isinstance(array.sharding, NamedSharding):
        return False
    return all(entry is None for entry in array.sharding.spec[1:])


def own_rows(array: jax.Array) -> tuple[np.ndarray, dict[tuple[int, int], int]]:
    """The rows of a matrix that the devices of this process hold.

    Args:
      array: one that ``split_by_rows``.

    Returns:
      The rows; and by first row and end, where those of a device begin among them.
    """
    pieces = {_rows(s.index, array.shape): s.data for s in array.addressable_shards}
    pieces = {at: pieces[at] for at in sorted(pieces)}
    ends = np.cumsum([end - start for start, end in pieces])
    starts = dict(zip(pieces, (0, *map(int, ends[:-1])), strict=True))
    return np.concatenate([np.asarray(p) for p in pieces.values()]), starts


def from_own_rows(
    rows: np.ndarray, starts: dict[tuple[int, int], int], like: jax.Array
) -> jax.Array:
    """An array over several processes, from the rows that each has; inverse to ``own_rows``.

    Args:
      rows: this process's, ``(own rows, ..)``.
      starts: where those of a device begin.
      like: has as many rows, split in the same way.

    Returns:
      ``(rows, ..)``.
    """

    def piece(index):
        first, end = _rows(index, like.shape)
        return rows[starts[first, end] : starts[first, end] + end - first]

    sharding = NamedSharding(like.sharding.mesh, PartitionSpec(*like.sharding.spec[:1]))
    return jax.make_array_from_callback((like.shape[0], *rows.shape[1:]), sharding, piece)


def _rows(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[int, int]:
    return index[0].indices(shape[0])[:2]


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """What is computed inside is this process's own, whatever mesh is in use around it."""
    device = jax.local_devices(backend="cpu")[:1]
    with jax.set_mesh(Mesh(np.array(device), ("alone",))), jax.default_device(device[0]):
        yield


def numpy(*arrays: Any) -> Any:
    """Arrays as NumPy's if all are on the host, otherwise as they are.

    Args:
      *arrays: arrays, or None.

    Returns:
      As many of them; one alone is not in a list.
    """
    if is_on_host(*arrays):
        arrays = [None if a is None else np.asarray(a) for a in arrays]
    return arrays[0] if len(arrays) == 1 else list(arrays)


def call(function: Callable, *args: Any) -> Any:
    """Calls a function of operators and methods that NumPy and JAX arrays share.

    Args:
      function: what to compute.
      *args: trees of arrays.

    Returns:
      Its result, a tree of JAX arrays.
    """
    leaves, treedef = jax.tree.flatten(args)
    if is_on_host(*leaves):
        args = jax.tree.unflatten(treedef, [np.asarray(a) for a in leaves])
    return to_device(function(*args))


def any_rows(function: Callable, array: Any) -> bool:
    """Whether a test is true of any element, without an array of all answers.

    Args:
      function: of a NumPy array, gives as many booleans.
      array: of NumPy or JAX, fetched whole.

    Returns:
      The answer.

    Example:
      >>> any_rows(np.isnan, np.array([[1.0, 2.0], [3.0, np.nan]]))
      True
    """
    array = np.asarray(array)
    array = array if array.flags.c_contiguous else array.T
    rows = array.reshape(-1, max((1, *array.shape[-1:])))
    step = max(1, _ELEMENTS // rows.shape[-1])
    return any(bool(function(rows[at : at + step]).any()) for at in range(0, len(rows), step))


def empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An uninitialised NumPy array that JAX on the CPU takes as it is, without copying it.

    Args:
      shape: its shape.
      dtype: its dtype.

    Returns:
      The array, at an address that is a multiple of 64. It must not be written to any more when
      JAX has been given it.
    """
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    room = np.empty(size + 64, np.uint8)
    first = -room.ctypes.data % 64
    return room[first : first + size].view(dtype).reshape(shape)


def reserved(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Zeros for which the system gives memory page by page, as they are written to.

    Args:
      shape: its shape.
      dtype: its dtype.

    Returns:
      The array. What is only read takes nothing.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size < LARGE or not hasattr(mmap, "MAP_PRIVATE"):
        return np.zeros(shape, dtype)
    room = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):  # Of which one would span many rows.
        with contextlib.suppress(OSError):
            room.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(room, dtype).reshape(shape)


def to_device(tree: Any) -> Any:
    """NumPy arrays of a tree as JAX arrays; unlike ``jnp.asarray`` it compiles nothing."""
    return jax.tree.map(lambda a: a if isinstance(a, jax.Array) else jax.device_put(a), tree)


def settle(tree: Any) -> None:
    """Waits until arrays are computed, and lets go of what they were computed from.

    A CPU that computes holds its arguments and temporary arrays until a moment after the results
    are there; and of arguments that were NumPy's JAX lets go only when it is called the next time.

    Args:
      tree: arrays, or what has a shape in their place; for fewer than ``LARGE`` elements nothing is
        waited for but them.
    """
    jax.block_until_ready(tree)
    if sum(math.prod(np.shape(a)) for a in jax.tree.leaves(tree)) >= LARGE:
        _let_go()


def _let_go() -> None:
    time.sleep(_MOMENT)
    jax.device_put(np.int32(0))


def trim() -> None:
    """Gives freed memory back to the system where the C library would keep it.

    glibc keeps freed arrays of up to 32 MB for the next ones, in heaps from which it gives back by
    itself only what is at the end. Other C libraries are left alone.
    """
    _let_go()
    if (give_back := _malloc_trim()) is not None:
        give_back(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # Not glibc; not even a C library that is linked.
        return None


def fetch(tree: Any) -> Any:
    """Whole arrays as NumPy's, also where other processes hold parts of them.

    All processes that hold parts must call it, in the same order as their other computations.

    Args:
      tree: arrays of NumPy or JAX.

    Returns:
      The tree with NumPy arrays, the same on all processes.

    Example:
      >>> fetch({"a": jax.numpy.arange(3)})
      {'a': array([0, 1, 2], dtype=int32)}
    """
    leaves, treedef = jax.tree.flatten(tree)
    spread = {k: a for k, a in enumerate(leaves) if _is_spread(a)}
    if spread:  # All at once: one program, one exchange.
        replicated = {k: _replicated(a.sharding) for k, a in spread.items()}
        for k, a in jax.jit(_same, out_shardings=(replicated,))(spread)[0].items():
            leaves[k] = a
    return jax.tree.unflatten(treedef, [np.asarray(a) for a in leaves])


def _same(*arrays: Any) -> Any:
    return arrays


def _is_spread(array: Any) -> bool:
    """Whether ``np.asarray`` fails because this process lacks a part."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable:
        return False
    return not array.is_fully_replicated


def _replicated(sharding: Any) -> NamedSharding:
    if not isinstance(sharding, NamedSharding):
        raise TypeError(f"an array over several processes has no mesh but {sharding}")
    return NamedSharding(sharding.mesh, PartitionSpec())
