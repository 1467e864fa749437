"""Checks of what the layer algorithms are given, each with an error that says what to do."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp import host
from jaxcomp.calibration import Unsummed
from jaxcomp.errors import JaxcompError
from jaxcomp.formats import grid
from jaxcomp.formats.spec import NM, Codebook, Element, Sparse
from jaxcomp.step import Layer
from jaxcomp.triangle import Triangle

CLIPPINGS = ("minmax", "mse", "percentile")


def _where(path: str) -> str:
    return f"{path}: " if path else ""


def _finite(a: Any) -> bool:
    if isinstance(a, jax.core.Tracer):
        return True
    if isinstance(a, Unsummed):  # Looked at when it is summed.
        return True
    if isinstance(a, Triangle):
        a = a.diagonal()
    # NumPy looks at the buffer where it is, without a compilation, when the array lives on the CPU.
    if host.is_whole(a):
        return not host.any_rows(lambda rows: ~np.isfinite(rows), a)
    return bool(jnp.isfinite(a).all())


def check_finite(a: Any, what: str) -> None:
    """Checks values that a caller passed in.

    Args:
      a: an array.
      what: its description, for the message.

    Raises:
      JaxcompError: there is NaN or infinity in it.
    """
    if not _finite(a):
        raise JaxcompError(f"{what} {tuple(a.shape)} hold NaN or infinite values")


def check_weight(w: Any, path: str = "") -> None:
    """Checks that a weight is a finite matrix or a stack of them.

    Args:
      w: ``(*stack, out, in)``.
      path: its name, for the message.

    Raises:
      JaxcompError: it is not.
    """
    if w.ndim < 2 or not jnp.issubdtype(w.dtype, jnp.floating):
        raise JaxcompError(
            f"{_where(path)}expected a float weight (.., out, in), got {w.dtype} {tuple(w.shape)}"
        )
    if not _finite(w):
        raise JaxcompError(
            f"{_where(path)}{tuple(w.shape)} holds NaN or infinite weights; repair the checkpoint "
            "or exclude this path"
        )


def check_hessian(h: Any, w: Any, path: str = "") -> None:
    """Checks that a Hessian is finite and fits a weight.

    Args:
      h: ``(in, in)`` or ``(*stack, in, in)``.
      w: ``(*stack, out, in)``.
      path: name of the weight, for the message.

    Raises:
      JaxcompError: it does not.
    """
    size = w.shape[-1]
    if tuple(h.shape) not in ((size, size), (*w.shape[:-2], size, size)):
        raise JaxcompError(
            f"{_where(path)}a weight {tuple(w.shape)} needs a Hessian ({size}, {size}) or one for "
            f"each element of its stack, got {tuple(h.shape)}"
        )
    if not _finite(h):
        raise JaxcompError(
            f"{_where(path)}the Hessian holds NaN or infinite values: activations overflowed in "
            "calibration; check the calibration data and the model's outputs, or exclude this path"
        )


def check_statistics(layer: Layer, field: str) -> None:
    """Checks that a layer came with a statistic.

    Args:
      layer: the layer.
      field: field of ``Statistics``.

    Raises:
      JaxcompError: it did not, or it holds NaN or infinite values.
    """
    value = None if layer.statistics is None else getattr(layer.statistics, field)
    if value is None:
        raise JaxcompError(
            f"{_where(layer.path)}this algorithm reads the {field} of the layer's inputs: it needs "
            "calibration data"
        )
    if not _finite(value):
        raise JaxcompError(
            f"{_where(layer.path)}the {field} of the inputs holds NaN or infinite values; check "
            "the calibration data and the model's outputs, or exclude this path"
        )


def check_choice(name: str, value: Any, choices: Sequence[Any], path: str = "") -> None:
    """Checks an option that has a fixed set of values.

    Args:
      name: the option.
      value: what was given.
      choices: what may be given.
      path: name of the weight, for the message.

    Raises:
      JaxcompError: it is none of them.
    """
    if value not in choices:
        options = ", ".join(repr(c) for c in choices)
        raise JaxcompError(f"{_where(path)}{name} {value!r} is none of {options}")


def check_format(
    fmt: Element, w: Any, mask: Any, nm: tuple[int, int] | None, path: str = ""
) -> None:
    """Checks that a format can hold a weight, under its mask.

    Args:
      fmt: element format.
      w: ``(*stack, out, in)``.
      mask: bool like ``w``, or None.
      nm: pattern of the mask, or None.
      path: name of the weight, for the message.

    Raises:
      JaxcompError: it cannot.
    """
    name = path or "weight"
    if not isinstance(fmt, Element):
        raise JaxcompError(
            f"{name}: {fmt!r} is no element format; use Int, Float or Codebook (sparsity is the "
            "matter of the pruning steps)"
        )
    grid.check(fmt, w.shape, name)
    if mask is None:
        return
    if tuple(mask.shape) != tuple(w.shape):
        raise JaxcompError(f"{name} {tuple(w.shape)}: the mask's shape is {tuple(mask.shape)}")
    if isinstance(fmt, Codebook):
        if fmt.kind == "kmeans" or (fmt.kind == "levels" and 0.0 not in fmt.levels):
            raise JaxcompError(
                f"{name} {tuple(w.shape)}: a pruned weight needs a grid with zero in it; use "
                "Int, Float "
                'or Codebook("nf4")'
            )
    else:
        grid.check(sparse_format(fmt, nm), w.shape, name)


def check_damping(damping: float, block_size: int, path: str = "") -> None:
    """Checks the options of the column solver.

    Args:
      damping: fraction of the mean diagonal.
      block_size: columns of a lazy block.
      path: name of the weight, for the message.

    Raises:
      JaxcompError: one is out of its range.
    """
    if not 0 <= damping < float("inf"):
        raise JaxcompError(f"{_where(path)}damping {damping} must be 0 or more; 0.01 is usual")
    if not isinstance(block_size, int) or block_size < 1:
        raise JaxcompError(f"{_where(path)}block_size {block_size} must be a whole number above 0")


def check_inputs(x: Any, w: Any, path: str = "") -> None:
    """Checks that calibration inputs are finite and fit a weight.

    Args:
      x: ``(tokens, in)`` or ``(*stack, tokens, in)``.
      w: ``(*stack, out, in)``.
      path: name of the weight, for the message.

    Raises:
      JaxcompError: they do not.
    """
    if x.ndim < 2 or x.shape[-1] != w.shape[-1] or x.shape[:-2] not in ((), w.shape[:-2]):
        raise JaxcompError(
            f"{_where(path)}a weight {tuple(w.shape)} needs inputs (tokens, {w.shape[-1]}), got "
            f"{tuple(x.shape)}"
        )
    if not _finite(x):
        raise JaxcompError(f"{_where(path)}the calibration inputs hold NaN or infinite values")


def sparse_format(values: Any, nm: tuple[int, int] | None) -> NM | Sparse:
    """The format of a pruned weight.

    Args:
      values: element format of kept values, or None.
      nm: (n, m) where the mask has that pattern, or None.

    Returns:
      ``NM`` or ``Sparse``.
    """
    return Sparse(values) if nm is None else NM(*nm, values)
