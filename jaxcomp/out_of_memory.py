"""Out of memory, told by the weight that was worked on: how much was asked for, what to change.

XLA says RESOURCE_EXHAUSTED and a number of bytes, NumPy raises MemoryError; neither knows of
weights. Both come out of the ``with`` block around a piece of work as an ``OutOfMemoryError``.
"""

import contextlib
import math
import re
from collections.abc import Iterator, Sequence

import jax

from jaxcomp.errors import OutOfMemoryError

# How XLA's allocators and compilers and NumPy write what did not fit.
_ASKED = (
    r"[Oo]ut of memory (?:while trying to allocate|allocating) "
    r"(?P<asked>[\d.]+ ?[KMGTP]?i?B|\d+)\b",
    r"Used (?P<asked>[\d.]+\w*) of (?P<there>[\d.]+\w*) hbm",
    r"Attempting to (?:reserve|allocate) (?P<asked>[\d.]+\w*)",
    r"Unable to allocate (?P<asked>[\d.]+ \w+)",
)
_SMALLER_BATCHES = (
    "give the same calibration data in smaller batches, or fewer or shorter samples; or use "
    "compress(mesh=..), which splits batches over devices and keeps what waits in host memory (a "
    "mesh of one device does too)"
)
_SMALLER_WORK = (
    "split the work over more devices with compress(mesh=..), give a smaller block_size, use an "
    "algorithm that needs no Hessian for this path (rtn, smoothquant, wanda), or exclude it"
)
_MORE_DEVICES = (
    "split it over more devices with the sharding rules, drop arrays that these devices hold "
    "already, or store the model in fewer bits (`jaxcomp plan` says what fits)"
)


@contextlib.contextmanager
def evaluating(path: str, shape: Sequence[int], what: str) -> Iterator[None]:
    """Names a weight in an out-of-memory error of evaluation on the calibration data.

    Args:
      path: the weight's.
      shape: its shape.
      what: what is done, for the message: "evaluating ..".

    Yields:
      Nothing.

    Raises:
      OutOfMemoryError: the work in the block ran out of memory.
    """
    with _named(path, shape, what, _SMALLER_BATCHES):
        yield


@contextlib.contextmanager
def compressing(
    paths: Sequence[str], shapes: Sequence[Sequence[int]], in_size: int | None = None
) -> Iterator[None]:
    """Names the weights of an input group in an out-of-memory error of their algorithm.

    Args:
      paths: the weights'.
      shapes: their shapes.
      in_size: size of their Hessian, where there is one.

    Yields:
      Nothing.

    Raises:
      OutOfMemoryError: the work in the block ran out of memory.
    """
    what = "compressing it"
    if len(paths) > 1:
        others = ", ".join(f"{p} {tuple(s)}" for p, s in zip(paths[1:], shapes[1:], strict=True))
        what = f"compressing it together with {others}, which read the same input"
    if in_size is not None:
        what += f" (their Hessian alone is {bytes_text(4 * in_size * in_size)})"
    with _named(paths[0], shapes[0], what, _SMALLER_WORK):
        yield


@contextlib.contextmanager
def placing(path: str, shape: Sequence[int]) -> Iterator[None]:
    """Names a weight in an out-of-memory error of bringing it to devices.

    Args:
      path: the weight's.
      shape: its shape.

    Yields:
      Nothing.

    Raises:
      OutOfMemoryError: the work in the block ran out of memory.
    """
    with _named(path, shape, "placing it on devices", _MORE_DEVICES):
        yield


@contextlib.contextmanager
def _named(path: str, shape: Sequence[int], what: str, advice: str) -> Iterator[None]:
    try:
        yield
    except MemoryError as error:
        raise _translated(error, path, shape, what, advice, "host memory") from error
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        where = f"memory of {_devices()}"
        raise _translated(error, path, shape, what, advice, where) from error


def _translated(error, path, shape, what, advice, where) -> OutOfMemoryError:
    asked = asked_for(str(error))
    return OutOfMemoryError(
        f"{path} {tuple(shape)}: out of {where} while {what}: "
        + (f"{asked} were asked for" if asked else f"the system says {_first_line(error)!r}")
        + f"; {advice}"
    )


def asked_for(message: str) -> str | None:
    """How much memory an error message says was asked for.

    Args:
      message: of XLA or NumPy.

    Returns:
      The amount with its unit, or None if the message does not tell.

    Example:
      >>> asked_for("RESOURCE_EXHAUSTED: Out of memory allocating 4398046511104 bytes.")
      '4.00 TiB'
      >>> asked_for("Ran out of memory in memory space hbm. Used 21.90G of 15.48G hbm. Exceeded ..")
      '21.90G of 15.48G'
    """
    for pattern in _ASKED:
        found = re.search(pattern, message)
        if found:
            amount = found["asked"]
            text = bytes_text(int(amount)) if amount.isdigit() else amount
            there = found.groupdict().get("there")
            return f"{text} of {there}" if there else text
    return None


def bytes_text(count: int) -> str:
    """A number of bytes as people read it.

    Example:
      >>> bytes_text(822083584)
      '784 MiB'
    """
    unit = min(int(math.log2(max(count, 1))) // 10, 5)
    value = count / 1024**unit
    return f"{value:.{0 if value >= 100 or not unit else 2}f} " + ("B", *_UNITS)[unit]


_UNITS = ("KiB", "MiB", "GiB", "TiB", "PiB")


def _devices() -> str:
    """The default device, and how full it is where it tells."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    text = f"device {device.device_kind} ({device.platform})"
    if "bytes_limit" in stats:
        used = bytes_text(stats.get("bytes_in_use", 0))
        text += f", {used} of {bytes_text(stats['bytes_limit'])} in use,"
    return text


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
