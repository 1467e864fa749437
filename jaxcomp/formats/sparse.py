"""Sparse parts: N of every M consecutive inputs, and arbitrary positions under a bit mask.

Both can hold kept values in a dtype, or as codes of an ``Int`` or ``Float`` grid that was fitted to
the dense matrix (one code a kept weight, scales of the dense matrix's groups). What is not kept is
exactly zero.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp import host
from jaxcomp.errors import JaxcompError
from jaxcomp.formats import base, checks, floating, grid, packing
from jaxcomp.formats.base import Part, part, static
from jaxcomp.formats.dense import Dense
from jaxcomp.formats.grid import Context, QParams
from jaxcomp.formats.spec import NM, Float, Int, Sparse

_UNROLLED = 8  # The largest m whose positions are looked at one by one.


@part
class NMPart(Part):
    """At most n of every m consecutive inputs are not zero.

    Attributes:
      indices: position in its block of each kept value, ascending in a block, packed at ceil(log2
        m) bits along the input axis, uint8 ``(*stack, out, ceil(in*n/m*bits/8))``.
      values: part of shape ``(*stack, out, in*n/m)``: kept values, block after block.
      n: values kept of a block.
      m: size of a block.
    """

    indices: jax.Array
    values: Any
    n: int = static(default=2)
    m: int = static(default=4)

    @property
    def index_bits(self) -> int:
        """Bits of a stored position."""
        return (self.m - 1).bit_length()

    @property
    def shape(self) -> tuple[int, ...]:
        """``(*stack, out, in)``."""
        *lead, kept = self.values.shape
        return (*lead, kept // self.n * self.m)

    def positions(self) -> jax.Array:
        """Position in its block of each kept value, uint8 ``(*stack, out, in/m, n)``."""
        *lead, kept = self.values.shape
        flat = packing.unpack(self.indices, self.index_bits, kept)
        return flat.reshape(*lead, kept // self.n, self.n)

    @base.jitted
    def materialize(self, dtype: Any = jnp.float32) -> jax.Array:
        """The dense matrix ``(*stack, out, in)`` in ``dtype``."""
        at = self.positions()
        kept = self.values.materialize(dtype).reshape(at.shape)
        block = jnp.expand_dims(jnp.arange(self.m, dtype=at.dtype), range(at.ndim - 1))
        dense = jnp.zeros((*at.shape[:-1], self.m), dtype)
        for j in range(self.n):
            dense = jnp.where(at[..., j, None] == block, kept[..., j, None], dense)
        return dense.reshape(self.shape)

    def scale_rows(self, c: jax.Array) -> "NMPart":
        """Rows times ``c (*stack, out)``, in the kept values."""
        return self.replace(values=self.values.scale_rows(c))


@part
class SparsePart(Part):
    """Kept values at arbitrary positions.

    Attributes:
      mask: one bit a weight, uint8 ``(*stack, out, ceil(in/8))``.
      values: kept values in row-major order, ``(*stack, kept)`` in any dtype; or their codes
        packed, uint8 ``(*stack, ceil(kept*bits/8))``. Matrices of a stack that keep fewer are
        padded with zeros.
      scale: as in ``Affine`` or ``FloatPart``, of the dense matrix's groups; None without an
        element.
      zero_point: as in ``Affine``, or None.
      tensor_scale: as in ``FloatPart``, or None.
      group_index: as in ``Affine``, or None.
      element: ``Int`` or ``Float`` format of the codes, None for plain values.
      padding: bits by which the packed mask row is longer than the input axis.
      values_padding: codes by which the packed values are longer than the kept count.
    """

    mask: jax.Array
    values: jax.Array
    scale: jax.Array | None = None
    zero_point: jax.Array | None = None
    tensor_scale: jax.Array | None = None
    group_index: jax.Array | None = None
    element: Any = static(default=None)
    padding: int = static(default=0)
    values_padding: int = static(default=0)

    @property
    def in_size(self) -> int:
        """Length of the input axis."""
        return packing.unpacked_size(self.mask.shape[-1], 1, self.padding)

    @property
    def shape(self) -> tuple[int, ...]:
        """``(*stack, out, in)``."""
        return (*self.mask.shape[:-1], self.in_size)

    @property
    def kept(self) -> int:
        """Values stored for a matrix."""
        if self.element is None:
            return self.values.shape[-1]
        return packing.unpacked_size(
            self.values.shape[-1], _element_bits(self.element), self.values_padding
        )

    def padded(self, kept: int) -> "SparsePart":
        """The same matrix with room for ``kept`` values, so that it stacks with fuller ones.

        Args:
          kept: at least ``self.kept``.

        Returns:
          A part whose values end in ``kept - self.kept`` unused zeros.
        """
        more = kept - self.kept
        values = jnp.asarray(self.values)
        edge = [(0, 0)] * (values.ndim - 1) + [(0, more)]
        if self.element is None:
            return self.replace(values=jnp.pad(values, edge))
        bits = _element_bits(self.element)
        codes = jnp.pad(packing.unpack(values, bits, self.kept), edge)
        return self.replace(
            values=packing.pack(codes, bits), values_padding=packing.padding_of(kept, bits)
        )

    def kept_mask(self) -> jax.Array:
        """Bool ``(*stack, out, in)``, True where a value is kept."""
        return packing.unpack(self.mask, 1, self.in_size).astype(bool)

    @base.jitted
    def materialize(self, dtype: Any = jnp.float32) -> jax.Array:
        """The dense matrix ``(*stack, out, in)`` in ``dtype``."""
        mask = self.kept_mask()
        if self.element is None:
            return _scatter(self.values.astype(dtype), mask)
        bits = _element_bits(self.element)
        is_int = isinstance(self.element, Int)
        unpack = packing.unpack_signed if is_int else packing.unpack
        codes = _scatter(unpack(self.values, bits, self.kept), mask)
        out, size = self.shape[-2:]

        def spread(groups):
            if self.group_index is not None:
                return base.gather_groups(groups, self.group_index, out)
            return base.expand_groups(groups, out, size)

        wide = base.compute_dtype(self.scale, self.tensor_scale)
        scale, zero_point = self.scale, self.zero_point
        if not is_int:
            scale = floating.effective_scale(self.element.kind, scale, self.tensor_scale, wide)
        qparams = QParams(
            spread(scale.astype(wide)), None if zero_point is None else spread(zero_point)
        )
        value = grid.decode(self.element, codes.astype(jnp.int32), qparams)
        return jnp.where(mask, value, 0).astype(dtype)

    def scale_rows(self, c: jax.Array) -> "SparsePart":
        """Rows times ``c (*stack, out)``: in the scales if there are some, else in the values."""
        if self.element is None:
            rows = jnp.broadcast_to(c[..., :, None], self.shape)
            factor = _compact(rows, self.kept_mask(), self.kept)
            wide = base.compute_dtype(self.values, c)
            scaled = self.values.astype(wide) * factor.astype(wide)
            return self.replace(values=scaled.astype(self.values.dtype))
        kind = getattr(self.element, "kind", None)
        if kind in floating.BLOCK:
            wide = base.compute_dtype(self.scale, self.tensor_scale)
            scale = floating.effective_scale(kind, self.scale, self.tensor_scale, wide)
            element = Float(floating.ELEMENT_OF[kind], group_size=floating.BLOCK[kind])
            scale = base.scale_group_rows(scale, c)
            return self.replace(scale=scale, tensor_scale=None, element=element)
        zero_point = self.zero_point
        if zero_point is not None and zero_point.shape[-1] != c.shape[-1]:
            zero_point = jnp.repeat(zero_point, c.shape[-1] // zero_point.shape[-1], axis=-1)
        return self.replace(scale=base.scale_group_rows(self.scale, c), zero_point=zero_point)


def row_counts(mask: jax.Array) -> np.ndarray:
    """How many weights a mask keeps of each row.

    Args:
      mask: bool ``(*stack, out, in)``, not traced, wherever its parts are.

    Returns:
      int64 ``(*stack, out)``.
    """
    return host.fetch(host.numpy(mask).sum(-1)).astype(np.int64)


def _element_bits(element: Int | Float) -> int:
    if isinstance(element, Int):
        return element.bits
    return floating.ELEMENTS[floating.ELEMENT_OF[element.kind]].bits


def _before(counts: jax.Array) -> jax.Array:
    """Sums of all entries before each, int32, along the last axis.

    Level by level: on a CPU, XLA passes over the whole array once for each doubling of the length
    of a cumulative sum, so one of millions of entries takes far longer than these short ones.
    """
    size = counts.shape[-1]
    if size <= 256:
        return jnp.cumsum(counts, axis=-1) - counts
    few = 16
    edge = [(0, 0)] * (counts.ndim - 1) + [(0, -size % few)]
    groups = jnp.pad(counts, edge).reshape(*counts.shape[:-1], -1, few)
    inside = jnp.cumsum(groups, axis=-1) - groups
    ranks = _before(groups.sum(-1))[..., None] + inside
    return ranks.reshape(*counts.shape[:-1], -1)[..., :size]


def _order(mask: jax.Array) -> jax.Array:
    """How many positions are kept before each one in row-major order, ``(*stack, out * in)``."""
    size = mask.shape[-2] * mask.shape[-1]
    flat = mask.reshape(*mask.shape[:-2], size)
    edge = [(0, 0)] * (flat.ndim - 1) + [(0, -size % 8)]
    bits = jnp.pad(flat, edge).reshape(*flat.shape[:-1], -1, 8).astype(jnp.uint8)
    bit = jnp.arange(8, dtype=jnp.uint8)
    # Inside a byte the bits below are counted, which needs no sum over positions at all.
    word = (bits << bit).sum(-1, dtype=jnp.uint8, keepdims=True)
    lower = (jnp.uint8(1) << bit) - jnp.uint8(1)
    inside = jax.lax.population_count(word & lower).astype(jnp.int32)
    start = _before(bits.sum(-1, dtype=jnp.int32))
    return (start[..., None] + inside).reshape(*flat.shape[:-1], -1)[..., :size]


def _scatter(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Values ``(*stack, kept)`` at the True positions of ``mask``, zero elsewhere."""
    if values.shape[-1] == 0:
        return jnp.zeros(mask.shape, values.dtype)
    rank = jnp.clip(_order(mask), 0, values.shape[-1] - 1)
    dense = jnp.take_along_axis(values, rank, axis=-1, mode="promise_in_bounds")
    return jnp.where(mask, dense.reshape(mask.shape), jnp.zeros((), values.dtype))


