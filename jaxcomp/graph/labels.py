"""Labels: which unit each position of a value belongs to, and how operations hand that on.

A label says that position (i, j, ..) of a value belongs to unit ``base + axes[0][i] + axes[1][j] +
..``. Each labelled axis holds its share of the sum, or -1 where positions belong to no unit; so
heads that are an axis of their own, a part of a wider axis, or a region of a fused projection are
one notion, and slices, reshapes and transposes are bookkeeping on short integer vectors.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxcomp.graph.views import IDENTITIES, View


class Stuck(Exception):
    """An operation through which a label cannot be followed; the message says why."""


@dataclasses.dataclass(frozen=True, eq=False)
class Label:
    """Units of the positions of a value.

    Attributes:
      base: the unit of the first labelled position.
      axes: axis -> what each index adds to the unit, -1 where there is no unit. Axes that are not
        named add nothing.
    """

    base: int
    axes: dict[int, np.ndarray]

    @property
    def key(self) -> tuple:
        """Equal for equal labels."""
        return self.base, tuple((a, self.axes[a].tobytes()) for a in sorted(self.axes))


def label(base: int, axes: dict[int, np.ndarray], count: int) -> Label | None:
    """A label in normal form; None where positions do not differ by unit.

    Args:
      base: the unit of the first labelled position.
      axes: axis -> contribution.
      count: units of one stack index: what differs by multiples of it is the stack alone.

    Returns:
      The label.
    """
    kept, varies = {}, False
    for axis, part in axes.items():
        valid = part >= 0
        if not valid.any():
            return None
        low = int(part[valid].min())
        base += low
        part = np.where(valid, part - low, -1)
        if part.any():
            kept[axis] = part
            varies |= bool((part[valid] % count).any())
    return Label(base, kept) if varies else None


def covered(seen: Label, others: Sequence[Label], shape: Sequence[int]) -> bool:
    """Whether other labels of a value together say what a label says.

    Args:
      seen: the label.
      others: labels of the same value.
      shape: shape of the value.

    Returns:
      True where each position has the same unit in one of them.
    """
    if any(seen.key == other.key for other in others):
        return True
    axes = sorted({a for one in (seen, *others) for a in one.axes})

    def units(one):
        part = join([_filled(one.axes, a, shape[a]) for a in axes])
        return np.where(part >= 0, part + one.base, -1)

    wanted = units(seen)
    done = wanted < 0
    for other in others:
        done |= units(other) == wanted
    return bool(done.all())


def join(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Contributions of axes merged into one, slowest first."""
    total, valid = np.zeros((), np.int64), np.ones((), bool)
    for part in parts:
        total = total[..., None] + part
        valid = valid[..., None] & (part >= 0)
    return np.where(valid, total, -1).reshape(-1)


def split(part: np.ndarray, sizes: Sequence[int]) -> tuple[int, list[np.ndarray]] | None:
    """Contributions of one axis split into several; None where they are no sum over them.

    Args:
      part: ``(prod(sizes),)`` contributions.
      sizes: sizes of the axes, slowest first.

    Returns:
      A constant and one vector an axis.
    """
    grid = part.reshape(sizes)
    valid = grid >= 0
    if not valid.any():
        return None
    at = np.unravel_index(np.argmin(np.where(valid, grid, np.iinfo(np.int64).max)), grid.shape)
    base, parts = int(grid[at]), []
    for k in range(len(sizes)):
        line = grid[(*at[:k], slice(None), *at[k + 1 :])]
        parts.append(np.where(line >= 0, line - base, -1))
    rebuilt = join(parts)
    rebuilt = np.where(rebuilt >= 0, rebuilt + base, -1)
    return (base, parts) if np.array_equal(rebuilt, part.reshape(-1)) else None


def _split(part, sizes):
    found = split(part, sizes)
    if found is None:
        raise Stuck("regroups an axis so that no axis of its operand holds whole units")
    return found


def _filled(axes: dict[int, np.ndarray], axis: int, size: int) -> np.ndarray:
    return axes.get(axis, np.zeros(size, np.int64))


def to_leaf(view: View, seen: Label) -> tuple[int, dict[int, np.ndarray]]:
    """A label on a view of a leaf as contributions of the leaf's axes.

    Axes that the view fixes at an index are labelled there alone.
    """
    base, factors = seen.base, []
    for axis, parts in enumerate(view.axes):
        if axis in seen.axes and parts:
            more, split_up = _split(seen.axes[axis], [f.size for f in parts])
            base += more
            factors += zip(parts, split_up, [True] * len(parts), strict=True)
        else:
            factors += [(f, np.zeros(f.size, np.int64), False) for f in parts]
    axes = {}
    for axis in range(len(view.leaf_shape)):
        mine = sorted((f for f in factors if f[0].axis == axis), key=lambda f: -f[0].stride)
        if any(f[2] for f in mine):
            axes[axis] = join([f[1] for f in mine])
    for factor, index in view.fixed:
        axes[factor.axis] = np.where(np.arange(factor.size) == index, 0, -1)
    return base, axes


