"""Pruning in training: wraps an optimizer so that the parameters are exactly masked.

    tx = wrap(optax.adamw(1e-3), GradualMagnitude(), cubic(0.8, end=1000), every=100)
    state = tx.init(params)
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)       # dropped weights are 0.0, not nearly

In each step, with p the parameters, m the masks and h the hidden values of dropped weights:

    w  = where(m, p, h)            h = 0 unless the method is latent
    u  = tx.update(method.gradient(g), .., w)
    w' = w + u                     dropped weights stay 0 unless the method is latent
    m' = method.select(w', ..)     at the steps where masks are recomputed
    the update handed out:         u where kept, -p where dropped, w' - p where a weight returns

Since p + (-p) is exactly zero, whatever weight decay and momentum did is undone for dropped
weights. For methods that are not latent the optimizer's moments of dropped weights are set to zero
when masks change, so that a weight that returns starts afresh.

The wrapper must be the last link of a chain: what follows it would change the updates. It may stand
in ``optax.MultiSteps``, which then counts the steps and averages the gradients.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcomp.errors import JaxcompError
from jaxcomp.pruning.masks import check_sparsity
from jaxcomp.pruning.method import Layout, Method, Weight, evaluate
from jaxcomp.pruning.paths import choose, path_name


class PruningState(NamedTuple):
    """State of a wrapped optimizer.

    Attributes:
      count: steps taken.
      inner: the wrapped optimizer's state.
      masks: tree like the parameters, bool, None where nothing is pruned.
      latent: hidden values of dropped weights, 0 where kept; None for methods without.
      method: the method's own state of each weight, None where nothing is pruned.
    """

    count: jax.Array
    inner: Any
    masks: Any
    latent: Any
    method: Any


def wrap(
    tx: optax.GradientTransformation,
    method: Method,
    schedule: float | Callable[[Any], jax.Array] | None = None,
    *,
    include: str | Sequence[str] = "*",
    exclude: str | Sequence[str] = (),
    every: int = 1,
    begin: int = 0,
    end: int | None = None,
    stack: int | Callable[[str], int] = 0,
    input_axes: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that its parameters are pruned while they are trained.

    Args:
      tx: the optimizer.
      method: ``GradualMagnitude``, ``Taylor``, ``Movement``, ``SoftMovement``, ``SRSTE``, ``RigL``
        or another ``Method``.
      schedule: sparsity as a number or a function of the step; None for methods without. It is
        read to seven decimals, and counts are exact for that.
      include: rules for the paths to prune, globs or ``re:`` and a regular expression. ``"*"`` is
        every float leaf with two axes or more after its stack; others (norms, biases) must be
        named by a rule of their own.
      exclude: rules for paths to leave alone.
      every: masks are recomputed every so many steps.
      begin: step of the first recomputation.
      end: last step at which masks may be recomputed; None for no end.
      stack: leading axes of a leaf that index layers or experts, each a tensor of its own for the
        scopes "tensor" and "row"; a number, or a function of the path.
      input_axes: the axis or axes that a leaf's contraction sums over, which rows and N:M blocks
        run along; None for all but the last after the stack, as in Flax kernels ``(in, out)``; or
        a function of the path.

    Returns:
      The transformation. ``init`` raises for what cannot be done; ``update`` needs ``params``, and
      passes extra arguments on to ``tx``.

    Raises:
      JaxcompError: an option is out of its range; at ``init``, a rule matches nothing, or a weight
        does not fit the method.

    Example:
      >>> from jaxcomp.pruning import GradualMagnitude, get_masks, sparsity
      >>> params = {"kernel": jnp.array([[1.0, -3.0], [2.0, 0.5]]), "bias": jnp.ones(2)}
      >>> tx = wrap(optax.adamw(0.1), GradualMagnitude(), 0.5)
      >>> state = tx.init(params)
      >>> updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
      >>> optax.apply_updates(params, updates)["kernel"].tolist()[1][1]
      0.0
      >>> sparsity(get_masks(state))
      0.5
    """
    tx = optax.with_extra_args_support(tx)
    _check_options(method, schedule, every, begin, end)

    def layouts_of(flat):
        return _layouts(flat, include, exclude, stack, input_axes)

    def init(params):
        flat, structure = jax.tree_util.tree_flatten_with_path(params)
        layouts = layouts_of(flat)
        chosen = [layout for layout in layouts if layout is not None]
        method.check(chosen, schedule)
        leaves = [leaf for _, leaf in flat]
        weights = [
            Weight(layout, jnp.asarray(leaf), None, None, None)
            for layout, leaf in zip(layouts, leaves, strict=True)
            if layout is not None
        ]
        kept = method.initial_masks(weights, schedule)
        states = [method.init(w.layout, w.value) for w in weights]
        hidden = [jnp.where(m, 0, w.value) for m, w in zip(kept, weights, strict=True)]

        def tree(values):
            values = iter(values)
            return structure.unflatten([None if lay is None else next(values) for lay in layouts])

        return PruningState(
            jnp.zeros((), jnp.int32),
            tx.init(params),
            tree(kept),
            tree(hidden) if method.latent else None,
            tree(states),
        )

    def update(updates, state, params=None, **extra_args):
        if params is None:
            raise JaxcompError("pruning needs params: call tx.update(grads, state, params)")
        flat, structure = jax.tree_util.tree_flatten_with_path(params)
        layouts = layouts_of(flat)
        where = [i for i, layout in enumerate(layouts) if layout is not None]
        layouts = [layouts[i] for i in where]
        old = [leaf for _, leaf in flat]

        def pick(tree):
            leaves = structure.flatten_up_to(tree)
            return [leaves[i] for i in where]

        def merged(everything, some):
            everything = list(everything)
            for i, leaf in zip(where, some, strict=True):
                everything[i] = leaf
            return structure.unflatten(everything)

        mask, gradients = pick(state.masks), pick(updates)
        p = [old[i] for i in where]
        hidden = pick(state.latent) if method.latent else [jnp.zeros((), w.dtype) for w in p]
        value = [jnp.where(m, w, h) for m, w, h in zip(mask, p, hidden, strict=True)]
        steps, inner = tx.update(
            merged(
                structure.flatten_up_to(updates),
                [method.gradient(g, w, m) for g, w, m in zip(gradients, value, mask, strict=True)],
            ),
            state.inner,
            merged(old, value),
            **extra_args,
        )
        u = pick(steps)
        new = [optax.apply_updates(w, s) for w, s in zip(value, u, strict=True)]
        if not method.latent:
            new = [jnp.where(m, w, 0) for m, w in zip(mask, new, strict=True)]
        states = [
            method.accumulate(*row, state.count)
            for row in zip(layouts, pick(state.method), value, gradients, mask, strict=True)
        ]
        sparsity = None if schedule is None else evaluate(schedule, state.count)

        def choose_masks(columns, sparsity, count):
            rows = zip(layouts, *columns, strict=True)
            return method.select([Weight(*row) for row in rows], sparsity, count)

        def select(inner):
            kept = _on_automatic_axes(choose_masks, new)(
                (new, gradients, mask, states), sparsity, state.count
            )
            if not method.latent:
                inner = _forget(inner, flat, where, kept)
            return kept, inner

        since = state.count - begin
        due = (since >= 0) & (since % every == 0)
        if end is not None:
            due = (due & (state.count <= end)) | (state.count == end)
        kept, inner = jax.lax.cond(due, select, lambda inner: (mask, inner), inner)

        def handed_out(w, step, target, before, after):
            dtype = jnp.result_type(w.dtype, step.dtype)
            returned = target.astype(dtype) - w.astype(dtype)
            there = jnp.where(before, step.astype(dtype), returned)
            return jnp.where(after, there, -w.astype(dtype))

        rows = zip(p, u, new, mask, kept, strict=True)
        out = merged(structure.flatten_up_to(steps), [handed_out(*row) for row in rows])
        latent = None
        if method.latent:
            latent = [jnp.where(m, 0, w) for m, w in zip(kept, new, strict=True)]
            latent = merged([None] * len(old), latent)
        return out, PruningState(
            optax.safe_increment(state.count),
            inner,
            merged([None] * len(old), kept),
            latent,
            merged([None] * len(old), states),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _check_options(method, schedule, every, begin, end):
    if not isinstance(method, Method):
        raise JaxcompError(f"method {method!r} is no jaxcomp.pruning.Method, as GradualMagnitude()")
    if schedule is not None and not callable(schedule):
        check_sparsity(schedule)
    if every < 1 or begin < 0:
        raise JaxcompError(f"every {every} must be at least 1, and begin {begin} not negative")
    if end is not None and end < begin:
        raise JaxcompError(f"end {end} is before begin {begin}: masks would never be computed")


def _layouts(flat, include, exclude, stack, input_axes) -> list[Layout | None]:
    """For each leaf how to read it, or None where it is not pruned."""
    floats = {
        path_name(path): leaf
        for path, leaf in flat
        if jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.floating)
    }
    stacks = {name: stack(name) if callable(stack) else stack for name in floats}
    default = [name for name, leaf in floats.items() if jnp.ndim(leaf) - stacks[name] >= 2]
    on_request = [name for name in floats if name not in default]
    chosen = set(choose(default, on_request, include, exclude))
    layouts: list[Layout | None] = []
    for path, leaf in flat:
        name = path_name(path)
        if name not in chosen:
            layouts.append(None)
            continue
        shape, depth = tuple(jnp.shape(leaf)), stacks[name]
        if not 0 <= depth < len(shape):
            raise JaxcompError(
                f"{name} {shape}: {depth} stack axes leave no axis to prune; give stack as a "
                "function of the path, or exclude this path"
            )
        axes = input_axes(name) if callable(input_axes) else input_axes
        if axes is None:
            axes = range(depth, max(len(shape) - 1, depth + 1))
        elif isinstance(axes, int):
            axes = (axes,)
        if any(not -len(shape) <= a < len(shape) for a in axes):
            raise JaxcompError(f"{name} {shape}: there are no input axes {tuple(axes)}")
        axes = tuple(a % len(shape) for a in axes)
        if not axes or min(axes) < depth or len(set(axes)) != len(axes):
            raise JaxcompError(
                f"{name} {shape}: input axes {axes} must be different axes after the {depth} "
                "stack axes"
            )
        layouts.append(Layout(name, shape, depth, axes))
    return layouts


