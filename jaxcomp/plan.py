"""Which steps of a recipe apply to which weights of a model, checked before any work is done."""

from typing import Any

import jax.numpy as jnp

from jaxcomp import formats
from jaxcomp.errors import RecipeError
from jaxcomp.formats import is_compressed
from jaxcomp.graph import Graph, Layout
from jaxcomp.recipe import Recipe, matches


def make_plan(graph: Graph, recipe: Recipe) -> dict[str, tuple[int, ...]]:
    """Which steps apply to which weight, checked against the model before any work.

    Args:
      graph: the traced model.
      recipe: what is to be done.

    Returns:
      Path -> indices of steps.

    Raises:
      RecipeError: a rule matches nothing, or names a weight that cannot be compressed.
      JaxcompError: a format does not fit a weight.
    """
    bare, on_request = [], []
    for path in dict.fromkeys(s.path for s in graph.sites):
        leaf = graph.shapes[path]
        if is_compressed(leaf):
            continue
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            if any(matches(step, path) for step in recipe.steps):
                raise RecipeError(
                    f"{path} {tuple(leaf.shape)}: holds {leaf.dtype}, and only floating-point "
                    "weights can be compressed; convert it, or exclude this path"
                )
            continue
        kinds = {s.is_contraction for s in graph.sites_of(path)}
        (bare if kinds == {True} else on_request).append(path)
    blocked = {u.path: u for u in graph.other_uses if u.contracted}
    for step in recipe.steps:
        for path, use in blocked.items():
            shape = tuple(graph.shapes[path].shape)
            if matches(step, path):
                raise RecipeError(
                    f"{path} {shape}: reached through {use.primitive!r} before a contraction "
                    f"(equation {use.where}), so compressing it would not reach the matmul; apply "
                    "that operation to the weight beforehand, or to the layer's input or output, "
                    "or exclude this path"
                )
    sites = set(bare) | set(on_request)
    unusable = [p for p in graph.paths if p not in sites and _named_outright(recipe, p)]
    if unusable:
        path = unusable[0]
        if is_compressed(graph.shapes[path]):
            raise RecipeError(
                f"{path} {tuple(graph.shapes[path].shape)}: is already compressed; materialize it "
                "first, or remove this path"
            )
        uses = sorted({u.primitive for u in graph.other_uses if u.path == path})
        raise RecipeError(
            f"{path} {tuple(graph.shapes[path].shape)}: named by the recipe, but no contraction or "
            f"look-up uses it (it is used by: {', '.join(uses) or 'nothing'}); remove this path"
        )
    plan = recipe.resolve(bare, on_request)
    for path, steps in plan.items():
        layout = graph.layouts[path]
        for k in steps:
            _check_step(recipe.steps[k], layout, path)
    return plan


def _named_outright(recipe: Recipe, path: str) -> bool:
    return any(path in step.include for step in recipe.steps)


def _check_step(step: Any, layout: Layout, path: str) -> None:
    shape = layout.matrix_shape
    fmt = getattr(step, "format", None)
    if fmt is not None:
        formats.check(fmt, shape, path)
    n, m = getattr(step, "n", None), getattr(step, "m", None)
    if n is not None and m is not None:
        formats.check(formats.NM(n, m), shape, path)