def from_leaf(view: View, axes: dict[int, np.ndarray]) -> tuple[int, dict[int, np.ndarray]]:
    """Contributions of a leaf's axes as contributions of the axes of a view of it."""
    base, parts = 0, {}
    places = [(i, j) for i, axis in enumerate(view.axes) for j in range(len(axis))]
    for axis, part in axes.items():
        mine = [p for p in places if view.axes[p[0]][p[1]].axis == axis]
        mine.sort(key=lambda p: -view.axes[p[0]][p[1]].stride)
        more, split_up = _split(part, [view.axes[i][j].size for i, j in mine])
        base += more
        parts |= dict(zip(mine, split_up, strict=True))
    found = {}
    for i, factors in enumerate(view.axes):
        if any((i, j) in parts for j in range(len(factors))):
            found[i] = join(
                [parts.get((i, j), np.zeros(f.size, np.int64)) for j, f in enumerate(factors)]
            )
    return base, found


def moved(seen: Label, mapping: dict[int, int], count: int) -> Label | None:
    """The label of an operand whose axes correspond to the result's; others are left out."""
    return label(seen.base, {mapping[a]: v for a, v in seen.axes.items() if a in mapping}, count)


def reshaped(seen: Label, before: Sequence[int], after: Sequence[int], count: int) -> Label | None:
    """The label of a reshape's operand.

    Args:
      seen: label of the result.
      before: shape of the operand.
      after: shape of the result.
      count: units of one stack index.

    Returns:
      The label.

    Raises:
      Stuck: no axis of the operand holds whole units.
    """
    base, axes = seen.base, {}
    i = j = 0
    while i < len(before) or j < len(after):
        start = i, j
        p, q = math.prod(before[i : i + 1]), math.prod(after[j : j + 1])
        i, j = min(i + 1, len(before)), min(j + 1, len(after))
        while p != q:
            if p < q:
                p, i = p * before[i], i + 1
            else:
                q, j = q * after[j], j + 1
        mine = range(start[1], j)
        if any(a in seen.axes for a in mine):
            whole = join([_filled(seen.axes, a, after[a]) for a in mine])
            more, parts = _split(whole, before[start[0] : i])
            base += more
            axes |= dict(zip(range(start[0], i), parts, strict=True))
    return label(base, axes, count)


ELEMENTWISE = IDENTITIES | frozenset(
    "abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil "
    "clamp complex conj convert_element_type cos cosh digamma div eq eq_to erf erf_inv erfc exp "
    "exp2 expm1 floor ge gt igamma igammac imag integer_pow is_finite le le_to lgamma log log1p "
    "logistic lt lt_to max min mul ne neg nextafter not or polygamma pow real reduce_precision "
    "rem round rsqrt select_n shift_left shift_right_arithmetic shift_right_logical sign sin sinh "
    "sqrt square sub tan tanh xor".split()
)
_REDUCTIONS = frozenset(
    "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor argmax "
    "argmin".split()
)
_CUMULATIVE = frozenset("cumsum cumprod cummax cummin cumlogsumexp".split())


def dot_axes(eqn: Any) -> tuple[list[dict[int, int]], tuple[tuple[int, ...], ...]]:
    """How the axes of a dot_general's result correspond to those of its operands.

    Returns:
      For each operand, axis of the result -> axis of the operand; and the contracted axes of each.
    """
    contract, batch = eqn.params["dimension_numbers"]
    maps = [dict(enumerate(b)) for b in batch]
    at = len(batch[0])
    for k in (0, 1):
        used = {*contract[k], *batch[k]}
        for a in range(len(eqn.invars[k].aval.shape)):
            if a not in used:
                maps[k][at] = a
                at += 1
    return maps, tuple(tuple(c) for c in contract)


