"""Masks: which weights stay, with exact counts and ties broken the same way every time.

A mask is boolean, True where a weight is kept, of the weight's shape. Of ``size`` scores the
``round(sparsity * size)`` smallest are dropped; among equal scores the one with the smaller index
goes first, as a stable sort would have it. No sort is done: the bits of a non-negative float order
as an integer does, so the k-th smallest score is found bit by bit with one count a bit, which is
much faster than sorting on CPU and on accelerators, needs no extra memory, and runs over several
arrays at once (the global scope).
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.errors import JaxcompError


def check_sparsity(sparsity: float, path: str = "") -> float:
    """Checks a fraction of weights to drop.

    Args:
      sparsity: the fraction, 0 to 1.
      path: name of the weight, for the message.

    Returns:
      The sparsity.

    Raises:
      JaxcompError: it is no number from 0 to 1.
    """
    if not isinstance(sparsity, (int, float)) or not 0 <= sparsity <= 1:
        where = f"{path}: " if path else ""
        raise JaxcompError(
            f"{where}sparsity {sparsity!r} is not a fraction from 0 (keep all) to 1 (drop all); "
            "write 50 % as 0.5"
        )
    return sparsity


def check_nm(n: int, m: int, in_size: int | None = None, path: str = "") -> None:
    """Checks an N:M pattern and, where the size is given, that its blocks divide the input.

    Args:
      n: values kept of each block.
      m: size of a block.
      in_size: length of the input axis.
      path: name of the weight, for the message.

    Raises:
      JaxcompError: the pattern cannot be made.
    """
    where = f"{path}: " if path else ""
    if not isinstance(n, int) or not isinstance(m, int) or not 0 < n < m:
        raise JaxcompError(f"{where}N:M pattern {n}:{m} needs whole numbers with 0 < n < m, as 2:4")
    if in_size is not None and in_size % m:
        raise JaxcompError(
            f"{where}N:M pattern {n}:{m} does not divide the input size {in_size}; "
            f"use a block size m that divides it, or exclude this path"
        )


def check_target(
    sparsity: float | None, n: int | None, m: int | None, in_size: int, path: str = ""
) -> tuple[int, int] | None:
    """Checks that either a sparsity or an N:M pattern is asked for, and that it can be made.

    Args:
      sparsity: fraction to drop, or None.
      n: values kept of each block, or None.
      m: size of a block, or None.
      in_size: length of the input axis.
      path: name of the weight, for the message.

    Returns:
      (n, m), or None for a sparsity.

    Raises:
      JaxcompError: both or neither are given, or it cannot be made.
    """
    where = f"{path}: " if path else ""
    if (sparsity is None) == (n is None) or (n is None) != (m is None):
        raise JaxcompError(
            f"{where}give either a sparsity or both n and m, got sparsity={sparsity}, n={n}, m={m}"
        )
    if sparsity is not None:
        check_sparsity(sparsity, path)
        return None
    check_nm(n, m, in_size, path)
    return n, m


def dropped_count(sparsity: float, size: int) -> int:
    """How many of ``size`` weights a sparsity drops: the nearest whole number.

    Args:
      sparsity: fraction to drop.
      size: weights compared with one another.

    Returns:
      The count.

    Example:
      >>> dropped_count(0.5, 5)
      2
    """
    return min(size, round(sparsity * size))


def _bits(scores: jax.Array) -> jax.Array:
    """The scores as integers that order in the same way."""
    scores = jnp.abs(scores)
    if scores.dtype not in (jnp.float32, jnp.float64):
        scores = scores.astype(jnp.float32)
    return jax.lax.bitcast_convert_type(
        scores, jnp.int64 if scores.dtype == jnp.float64 else jnp.int32
    )


def _ordered_bits(scores: jax.Array) -> jax.Array:
    """Signed scores as unsigned integers that order in the same way, zeros of both signs alike."""
    if scores.dtype not in (jnp.float32, jnp.float64):
        scores = scores.astype(jnp.float32)
    wide = scores.dtype == jnp.float64
    bits = jax.lax.bitcast_convert_type(scores, jnp.uint64 if wide else jnp.uint32)
    sign = jnp.asarray(1, bits.dtype) << (63 if wide else 31)
    # Minus zero alone is the sign bit; compared as a float, denormals would be zero too.
    bits = jnp.where(bits == sign, 0, bits)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _split(count):
    """A count as (high, low) with 15 low bits; such a pair is left as it is."""
    return count if isinstance(count, tuple) else (count >> 15, count & 0x7FFF)


def _minus(total, count):
    """The pair ``total`` less an int32 count, not below zero."""
    low = total[1] - (count & 0x7FFF)
    high = total[0] - (count >> 15) + (low >> 15)
    return jnp.maximum(high, 0), jnp.where(high < 0, 0, low & 0x7FFF)


def _total(counts):
    """Sum of int32 counts as (high, low) with 15 low bits, which holds more than 2**31 weights."""
    low = sum(c & 0x7FFF for c in counts)
    return sum(c >> 15 for c in counts) + (low >> 15), low & 0x7FFF


def _kth_bits(bits: Sequence[jax.Array], k) -> jax.Array:
    """The k-th smallest (from 1) of integers over the last axis of all arrays; 0 for k = 0."""
    return _search(list(bits), *_split(k))


@jax.jit
def _search(bits, high, low):
    dtype = bits[0].dtype
    info = jnp.iinfo(dtype)
    width = info.bits - (info.min < 0)
    one = jnp.asarray(1, dtype)

    def narrow(i, value):
        # Sets the bit where fewer than k scores lie below the candidate: then the k-th is not
        # below.
        candidate = value | jnp.left_shift(one, (width - 1 - i).astype(dtype))
        counts = [(b < candidate).sum(-1, keepdims=True, dtype=jnp.int32) for b in bits]
        below_high, below_low = _total(counts)
        fewer = (below_high < high) | ((below_high == high) & (below_low < low))
        return jnp.where(fewer, candidate, value)

    start = jnp.zeros_like(bits[0], shape=(*bits[0].shape[:-1], 1))
    return jax.lax.fori_loop(0, width, narrow, start)


def drop_smallest(
    scores: jax.Array, k, axes: tuple[int, ...] = (-1,), signed: bool = False
) -> jax.Array:
    """Marks all but the k smallest scores over some axes.

    Args:
      scores: scores, any shape.
      k: how many to drop, may be traced; a scalar, or an array that broadcasts against the scores
        with ``axes`` reduced to one.
      axes: the axes over which scores are compared, which must be trailing and in order.
      signed: compare the scores themselves, -inf first; otherwise their magnitudes.

    Returns:
      Bool like ``scores``, False for exactly k of them in each comparison group.
    """
    axes = tuple(sorted(a % scores.ndim for a in axes))
    if axes != tuple(range(scores.ndim - len(axes), scores.ndim)):
        raise JaxcompError(
            f"scores of {scores.ndim} axes are compared over trailing axes, not {axes}"
        )
    shape = scores.shape
    lead = shape[: scores.ndim - len(axes)]
    bits = (_ordered_bits if signed else _bits)(scores).reshape(*lead, -1)
    k = jnp.asarray(k)
    k = k.reshape(*k.shape[: -len(axes)], 1) if k.ndim else k
    threshold = _kth_bits([bits], k)
    below, equal = bits < threshold, bits == threshold
    free = k - below.sum(-1, keepdims=True, dtype=jnp.int32)
    # Row by row, then over rows: where devices hold rows of the scores they tell each other only
    # how many ties a row has.
    equal = equal.reshape(*lead, -1, shape[-1])
    counts = equal.sum(-1, keepdims=True, dtype=jnp.int32)
    before = jnp.cumsum(counts, -2) - counts
    rank = before + jnp.cumsum(equal, -1, dtype=jnp.int32)
    drop = below.reshape(equal.shape) | (equal & (rank <= free[..., None]))
    return ~drop.reshape(shape)


def row_mask(scores: jax.Array, sparsity: float) -> jax.Array:
    """Drops the smallest scores of each row (output).

    Args:
      scores: ``(*stack, out, in)``.
      sparsity: fraction to drop.

    Returns:
      Bool mask in which every row keeps the same number.

    Example:
      >>> row_mask(jnp.array([[3.0, 1.0, 2.0, 4.0]]), 0.5)
      Array([[ True, False, False,  True]], dtype=bool)
    """
    check_sparsity(sparsity)
    return drop_smallest(scores, dropped_count(sparsity, scores.shape[-1]))


def tensor_mask(scores: jax.Array, sparsity: float) -> jax.Array:
    """Drops the smallest scores of each matrix.

    Args:
      scores: ``(*stack, out, in)``; each element of the stack is pruned for itself.
      sparsity: fraction to drop.

    Returns:
      Bool mask.
    """
    check_sparsity(sparsity)
    size = scores.shape[-1] * scores.shape[-2]
    return drop_smallest(scores, dropped_count(sparsity, size), (-2, -1))


def nm_mask(scores: jax.Array, n: int, m: int) -> jax.Array:
    """Keeps the n largest scores of every m consecutive inputs.

    Args:
      scores: ``(*stack, out, in)``, m dividing ``in``.
      n: values kept.
      m: size of a block.

    Returns:
      Bool mask with exactly n in each block.

    Example:
      >>> nm_mask(jnp.array([[1.0, 1.0, 1.0, 1.0]]), 2, 4)
      Array([[False, False,  True,  True]], dtype=bool)
    """
    check_nm(n, m, scores.shape[-1])
    blocks = scores.reshape(*scores.shape[:-1], scores.shape[-1] // m, m)
    mine, other = blocks[..., :, None], blocks[..., None, :]
    index = jnp.arange(m)
    before = (other < mine) | ((other == mine) & (index[None, :] < index[:, None]))
    return (before.sum(-1) >= m - n).reshape(scores.shape)


def global_mask(scores: Any, sparsity: float) -> Any:
    """Drops the smallest scores of a whole tree, with one threshold for all leaves.

    Args:
      scores: pytree of non-negative scores.
      sparsity: fraction of all of them to drop.

    Returns:
      Tree of bool masks; ties are broken in the order of the leaves.

    Example:
      >>> global_mask({"a": jnp.array([1.0, 5.0]), "b": jnp.array([2.0, 3.0])}, 0.5)
      {'a': Array([False,  True], dtype=bool), 'b': Array([False,  True], dtype=bool)}
    """
    check_sparsity(sparsity)
    leaves, structure = jax.tree.flatten(scores)
    k = dropped_count(sparsity, sum(leaf.size for leaf in leaves))
    return jax.tree.unflatten(structure, drop_smallest_of_all(leaves, k))


def drop_smallest_of_all(
    scores: Sequence[jax.Array], k: Any, signed: bool = False
) -> list[jax.Array]:
    """Marks all but the k smallest scores of several arrays together.

    Args:
      scores: the arrays, any shapes.
      k: how many to drop: an int, or a pair of int32 from ``traced_counts``.
      signed: compare the scores themselves, -inf first; otherwise their magnitudes.

    Returns:
      A bool mask for each, False for exactly k of all; ties are broken in the order of the arrays.

    Example:
      >>> a, b = drop_smallest_of_all([jnp.array([1.0, -5.0]), jnp.array([0.0])], 1, signed=True)
      >>> a.tolist(), b.tolist()
      ([True, False], [True])
    """
    wide = jnp.result_type(jnp.float32, *scores)
    order = _ordered_bits if signed else _bits
    bits = [order(leaf.astype(wide)).reshape(-1) for leaf in scores]
    threshold = _kth_bits(bits, k)
    free = _split(k)
    for b in bits:
        free = _minus(free, (b < threshold).sum(dtype=jnp.int32))
    result = []
    for leaf, b in zip(scores, bits, strict=True):
        equal = b == threshold
        here = jnp.where(free[0] >= 1 << 16, 2**31 - 1, (free[0] << 15) | free[1])
        drop = (b < threshold) | (equal & (jnp.cumsum(equal, dtype=jnp.int32) <= here))
        free = _minus(free, equal.sum(dtype=jnp.int32))
        result.append(~drop.reshape(leaf.shape))
    return result


_DECIMALS = 10**7


def traced_counts(sparsity: Any, sizes: Sequence[int]) -> tuple[jax.Array, jax.Array]:
    """``dropped_count`` of a traced sparsity for several sizes, in whole numbers throughout.

    float32 cannot count beyond 2**24, so the sparsity is read to seven decimals and multiplied with
    the size digit by digit: 0.9 of a billion weights is exactly 900,000,000.

    Args:
      sparsity: scalar from 0 to 1, may be traced.
      sizes: numbers of weights.

    Returns:
      Pair of int32 arrays ``(len(sizes),)``: the counts divided by 2**15, and the remainders.

    Example:
      >>> high, low = traced_counts(jnp.float32(0.9), [1_000_000_000])
      >>> int(high[0]) * 2**15 + int(low[0])
      900000000
    """
    digits = jnp.round(jnp.clip(sparsity, 0, 1) * _DECIMALS).astype(jnp.int32)
    whole = jnp.asarray([size // _DECIMALS for size in sizes], jnp.int32)
    part = jnp.asarray([size % _DECIMALS for size in sizes], jnp.int32)

    def double(i, carry):
        high, low, rest = carry
        bit = (digits >> (23 - i)) & 1
        rest = 2 * rest + bit * part
        low = 2 * low + bit * whole + rest // _DECIMALS
        return 2 * high + (low >> 15), low & 0x7FFF, rest % _DECIMALS

    zero = jnp.zeros_like(part)
    high, low, rest = jax.lax.fori_loop(0, 24, double, (zero, zero, zero))
    half = _DECIMALS // 2
    low = low + ((rest > half) | ((rest == half) & (low % 2 == 1)))
    return high + (low >> 15), low & 0x7FFF


def apply_mask(tree: Any, masks: Any) -> Any:
    """Sets dropped weights to exactly zero.

    Args:
      tree: pytree of weights, or one array.
      masks: the same tree of bool masks; a leaf of None leaves the weight alone.

    Returns:
      The masked weights, dtypes kept.
    """

    def one(mask, weight):
        return weight if mask is None else jnp.where(mask, weight, jnp.zeros((), weight.dtype))

    return jax.tree.map(one, masks, tree, is_leaf=lambda leaf: leaf is None)


def sparsity(masks: Any) -> float:
    """Fraction of weights that masks drop.

    Args:
      masks: a bool mask or a pytree of them; leaves of None do not count.

    Returns:
      The fraction over all leaves.

    Example:
      >>> sparsity(jnp.array([True, False, False, False]))
      0.75
    """
    leaves = jax.tree.leaves(masks)
    size = sum(leaf.size for leaf in leaves)
    if not size:
        return 0.0
    return math.fsum(float((~leaf).sum()) for leaf in leaves) / size


def sparsity_counts(masks: Any) -> dict[str, tuple[int, int]]:
    """Exact counts of what masks drop.

    Args:
      masks: a bool mask or a pytree of them; leaves of None do not count.

    Returns:
      For each path, how many weights are dropped and how many there are.

    Example:
      >>> sparsity_counts({"up": jnp.array([True, False, False, False]), "bias": None})
      {'up': (3, 4)}
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(masks)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (
            leaf.size - int(np.asarray(leaf).sum(dtype=np.int64)),
            leaf.size,
        )
        for path, leaf in flat
    }