def _on_automatic_axes(function, like):
    """Hands explicit mesh axes to the compiler: selection reshapes and counts across shards."""
    shardings = [jax.typeof(x).sharding for x in like]
    explicit = tuple(dict.fromkeys(axis for s in shardings for axis in s.mesh.explicit_axes))
    if not explicit:
        return function
    return jax.sharding.auto_axes(function, axes=explicit, out_sharding=shardings)


def _forget(inner, flat, where, kept):
    """Zeroes the optimizer's memory of dropped weights.

    That is in the leaves of its state whose path ends in a weight's and that have its shape.
    """
    masks = dict(zip(where, kept, strict=True))
    owners = {tuple(path): i for i, (path, _) in enumerate(flat)}
    shapes = [jnp.shape(leaf) for _, leaf in flat]
    longest = max(len(path) for path in owners)

    def clear(path, leaf):
        for length in range(min(longest, len(path)), -1, -1):
            i = owners.get(tuple(path[len(path) - length :]))
            if i is not None and jnp.shape(leaf) == shapes[i]:
                if i in masks and jnp.issubdtype(leaf.dtype, jnp.floating):
                    return jnp.where(masks[i], leaf, jnp.zeros((), leaf.dtype))
                return leaf
        return leaf

    return jax.tree_util.tree_map_with_path(clear, inner)


