"""Which weights, inputs and values a recipe of quantization-aware training quantizes, and how."""

import dataclasses
from collections.abc import Callable
from typing import Any

from jaxcomp.errors import RecipeError
from jaxcomp.formats import is_compressed
from jaxcomp.graph import Graph, Layout, trace
from jaxcomp.graph.program import Op, hooks
from jaxcomp.kernels.implementations import note_of
from jaxcomp.plan import make_plan
from jaxcomp.quantization.activation import check_activation
from jaxcomp.quantization.inputs import InputQuantizer
from jaxcomp.quantization.trainable import FakeQuantValues, WeightQuantizer, weight_quantizer
from jaxcomp.quantization.training_matmul import check_matmul
from jaxcomp.recipe import Recipe
from jaxcomp.rules import fits
from jaxcomp.taps import no_such_value


@dataclasses.dataclass(frozen=True)
class Input:
    """A quantized input of a site, or a quantized named value.

    Attributes:
      key: its name in the state.
      path: of the weight, or the value's name.
      loops: lengths of the scans around it, the leading axes of its state.
      quantizer: how it is quantized.
    """

    key: str
    path: str
    loops: tuple[int, ...]
    quantizer: InputQuantizer


@dataclasses.dataclass(frozen=True)
class Weight:
    """A weight that a recipe names.

    Attributes:
      path: its name.
      layout: its canonical matrix.
      quantizer: how it is quantized; None where only its input is.
      inputs: one for each of its matmuls whose input is quantized.
      matmul: "simulated", or "int8" or "fp8" to multiply codes.
      quantize_gradients: multiply codes in the backward pass too.
    """

    path: str
    layout: Layout
    quantizer: WeightQuantizer | None
    inputs: tuple[Input, ...]
    matmul: str = "simulated"
    quantize_gradients: bool = False


def plan_training(
    function: Callable, given: Recipe, params: Any, inputs: tuple, kwargs: dict
) -> tuple[Graph, dict[str, Weight], dict[str, Input]]:
    """Traces a model and applies a recipe to it.

    Args:
      function: the model.
      given: the recipe.
      params: its parameters; shapes are enough.
      inputs: its further arguments, likewise.
      kwargs: its keyword arguments.

    Returns:
      The graph, the weights by path, and the quantized inputs and values by the id of their site or
      named value.

    Raises:
      JaxcompError: a rule matches nothing, or a format does not fit.
    """
    value_steps = [s for s in given.steps if isinstance(s, FakeQuantValues)]
    steps = tuple(s for s in given.steps if not isinstance(s, FakeQuantValues))
    named = (lambda name: note_of(name) is None) if value_steps else None
    graph = trace(function, params, *inputs, named=named, **kwargs)
    rules = _value_rules(graph, value_steps)
    weights: dict[str, Weight] = {}
    if steps:
        readers: dict[str, list] = {}
        for op, loops in hooks(graph.program):
            if op.kind == "site" and op.site.is_contraction:
                readers.setdefault(op.site.path, []).append((op, loops))
        recipe = Recipe(steps=steps)
        for path, chosen in make_plan(graph, recipe).items():
            mine = [recipe.steps[k] for k in chosen]
            found = _input_rules(path, mine, graph.layouts[path], readers.get(path, []))
            weights[path] = _weight(path, mine, graph.layouts[path], tuple(found.values()))
            if weights[path].matmul != "simulated":
                _check_products(path, graph.layouts[path], readers.get(path, []))
            rules |= found
    # Once more, following no more than that: what is left alone keeps its own derivatives.
    paths = {p for p, leaf in graph.shapes.items() if is_compressed(leaf)} | set(weights)
    graph = trace(function, params, *inputs, named=named, paths=paths, **kwargs)
    return graph, weights, rules


def _names(step: FakeQuantValues, name: str) -> bool:
    return any(fits(r, name) for r in step.include) and not any(fits(r, name) for r in step.exclude)


