"""What the layer algorithms share: errors of a layer, slabs of rows, how results are stored."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp import host
from jaxcomp.calibration import Unsummed
from jaxcomp.formats import grid, sparse
from jaxcomp.formats.compressed import CompressedArray
from jaxcomp.formats.dense import Dense
from jaxcomp.formats.spec import Codebook, Element
from jaxcomp.formats.transforms import InputQuant, InputScale
from jaxcomp.processes import told
from jaxcomp.quantization.activation import check_activation, static_scales
from jaxcomp.quantization.checks import sparse_format
from jaxcomp.quantization.factored import LAPACK
from jaxcomp.step import Activation, Error, Layer


class Rounded(NamedTuple):
    """A matrix on a grid.

    Attributes:
      values: ``(*stack, out, in)``, what is stored stands for these; None where nobody asks.
      codes: int32 like ``values``, or None when they are in ``part``.
      qparams: scales and zero points of the groups.
      context: what the whole matrix shares.
      group_index: group of each input where groups are not consecutive, else None.
      part: the stored matrix; None leaves it to ``store`` to make it.
    """

    values: jax.Array | None
    codes: jax.Array | None
    qparams: Any
    context: Any
    group_index: jax.Array | None = None
    part: Any = None


def working_dtype(*arrays: Any) -> Any:
    """float64 when one of the arrays is, float32 otherwise.

    Args:
      *arrays: what is computed with; None is passed over.

    Returns:
      The dtype.
    """
    wide = any(a is not None and a.dtype == jnp.float64 for a in arrays)
    return jnp.float64 if wide else jnp.float32


def over_stack(function, w: Any, *operands: Any):
    """Maps a function of one matrix over the stack of a weight.

    Args:
      function: takes a matrix and operands.
      w: ``(*stack, out, in)``.
      *operands: ``(value, ndim)`` pairs: an array with ``ndim`` axes is shared by all of the
        stack, one with more has the same leading stack; None stays None.

    Returns:
      The function's results with leading stack axes.
    """
    depth = w.ndim - 2
    values = [value for value, _ in operands]
    axes = [0 if v is not None and v.ndim > n else None for v, n in operands]
    for _ in range(depth):
        function = jax.vmap(function, in_axes=(0, *axes))
    return function(w, *values)


def energies(w: jax.Array, approximation: jax.Array, h: jax.Array | LAPACK | None) -> jax.Array:
    """Rows' shares of tr(E H Eᵀ) and tr(W H Wᵀ).

    Args:
      w: ``(*stack, out, in)``.
      approximation: what stands in for it; E is the difference.
      h: ``(in, in)`` or ``(*stack, in, in)``; None stands for the identity.

    Returns:
      ``(*stack, out, 2)``.
    """
    if isinstance(h, LAPACK):
        shares = []
        for start in range(0, len(w), _ENERGY_ROWS):  # Not as large as the slab once more.
            piece = w[start : start + _ENERGY_ROWS].astype(h.dtype, copy=False)
            # In one product: a third faster, as H is brought into the cache once for both.
            pair = np.stack([piece - approximation[start : start + _ENERGY_ROWS], piece])
            shares.append(h.energies(pair.reshape(-1, pair.shape[-1])).reshape(2, -1).T)
        return np.concatenate(shares)
    xp = np if isinstance(w, np.ndarray) else jnp

    def energy(e):
        moved = e
        if h is not None:
            exact = {} if xp is np else {"precision": jax.lax.Precision.HIGHEST}
            moved = xp.matmul(e, h, **exact)
        return (moved * e).sum(-1)

    return xp.stack([energy(w - approximation), energy(w)], -1)


def error_of(energy: Any) -> Error:
    """Relative error of a layer from what ``energies`` gave.

    Args:
      energy: ``(*stack, out, 2)``.

    Returns:
      sqrt(tr(E H Eᵀ) / tr(W H Wᵀ)).
    """
    lost, whole = host.fetch(energy).astype(np.float64).reshape(-1, 2).sum(0)
    return Error.of(float(lost), float(whole))


@jax.jit
def _lost_and_whole(w, approximation, h):
    dtype = working_dtype(w)
    h = None if h is None else h.astype(dtype)
    energy = energies(w.astype(dtype), approximation.astype(dtype), h)
    return energy.reshape(-1, 2).sum(0)


# Rows whose energy is computed at a time on the CPU.
_ENERGY_ROWS = 64
# Rows that a column loop takes at a time on the CPU, and elements, for which it takes fewer.
_ROWS = 256
_SLAB = 2**19


def slab_rows(in_size: int) -> int:
    """Rows that a column loop takes at a time on the CPU.

    A slab is there in float32 some three times over (weights, errors, what is subtracted): of very
    wide matrices it has fewer rows, or it would weigh beside the Hessian.

    Args:
      in_size: columns.

    Returns:
      A power of two, the same for all sizes up to 2048.

    Example:
      >>> [slab_rows(n) for n in (128, 4096, 14336)]
      [256, 128, 32]
    """
    fitting = max(1, _SLAB // max(1, in_size))
    return min(_ROWS, max(32, 2 ** (fitting.bit_length() - 1)))


def splits_rows(w: Any, h: Any, fmt: Any) -> bool:
    """Whether the column loop runs over slabs of ``slab_rows`` rows of a matrix.

    Rows are independent of one another, so one compilation for an input size serves weights of
    every output size, and a slab stays in the CPU's cache. Accelerators take all rows at once.

    Args:
      w: the weight.
      h: its Hessian.
      fmt: element format or None; one whose rows share something is not split.

    Returns:
      True on the CPU for a single matrix of concrete values whose rows share no scale.
    """
    if not _independent_rows(w, fmt):
        return False
    return jax.default_backend() == "cpu" and host.is_on_host(w, h)


def spreads_rows(w: Any, h: Any, fmt: Any) -> bool:
    """Whether several processes each run the column loop over the rows that their CPUs hold.

    Args:
      w: the weight.
      h: its Hessian.
      fmt: element format or None.

    Returns:
      True where ``splits_rows`` would be if one process held the weight. ``by_rows`` then calls its
      function with NumPy arrays as well, so it must read nothing that lies on the mesh.
    """
    return _independent_rows(w, fmt) and host.split_by_rows(w) and host.is_whole(h)


def spreads_stack(w: Any, h: Any) -> bool:
    """Whether several processes each take the matrices of a stack that their CPUs hold.

    Args:
      w: the weight, ``(*stack, out, in)``.
      h: its Hessian.

    Returns:
      True where ``by_stack`` can be called for them.
    """
    return w.ndim > 2 and host.split_by_rows(w) and host.is_whole(h)


def by_stack(function: Any, w: Any, *operands: Any) -> Any:
    """Applies a compiled function to those matrices of a stack that this process's CPUs hold.

    Args:
      function: of a stack and the operands, NumPy arrays; every array of its result has the stack
        first.
      w: a weight that ``spreads_stack``.
      *operands: ``(value, ndim)`` pairs as in ``over_stack``.

    Returns:
      The result for the whole stack, split like the weight.
    """
    own, starts = host.own_rows(w)

    def mine(value, ndim):
        if value is None or value.ndim == ndim:
            return None if value is None else np.asarray(value)
        if not host.is_whole(value):
            return host.own_rows(jax.device_put(value, w.sharding))[0]
        value = np.asarray(value)
        return np.concatenate([value[first:end] for first, end in starts])

    def work():
        found = function(own, *(mine(*operand) for operand in operands))
        return jax.tree.map(np.asarray, found)

    found = by_itself(w, work)
    return jax.tree.map(lambda a: host.from_own_rows(a, starts, w), found)


def _independent_rows(w: Any, fmt: Any) -> bool:
    if w.ndim != 2:
        return False
    if getattr(fmt, "out_group_size", 1) != 1 or getattr(fmt, "kind", None) == "nvfp4":
        return False
    return fmt is None or not grid.fits_together(fmt)


def by_itself(w: Any, work: Callable[[], Any]) -> Any:
    """What a process computes without the others; where it fails, all of them raise.

    Args:
      w: the weight that it is for; one that is not spread over processes is this one's alone.
      work: reads nothing that lies on the mesh.

    Returns:
      What it gives here.
    """
    if not host.split_by_rows(w):
        return work()

    def alone():
        with host.alone():
            return work()

    processes = sorted({device.process_index for device in w.sharding.device_set})
    return told("compress", processes, alone)


def by_rows(function: Any, *operands: Any, rows: int | None) -> Any:
    """Applies a compiled function to slabs of rows, the last filled up with zeros.

    Args:
      function: of slabs, NumPy arrays; every array of its result has the rows first, or does not
        depend on them (a first axis that is not as long).
      *operands: arrays ``(out, ..)``, or None.
      rows: of a slab; None takes all that this process has.

    Returns:
      The result for all rows; of a weight that ``spreads_rows`` it is split like the weight.
    """
    first = operands[0]
    if not host.split_by_rows(first):
        operands = [None if a is None else np.asarray(a) for a in operands]
        return host.to_device(_slabs(function, operands, rows)[0])
    # Nothing is exchanged: each process has the rows that it computes.
    placed = [None if a is None else jax.device_put(a, first.sharding) for a in operands]
    own = [None if a is None else host.own_rows(a)[0] for a in placed]
    starts = host.own_rows(first)[1]
    whole, per_row = by_itself(first, lambda: _slabs(function, own, rows))
    return jax.tree.map(
        lambda a, split: host.from_own_rows(a, starts, first) if split else a, whole, per_row
    )


def _slabs(
    function: Any, operands: Sequence[np.ndarray | None], rows: int | None
) -> tuple[Any, Any]:
    """What ``by_rows`` gives for NumPy arrays, and for each array whether it has the rows first."""
    out = operands[0].shape[0]
    rows = out if rows is None else rows

    def slab(a, start):
        if a is None:
            return None
        piece = a[start : start + rows]
        if len(piece) == rows:
            return piece
        full = np.zeros((rows, *a.shape[1:]), a.dtype)
        full[: len(piece)] = piece
        return full

    whole = per_row = None
    for start in range(0, out, rows):
        pieces = jax.tree.map(np.asarray, function(*(slab(a, start) for a in operands)))
        if whole is None:
            per_row = jax.tree.map(lambda a: len(a) == rows, pieces)
            whole = jax.tree.map(
                lambda a: host.empty((out, *a.shape[1:]), a.dtype) if len(a) == rows else a, pieces
            )
        for all_rows, piece in zip(jax.tree.leaves(whole), jax.tree.leaves(pieces), strict=True):
            if len(piece) == rows:
                all_rows[start : start + rows] = piece[: out - start]
    return whole, per_row


def relative_error(w: jax.Array, approximation: jax.Array, h: jax.Array | None = None) -> jax.Array:
    """Error of a layer's output, sqrt(tr(E H Eᵀ) / tr(W H Wᵀ)) with E = W - approximation.

    Args:
      w: ``(*stack, out, in)``.
      approximation: what stands in for it.
      h: ``(in, in)`` or ``(*stack, in, in)``; None gives the relative error of the weights.

    Returns:
      A scalar over the whole stack.
    """
    h = None if h is None else host.to_device(h)
    lost, whole = _lost_and_whole(w, approximation, h)
    return jnp.sqrt(jnp.maximum(lost, 0) / jnp.where(whole > 0, whole, 1))


def _error(w, approximation, h) -> Error:
    h = h.whole() if isinstance(h, Unsummed) else h
    h = None if h is None else host.to_device(h)
    return Error.of(*map(float, host.fetch(_lost_and_whole(w, approximation, h))))


def compressed(parts: Sequence[Any], w: Any) -> CompressedArray:
    """Wraps parts of a canonical matrix.

    Args:
      parts: format parts that sum up to the matrix.
      w: ``(*stack, out, in)``, whose shape and dtype the result takes.

    Returns:
      The compressed array.
    """
    stack = tuple(range(w.ndim - 2))
    return CompressedArray.from_matrix(
        tuple(parts), tuple(w.shape), w.dtype, stack, (w.ndim - 2,), (w.ndim - 1,)
    )


def with_activation(parts: Sequence[Any], activation: Activation | None, statistics=None, path=""):
    """Puts the quantization of the input in front of parts.

    Args:
      parts: format parts.
      activation: how the input is quantized, or None for not at all.
      statistics: of the inputs, for static scales.
      path: name of the weight, for errors.

    Returns:
      The parts, each under an ``InputQuant``.
    """
    if activation is None:
        return tuple(parts)
    check_activation(activation, path)
    scale = zero_point = None
    if not activation.dynamic:
        scale, zero_point = static_scales(statistics, activation)
    return tuple(InputQuant(part, scale, zero_point, spec=activation) for part in parts)


def activation_needs(activation: Activation | None) -> frozenset[str]:
    """Statistics that activation quantization reads.

    Args:
      activation: how the input is quantized, or None.

    Returns:
      The range for static scales, nothing otherwise.
    """
    return (
        frozenset({"range"}) if activation is not None and not activation.dynamic else frozenset()
    )


def input_shape(layer: Layer) -> tuple[int, ...]:
    """Shape ``(*stack, in)`` of per-channel values of a layer.

    Args:
      layer: the layer.

    Returns:
      The shape.
    """
    return (*layer.shape[:-2], layer.shape[-1])


def shared_stack(layers: Sequence[Layer]) -> tuple[int, ...]:
    """Stack axes for which the layers of an input group can each have a scale.

    Args:
      layers: the group.

    Returns:
      Their stack where it is the same for all, otherwise () for one scale of all.
    """
    stacks = {layer.shape[:-2] for layer in layers}
    return stacks.pop() if len(stacks) == 1 else ()


def shared(values: Sequence[jax.Array], stack: tuple[int, ...]) -> jax.Array:
    """Maximum over the layers of a group (and over stacks that they do not share).

    Args:
      values: ``(in,)`` or ``(*stack_i, in)`` of each layer.
      stack: what ``shared_stack`` gave.

    Returns:
      ``(*stack, in)``, or ``(in,)`` where all values are.
    """

    def largest(*values):
        xp = np if isinstance(values[0], np.ndarray) else jnp
        known = ((), stack)
        flat = [v if v.shape[:-1] in known else v.reshape(-1, v.shape[-1]).max(0) for v in values]
        return functools.reduce(xp.maximum, flat)

    return host.call(largest, *values)


def rescaled(layer: Layer, scale: jax.Array) -> Layer:
    """The layer with its weight's columns multiplied by a scale and its input divided by it.

    Args:
      layer: the layer.
      scale: ``(in,)`` or ``(*stack, in)``, positive.

    Returns:
      The layer, which computes the same. Its parts are dropped.
    """
    layer = layer.map_weight(lambda weight: host.call(_rescaled, weight, scale))
    scale = host.numpy(scale)
    xp = np if isinstance(scale, np.ndarray) else jnp
    inverse = host.to_device(1 / xp.broadcast_to(scale, input_shape(layer)))
    before = layer.input_scale
    return layer.replace(
        statistics=None if layer.statistics is None else layer.statistics.scaled(inverse),
        input_scale=inverse if before is None else before * inverse,
        parts=None,
    )


def _rescaled(w, scale):
    xp = np if isinstance(w, np.ndarray) else jnp
    scale = xp.broadcast_to(scale, (*w.shape[:-2], w.shape[-1]))
    if xp is np:
        # Into an array that JAX takes as it is; nor is what is stored copied to be converted.
        out = host.empty(w.shape, jax.dtypes.canonicalize_dtype(working_dtype(w)))
        product = np.multiply(w, scale[..., None, :], out=out)
    else:
        product = (w * scale[..., None, :]).astype(w.dtype)
    return product


def round_to_grid(
    fmt: Element,
    w: jax.Array,
    clipping: str,
    percentile: float,
    mask: jax.Array | None = None,
    build: bool = True,
) -> Rounded:
    """Rounds a matrix to the nearest points of a grid fitted to it.

    Args:
      fmt: element format.
      w: ``(*stack, out, in)``.
      clipping: how a group's range is chosen.
      percentile: for ``clipping="percentile"``.
      mask: bool like ``w``, weights that may be other than zero.
      build: store the matrix instead of returning codes.

    Returns:
      The matrix on the grid.
    """
    importance = None
    if mask is not None:
        w = jnp.where(mask, w, 0.0)
        importance = mask.astype(w.dtype)
    context = grid.prepare(fmt, w, importance)
    qparams = grid.fit(fmt, w, context, clipping=clipping, percentile=percentile, mask=mask)
    expanded = grid.expand(fmt, qparams, *w.shape[-2:])
    codes = grid.encode(fmt, w, expanded, context)
    values = grid.decode(fmt, codes, expanded, context).astype(w.dtype)
    if mask is not None:
        return Rounded(jnp.where(mask, values, 0.0), codes, qparams, context)
    if not build:
        return Rounded(values, codes, qparams, context)
    return Rounded(values, None, qparams, context, None, grid.build(fmt, codes, qparams, context))


_build_sparse = functools.partial(jax.jit, static_argnums=0, static_argnames=("kept", "path"))(
    sparse.build
)


def _kept(mask: jax.Array, nm: tuple[int, int] | None) -> int | None:
    if nm is not None or isinstance(mask, jax.core.Tracer):
        return None
    return int(sparse.row_counts(mask).sum(-1).max())


def store(
    fmt: Element,
    rounded: Rounded,
    mask: jax.Array | None,
    nm: tuple[int, int] | None,
    kept: int | None = None,
) -> tuple[Any, ...]:
    """The parts that hold a rounded matrix.

    Args:
      fmt: its element format.
      rounded: the matrix.
      mask: weights that are kept, None for all.
      nm: (n, m) where the mask has that pattern.
      kept: weights that the mask keeps of a matrix, if known; None counts them.

    Returns:
      One part: dense codes, or under a mask an ``NMPart`` or ``SparsePart`` (for a codebook, whose
      zero level holds what is pruned, dense codes).
    """
    r = rounded
    if r.part is not None:
        return (r.part,)
    if mask is None or isinstance(fmt, Codebook):
        return (grid.build(fmt, r.codes, r.qparams, r.context, r.group_index),)
    part = _build_sparse(
        sparse_format(fmt, nm),
        mask,
        codes=r.codes,
        qparams=r.qparams,
        context=r.context,
        group_index=r.group_index,
        kept=_kept(mask, nm) if kept is None else kept,
    )
    return (part,)


def sparse_parts(
    w: jax.Array,
    mask: jax.Array,
    nm: tuple[int, int] | None = None,
    dtype: Any = None,
    kept: int | None = None,
) -> tuple[Any, ...]:
    """The parts that hold a pruned weight in its own dtype.

    Args:
      w: ``(*stack, out, in)``.
      mask: bool like ``w``, weights that are kept.
      nm: (n, m) where the mask has that pattern.
      dtype: in which values are stored; None is that of ``w``.
      kept: weights that the mask keeps of a matrix, if known; None counts them.

    Returns:
      One ``NMPart`` or ``SparsePart``.
    """
    w = w.astype(dtype or w.dtype)
    kept = _kept(mask, nm) if kept is None else kept
    return (_build_sparse(sparse_format(None, nm), mask, w, kept=kept),)


def pattern(layer: Layer) -> tuple[int, int] | None:
    """The N:M pattern in which an earlier step pruned a layer.

    Args:
      layer: the layer.

    Returns:
      (n, m), or None when it is not pruned or has no such pattern.
    """
    if layer.mask is None or not layer.parts:
        return None
    part = layer.parts[0]
    while isinstance(part, (InputQuant, InputScale)):
        part = part.part
    return (part.n, part.m) if isinstance(part, sparse.NMPart) else None


def quantized(
    layer: Layer,
    parts: Sequence[Any],
    values: jax.Array | None,
    activation: Activation | None,
    error: Any = None,
) -> Layer:
    """The layer after a quantizing step.

    Args:
      layer: the layer, transformed as the step left it.
      parts: parts that hold its weight.
      values: what they stand for; not read where there is an error.
      activation: how the input is quantized, or None.
      error: relative error, if the step has it.

    Returns:
      The layer with parts, activation and metrics.
    """
    if error is None:
        h = None if layer.statistics is None else layer.statistics.hessian
        host.settle(values)  # Before the weight is read again.
        error = _error(layer.weight, values, h)
    parts = with_activation(parts, activation, layer.statistics, layer.path)
    metrics = {**layer.metrics, "error": error}
    return layer.replace(parts=parts, activation=activation, metrics=metrics)


def pruned(
    layer: Layer,
    mask: jax.Array,
    weight: jax.Array,
    parts: Sequence[Any],
    error: Any = None,
) -> Layer:
    """The layer after a pruning step.

    Args:
      layer: the layer as it was.
      mask: weights that are kept.
      weight: the pruned weight.
      parts: parts that hold it.
      error: relative error, if the step has it.

    Returns:
      The layer with mask, weight, parts and metrics; without the first two if it ``is_last``.
    """
    if error is None:
        h = None if layer.statistics is None else layer.statistics.hessian
        error = _error(layer.weight, weight, h)
    kept = float(sparse.row_counts(mask).sum() / mask.size)
    metrics = {**layer.metrics, "error": error, "sparsity": 1 - kept}
    parts = tuple(_in_dtype(part, layer.original_dtype) for part in parts)
    seen = {} if layer.is_last else {"mask": mask, "weight": weight}
    return layer.replace(**seen, parts=parts, metrics=metrics)


def _in_dtype(part: Any, dtype: Any) -> Any:
    """A sparse part whose plain values are stored in the dtype of the model's own weight."""
    if dtype is None:
        return part
    if isinstance(part, sparse.NMPart) and isinstance(part.values, Dense):
        return part.replace(values=Dense(part.values.values.astype(dtype)))
    if isinstance(part, sparse.SparsePart) and part.element is None:
        return part.replace(values=part.values.astype(dtype))
    return part


def report_damping(layer: Layer, used: jax.Array, asked: float) -> None:
    """Notes in a layer's metrics when the Hessian needed more damping than was asked for.

    Args:
      layer: the layer, after a step.
      used: damping of each element of the stack.
      asked: the step's option.
    """
    most = float(host.fetch(used).max())
    if most > asked * 1.01:
        layer.metrics["damping"] = most