def _states(state: Any) -> list[PruningState]:
    """All states of wrapped optimizers inside an optimizer's state, the outer ones first."""

    def is_ours(x):
        return isinstance(x, PruningState)

    found = [leaf for leaf in jax.tree.leaves(state, is_leaf=is_ours) if is_ours(leaf)]
    return [s for own in found for s in (own, *_states(own.inner))]


def _needed(state: Any) -> list[PruningState]:
    found = _states(state)
    if not found:
        raise JaxcompError("there is no state of jaxcomp.pruning.wrap in this optimizer state")
    return found


def get_masks(state: Any) -> Any:
    """The masks in an optimizer's state, wherever in a chain or ``MultiSteps`` they are.

    Args:
      state: optimizer state of, or around, ``wrap``.

    Returns:
      Tree like the parameters, bool, None where nothing is pruned; for ``apply_mask``, ``sparsity``
      and ``sparsity_counts``.

    Raises:
      JaxcompError: there are none.
    """

    def both(*masks):
        masks = [m for m in masks if m is not None]
        return None if not masks else masks[0] if len(masks) == 1 else jnp.all(jnp.array(masks), 0)

    trees = [s.masks for s in _needed(state)]
    return jax.tree.map(both, *trees, is_leaf=lambda x: x is None)


def latent_weights(state: Any, params: Any) -> Any:
    """The dense weights behind masked parameters, for methods that keep them.

    Args:
      state: optimizer state of, or around, ``wrap``.
      params: the masked parameters that go with it.

    Returns:
      The parameters with the hidden values of dropped weights put in; where a method keeps none
      they are zero.

    Raises:
      JaxcompError: there is no state of ``wrap``.
    """
    for own in _needed(state):
        if own.latent is not None:
            params = jax.tree.map(
                lambda m, h, p: p if m is None else jnp.where(m, p, h),
                own.masks,
                own.latent,
                params,
                is_leaf=lambda x: x is None,
            )
    return params