def _value_rules(graph: Graph, steps: list[FakeQuantValues]) -> dict[str, Input]:
    """How each named value is quantized, by its id."""
    found = [(op.named, loops) for op, loops in hooks(graph.program) if op.kind == "named"]
    counts: dict[str, int] = {}
    for named, _ in found:
        counts[named.name] = counts.get(named.name, 0) + 1
    for step in steps:
        check_activation(step.activation)
        for rule in (*step.include, *step.exclude):
            if not any(fits(rule, name) for name in counts):
                raise no_such_value(rule, list(counts))
    rules, number = {}, dict.fromkeys(counts, 0)
    for named, loops in found:
        chosen = [s for s in steps if _names(s, named.name)]
        if not chosen:
            continue
        if len(chosen) > 1:
            raise RecipeError(
                f"the value {named.name!r}: {len(chosen)} steps quantize it; let one name it"
            )
        key = f"value:{named.name}"
        if counts[named.name] > 1:
            key = f"{key}#{number[named.name]}"
            number[named.name] += 1
        rules[named.id] = _input(key, named.name, loops, chosen[0])
    return rules


def _input(key, path, loops, step) -> Input:
    options = step.activation, step.observer, step.percentile, step.momentum
    quantizer = InputQuantizer(*options)
    quantizer.check(path)
    return Input(key, path, loops, quantizer)


def _weight(path: str, steps: list, layout: Layout, inputs: tuple[Input, ...]) -> Weight:
    quantizers = [q for s in steps if (q := weight_quantizer(s)) is not None]
    if len(quantizers) > 1:
        raise RecipeError(
            f"{path} {layout.leaf_shape}: {len(quantizers)} steps quantize the weight; let one of "
            "them name this path"
        )
    for quantizer in quantizers:
        quantizer.check(layout.matrix_shape, path)
    fast = [s for s in steps if getattr(s, "matmul", "simulated") != "simulated"]
    options = ()
    if fast:
        step = fast[0]
        options = step.matmul, step.quantize_gradients
        check_matmul(
            step.matmul, step.format, inputs[0].quantizer.activation if inputs else None, path
        )
        if getattr(step, "scale", "dynamic") != "dynamic" or step.clipping != "minmax":
            raise RecipeError(
                f'{path}: matmul="{step.matmul}" places the grid on the whole range; use '
                'scale="dynamic" and clipping="minmax"'
            )
    return Weight(path, layout, quantizers[0] if quantizers else None, inputs, *options)


def _input_rules(path: str, steps: list, layout: Layout, readers: list) -> dict[str, Input]:
    """How the inputs of a weight's matmuls are quantized, by the id of the site."""
    active = [s for s in steps if getattr(s, "activation", None) is not None]
    if not active:
        return {}
    if len(active) > 1 or not readers:
        problem = f"{len(active)} steps quantize its input" if readers else "is only looked up"
        raise RecipeError(
            f"{path} {layout.leaf_shape}: {problem}; let {'one' if readers else 'none'} of the "
            "steps with an activation name this path"
        )
    step = active[0]
    check_activation(step.activation, path)
    rules = {}
    for k, (op, loops) in enumerate(readers):
        key = path if len(readers) == 1 else f"{path}#{k}"
        if hasattr(step, "observer"):
            rule = _input(key, path, loops, step)
        else:
            rule = Input(key, path, loops, InputQuantizer(step.activation))
        _check_input(op, rule, layout, len(readers))
        rules[op.site.id] = rule
    return rules


def _check_input(op: Op, rule: Input, layout: Layout, uses: int) -> None:
    """Refuses what ``convert`` could not store or dispatch could not run."""
    static, where = not rule.quantizer.activation.dynamic, f"{rule.path} {layout.leaf_shape}"
    if op.site.kind == "conv_general_dilated" and rule.quantizer.activation.granularity == "token":
        raise RecipeError(
            f"{where}: the input of a convolution has no tokens; use "
            'granularity="tensor", or leave the activation out for this path'
        )
    if static and op.site.kind == "ragged_dot":
        raise RecipeError(
            f"{where}: the experts of a ragged product have no static range each; use an "
            "activation with dynamic=True, or leave it out for this path"
        )
    stack = layout.sizes(layout.stack_axes)
    if static and (uses > 1 or stack[: len(rule.loops)] != rule.loops):
        raise RecipeError(
            f"{where}: used by {uses} matmuls or shared by the steps of a loop, which one static "
            "range cannot serve; use dynamic=True, or leave the activation out for this path"
        )


def _check_products(path: str, layout: Layout, readers: list) -> None:
    """Refuses to multiply codes where a weight is used other than by its rows' scales."""
    for op, _ in readers:
        if op.site.kind != "dot_general" or op.site.transposed:
            use = "transposed" if op.site.transposed else f"by a {op.site.kind}"
            raise RecipeError(
                f"{path} {layout.leaf_shape}: is used {use}, which cannot multiply its codes; use "
                'matmul="simulated" for this path'
            )
