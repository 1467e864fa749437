"""Compressed parameters as shapes: what ``compress`` would make of a model, without any weights.

The format, the pruning pattern and the transforms of the input decide which arrays a compressed
weight holds; an algorithm only chooses their values. So each step is run here on shapes, by the
rounding and storing that the real one ends with, and nothing of the model's size is allocated.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxcomp import folding, formats
from jaxcomp.calibration import Statistics
from jaxcomp.errors import RecipeError
from jaxcomp.formats import CompressedArray
from jaxcomp.graph import Graph
from jaxcomp.graph.coupling import producers
from jaxcomp.graph.program import Op, Program
from jaxcomp.graph.trace import leaf_paths
from jaxcomp.plan import make_plan
from jaxcomp.pruning import Magnitude, SparseGPT, Wanda, masks
from jaxcomp.pruning.sparsegpt import kept_count
from jaxcomp.quantization import (
    AWQ,
    GPTQ,
    RTN,
    Binary,
    FakeQuant,
    LLMInt8,
    SmoothQuant,
    Ternary,
    binary,
    common,
    ternary,
)
from jaxcomp.quantization.llm_int8 import ACTIVATION, FORMAT
from jaxcomp.recipe import Recipe
from jaxcomp.step import Activation

# Features that LLM.int8() keeps dense: at most 7 of 4096 to 5120 at 13 billion parameters
# (https://arxiv.org/abs/2208.07339, table 4); their number depends on data, so it is assumed.
OUTLIERS = 0.002


@dataclasses.dataclass(frozen=True)
class Sketch:
    """A weight on its way through the steps, as shapes.

    Attributes:
      path: name of the weight, for errors.
      weight: ``(*stack, out, in)``.
      dtype: of the dense leaf.
      pattern: (n, m) once it is pruned in that pattern.
      kept: weights of a matrix that are stored, once it is pruned without a pattern.
      scaled: whether its input is to be multiplied by a channel scale.
      parts: the parts so far, or None.
      outliers: input features that LLM.int8() keeps dense.
    """

    path: str
    weight: jax.ShapeDtypeStruct
    dtype: Any
    pattern: tuple[int, int] | None = None
    kept: int | None = None
    scaled: bool = False
    parts: tuple[Any, ...] | None = None
    outliers: int = 0

    def replace(self, **changes) -> "Sketch":
        """A copy with some fields replaced."""
        return dataclasses.replace(self, **changes)

    @property
    def mask(self) -> jax.ShapeDtypeStruct | None:
        """The shape of the mask of a pruned weight."""
        if self.pattern is None and self.kept is None:
            return None
        return jax.ShapeDtypeStruct(self.weight.shape, jnp.bool_)


def compressed_shapes(graph: Graph, params: Any, recipe: Recipe, outliers: float = OUTLIERS) -> Any:
    r"""The tree that ``compress`` would return, of shapes.

    Args:
      graph: the traced model.
      params: its parameters, shapes are enough.
      recipe: what is to be done to which weight.
      outliers: fraction of the input features that LLM.int8() keeps dense.

    Returns:
      ``params`` with compressed arrays of ``jax.ShapeDtypeStruct``\ s in place of the weights that
      the recipe names.

    Raises:
      RecipeError: the recipe does not fit the model.
      JaxcompError: a format does not fit a weight.

    Example:
      >>> import jaxcomp as jc
      >>> params = {"w": jax.ShapeDtypeStruct((256, 512), jnp.bfloat16)}
      >>> x = jax.ShapeDtypeStruct((1, 256), jnp.bfloat16)
      >>> graph = jc.trace(lambda p, x: x @ p["w"], params, x)
      >>> jc.nbits(compressed_shapes(graph, params, jc.presets.w4a16_gptq())) / (256 * 512)
      4.125
    """
    plan = make_plan(graph, recipe)
    named, treedef = leaf_paths(params)
    sketches = {}
    for path, leaf in named:
        if path in plan:
            shape = graph.layouts[path].matrix_shape
            wide = jnp.promote_types(leaf.dtype, jnp.float32)
            sketches[path] = Sketch(
                path,
                jax.ShapeDtypeStruct(shape, wide),
                leaf.dtype,
                outliers=math.ceil(outliers * shape[-1]),
            )
    for k, step in enumerate(recipe.steps):
        for path, steps in plan.items():
            if k in steps:
                sketches[path] = apply_step(step, sketches[path])
    uses: dict[str, int] = {}
    for item in (*graph.sites, *graph.other_uses):
        uses[item.path] = uses.get(item.path, 0) + 1
    single_use = {path for path in graph.paths if uses.get(path, 0) <= 1}
    arrays: dict[str, CompressedArray] = {}
    for program, ops in _groups(graph.program, plan):
        members = [sketches[op.site.path] for op in ops]
        fold = _folds(program, ops, members, single_use, arrays)
        arrays |= {m.path: _array(m, graph, keep_scale=not fold) for m in members}
    return jax.tree.unflatten(treedef, [arrays.get(path, leaf) for path, leaf in named])


def _groups(program: Program, plan: dict, done: set | None = None):
    """Input groups of the sites that are compressed, each with its program, in order."""
    done = set() if done is None else done
    for op in program.ops:
        if op.kind == "site" and _compresses(op, plan) and op.site.path not in done:
            group = []
            for other in program.ops:
                same = other.kind == "site" and other.site.input_group == op.site.input_group
                if same and _compresses(other, plan) and other.site.path not in done:
                    done.add(other.site.path)
                    group.append(other)
            yield program, group
        for body in op.bodies:
            yield from _groups(body, plan, done)


def _compresses(op: Op, plan: dict) -> bool:
    return op.site.path in plan and not op.site.transposed


def _folds(program, ops, members, single_use, arrays) -> bool:
    """Whether the common scale of a group's input moves into other parameters."""
    if not all(m.scaled for m in members) or any(op.site.batch_axes for op in ops):
        return False
    targets = producers(program, ops, single_use)
    if targets is None:
        return False
    rows = [arrays[t.path] for t in targets if t.kind == "rows" and t.path in arrays]
    return all(folding.rows_scale_exactly(array) for array in rows)


