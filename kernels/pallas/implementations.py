"""Choosing among the implementations of an operation, with the reasons of those that do not fit."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name

# Begins the names of values that say what made them, and no name that a model gives.
MARK = "jaxcomp.made_by:"
# Among what JAX keeps traces by: a function is traced again where this differs.
_ONLY_XLA = jax.make_user_context(False)


class Unsupported(NotImplementedError):
    """No implementation of an operation takes these operands on this chip."""


@contextlib.contextmanager
def only_xla() -> Iterator[None]:
    """No operation takes a kernel that it is not told to take.

    For what reads a traced function: the equations of a kernel say nothing of heads and features.
    """
    with _ONLY_XLA(True):
        yield


def choose(
    operation: str,
    reasons: Mapping[str, str | None],
    forced: str | None = None,
) -> str:
    """The implementation to run.

    Args:
      operation: name of the operation with the shapes and dtypes of its operands, for the message.
      reasons: name -> why it does not fit, or None where it does; best first.
      forced: the only one that may run, or None.

    Returns:
      The first that fits, or the forced one.

    Raises:
      Unsupported: none fits, or the forced one does not; the message holds all reasons.
      ValueError: the forced one does not exist.
    """
    if forced is not None and forced not in reasons:
        raise ValueError(
            f"{operation}: implementation {forced!r} is unknown; use None for the best one, or one "
            f"of {', '.join(reasons)}"
        )
    fitting = [name for name, reason in reasons.items() if not reason]
    if forced is None and _ONLY_XLA.value and "xla" in fitting:
        return "xla"
    if forced in fitting or (forced is None and fitting):
        return forced or fitting[0]
    told = "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason)
    which = (
        "no implementation fits" if forced is None else f"implementation {forced!r} does not fit"
    )
    raise Unsupported(f"{operation}: {which} ({told})")


class Note(NamedTuple):
    """What made a value of a traced function.

    Attributes:
      operation: such as "attention".
      implementation: the one that ran.
      reason: why none that comes before it did; empty where it is the first.
    """

    operation: str
    implementation: str
    reason: str


def noted(
    x: jax.Array, operation: str, chosen: str, reasons: Mapping[str, str | None]
) -> jax.Array:
    """A result that says in a traced function what made it; nothing is computed.

    Args:
      x: the result.
      operation: name of the operation.
      chosen: the implementation that made it.
      reasons: as for ``choose``.

    Returns:
      x, under a name of ``jax.ad_checkpoint.checkpoint_name`` that ``note_of`` reads.
    """
    before = itertools.takewhile(lambda item: item[0] != chosen, reasons.items())
    told = "; ".join(f"{name}: {reason}" for name, reason in before if reason)
    return checkpoint_name(x, f"{MARK}{operation}:{chosen}:{told}")


def note_of(name: str) -> Note | None:
    """What the name of a value says about its making; None of other names."""
    if not name.startswith(MARK):
        return None
    return Note(*name.removeprefix(MARK).split(":", 2))


def without_gradient(function: Callable, told: str) -> Callable:
    """A function of arrays that a kernel computes, and that says so where it is differentiated.

    Args:
      function: of pytrees of arrays.
      told: what has no gradient, and what to use instead.

    Returns:
      The function; to differentiate it raises ``Unsupported``.
    """
    wrapped = jax.custom_jvp(function)

    @wrapped.defjvp
    def _(primals, tangents):
        raise Unsupported(told)

    return wrapped


def first_order(
    operation: str, chosen: str, kernel: Callable, instead: str = "use implementation='xla'"
) -> Callable:
    """A kernel in what has gradients of its own, where only the first ones can be taken.

    Args:
      operation: its name.
      chosen: the implementation.
      kernel: of pytrees of arrays.
      instead: what has those of higher order.

    Returns:
      The kernel; to differentiate it, as gradients of higher order do, raises ``Unsupported``.
    """
    told = f"{operation} by {chosen} has first-order gradients only; {instead} for higher orders"
    return without_gradient(kernel, told)
