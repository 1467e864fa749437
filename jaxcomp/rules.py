"""Rules that name weights, values or layers by path, and what is close to one that names nothing.

A rule is a glob over the whole path: ``*`` matches any characters, ``/`` among them, ``?`` one
character, ``[ab]`` one of a set. A rule that starts with ``re:`` is a regular expression.
"""

import difflib
import fnmatch
import functools
import re
from collections.abc import Iterable

from jaxcomp.errors import RecipeError


@functools.lru_cache(maxsize=4096)
def compiled(rule: str) -> re.Pattern[str]:
    """A rule as a pattern.

    Raises:
      RecipeError: its regular expression is malformed.
    """
    if not rule.startswith("re:"):
        return re.compile(fnmatch.translate(rule))
    try:
        return re.compile(rule[3:])
    except re.error as error:
        raise RecipeError(f"rule {rule!r}: not a regular expression: {error}.") from error


def fits(rule: str, path: str) -> bool:
    """Whether a rule matches a whole path."""
    return compiled(rule).fullmatch(path) is not None


def close_names(rule: str, names: Iterable[str], count: int = 3) -> list[str]:
    """The names most like a rule, or with a part most like it.

    Args:
      rule: what was asked for.
      names: what there is.
      count: how many to give.

    Returns:
      Names, the closest first.

    Example:
      >>> close_names("*mlp/upp*", ["attention/query", "mlp/down", "mlp/up"], 1)
      ['mlp/up']
    """
    stem = rule.removeprefix("re:").strip("*^$./")

    def likeness(name):
        parts = (name, *name.split("/"))
        return max(difflib.SequenceMatcher(a=stem, b=part).ratio() for part in parts)

    return sorted(names, key=lambda name: -likeness(name))[:count]