def _array(sketch: Sketch, graph: Graph, keep_scale: bool) -> CompressedArray:
    layout = graph.layouts[sketch.path]
    parts = sketch.parts
    if parts is None:
        values = jax.ShapeDtypeStruct(sketch.weight.shape, sketch.dtype)
        parts = (formats.Dense(values),)
    if sketch.scaled and keep_scale:
        shape = (*sketch.weight.shape[:-2], sketch.weight.shape[-1])
        scale = jax.ShapeDtypeStruct(shape, sketch.weight.dtype)
        parts = tuple(formats.InputScale(part, scale) for part in parts)
    axes = (layout.stack_axes, layout.out_axes, layout.in_axes)
    return CompressedArray.from_matrix(parts, layout.leaf_shape, sketch.dtype, *axes)


@functools.singledispatch
def apply_step(step: Any, sketch: Sketch) -> Sketch:
    """What a step makes of a weight, in shapes.

    Args:
      step: a step of a recipe.
      sketch: the weight as the steps before left it.

    Returns:
      The weight after it.

    Raises:
      RecipeError: the step has nothing to store before training.
    """
    raise RecipeError(
        f"{sketch.path}: a step {step.__struct_config__.tag!r} only trains, so there is no "
        "compressed weight to plan for; use the recipe's counterpart without training, such as "
        "rtn with the same format"
    )


@apply_step.register(RTN)
@apply_step.register(GPTQ)
def _(step, sketch):
    scattered = getattr(step, "order", "natural") == "activation" and step.static_groups is False
    size = step.format.group_size
    scattered = scattered and size not in (None, sketch.weight.shape[-1])
    return _quantized(step.format, sketch, step.activation, scattered)


@apply_step.register
def _(step: FakeQuant, sketch):
    if step.format is None or step.scale == "learned":
        return apply_step.dispatch(object)(step, sketch)
    return _quantized(step.format, sketch, step.activation)