def gather_axes(eqn: Any) -> dict[int, int]:
    """Axes of a gather's result that are whole axes of its operand."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    shape = eqn.invars[0].aval.shape
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    rest = [a for a in range(len(shape)) if a not in gone]
    pairs = zip(numbers.offset_dims, rest, strict=True)
    return {o: a for o, a in pairs if sizes[a] == shape[a]}


def backward(eqn: Any, output: int, seen: Label, count: int) -> list[tuple[int, Label]]:
    """The labels of an equation's operands that give its result a label.

    Args:
      eqn: an equation without sub-jaxprs.
      output: which of its results is labelled.
      seen: the label.
      count: units of one stack index.

    Returns:
      Pairs of operand and label. An operand that is the same for all units has none.

    Raises:
      Stuck: the operation mixes units, or is not known.
    """
    name, params = eqn.primitive.name, eqn.params
    shapes = [tuple(v.aval.shape) for v in eqn.invars]
    shape = tuple(eqn.outvars[output].aval.shape)
    if name == "optimization_barrier":
        return [(output, seen)]
    if name in ELEMENTWISE:
        maps = [
            {a: a for a, n in enumerate(s) if n == shape[a]} if len(s) == len(shape) else {}
            for s in shapes
        ]
        found = [moved(seen, m, count) for m in maps]
    elif name == "reshape" and params.get("dimensions") is None:
        found = [reshaped(seen, shapes[0], shape, count)]
    elif name in ("squeeze", "expand_dims"):
        found = [reshaped(seen, shapes[0], shape, count)]
    elif name == "broadcast_in_dim":
        axes = params["broadcast_dimensions"]
        same = {o: a for a, o in enumerate(axes) if shapes[0][a] == shape[o]}
        found = [moved(seen, same, count)]
    elif name == "transpose":
        found = [moved(seen, dict(enumerate(params["permutation"])), count)]
    elif name == "rev":
        flip = {a: v[::-1] if a in params["dimensions"] else v for a, v in seen.axes.items()}
        found = [label(seen.base, flip, count)]
    elif name == "slice":
        found = [_slice(params, seen, shapes[0], count)]
    elif name == "split":
        found = [_part(params, output, seen, shapes[0], count)]
    elif name == "concatenate":
        found = _concatenate(params["dimension"], seen, shapes, count)
    elif name == "pad":
        if any(any(params["padding_config"][a]) for a in seen.axes):
            raise Stuck("pads the axis of the units")
        found = [seen]
    elif name in _REDUCTIONS:
        kept = [a for a in range(len(shapes[0])) if a not in params["axes"]]
        found = [moved(seen, dict(enumerate(kept)), count)]
    elif name in _CUMULATIVE:
        found = [_apart(seen, (params["axis"],))]
    elif name == "sort":
        found = [_apart(seen, (params["dimension"],))] * len(shapes)
    elif name == "top_k":
        found = [_apart(seen, (len(shape) - 1,))]
    elif name == "dot_general":
        found = [moved(seen, m, count) for m in dot_axes(eqn)[0]]
    elif name == "iota":
        _apart(seen, (params["dimension"],))
        found = []
    elif name in ("dynamic_slice", "dynamic_update_slice"):
        which = 1 if name == "dynamic_slice" else 2
        for s in shapes[:which]:
            _apart(seen, tuple(a for a in range(len(shape)) if s[a] != shape[a]))
        found = [seen] * which
    elif name == "gather":
        axes = gather_axes(eqn)
        _apart(seen, tuple(a for a in range(len(shape)) if a not in axes))
        found = [moved(seen, axes, count)]
    else:
        raise Stuck("is not known to keep units apart")
    return [(k, v) for k, v in enumerate(found) if v is not None]


def reads(eqn: Any, seen: Label, count: int) -> bool:
    """Whether an equation reads any position that an operand's label names."""
    if eqn.primitive.name != "slice":
        return True
    p = eqn.params
    strides = p["strides"] or (1,) * len(p["start_indices"])
    for axis, part in seen.axes.items():
        cut = slice(p["start_indices"][axis], p["limit_indices"][axis], strides[axis])
        if not (part[cut] >= 0).any():
            return False
    return True


def _apart(seen: Label, axes: tuple[int, ...]) -> Label:
    if any(a in seen.axes for a in axes):
        raise Stuck("works along the axis of the units")
    return seen


def _slice(params, seen, shape, count):
    axes, strides = dict(seen.axes), params["strides"] or (1,) * len(shape)
    for a, n in enumerate(shape):
        start, limit, stride = params["start_indices"][a], params["limit_indices"][a], strides[a]
        if (start, limit, stride) == (0, n, 1):
            continue
        part = np.full(n, -1, np.int64)
        size = -(-(limit - start) // stride)
        part[start:limit:stride] = _filled(axes, a, size)
        axes[a] = part
    return label(seen.base, axes, count)


def _part(params, output, seen, shape, count):
    axis, sizes = params["axis"], params["sizes"]
    start = sum(sizes[:output])
    part = np.full(shape[axis], -1, np.int64)
    part[start : start + sizes[output]] = _filled(seen.axes, axis, sizes[output])
    return label(seen.base, {**seen.axes, axis: part}, count)


def _concatenate(axis, seen, shapes, count):
    if axis not in seen.axes:
        return [seen] * len(shapes)
    found, at = [], 0
    for s in shapes:
        part = seen.axes[axis][at : at + s[axis]]
        at += s[axis]
        piece = label(seen.base, {**seen.axes, axis: part}, count)
        if piece is None and (part >= 0).any():
            raise Stuck("joins units that are computed one by one")
        found.append(piece)
    return found
