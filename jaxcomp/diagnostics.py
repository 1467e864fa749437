"""Finding where a training run left the finite numbers."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.dispatch import Dispatcher, arrays_of
from jaxcomp.errors import JaxcompError
from jaxcomp.graph import interpret, trace
from jaxcomp.graph.program import Program, hooks
from jaxcomp.graph.trace import leaf_paths


@dataclasses.dataclass(frozen=True)
class NonFinite:
    """A place that holds NaN or infinite values.

    Attributes:
      kind: "parameter", "input" or "result" of a matmul or look-up.
      path: name of the weight.
      loop: which iterations of the loops around it, outermost first, for the first that does.
    """

    kind: str
    path: str
    loop: tuple[int, ...] = ()

    def __str__(self) -> str:
        where = f", iteration {', '.join(map(str, self.loop))} of its loop" if self.loop else ""
        kinds = {"parameter": "the parameter", "input": "the input of", "result": "the result of"}
        return f"{kinds[self.kind]} {self.path}{where}"


class TrainingError(JaxcompError):
    """A training run that cannot go on."""


def find_nonfinite(apply: Callable, params: Any, *inputs: Any, **kwargs: Any) -> list[NonFinite]:
    """Evaluates a model and lists where NaN or infinite values are.

    Args:
      apply: a pure function ``apply(params, *inputs)``.
      params: parameter tree, dense or compressed.
      *inputs: of the model.
      **kwargs: keyword arguments of the model.

    Returns:
      Parameters first, then inputs and results of matmuls, each at its first iteration that is not
      finite, in the order in which these run; empty when all is finite. What is masked away on
      purpose (scores at minus infinity) is no matmul's result.

    Example:
      >>> params = {"up": jnp.ones((2, 2)), "down": jnp.ones((2, 1))}
      >>> apply = lambda p, x: jnp.log(x @ p["up"] - 3) @ p["down"]
      >>> print(*find_nonfinite(apply, params, jnp.ones((1, 2))), sep="; ")
      the input of down; the result of down
    """
    named, _ = leaf_paths(params)
    found = [
        NonFinite("parameter", path)
        for path, leaf in named
        if not _all_finite(jax.tree.leaves(leaf))
    ]
    graph = trace(apply, params, *inputs, **kwargs)
    sites = [(op.site, loops) for op, loops in hooks(graph.program) if op.kind == "site"]
    start = {
        site.id: {"input": jnp.ones(loops, bool), "result": jnp.ones(loops, bool)}
        for site, loops in sites
    }
    arguments = arrays_of(named, inputs, kwargs)
    run = jax.jit(lambda arguments: interpret(graph.program, arguments, _Checker(), start)[1])
    finite = jax.tree.map(np.asarray, run(arguments))
    broken = []
    for place, site in _places(graph.program):
        for last, kind in enumerate(("input", "result")):
            bad = np.argwhere(~finite[site.id][kind])
            if len(bad):
                loop = tuple(map(int, bad[0]))
                iterations = iter(loop)
                when = [next(iterations) if k is None else k for k in place]
                broken.append(((*when, last), NonFinite(kind, site.path, loop)))
    return found + [item for _, item in sorted(broken, key=lambda pair: pair[0])]


def _places(program: Program, before: tuple = ()):
    """Sites with the order in which they run: indices of operations, None for an iteration."""
    for k, op in enumerate(program.ops):
        if op.kind == "site":
            yield (*before, k), op.site
        for body in op.bodies:
            yield from _places(body, (*before, k, None) if op.kind == "scan" else (*before, k))


def check_finite(
    loss: Any, step: int, apply: Callable, params: Any, *inputs: Any, **kwargs: Any
) -> None:
    """Raises an error that says where the numbers broke when a loss is NaN or infinite.

    Call it on the host between steps; it costs nothing while the loss is finite.

    Args:
      loss: scalar.
      step: which step it is of.
      apply: the model function that the loss came from.
      params: the parameters it was called with.
      *inputs: its inputs.
      **kwargs: its keyword arguments.

    Raises:
      TrainingError: the loss is not finite.
    """
    if np.isfinite(np.asarray(loss)):
        return
    found = find_nonfinite(apply, params, *inputs, **kwargs)
    if not found:
        where = "all parameters and matmuls of the model are finite, so look at the loss itself"
    elif found[0].kind == "parameter":
        where = f"{found[0]} is no longer finite, so an earlier update broke it"
    else:
        where = f"the first that is not finite is {found[0]}"
    raise TrainingError(
        f"the loss is {float(np.asarray(loss))} at step {step}: {where}; lower the learning rate, "
        "clip gradients (optax.clip_by_global_norm), or keep this place in float32"
    )


def _all_finite(leaves: list) -> bool:
    floats = [a for a in leaves if jnp.issubdtype(getattr(a, "dtype", np.int32), jnp.floating)]
    return all(bool(_finite(jnp.asarray(a))) for a in floats)


def _finite(a: jax.Array) -> jax.Array:
    # Some small float types have no isfinite of their own.
    return jnp.isfinite(a.astype(jnp.promote_types(a.dtype, jnp.float32))).all()


class _Checker(Dispatcher):
    """Records whether inputs and results of sites are finite."""

    def site(self, op, operands, leaf, state):
        """Evaluates a site."""
        results, _ = super().site(op, operands, leaf, None)
        seen = jnp.ones((), bool)
        if op.site.is_contraction:
            seen = _finite(operands[1 - op.site.operand])
        return results, {"input": seen, "result": _finite(results[0])}
