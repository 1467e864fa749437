"""``qat``: a model function that computes as it will when quantized, for training loops.

    qat = jc.qat(apply, recipe)
    state = qat.init(params, *inputs)
    out, state = qat.apply(params, state, *inputs)        in the loss; differentiable
    compressed = qat.convert(params, state)               for jc.dispatch(apply)

The weights stay in full precision in ``params``; ``state.learned`` holds what is trained beside
them (step sizes, offsets, clipping levels), ``state.ranges`` the moving averages of activations.
All of it is one pytree: it jits, shards and checkpoints like any.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp import formats
from jaxcomp.dispatch import Dispatcher, arrays_of
from jaxcomp.errors import JaxcompError, RecipeError
from jaxcomp.formats import CompressedArray, is_compressed
from jaxcomp.graph import Graph, _compat, interpret
from jaxcomp.graph.latent import Latent
from jaxcomp.graph.program import Op, hooks
from jaxcomp.graph.sites import features, from_tokens, to_tokens
from jaxcomp.graph.trace import leaf_paths
from jaxcomp.qat_plan import Input, Weight, plan_training
from jaxcomp.quantization.trainable import weight_quantizer
from jaxcomp.quantization.training_matmul import training_matmul
from jaxcomp.recipe import Recipe

Schedule = Callable[[jax.Array], Any]


@dataclasses.dataclass(frozen=True)
class State:
    """What training keeps beside the parameters.

    Attributes:
      learned: {"weights": {path: {..}}, "inputs": {key: {..}}}: trained with the parameters.
      ranges: key -> moving averages of an input's range.
      step: int32, calls of ``apply`` so far: what schedules are evaluated at.
      plan: what is quantized how (not an array).
    """

    learned: Any
    ranges: Any
    step: Any
    plan: tuple[Weight, ...] = ()

    def replace(self, **changes: Any) -> "State":
        """A copy with some fields replaced."""
        return dataclasses.replace(self, **changes)


jax.tree_util.register_dataclass(
    State, data_fields=["learned", "ranges", "step"], meta_fields=["plan"]
)


class QAT:
    """``init``, ``apply`` and ``convert`` of a model function under quantization-aware training."""

    def __init__(
        self,
        apply: Callable,
        recipe: Recipe,
        *,
        enabled: Schedule | None = None,
        bits: Schedule | None = None,
        observe: Schedule | None = None,
    ):
        self.function = apply
        self.recipe = recipe
        self.schedules = {"enabled": enabled, "bits": bits, "observe": observe}
        for step in recipe.steps:
            weight_quantizer(step)

    def init(self, params: Any, *inputs: Any, **kwargs: Any) -> State:
        """The state before training.

        Args:
          params: parameter tree; learned step sizes start from its values.
          *inputs: as for ``apply``. Arrays start the ranges of static activations; shapes are
            enough where no range is learned.
          **kwargs: keyword arguments of the model function.

        Returns:
          The state.

        Raises:
          JaxcompError: a rule matches nothing, a format does not fit a weight, or learned ranges
            get no data to start from.
        """
        graph, weights, rules = self._plan(params, inputs, kwargs)
        named, _ = leaf_paths(params)
        leaves = dict(named)
        learned = {
            w.path: w.quantizer.init(Latent(leaves[w.path], {}, w.path, w.layout).matrix())
            for w in weights.values()
            if w.quantizer is not None
        }
        learned = {path: tree for path, tree in learned.items() if tree}
        seen = _observed(graph, rules, arrays_of(named, inputs, kwargs))
        ranges = {
            r.key: {k: seen[r.key][k] for k in ("low", "high", "seen")}
            for r in rules.values()
            if r.quantizer.observes
        }
        for rule in rules.values():
            if rule.quantizer.learns:
                _check_seen(rule, seen[rule.key], "init")
        inputs_learned = {
            r.key: r.quantizer.start(seen[r.key]) for r in rules.values() if r.quantizer.learns
        }
        return State(
            {"weights": learned, "inputs": inputs_learned},
            ranges,
            jnp.zeros((), jnp.int32),
            tuple(weights.values()),
        )

    def apply(self, params: Any, state: State, *inputs: Any, **kwargs: Any) -> tuple[Any, State]:
        """Evaluates the model as if quantized.

        Static ranges are those of the state that comes in, so the result is that of the model which
        ``convert`` would make of it; only a range that has seen nothing uses the batch itself. For
        evaluation, use the result and drop the new state.

        Args:
          params: parameter tree, full precision. Leaves may be compressed: those run as they are.
          state: from ``init`` or the call before.
          *inputs: of the model function.
          **kwargs: keyword arguments of the model function.

        Returns:
          The model's result, and the state with ranges and step brought up to date.
        """
        graph, weights, rules = self._plan(params, inputs, kwargs)
        controls = {
            name: None if schedule is None else jnp.asarray(schedule(state.step))
            for name, schedule in self.schedules.items()
        }
        learned, ranges = state.learned["inputs"], state.ranges
        handler = _Trainer(weights, rules, controls)
        before = {
            i: {"learned": learned.get(r.key), "range": ranges.get(r.key)}
            for i, r in rules.items()
            if r.quantizer.observes or r.quantizer.learns
        }
        named, _ = leaf_paths(params)
        arguments = arrays_of(_latent(named, weights, state.learned["weights"]), inputs, kwargs)
        results, after = interpret(graph.program, arguments, handler, before)
        ranges = {rules[i].key: s["range"] for i, s in after.items() if rules[i].quantizer.observes}
        out = jax.tree.unflatten(graph.out_tree, results)
        return out, state.replace(ranges=ranges, step=state.step + 1)

    def convert(self, params: Any, state: State) -> Any:
        """The parameters as they are stored: what ``jc.compress`` makes of a recipe.

        Args:
          params: parameter tree.
          state: from training.

        Returns:
          The tree with compressed arrays in place of the weights that the recipe names. Run it with
          ``jc.dispatch``: it computes what ``apply`` computed, to rounding. Named values (the KV
          cache) are no weights, and are quantized by ``apply`` alone.
        """
        named, treedef = leaf_paths(params)
        plan = {w.path: w for w in state.plan}
        leaves = [self._converted(plan[p], leaf, state) if p in plan else leaf for p, leaf in named]
        return jax.tree.unflatten(treedef, leaves)

    def _converted(self, weight: Weight, leaf: Any, state: State) -> CompressedArray:
        layout = weight.layout
        matrix = Latent(jnp.asarray(leaf), {}, weight.path, layout).matrix()
        if weight.quantizer is None:
            part = formats.Dense(matrix)
        else:
            part = weight.quantizer.convert(matrix, state.learned["weights"].get(weight.path, {}))
        if weight.inputs:
            rule = weight.inputs[0]
            scale = zero = None
            if not rule.quantizer.activation.dynamic:
                learned, ranges = state.learned["inputs"], state.ranges
                _check_seen(rule, ranges.get(rule.key), "convert")
                scale, zero = rule.quantizer.qparams(learned.get(rule.key), ranges.get(rule.key))
                scale, zero = (_on_stack(a, matrix.shape[:-2]) for a in (scale, zero))
            part = formats.InputQuant(part, scale, zero, spec=rule.quantizer.activation)
        return CompressedArray.from_matrix(
            part, leaf.shape, leaf.dtype, layout.stack_axes, layout.out_axes, layout.in_axes
        )

    def _check_schedules(self):
        """Refuses schedules that some step cannot follow."""
        fast = any(getattr(s, "matmul", "simulated") != "simulated" for s in self.recipe.steps)
        for name in ("enabled", "bits"):
            if fast and self.schedules[name] is not None:
                raise RecipeError(
                    f'the schedule {name!r} needs matmul="simulated": codes are multiplied as they '
                    "are"
                )
        if self.schedules["bits"] is not None:
            _check_widths(self.recipe)

    def _plan(self, params, inputs, kwargs):
        self._check_schedules()
        return plan_training(self.function, self.recipe, params, inputs, kwargs)


def qat(
    apply: Callable,
    recipe: Recipe,
    *,
    enabled: Schedule | None = None,
    bits: Schedule | None = None,
    observe: Schedule | None = None,
) -> QAT:
    """Makes a model function compute as if quantized, for training.

    Args:
      apply: a pure function ``apply(params, *inputs)``.
      recipe: steps that can be trained: ``FakeQuant``, ``FakeQuantValues``, ``RTN``, ``Ternary``,
        ``Binary``; ``jaxcomp.quantization.trainable`` says how to add one.
      enabled: optax schedule of calls of ``apply``: how much of the rounding is applied, 0 (none:
        a delayed start) to 1.
      bits: optax schedule of the bit width of weights with dynamic ``Int`` grids; ``convert`` uses
        the width of the recipe, at which it should end.
      observe: optax schedule: ranges of activations move where it is above 0, and are frozen else.

    Returns:
      An object with ``init``, ``apply`` and ``convert``. A function with a derivative of its own
      (``custom_vjp``) that uses a weight of the recipe is differentiated as it is written; all
      others keep theirs.

    Raises:
      RecipeError: a step cannot be trained.

    Example:
      >>> import jaxcomp as jc
      >>> from jaxcomp.formats import Int
      >>> recipe = jc.Recipe(steps=(jc.quantization.FakeQuant(format=Int(4)),))
      >>> train = jc.qat(lambda p, x: x @ p["w"], recipe)
      >>> params, x = {"w": jnp.ones((8, 4))}, jnp.ones((2, 8))
      >>> state = train.init(params, x)
      >>> out, state = train.apply(params, state, x)
      >>> bool((out == jc.dispatch(lambda p, x: x @ p["w"])(train.convert(params, state), x)).all())
      True
    """
    return QAT(apply, recipe, enabled=enabled, bits=bits, observe=observe)


def _check_widths(recipe: Recipe) -> None:
    """Refuses a schedule of the bit width where some weight would not follow it."""
    for step in recipe.steps:
        name, fmt = step.__struct_config__.tag, getattr(step, "format", None)
        trained = name in ("rtn", "fake_quant") and (fmt is None or isinstance(fmt, formats.Int))
        plain = getattr(step, "clipping", "minmax") == "minmax"
        plain &= getattr(step, "scale", "dynamic") == "dynamic"
        plain &= getattr(step, "estimator", "ste") == "ste"
        if name != "fake_quant_values" and not (trained and plain):
            raise RecipeError(
                "a schedule of the bit width is for Int weights whose grid covers their range: "
                f'scale="dynamic", clipping="minmax", estimator="ste"; step {name} with {fmt} is '
                "something else, so leave bits out"
            )


def _latent(named, weights, learned):
    """The leaves of params with what is learned about them."""
    return [
        (
            path,
            Latent(leaf, learned.get(path, {}), path, weights[path].layout)
            if path in weights and not is_compressed(leaf)
            else leaf,
        )
        for path, leaf in named
    ]


class _Observer(Dispatcher):
    """Records what inputs and named values are like."""

    def __init__(self, rules: dict[str, Input]):
        super().__init__()
        self.rules = rules

    def site(self, op, operands, leaf, state):
        """Evaluates a site as it is."""
        results, _ = super().site(op, operands, leaf, None)
        if state is not None:
            state = self.rules[op.site.id].quantizer.seen(operands[1 - op.site.operand])
        return results, state

    def named(self, op, value, state):
        """Passes a value on."""
        return value, None if state is None else self.rules[op.named.id].quantizer.seen(value)


def _check_seen(rule: Input, seen: Any, where: str) -> None:
    """Refuses a range that no data has reached; tracers are taken on trust."""
    if seen is None or isinstance(seen["seen"], jax.core.Tracer):
        return
    low, high = np.asarray(seen["low"]), np.asarray(seen["high"])
    if not np.all(seen["seen"]) or np.any((low == 0) & (high == 0)):
        raise JaxcompError(
            f"{rule.path}: no data but zeros has reached its input when {where} is called (a "
            "branch not taken, a loop that did not run, or no call of apply yet), so its range is "
            "unknown; use inputs that reach it, or an activation with dynamic=True"
        )
    pact = rule.quantizer.observer == "pact" and not rule.quantizer.activation.symmetric
    if pact and where == "init" and np.any(low < 0):
        raise JaxcompError(
            f"{rule.path}: its input is negative in places (least {low.min()}), and an asymmetric "
            'pact clips at 0; use symmetric=True or observer="learned"'
        )


def _observed(graph: Graph, rules: dict[str, Input], arguments: list) -> dict[str, dict]:
    """What the inputs with static ranges are like: key -> {"low", "high", "mean", "seen"}."""
    rules = {i: r for i, r in rules.items() if r.quantizer.observes or r.quantizer.learns}
    wide = {}
    for op, _ in hooks(graph.program):
        at = 0 if op.kind == "named" else 1 - op.site.operand
        hook = op.named if op.kind == "named" else op.site
        wide[hook.id] = jnp.promote_types(op.eqn.invars[at].aval.dtype, jnp.float32)
    start = {
        i: {k: jnp.zeros(r.loops, wide[i]) for k in ("low", "high", "mean", "seen")}
        for i, r in rules.items()
    }
    if any(isinstance(a, jax.ShapeDtypeStruct) for a in jax.tree.leaves(arguments)):
        for rule in rules.values():
            if rule.quantizer.learns:
                raise JaxcompError(
                    f"{rule.path}: a learned range of its input needs data to start from; call "
                    "init with arrays, not shapes"
                )
        return {rules[i].key: s for i, s in start.items()}
    if not rules:
        return {}
    _, after = interpret(graph.program, arguments, _Observer(rules), start)
    return {rules[i].key: s for i, s in after.items()}


def _on_stack(value: jax.Array | None, stack: tuple[int, ...]) -> jax.Array | None:
    """One value a loop spread over a weight's whole stack."""
    if value is None:
        return None
    missing = len(stack) - value.ndim
    return jnp.broadcast_to(value.reshape(*value.shape, *(1,) * missing), stack)


