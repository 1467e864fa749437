"""L1 and group lasso: penalties, and proximal steps that reach exact zeros.

    L1:          sum |w|,            prox: sign(w) max(|w| - a, 0)
    group lasso: sum_g c_g ||w_g||₂, prox: w_g max(1 - a c_g / ||w_g||, 0),  c_g = sqrt(|g|)

with a the learning rate times the strength. As optax transformations the proximal steps come last
in a chain: they see the update that the optimizer made, and change it so that the new parameters
are the proximal point of what it would have made of them.

    tx = optax.chain(optax.sgd(0.1), proximal_l1(1e-3, learning_rate=0.1))

Differs from the papers in: with an optimizer that scales each weight for itself (Adam) the step is
the proximal operator in the plain metric, not in the optimizer's.

Source: Tibshirani 1996 for L1; Yuan & Lin, "Model selection and estimation in regression with
grouped variables", 2006; proximal operators: Parikh & Boyd, "Proximal algorithms", section 6.5.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcomp.errors import JaxcompError
from jaxcomp.pruning.blocks import check_coupled, spread, unit_norms, unit_size
from jaxcomp.pruning.paths import choose, close_names, path_name


def _wide(x):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def l1_penalty(tree: Any) -> jax.Array:
    """Sum of magnitudes of all leaves.

    Args:
      tree: pytree of arrays.

    Returns:
      Scalar; its subgradient at zero is zero.

    Example:
      >>> float(l1_penalty({"a": jnp.array([1.0, -2.0]), "b": jnp.array(3.0)}))
      6.0
    """
    # Not abs, whose slope at zero is 1 in JAX.
    return sum((_wide(leaf) * jnp.sign(_wide(leaf))).sum() for leaf in jax.tree.leaves(tree))


def group_lasso_penalty(arrays: Any, units: Any, size_weighted: bool = True) -> jax.Array:
    """Sum over units of the norm of their weights.

    Args:
      arrays: an array, or a sequence of arrays whose units are coupled.
      units: an axis, axes or ``Units`` for each array.
      size_weighted: multiply each norm by the square root of the unit's number of weights.

    Returns:
      Scalar; its gradient at a unit of zeros is zero.

    Raises:
      JaxcompError: the arrays have different units.

    Example:
      >>> float(group_lasso_penalty(jnp.array([[3.0, 0.0], [4.0, 0.0]]), -1, size_weighted=False))
      5.0
    """
    arrays, units = _as_lists(arrays, units)
    zero = unit_norms([jax.lax.stop_gradient(a) for a in arrays], units) == 0
    # The square root's slope at zero is infinite: units of zeros are set to one before it.
    safe = [jnp.where(spread(zero, a.shape, u), 1, a) for a, u in zip(arrays, units, strict=True)]
    return _factor(arrays, units, size_weighted) * jnp.where(zero, 0, unit_norms(safe, units)).sum()


def _as_lists(arrays, units):
    return ([arrays], [units]) if hasattr(arrays, "shape") else (list(arrays), list(units))


def _factor(arrays, units, size_weighted):
    if not size_weighted:
        return 1.0
    return math.sqrt(sum(unit_size(a.shape, u) for a, u in zip(arrays, units, strict=True)))


def soft_threshold(w: jax.Array, amount: float | jax.Array) -> jax.Array:
    """The proximal operator of ``amount * |w|``.

    Args:
      w: any shape.
      amount: how far each weight moves towards zero, not negative.

    Returns:
      argmin_x 1/2 ||x - w||² + amount ||x||_1, of the shape and dtype of ``w``.

    Example:
      >>> soft_threshold(jnp.array([-3.0, 0.5, 2.0]), 1.0).tolist()
      [-2.0, 0.0, 1.0]
    """
    x = _wide(w)
    return jnp.where(jnp.abs(x) > amount, x - jnp.sign(x) * amount, 0).astype(w.dtype)


def group_soft_threshold(
    arrays: Any, amount: float | jax.Array, units: Any, size_weighted: bool = True
) -> Any:
    """The proximal operator of ``amount`` times the group lasso penalty.

    Args:
      arrays: an array, or a sequence of arrays whose units are coupled.
      amount: how far the norm of a unit shrinks, before the factor of its size.
      units: an axis, axes or ``Units`` for each array.
      size_weighted: as in ``group_lasso_penalty``.

    Returns:
      The array or arrays, units whose norm is at most the amount exactly zero.

    Raises:
      JaxcompError: the arrays have different units.

    Example:
      >>> w = jnp.array([[3.0, 0.1], [4.0, 0.1]])
      >>> group_soft_threshold(w, 2.5, -1, size_weighted=False).tolist()
      [[1.5, 0.0], [2.0, 0.0]]
    """
    single = hasattr(arrays, "shape")
    arrays, units = _as_lists(arrays, units)
    norms = unit_norms(arrays, units)
    amount = amount * _factor(arrays, units, size_weighted)
    shrink = jnp.where(norms > amount, 1 - amount / jnp.where(norms > 0, norms, 1), 0)
    moved = [
        jnp.where(spread(norms > amount, a.shape, u), _wide(a) * spread(shrink, a.shape, u), 0)
        .astype(a.dtype)
        for a, u in zip(arrays, units, strict=True)
    ]  # fmt: skip
    return moved[0] if single else moved


class ProximalState(NamedTuple):
    """State of a proximal transformation.

    Attributes:
      count: steps taken.
    """

    count: jax.Array


Number = float | jax.Array | Callable[[Any], jax.Array]


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, (int, float)) and not 0 <= value < math.inf:
        raise JaxcompError(f"{name} {value} must be a number that is not negative, or a schedule")


def _proximal(strength: Number, learning_rate: Number, prox, check):
    """A transformation that ends each step with ``prox(names, new values, amount)``."""
    _check_number("strength", strength)
    _check_number("learning_rate", learning_rate)

    def init(params):
        flat, _ = jax.tree_util.tree_flatten_with_path(params)
        check({path_name(path): leaf for path, leaf in flat})
        return ProximalState(jnp.zeros((), jnp.int32))

    def update(updates, state, params=None, **extra_args):
        del extra_args
        if params is None:
            raise JaxcompError("a proximal step needs params: call tx.update(grads, state, params)")
        flat, structure = jax.tree_util.tree_flatten_with_path(params)
        old = {path_name(path): leaf for path, leaf in flat}
        steps = dict(zip(old, structure.flatten_up_to(updates), strict=True))
        rate, price = (
            value(state.count) if callable(value) else value for value in (learning_rate, strength)
        )
        chosen = check(old)
        new = {
            name: _wide(old[name]) + steps[name].astype(_wide(old[name]).dtype) for name in chosen
        }
        moved = prox(new, rate * price)
        for name, value in moved.items():
            p = old[name]
            # Minus p is exact, so that zeros are; rounding the difference would not always be.
            change = jnp.where(value == 0, -_wide(p), steps[name] + (value - new[name]))
            steps[name] = change.astype(jnp.result_type(steps[name].dtype, p.dtype))
        return (
            structure.unflatten(list(steps.values())),
            ProximalState(optax.safe_increment(state.count)),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _selected(params, include, exclude):
    floats = {n: p for n, p in params.items() if jnp.issubdtype(p.dtype, jnp.floating)}
    default = [n for n, p in floats.items() if p.ndim > 1]
    return choose(default, [n for n in floats if n not in default], include, exclude)


def proximal_l1(
    strength: Number,
    learning_rate: Number = 1.0,
    *,
    include: str | Sequence[str] = "*",
    exclude: str | Sequence[str] = (),
) -> optax.GradientTransformationExtraArgs:
    """Soft-thresholds the parameters after each update.

    Args:
      strength: factor of the L1 penalty, a number or a schedule of the step.
      learning_rate: the optimizer's, a number or a schedule; weights shrink by
        ``learning_rate * strength`` a step.
      include: rules for paths; ``"*"`` is every float leaf of two axes or more.
      exclude: rules for paths to leave out.

    Returns:
      A transformation to put last in a chain.

    Raises:
      JaxcompError: a number is negative; at ``init``, a rule matches nothing.

    Example:
      >>> tx = optax.chain(optax.sgd(1.0), proximal_l1(0.5))
      >>> w = jnp.array([[2.0, 0.25]])
      >>> updates, _ = tx.update(jnp.zeros_like(w), tx.init(w), w)
      >>> optax.apply_updates(w, updates).tolist()
      [[1.5, 0.0]]
    """

    def check(params):
        return _selected(params, include, exclude)

    def prox(values, amount):
        return {name: soft_threshold(value, amount) for name, value in values.items()}

    return _proximal(strength, learning_rate, prox, check)


def proximal_group_lasso(
    strength: Number,
    learning_rate: Number = 1.0,
    axis: Any = -1,
    *,
    groups: Sequence[Mapping[str, Any]] | None = None,
    size_weighted: bool = True,
    include: str | Sequence[str] = "*",
    exclude: str | Sequence[str] = (),
) -> optax.GradientTransformationExtraArgs:
    """Shrinks the norms of units after each update, and drops the units that reach zero.

    Args:
      strength: factor of the penalty, a number or a schedule of the step.
      learning_rate: the optimizer's, a number or a schedule.
      axis: the unit axis, axes or ``Units`` of every chosen leaf.
      groups: instead of ``axis`` and rules, units that span leaves: for each set of units the
        paths of its leaves with their unit axis, axes or ``Units``.
      size_weighted: multiply the strength by the square root of a unit's number of weights.
      include: rules for paths; ``"*"`` is every float leaf of two axes or more.
      exclude: rules for paths to leave out.

    Returns:
      A transformation to put last in a chain.

    Raises:
      JaxcompError: a number is negative; at ``init``, a rule or path matches nothing, a leaf is in
        two groups, or units do not agree.

    Example:
      >>> neurons = {"up": -1, "bias": -1, "down": -2}
      >>> tx = optax.chain(optax.sgd(0.1), proximal_group_lasso(1e-2, 0.1, groups=[neurons]))
    """
    if groups is not None:
        named = [path for group in groups for path in group]
        twice = {path for path in named if named.count(path) > 1}
        if twice:
            raise JaxcompError(f"{sorted(twice)[0]} is in more than one group; name it once")

    def sets(params):
        if groups is not None:
            return [dict(group) for group in groups]
        return [{name: axis} for name in _selected(params, include, exclude)]

    def check(params):
        for group in sets(params):
            for name in group:
                if name not in params:
                    raise JaxcompError(
                        f"group lasso: there is no weight {name!r}; the closest are "
                        f"{', '.join(close_names(name, params))}"
                    )
            check_coupled([params[n].shape for n in group], list(group.values()), list(group))
        return [name for group in sets(params) for name in group]

    def prox(values, amount):
        moved = {}
        for group in sets(values):
            arrays = [values[name] for name in group]
            result = group_soft_threshold(arrays, amount, list(group.values()), size_weighted)
            moved.update(zip(group, result, strict=True))
        return moved

    return _proximal(strength, learning_rate, prox, check)