def _compact(x: jax.Array, mask: jax.Array, kept: int) -> jax.Array:
    """The True positions of ``x (*stack, out, in)`` in row-major order, ``(*stack, kept)``."""
    size = mask.shape[-2] * mask.shape[-1]
    rank = jnp.where(mask.reshape(-1, size), _order(mask).reshape(-1, size), kept)
    flat = jax.vmap(lambda v, r: jnp.zeros(kept, v.dtype).at[r].set(v, mode="drop"))(
        x.reshape(-1, size), rank
    )
    return flat.reshape(*mask.shape[:-2], kept)


def _blocks(x: jax.Array, m: int) -> jax.Array:
    return x.reshape(*x.shape[:-1], x.shape[-1] // m, m)


def _nm_chosen(mask: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    """Which n positions a block stores: the first kept ones, then the first of the others.

    Args:
      mask: bool ``(..., blocks, m)``.
      n: stored positions of a block.

    Returns:
      ``chosen (..., blocks, m)`` and the ``rank`` of each position among the chosen.
    """
    dtype = _counting(mask.shape[-1])
    kept = mask.astype(dtype)
    first = jnp.cumsum(kept, -1, dtype=dtype) - 1
    after = kept.sum(-1, dtype=dtype, keepdims=True) + jnp.cumsum(1 - kept, -1, dtype=dtype) - 1
    chosen = jnp.where(mask, first, after) < n
    return chosen, jnp.cumsum(chosen, -1, dtype=dtype) - 1


def _counting(m: int) -> Any:
    """An integer dtype for positions in a block: as many are held as there are weights."""
    return jnp.int8 if m < 128 else jnp.int32


def _nm_compact(x: jax.Array, chosen: jax.Array, rank: jax.Array, n: int) -> jax.Array:
    """The chosen positions of ``x (..., blocks, m)``, ``(..., blocks * n)``.

    Of small blocks position by position: XLA for CPUs writes what it sums to memory first, which
    would be the whole of ``x`` for each of the n.
    """

    def take(j: int) -> jax.Array:
        here, zero = chosen & (rank == j), jnp.zeros((), x.dtype)
        if x.shape[-1] > _UNROLLED:
            return jnp.where(here, x, zero).sum(-1, dtype=x.dtype)
        one = jnp.zeros(x.shape[:-1], x.dtype)
        for k in range(x.shape[-1]):
            one = jnp.where(here[..., k], x[..., k], one)
        return one

    taken = [take(j) for j in range(n)]
    return jnp.stack(taken, -1).reshape(*x.shape[:-2], x.shape[-2] * n)


def build(
    fmt: NM | Sparse,
    mask: jax.Array,
    w: jax.Array | None = None,
    codes: jax.Array | None = None,
    qparams: QParams | None = None,
    context: Context = grid.EMPTY,
    group_index: jax.Array | None = None,
    kept: int | None = None,
    path: str = "weight",
) -> NMPart | SparsePart:
    """Stores the kept weights of a matrix.

    Args:
      fmt: ``NM`` or ``Sparse``; with ``values=None`` from ``w`` in its dtype, else from ``codes``.
      mask: bool ``(*stack, out, in)``, True where a weight is kept.
      w: ``(*stack, out, in)`` values, for ``values=None``.
      codes: ``(*stack, out, in)`` of ``fmt.values``'s grid.
      qparams: of the groups of the dense matrix, ``(*stack, out_groups, in_groups)``.
      context: of the whole matrix.
      group_index: ``(*stack, in)`` as in ``grid.build``, for ``Sparse(Int(..))`` only.
      kept: for ``Sparse``, how many values a matrix stores: the largest number of True in a matrix.
        None counts them, which needs a mask that is not traced.
      path: name of the weight, for errors.

    Returns:
      ``NMPart`` or ``SparsePart``.

    Raises:
      JaxcompError: when the format does not fit, or a block keeps more than n (seen outside of
      jit).

    Example:
      >>> import jax.numpy as jnp
      >>> w = jnp.array([[1.0, 0.0, 0.0, 4.0, 0.0, 6.0, 7.0, 0.0]])
      >>> part = build(NM(2, 4), w != 0, w)
      >>> part.materialize().tolist(), part.nbits
      ([[1.0, 0.0, 0.0, 4.0, 0.0, 6.0, 7.0, 0.0]], 136)
    """
    checks.check(fmt, mask.shape, path)
    mask = jnp.asarray(mask).astype(bool)
    if fmt.values is None and w is None:
        raise JaxcompError(f"{path} {mask.shape}: {fmt} stores the weight's own values; pass w.")
    if fmt.values is not None and (codes is None or qparams is None):
        raise JaxcompError(f"{path} {mask.shape}: {fmt} stores codes; pass codes and qparams.")
    if isinstance(fmt, NM):
        n, m = fmt.n, fmt.m
        if not isinstance(mask, jax.core.Tracer):
            most = int(host.numpy(mask).reshape(-1, m).sum(-1).max())
            if most > n:
                raise JaxcompError(
                    f"{path} {mask.shape}: a block of {m} inputs keeps {most} weights, more than "
                    f"the {n} of {n}:{m} sparsity; store it as Sparse(), or prune to {n}:{m} first."
                )
        if group_index is not None:
            raise JaxcompError(
                f"{path} {mask.shape}: {n}:{m} sparsity stores consecutive groups only; "
                "use static_groups."
            )
        return _build_nm(fmt, mask, w, codes, qparams, context)
    if kept is None:
        if isinstance(mask, jax.core.Tracer):
            raise JaxcompError(
                f"{path} {mask.shape}: the number of kept weights sizes an array, so it cannot "
                "come from a traced mask; pass kept, or build outside of jit."
            )
        kept = int(row_counts(mask).sum(-1).max())
    return _build_sparse(fmt, kept, mask, w, codes, qparams, context, group_index)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _build_sparse(fmt, kept, mask, w, codes, qparams, context, group_index):
    packed_mask = packing.pack(mask, 1)
    padding = packing.padding_of(mask.shape[-1], 1)
    if fmt.values is None:
        return SparsePart(packed_mask, _compact(w, mask, kept), padding=padding)
    element = fmt.values
    bits = _element_bits(element)
    whole = grid.build(element, codes, qparams, context, group_index)
    return SparsePart(
        packed_mask,
        packing.pack(_compact(codes, mask, kept), bits),
        whole.scale,
        getattr(whole, "zero_point", None),
        getattr(whole, "tensor_scale", None),
        getattr(whole, "group_index", None),
        element=element,
        padding=padding,
        values_padding=packing.padding_of(kept, bits),
    )


@functools.partial(jax.jit, static_argnums=0)
def _build_nm(fmt, mask, w, codes, qparams, context):
    n, m = fmt.n, fmt.m
    blocks = _blocks(mask, m)
    chosen, rank = _nm_chosen(blocks, n)
    where = jnp.arange(m, dtype=_counting(m))
    where = jnp.broadcast_to(jnp.expand_dims(where, range(blocks.ndim - 1)), blocks.shape)
    indices = packing.pack(_nm_compact(where, chosen, rank, n), (m - 1).bit_length())
    if fmt.values is None:
        x = jnp.where(mask, w, jnp.zeros((), w.dtype))
        return NMPart(indices, Dense(_nm_compact(_blocks(x, m), chosen, rank, n)), n=n, m=m)
    zero = jnp.zeros((), codes.dtype)
    if qparams.zero_point is not None:
        zero = base.spread(qparams.zero_point, *mask.shape[-2:]).astype(codes.dtype)
    compact = _nm_compact(_blocks(jnp.where(mask, codes, zero), m), chosen, rank, n)
    return NMPart(indices, grid.build(fmt.values, compact, qparams, context), n=n, m=m)


def quantize(
    fmt: NM | Sparse,
    w: jax.Array,
    mask: jax.Array,
    clipping: grid.Clipping = "minmax",
    percentile: float = 99.9,
    path: str = "weight",
) -> NMPart | SparsePart:
    """Rounds the kept weights of a matrix to the format's values and stores them.

    Args:
      fmt: ``NM`` or ``Sparse``.
      w: ``(*stack, out, in)``.
      mask: bool, shape of ``w``, True where a weight is kept.
      clipping: as in ``grid.fit``, on kept weights.
      percentile: as in ``grid.fit``.
      path: name of the weight, for errors.

    Returns:
      ``NMPart`` or ``SparsePart``.

    Raises:
      JaxcompError: as in ``build``.
    """
    if fmt.values is None:
        return build(fmt, mask, w, path=path)
    checks.check(fmt, w.shape, path)
    w = jnp.where(mask, w, 0)
    context = grid.prepare(fmt.values, w)
    qparams = grid.fit(fmt.values, w, context, clipping, percentile, mask)
    codes = _codes(fmt.values, w, qparams, context)
    return build(fmt, mask, codes=codes, qparams=qparams, context=context, path=path)


@functools.partial(jax.jit, static_argnums=0)
def _codes(fmt, w, qparams, context):
    return grid.encode(fmt, w, grid.expand(fmt, qparams, *w.shape[-2:]), context)


def pattern(
    mask: jax.Array, values: Int | Float | None = None, candidates=((1, 4), (2, 4), (4, 8))
) -> NM | Sparse:
    """The cheapest sparse format that can hold a mask.

    Args:
      mask: bool ``(*stack, out, in)``, not traced.
      values: format of the kept values.
      candidates: (n, m) to try, from the sparsest on.

    Returns:
      The first ``NM(n, m, values)`` that the mask and the format's groups allow, else
      ``Sparse(values)``.
    """
    mask = host.fetch(mask)
    for n, m in candidates:
        fmt = NM(n, m, values)
        try:
            checks.check(fmt, mask.shape)
        except JaxcompError:
            continue
        if mask.reshape(*mask.shape[:-1], -1, m).sum(-1).max() <= n:
            return fmt
    return Sparse(values)