class _Trainer(Dispatcher):
    """Quantizes weights, inputs and named values with straight-through gradients."""

    def __init__(self, weights: dict[str, Weight], rules: dict[str, Input], controls: dict):
        super().__init__()
        self.weights, self.rules, self.controls = weights, rules, controls

    def site(self, op, operands, leaf, state):
        """Evaluates a site."""
        if is_compressed(leaf):
            return super().site(op, operands, leaf, state)
        operands = list(operands)
        rule = self.rules.get(op.site.id)
        weight = self.weights.get(op.site.path)
        if weight is not None and weight.matmul != "simulated":
            return [self.coded(op, operands, weight, rule, leaf)], state
        if rule is not None:
            at = 1 - op.site.operand
            operands[at], state = self.input(rule, operands[at], features(op.eqn, op.site), state)
        operands[op.site.operand] = self.dense(op.site.path, op.site.view, leaf)
        return _compat.bind(op.eqn, *operands), state

    def coded(self, op: Op, operands: list, weight: Weight, rule: Input, leaf: Any) -> jax.Array:
        """The result of a site that multiplies codes."""
        product = functools.partial(
            training_matmul,
            fmt=weight.quantizer.format,
            activation=rule.quantizer.activation,
            quantize_gradients=weight.quantize_gradients,
        )
        view = op.site.view
        if view.fixed:
            leaf, _ = leaf.picked(view)
        x = to_tokens(op.eqn, op.site, operands[1 - op.site.operand])
        w = leaf.matrix()
        w = w.reshape(*x.shape[:-2], *w.shape[-2:])
        for _ in x.shape[:-2]:
            product = jax.vmap(product)
        return from_tokens(op.eqn, op.site, product(x, w))

    def named(self, op, value, state):
        """Quantizes a named value."""
        rule = self.rules.get(op.named.id)
        return (value, state) if rule is None else self.input(rule, value, (-1,), state)

    def input(self, rule: Input, x: jax.Array, axes: tuple[int, ...], state: Any) -> tuple:
        """A quantized input and its new state."""
        old = state or {"learned": None, "range": None}
        q, ranges = rule.quantizer.apply(x, axes, old["learned"], old["range"])
        observe = self.controls["observe"]
        if rule.quantizer.observes and observe is not None:
            ranges = {k: jnp.where(observe > 0, ranges[k], old["range"][k]) for k in ranges}
        return self.mixed(x, q), None if state is None else {**state, "range": ranges}

    def mixed(self, x: jax.Array, q: jax.Array) -> jax.Array:
        """As much of the rounding as the schedule says."""
        share = self.controls["enabled"]
        if share is None:
            return q
        share = share.astype(q.dtype)
        return jnp.where(share >= 1, q, x + share * (q - x))

    def dense(self, path, view, leaf):
        """The quantized weight."""
        if not isinstance(leaf, Latent):
            return super().dense(path, view, leaf)
        quantizer = self.weights[path].quantizer
        if quantizer is None:
            return view.replay(leaf.value)
        if view.fixed:
            leaf, view = leaf.picked(view)
        matrix = leaf.matrix()
        q = self.mixed(matrix, quantizer.apply(matrix, leaf.learned, self.controls["bits"]))
        return view.replay(leaf.from_matrix(q))