@apply_step.register
def _(step: AWQ, sketch):
    return _quantized(step.format, sketch, step.activation).replace(scaled=True)


@apply_step.register
def _(step: SmoothQuant, sketch):
    sketch = sketch.replace(scaled=True, parts=None)
    return sketch if sketch.mask is None else _sparse(sketch)


@apply_step.register
def _(step: LLMInt8, sketch):
    stack, size, count = sketch.weight.shape[:-2], sketch.weight.shape[-1], sketch.outliers
    (part,) = _quantized(FORMAT, sketch, ACTIVATION).parts
    hidden = formats.InputScale(part, jax.ShapeDtypeStruct((*stack, size), jnp.float32))
    columns = formats.DenseColumns(
        jax.ShapeDtypeStruct((*sketch.weight.shape[:-1], count), sketch.dtype),
        jax.ShapeDtypeStruct((*stack, count), jnp.int32),
        in_size=size,
    )
    return sketch.replace(parts=(hidden, columns))


@apply_step.register(Ternary)
@apply_step.register(Binary)
def _(step, sketch):
    names = ("group_size", "out_group_size", "scale_dtype")
    make = ternary if isinstance(step, Ternary) else binary
    options = {name: getattr(step, name) for name in names}
    array = jax.eval_shape(functools.partial(make, **options), sketch.weight)
    return sketch.replace(parts=_activated(array.parts, step.activation, sketch))


@apply_step.register(Magnitude)
@apply_step.register(Wanda)
@apply_step.register(SparseGPT)
def _(step, sketch):
    *_, out, size = sketch.weight.shape
    nm = masks.check_target(step.sparsity, step.n, step.m, size, sketch.path)
    kept = None
    if nm is None:
        if isinstance(step, SparseGPT):
            kept = kept_count(step.sparsity, step.block_size, out, size)
        else:
            by_row = isinstance(step, Wanda) or step.scope == "row"
            rows, group = (out, size) if by_row else (1, out * size)
            kept = rows * (group - masks.dropped_count(step.sparsity, group))
        # What an earlier step dropped stays dropped; at least the larger of both is gone.
        kept = kept if sketch.kept is None else min(kept, sketch.kept)
    sketch = sketch.replace(pattern=nm, kept=kept)
    fmt = getattr(step, "format", None)
    return _sparse(sketch) if fmt is None else _quantized(fmt, sketch, None)


def _quantized(fmt, sketch: Sketch, activation: Activation | None, scattered=False) -> Sketch:
    """The weight rounded to a format, whatever algorithm chooses the values."""

    def store(w, mask):
        rounded = common.round_to_grid(fmt, w, "minmax", 100.0, mask, build=not scattered)
        if scattered:
            index = jnp.zeros((*w.shape[:-2], w.shape[-1]), jnp.int32)
            rounded = rounded._replace(group_index=index)
        return common.store(fmt, rounded, mask, sketch.pattern, sketch.kept)

    parts = jax.eval_shape(store, sketch.weight, sketch.mask)
    return sketch.replace(parts=_activated(parts, activation, sketch))


def _sparse(sketch: Sketch) -> Sketch:
    """The pruned weight in its own dtype."""
    make = functools.partial(
        common.sparse_parts, nm=sketch.pattern, dtype=sketch.dtype, kept=sketch.kept
    )
    return sketch.replace(parts=jax.eval_shape(make, sketch.weight, sketch.mask))


def _activated(parts, activation: Activation | None, sketch: Sketch) -> tuple[Any, ...]:
    stack, size = sketch.weight.shape[:-2], sketch.weight.shape[-1]
    channels = jax.ShapeDtypeStruct((*stack, size), jnp.float32)
    count = jax.ShapeDtypeStruct(stack, jnp.float32)
    statistics = Statistics(count=count, minimum=channels, maximum=channels)
    wrap = functools.partial(common.with_activation, activation=activation, path=sketch.path)
    return jax.eval_shape(lambda parts, s: wrap(parts, statistics=s), tuple(parts), statistics)
