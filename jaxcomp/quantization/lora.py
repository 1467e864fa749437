"""LoRA: a frozen weight, dense or compressed, plus a trainable product of two thin matrices.

    W' = W + s B A,    A (rank, in) uniform in +-1/sqrt(in),    B (out, rank) = 0,

with s = alpha / rank, or alpha / sqrt(rank) (rank-stabilized). A model starts as it was, and after
training the product can be merged into W. On a compressed W (NF4 under double quantization) this is
QLoRA.

Adapters are one pytree, apart from the parameters: ``attach`` puts them where the weights are, as
parts of compressed arrays, so that ``dispatch`` sends the input through W and through A and B in
turn and no gradient of the size of W comes up:

    adapters = lora.init(key, graph, rank=8)
    loss = lambda adapters: f(jc.dispatch(apply)(lora.attach(params, adapters), x))
    gradient = jax.grad(loss)(adapters)
    params = lora.merge(params, adapters)

LoftQ starts from a base and factors that together are closest to W, alternating

    Q = quantize(W - s B A),    s B A = the best approximation of W - Q of that rank.

The error ||W - Q - s B A|| does not fall with every round, so the best round is kept.

QA-LoRA lets A see only the sums of the inputs over each group of a quantized base. The product is
then constant on a group and merges into the zero points exactly: Z' = Z - s B A / S.

Differs from the papers in:
1. Stacked weights (scanned layers, experts) have stacked factors.
2. No dropout on the adapters' input.
3. QA-LoRA's pooled input is a sum; an average is the same with another alpha.
4. LoftQ keeps the best of its rounds, the start without factors among them.

Source: Hu et al., LoRA, arXiv 2106.09685, and its code (A's start); Dettmers et al., QLoRA, arXiv
2305.14314; Kalajdzievski, rsLoRA, arXiv 2312.03732; Li et al., LoftQ, arXiv 2310.08659; Xu et al.,
QA-LoRA, arXiv 2309.14717.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxcomp.errors import JaxcompError
from jaxcomp.formats import base, grid
from jaxcomp.formats.affine import Affine
from jaxcomp.formats.base import part, static
from jaxcomp.formats.checks import check
from jaxcomp.formats.compressed import CompressedArray, is_compressed, to_matrix
from jaxcomp.formats.dense import Dense, LowRankPart, low_rank
from jaxcomp.formats.spec import Element, LowRank
from jaxcomp.formats.transforms import InputQuant
from jaxcomp.graph.sites import Layout
from jaxcomp.graph.trace import Graph, leaf_paths
from jaxcomp.quantization import checks, common
from jaxcomp.quantization.rtn import rtn
from jaxcomp.rules import close_names, fits

_EXACT = jax.lax.Precision.HIGHEST


@part
class Adapter:
    """The trainable product of one weight, W' = W + scaling * b @ a.

    Attributes:
      a: ``(*stack, rank, in)``; ``(*stack, rank, in / group_size)`` under QA-LoRA.
      b: ``(*stack, out, rank)``.
      scaling: alpha / rank, or alpha / sqrt(rank).
      group_size: inputs that QA-LoRA sums up; 1 is plain LoRA.
      layout: which axes of the weight make up its matrix.
    """

    a: jax.Array
    b: jax.Array
    scaling: float = static(default=1.0)
    group_size: int = static(default=1)
    layout: Layout | None = static(default=None)

    @property
    def rank(self) -> int:
        """Inner size."""
        return self.a.shape[-2]

    def product(self) -> LowRankPart:
        """The scaled product as a part of a compressed weight."""
        a = self.a
        if self.group_size != 1:
            a = jnp.repeat(a, self.group_size, axis=-1)
        return LowRankPart(self.b * jnp.asarray(self.scaling, self.b.dtype), a)


Adapters = dict[str, Adapter]


def init(
    key: jax.Array,
    graph_or_params: Any,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    rank: int = 8,
    alpha: float = 16.0,
    rank_stabilized: bool = False,
    group_size: int = 1,
    dtype: Any = jnp.float32,
) -> Adapters:
    """Makes adapters that change nothing yet.

    Args:
      key: for the first factors. Those of a weight depend on the key and its path alone.
      graph_or_params: what ``jc.trace`` gave for the model; or a parameter tree, of which
        compressed leaves alone can have adapters.
      include: globs over weight paths (``re:`` for a regular expression). The bare "*" stands for
        every matrix that a contraction uses; embeddings and tied heads must be named.
      exclude: globs of weights that have none, stronger than ``include``.
      rank: inner size of the product.
      alpha: the product is multiplied by alpha / rank.
      rank_stabilized: by alpha / sqrt(rank) instead.
      group_size: consecutive inputs that are summed up before the product, for QA-LoRA.
      dtype: of the factors.

    Returns:
      ``{path: Adapter}``.

    Raises:
      JaxcompError: a glob that matches nothing, a rank that is larger than the matrix, a weight of
        integers or without a matrix, or a group size that does not divide the inputs.

    Example:
      >>> import jaxcomp as jc
      >>> params = {"w": jnp.ones((8, 4)), "b": jnp.ones(4)}
      >>> graph = jc.trace(lambda p, x: x @ p["w"] + p["b"], params, jnp.ones((2, 8)))
      >>> adapters = init(jax.random.key(0), graph, rank=2)
      >>> [(path, v.a.shape, v.b.shape) for path, v in adapters.items()]
      [('w', (2, 8), (4, 2))]

    Source: https://arxiv.org/abs/2106.09685, section 4.1.
    """
    scaling = _scaling(rank, alpha, rank_stabilized)
    adapters = {}
    for path, layout in _chosen(graph_or_params, include, exclude, rank).items():
        *stack, out, size = layout.matrix_shape
        if group_size < 1 or size % group_size:
            raise JaxcompError(
                f"{path} {layout.leaf_shape}: group_size {group_size} does not divide the input "
                f"size {size}; use the group size of the quantized base, or 1, or exclude this path"
            )
        bound = 1 / math.sqrt(size)
        own = jax.random.fold_in(key, zlib.crc32(path.encode()))
        a = jax.random.uniform(own, (*stack, rank, size // group_size), dtype, -bound, bound)
        b = jnp.zeros((*stack, out, rank), dtype)
        adapters[path] = Adapter(a, b, scaling, group_size, layout)
    return adapters


def _scaling(rank: int, alpha: float, rank_stabilized: bool) -> float:
    if rank < 1:
        raise JaxcompError(f"rank {rank} must be 1 or more")
    return alpha / math.sqrt(rank) if rank_stabilized else alpha / rank


def _chosen(source: Any, include, exclude, rank: int) -> dict[str, Layout]:
    """The weights that globs name, with their matrices, each checked."""
    if isinstance(include, str) or isinstance(exclude, str):
        raise JaxcompError("include and exclude are tuples of globs; put the glob into a tuple")
    leaves, layouts, usual = _weights(source)
    picked: set[str] = set()
    for rule in include:
        found = usual if rule == "*" else [p for p in layouts if fits(rule, p)]
        if not found:
            raise JaxcompError(_unmatched("include", rule, leaves, layouts, source))
        picked.update(found)
    for rule in exclude:
        found = [p for p in leaves if fits(rule, p)]
        if not found:
            raise JaxcompError(_unmatched("exclude", rule, leaves, layouts, source))
        picked.difference_update(found)
    if not picked:
        raise JaxcompError(f"include {tuple(include)} and exclude {tuple(exclude)} leave no weight")
    chosen = {path: layouts[path] for path in leaves if path in picked}
    for path, layout in chosen.items():
        leaf = leaves[path]
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise JaxcompError(
                f"{path} {tuple(leaf.shape)}: {jnp.dtype(leaf.dtype).name} weights have no "
                "low-rank update; adapters are for float and compressed weights: exclude this path"
            )
        check(LowRank(rank), layout.matrix_shape, path)
    return chosen


def _weights(source: Any) -> tuple[dict[str, Any], dict[str, Layout], list[str]]:
    """Leaves by path, matrices of those that have one, and what the bare "*" stands for."""
    if isinstance(source, Graph):
        leaves = {p: leaf for p, leaf in source.shapes.items() if hasattr(leaf, "dtype")}
        layouts = dict(source.layouts)
        first = {}
        for site in source.sites:
            first.setdefault(site.path, site.is_contraction)
        usual = [path for path in leaves if first.get(path) and path in layouts]
    else:
        leaves = {p: leaf for p, leaf in leaf_paths(source)[0] if hasattr(leaf, "dtype")}
        layouts = {}
        usual = [path for path, leaf in leaves.items() if is_compressed(leaf)]
    layouts.update({p: _own_layout(leaf) for p, leaf in leaves.items() if is_compressed(leaf)})
    return leaves, layouts, usual


def _own_layout(leaf: CompressedArray) -> Layout:
    rest = [a for a in range(leaf.ndim) if a not in leaf.stack_axes]
    pick = lambda axes: tuple(rest[a] for a in axes)  # noqa: E731
    return Layout(tuple(leaf.shape), leaf.stack_axes, pick(leaf.out_axes), pick(leaf.in_axes))


def _unmatched(which: str, rule: str, leaves: dict, layouts: dict, source: Any) -> str:
    traced = isinstance(source, Graph)
    fix = "" if traced else "; pass the graph that jc.trace gives instead of the parameters"
    other = [path for path in leaves if fits(rule, path)]
    if other:
        why = (
            "no contraction or look-up uses" if traced else "a dense array does not say how to use"
        )
        return (
            f"{which} rule {rule!r} matches {other[0]} "
            f"{tuple(leaves[other[0]].shape)}, but {why} it as a matrix{fix}"
        )
    if not layouts:
        return f"{which} rule {rule!r}: there is no weight that could have an adapter{fix}"
    close = ", ".join(close_names(rule, layouts))
    return (
        f"{which} rule {rule!r} matches none of the model's {len(layouts)} weights; the closest "
        f"are {close}; correct or remove the rule"
    )


def attach(params: Any, adapters: Mapping[str, Adapter]) -> Any:
    """Parameters in which the adapted weights are sums of a frozen base and a low-rank part.

    Run them with ``jc.dispatch(apply)``. No gradient flows into the base.

    Args:
      params: parameter tree, leaves dense or compressed.
      adapters: from ``init``, trained or not.

    Returns:
      The same tree, with compressed arrays for the adapted weights; a dense base stays dense, as a
      part.

    Raises:
      JaxcompError: a path that is not in the tree, or shapes that do not fit.
    """

    def joined(path, leaf, adapter):
        whole = _base(path, leaf, adapter)
        return whole.replace(parts=(*jax.tree.map(_frozen, whole.parts), adapter.product()))

    return _replaced(params, adapters, joined)


def _frozen(a: Any) -> Any:
    return jax.lax.stop_gradient(a) if isinstance(a, jax.core.Tracer) else a


def _replaced(params: Any, adapters: Mapping[str, Adapter], function: Any) -> Any:
    named, treedef = leaf_paths(params)
    paths = [path for path, _ in named]
    for path in adapters:
        if path not in paths:
            close = ", ".join(close_names(path, paths))
            raise JaxcompError(
                f"an adapter is named {path!r}, but params have no such leaf; the closest are "
                f"{close}; make adapters for this model with lora.init"
            )
    leaves = [function(p, v, adapters[p]) if p in adapters else v for p, v in named]
    return jax.tree.unflatten(treedef, leaves)


def _base(path: str, leaf: Any, adapter: Adapter) -> CompressedArray:
    """A leaf as a compressed array whose matrix the adapter fits."""
    if is_compressed(leaf):
        whole = leaf
    else:
        layout = adapter.layout
        if tuple(leaf.shape) == layout.leaf_shape:
            axes = (layout.stack_axes, layout.out_axes, layout.in_axes)
            matrix = to_matrix(leaf, *axes)
            return CompressedArray.from_matrix(Dense(matrix), leaf.shape, leaf.dtype, *axes)
        whole = None
    wanted = (*adapter.b.shape[:-1], adapter.a.shape[-1] * adapter.group_size)
    if whole is None or whole.parts[0].shape != wanted:
        raise JaxcompError(
            f"{path} {tuple(leaf.shape)}: its adapter is for {adapter.layout.leaf_shape}, a matrix "
            f"{wanted}; make adapters for this model with lora.init"
        )
    return whole


def merge(params: Any, adapters: Mapping[str, Adapter], requantize: Element | None = None) -> Any:
    """Parameters with the adapters added to the weights.

    A dense weight becomes W + s B A in its own dtype. A compressed one becomes dense, its
    dequantized values plus the product, or is rounded to nearest again in the format
    ``requantize``; where its input is quantized, it stays so. A QA-LoRA adapter on integers of its
    group size goes into their zero points, which become float, and changes nothing else.

    Args:
      params: parameter tree, without the adapters attached.
      adapters: from ``init``.
      requantize: format of the merged weights whose base is compressed; None leaves them dense.

    Returns:
      The same tree.

    Raises:
      JaxcompError: a path that is not in the tree, or shapes or a format that do not fit.
    """

    def merged(path, leaf, adapter):
        whole = _base(path, leaf, adapter)
        if adapter.group_size != 1 and is_compressed(leaf):
            integers = _into_zero_points(whole, adapter)
            if integers is not None:
                return integers
        wide = base.compute_dtype(*jax.tree.leaves((whole.parts, adapter)))
        matrix = whole.matrix(wide) + adapter.product().materialize(wide)
        if requantize is not None and is_compressed(leaf):
            grid.check(requantize, matrix.shape, path)
            (rounded,) = rtn(matrix, requantize).parts
            return whole.replace(parts=(_like_input(whole, rounded),))
        dense = whole.replace(parts=(_like_input(whole, Dense(matrix)),))
        return dense if isinstance(dense.parts[0], InputQuant) else dense.materialize()

    return _replaced(params, adapters, merged)


def _like_input(whole: CompressedArray, inner: Any) -> Any:
    """A part under the quantization of the input that a weight has, if it has one."""
    outer = whole.parts[0]
    return outer.replace(part=inner) if isinstance(outer, InputQuant) else inner


def _into_zero_points(whole: CompressedArray, adapter: Adapter) -> CompressedArray | None:
    """The weight with a pooled adapter in its zero points; None where its groups are others."""
    integers = whole.parts[0]
    fits = isinstance(integers, Affine) and integers.group_size == adapter.group_size
    if not (fits and len(whole.parts) == 1 and integers.out_group_size == 1):
        return None
    wide = base.compute_dtype(integers.scale, adapter.a, adapter.b)
    b, a = (v.astype(wide) for v in (adapter.b, adapter.a))
    product = adapter.scaling * jnp.swapaxes(jnp.matmul(b, a, precision=_EXACT), -1, -2)
    zero = jnp.zeros((), wide) if integers.symmetric else integers.zero_point.astype(wide)
    zero = zero - product / integers.scale.astype(wide)
    return whole.replace(parts=(integers.replace(zero_point=zero),))


@functools.partial(jax.jit, static_argnames=("fmt", "rank", "iterations"))
def _loftq(w, *, fmt, rank, iterations):
    w = w.astype(common.working_dtype(w))

    def quantized(target):
        rounded = common.round_to_grid(fmt, target, "minmax", 99.9)
        return rounded.part, rounded.values

    def error(values, product):
        return jnp.square(w - values - product).sum((-1, -2))

    stored, values = quantized(w)
    zeros = jnp.zeros((*w.shape[:-2], rank, w.shape[-1]), w.dtype)
    factors = LowRankPart(jnp.zeros((*w.shape[:-1], rank), w.dtype), zeros)
    best = (stored, factors)
    least = error(values, 0)
    for i in range(iterations):
        if i:
            stored, values = quantized(w - factors.materialize(w.dtype))
        factors = low_rank(w - values, rank)
        now = error(values, factors.materialize(w.dtype))
        better = now < least

        def keep(new, old, better=better):
            return jnp.where(
                better.reshape(better.shape + (1,) * (new.ndim - better.ndim)), new, old
            )

        best = jax.tree.map(keep, (stored, factors), best)
        least = jnp.minimum(now, least)
    return best


def loftq(
    w: jax.Array, fmt: Element, rank: int, iterations: int = 5
) -> tuple[CompressedArray, jax.Array, jax.Array]:
    """A quantized weight and factors that together are close to a weight.

    Args:
      w: ``(*stack, out, in)`` float.
      fmt: element format of the base.
      rank: inner size of the product.
      iterations: rounds; the best is kept. 0 gives factors of zeros.

    Returns:
      The base, and a ``(*stack, rank, in)``, b ``(*stack, out, rank)`` with W ~ base + b a.

    Raises:
      JaxcompError: the format or the rank does not fit, or weights are not finite.

    Source: https://arxiv.org/abs/2310.08659, algorithm 1.
    """
    return _checked_loftq(w, fmt, rank, iterations, "")


def _checked_loftq(w, fmt, rank, iterations, path):
    checks.check_format(fmt, w, None, None, path)
    checks.check_weight(w, path)
    check(LowRank(rank), w.shape, path or "weight")
    if iterations < 0:
        raise JaxcompError(f"iterations {iterations} must be 0 or more")
    stored, factors = _loftq(w, fmt=fmt, rank=rank, iterations=iterations)
    return common.compressed((stored,), w), factors.b, factors.a


def init_loftq(
    key: jax.Array,
    graph: Graph,
    params: Any,
    fmt: Element,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    rank: int = 8,
    alpha: float = 16.0,
    rank_stabilized: bool = False,
    iterations: int = 5,
    dtype: Any = jnp.float32,
) -> tuple[Any, Adapters]:
    """Quantizes weights and makes adapters that take up what quantization lost.

    Args:
      key: as for ``init``; used where ``iterations`` is 0.
      graph: what ``jc.trace`` gave for the model.
      params: its parameters; the named weights are dense.
      fmt: element format of the bases.
      include: as for ``init``.
      exclude: as for ``init``.
      rank: as for ``init``.
      alpha: as for ``init``; the product at the start does not depend on it.
      rank_stabilized: as for ``init``.
      iterations: rounds of LoftQ; 0 is plain rounding with adapters that change nothing.
      dtype: of the factors.

    Returns:
      Parameters with compressed weights, and their adapters.

    Raises:
      JaxcompError: as for ``init`` and ``loftq``.
    """
    adapters = init(key, graph, include, exclude, rank, alpha, rank_stabilized, dtype=dtype)
    for path, adapter in adapters.items():
        leaf = graph.shapes[path]
        if is_compressed(leaf):
            raise JaxcompError(
                f"{path} {tuple(leaf.shape)}: LoftQ quantizes the weight itself; pass dense "
                "parameters, or exclude this path"
            )
        grid.check(fmt, adapter.layout.matrix_shape, path)
    made = dict(adapters)

    def quantized(path, leaf, adapter):
        axes = (adapter.layout.stack_axes, adapter.layout.out_axes, adapter.layout.in_axes)
        array, a, b = _checked_loftq(to_matrix(leaf, *axes), fmt, rank, iterations, path)
        # A weight that the format holds exactly leaves nothing to take up: it keeps A's start.
        lost = jnp.any(b != 0, axis=(-1, -2), keepdims=True)
        a = jnp.where(lost, a.astype(dtype), adapter.a)
        made[path] = dataclasses.replace(adapter, a=a, b=(b / adapter.scaling).astype(dtype))
        return CompressedArray.from_matrix(array.parts, leaf.shape, leaf.dtype, *axes)

    return _replaced(params, adapters, quantized), made
