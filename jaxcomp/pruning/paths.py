"""Which leaves of a parameter tree a rule names: globs, or ``re:`` and a regular expression."""

from collections.abc import Sequence

import jax

from jaxcomp.errors import JaxcompError
from jaxcomp.rules import close_names, fits


def path_name(path: tuple) -> str:
    """A key path as text, as "layers/0/mlp/up/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def as_rules(rules: str | Sequence[str]) -> tuple[str, ...]:
    """One rule or several as a tuple."""
    return (rules,) if isinstance(rules, str) else tuple(rules)


def choose(
    default: Sequence[str],
    on_request: Sequence[str],
    include: str | Sequence[str],
    exclude: str | Sequence[str] = (),
) -> list[str]:
    """Applies rules to paths.

    Args:
      default: paths that the bare rule ``"*"`` stands for.
      on_request: further paths, taken only by another rule than the bare ``"*"``.
      include: rules of which one must match.
      exclude: rules of which none may match.

    Returns:
      The chosen paths, in the order given.

    Raises:
      JaxcompError: a rule matches nothing, or nothing is left.

    Example:
      >>> choose(["mlp/up", "head"], ["norm"], "*", exclude="head")
      ['mlp/up']
    """
    include, exclude = as_rules(include), as_rules(exclude)
    everything = [*default, *on_request]
    for which, rules in (("include", include), ("exclude", exclude)):
        for rule in rules:
            pool = default if rule == "*" and which == "include" else everything
            if not any(fits(rule, path) for path in pool):
                raise JaxcompError(
                    f"{which} rule {rule!r} matches none of {len(pool)} weights; the closest are "
                    f"{', '.join(close_names(rule, everything)) or '(there are none)'}; a rule is "
                    "matched against the whole path"
                )
    named = tuple(rule for rule in include if rule != "*")

    def taken(path, rules):
        return any(fits(r, path) for r in rules) and not any(fits(r, path) for r in exclude)

    chosen = [path for path in default if taken(path, include)]
    chosen += [path for path in on_request if taken(path, named)]
    if not chosen:
        raise JaxcompError(
            f"no weight is left: exclude {list(exclude)} removes all that include {list(include)} "
            "matches; loosen one of them"
        )
    return chosen
