"""``trace``: a model function written down as a graph whose weights know their names."""

import dataclasses
from collections.abc import Callable, Container
from typing import Any

import jax

from jaxcomp.errors import JaxcompError
from jaxcomp.formats import is_compressed
from jaxcomp.graph.program import OtherUse, Program, build
from jaxcomp.graph.sites import Layout, Site


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """A traced function: its program and where it uses which weight.

    Attributes:
      program: the function as a list of operations.
      sites: every contraction and look-up of a weight, in order of evaluation.
      other_uses: uses of weights that are no sites (norm gains, biases, arithmetic on weights).
      paths: names of all leaves of the parameter tree.
      shapes: name -> shape and dtype of the leaf.
      layouts: name -> canonical matrix, for every weight that has a site.
      out_tree: structure of the function's result.
    """

    program: Program
    sites: tuple[Site, ...]
    other_uses: tuple[OtherUse, ...]
    paths: tuple[str, ...]
    shapes: dict[str, Any]
    layouts: dict[str, Layout]
    out_tree: Any
    number: dict[int, Any]

    def sites_of(self, path: str) -> tuple[Site, ...]:
        """The sites of one weight."""
        return tuple(s for s in self.sites if s.path == path)

    def __str__(self) -> str:
        rows = [("path", "kind", "stack", "out", "in", "group", "uses")]
        rows += [
            (
                *(s.path, s.kind, "x".join(map(str, s.stack)) or "-"),
                *map(str, (s.out_size, s.in_size, s.input_group, s.uses)),
            )
            for s in self.sites
        ]
        widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
        return "\n".join(
            "  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows
        )


def leaf_paths(params: Any) -> tuple[list[tuple[str, Any]], Any]:
    """Leaves of a parameter tree with their names, compressed arrays counted as leaves.

    Args:
      params: any pytree.

    Returns:
      Pairs of name ("layers/0/mlp/kernel") and leaf, and the tree's structure.
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_compressed)
    named = [(jax.tree_util.keystr(k, simple=True, separator="/"), v) for k, v in flat]
    return named, treedef


def is_array(value: Any) -> bool:
    """Whether a value takes part in tracing; Python scalars, strings and None are constants."""
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _numeric(value: Any) -> bool:
    """Whether a leaf holds numbers; PRNG keys do not."""
    return is_array(value) and not jax.dtypes.issubdtype(value.dtype, jax.dtypes.extended)


def abstract(value: Any) -> Any:
    """Shape and dtype of a leaf, with its sharding where JAX tracks it in the type."""
    if isinstance(value, jax.Array) or isinstance(value, jax.core.Tracer):
        return value
    return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=getattr(value, "sharding", None))


def trace(
    apply: Callable,
    params: Any,
    *inputs: Any,
    select: Callable[[Any], bool] = is_array,
    named: Callable[[str], bool] | None = None,
    paths: Container[str] | None = None,
    **kwargs: Any,
) -> Graph:
    r"""Traces ``apply(params, *inputs)`` from shapes alone and follows every weight to its uses.

    Args:
      apply: a pure function of a parameter tree and inputs.
      params: pytree of arrays, ``jax.ShapeDtypeStruct``\ s or compressed arrays. Only shapes and
        dtypes are read: a 70B model needs no 70B memory.
      *inputs: further positional arguments, arrays or shapes; Python scalars and None are
        constants.
      select: which leaves of ``params`` are followed; the others are ordinary values.
      named: which values named with ``jax.ad_checkpoint.checkpoint_name`` are to be operations of
        their own, for handlers; None is none of them.
      paths: names of the only weights to follow, of those that ``select`` takes; None is all. A
        call with a derivative of its own that uses none of them keeps that derivative.
      **kwargs: keyword arguments of ``apply``.

    Returns:
      The graph.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> shapes = {"w": jax.ShapeDtypeStruct((8, 4), jnp.float32)}
      >>> graph = trace(lambda p, x: x @ p["w"], shapes, jax.ShapeDtypeStruct((2, 8), jnp.float32))
      >>> [(s.path, s.out_size, s.in_size) for s in graph.sites]
      [('w', 4, 8)]
    """
    leaves, treedef = leaf_paths(params)
    seen: set[str] = set()
    for path, _ in leaves:
        if path in seen:
            raise JaxcompError(f"two leaves of params are both named {path!r}; rename one")
        seen.add(path)
    jaxpr, out_tree, moving = _jaxpr(apply, leaves, treedef, inputs, kwargs)
    weights = {k: leaves[i] for k, i in enumerate(moving) if _numeric(leaves[i][1])}
    weights = {
        k: (path, leaf)
        for k, (path, leaf) in weights.items()
        if select(leaf) and (paths is None or path in paths)
    }
    program, builder = build(jaxpr, weights, named)
    shapes = {path: leaf for path, leaf in leaves}
    layouts = {  # of the whole leaf, also where a shard_map sees a shard of it
        path: dataclasses.replace(layout, leaf_shape=tuple(shapes[path].shape))
        for path, (_, layout) in builder.layouts.items()
    }
    uses: dict[str, int] = {}
    for site in builder.sites:
        uses[site.path] = uses.get(site.path, 0) + 1
    final = {
        site.id: dataclasses.replace(
            site,
            uses=uses[site.path],
            layout=layouts[site.path],
            transposed=site.layout.in_axes != layouts[site.path].in_axes,
        )
        for site in builder.sites
    }
    _update(program, final)
    return Graph(
        program,
        tuple(final.values()),
        tuple(builder.other),
        tuple(path for path, _ in leaves),
        shapes,
        layouts,
        out_tree,
        builder.number,
    )


def _update(program: Program, final: dict[str, Site]) -> None:
    for op in program.ops:
        if op.site is not None:
            op.site = final[op.site.id]
        for body in op.bodies:
            _update(body, final)
    program.sites = tuple(final[s.id] for s in program.sites)


def flatten_inputs(inputs: tuple, kwargs: dict) -> tuple[list, list, Any]:
    """Splits arguments into arrays and constants.

    Returns:
      The array leaves, all leaves with arrays replaced by None, and the structure.
    """
    leaves, tree = jax.tree.flatten((inputs, kwargs))
    arrays = [v for v in leaves if is_array(v)]
    return arrays, [None if is_array(v) else (v,) for v in leaves], tree


def _jaxpr(apply, named, treedef, inputs, kwargs):
    moving = [i for i, (_, leaf) in enumerate(named) if is_array(leaf)]
    arrays, constants, tree = flatten_inputs(inputs, kwargs)

    def flat(leaves, arrays):
        all_leaves = [leaf for _, leaf in named]
        for i, leaf in zip(moving, leaves, strict=True):
            all_leaves[i] = leaf
        rest = iter(arrays)
        args, kw = jax.tree.unflatten(tree, [next(rest) if c is None else c[0] for c in constants])
        return apply(jax.tree.unflatten(treedef, all_leaves), *args, **kw)

    leaves = [abstract(named[i][1]) for i in moving]
    jaxpr, out = jax.make_jaxpr(flat, return_shape=True)(leaves, [abstract(a) for a in arrays])
    return jaxpr, jax.tree.structure(out), moving
