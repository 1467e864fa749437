"""Choosing among the implementations of an operation, with the reasons of those that do not fit."""

from collections.abc import Mapping


class Unsupported(NotImplementedError):
    """No implementation of an operation takes these operands on this chip."""


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
    if forced in fitting or (forced is None and fitting):
        return forced or fitting[0]
    told = "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason)
    which = (
        "no implementation fits" if forced is None else f"implementation {forced!r} does not fit"
    )
    raise Unsupported(f"{operation}: {which} ({told})")
