"""Scales and zero points of groups on TPUs, spread over the inputs of their group.

A decoded weight ``(outputs, inputs)`` has inputs along lanes, so that each of its registers needs
one more with an entry that is the same in all lanes of a group. Making it is the work of the units
that move lanes, which on v6e and 7x take longer than decoding and, of up to 256 rows, than
multiplying. Two ways:

- ``from_lanes``: groups lie along lanes, and a permutation moves an entry to its lanes;
- ``from_rows``: outputs lie along lanes, a load brings a group's entries to as many sublanes as it
  has inputs, and that is transposed. On v6e and 7x this is faster. On v5 it is slower, and with
  zero points, too, the compiler runs out of registers.

Zero points may be left out of weights instead: a row's product with ``s (c - z)`` is that with
``s c``, less ``s z`` times the sum of the row's inputs of the group (``sums``, ``"offsets"``).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxcomp.kernels import gathers
from jaxcomp.kernels.quantized_matmul.tpu_tiles import LANES as _LANES
from jaxcomp.kernels.quantized_matmul.weights import Weight


def by_channel(weight: Weight) -> bool:
    """Whether each output has one scale, which then scales its sums and no weights."""
    return weight.group_size == weight.shape[1]


def factors(weight: Weight, unit: float, rows: bool, summed: bool = False) -> dict[str, jax.Array]:
    """What decoded weights or sums are scaled with, by the names that a kernel has for it.

    Args:
      weight: with any stack axes.
      unit: what a 1 among decoded weights stands for.
      rows: whether they are spread by ``from_rows``.
      summed: whether zero points are multiplied with ``sums`` of rows, and not subtracted.

    Returns:
      f32 "output_scales" ``(*stack, 1, outputs)`` or "scales", and perhaps "zeros", both in bf16 or
      f32 ``(*stack, outputs, groups)`` with whole registers of groups; for ``from_rows``
      ``(*stack, groups, outputs)``, bf16 as words of two outputs. In place of "zeros" perhaps bf16
      "offsets" ``(*stack, outputs, terms)``, which the last axis of ``sums`` meets.
    """
    spreadable = _by_rows if rows else _by_lanes
    found = {}
    if by_channel(weight):
        found["output_scales"] = weight.scales.astype(jnp.float32) * unit
    else:
        found["scales"] = spreadable(weight.scales * unit)
    if weight.zeros is not None and not summed:
        found["zeros"] = spreadable(weight.zeros / unit)
    elif weight.zeros is not None:
        zeros = -weight.zeros.astype(jnp.float32)
        zeros = zeros / unit if by_channel(weight) else zeros * weight.scales.astype(jnp.float32)
        high, low = _two(jnp.swapaxes(zeros, -1, -2))
        found["offsets"] = _terms(high, high, low)
    return found


def sums(x: jax.Array, group_size: int) -> jax.Array:
    """Sums of rows' groups, whose products with "offsets" are what zero points add to the rows'.

    Both are two bf16 numbers, of whose four products the smallest is left out.

    Args:
      x: bf16 ``(M, K)``.
      group_size: inputs of a group.

    Returns:
      bf16 ``(M, terms)``.
    """
    k = x.shape[1]
    # As a product: of groups along an axis of their own XLA would make copies of x in f32.
    own = jnp.arange(k)[:, None] // group_size == jnp.arange(k // group_size)
    high, low = _two(jnp.dot(x, own.astype(x.dtype), preferred_element_type=jnp.float32))
    return _terms(high, low, high)


def terms(weight: Weight) -> int:
    """The last axis of ``sums`` and of "offsets"."""
    return -(-3 * (weight.shape[1] // weight.group_size) // _LANES) * _LANES


def _two(array: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two numbers that bf16 holds, which add up to one of f32 but for its last eight bits."""
    high = jax.lax.reduce_precision(array, 8, 7)
    return high, array - high


def _terms(*arrays: jax.Array) -> jax.Array:
    """Groups of all arrays along whole registers of lanes, bf16."""
    array = jnp.concatenate(arrays, axis=-1).astype(jnp.bfloat16)
    return jnp.pad(array, [*[(0, 0)] * (array.ndim - 1), (0, -array.shape[-1] % _LANES)])


def block(array: jax.Array, outputs: int, rows: bool) -> tuple[tuple[int, int], Callable]:
    """The block of ``factors`` of a tile of outputs.

    Args:
      array: of ``factors``.
      outputs: of a tile.
      rows: whether outputs are its last axis.

    Returns:
      Its shape, without stack axes, and the function of the tile's number that is its index.
    """
    if not rows:
        return (outputs, array.shape[-1]), lambda j: (j, 0)
    return (array.shape[-2], outputs // _outputs_of(array)), lambda j: (0, j)


def words(block: pl.Slice) -> pl.Slice:
    """Where some outputs are among words of two outputs."""
    return pl.ds(pl.multiple_of(block.start >> 1, block.size // 2), block.size // 2)


def from_lanes(ref, block: pl.Slice, start: int, group_size: int) -> jax.Array:
    """``(outputs, 128)``: each input's entry of ``(outputs, groups)``, inputs from ``start``."""
    group = start // group_size
    entries = ref[block, pl.ds(group // _LANES * _LANES, _LANES)]
    # Lanes are moved 32 bits at a time: two outputs' bf16 at once.
    pairs = pltpu.bitcast(entries, jnp.int32)
    first = group % _LANES
    if group_size >= _LANES:
        spread = jnp.broadcast_to(pairs[:, first : first + 1], pairs.shape)
    else:
        # One permutation, whichever the number of groups.
        lane = jax.lax.broadcasted_iota(jnp.int32, pairs.shape, 1)
        if period := group // _LANES:
            # Plus zero, which is not known: else indices would wait in registers for the groups
            # that lie in the same lanes.
            first += jnp.minimum(block.start + period, 0)
        spread = gathers.along(pairs, first + jax.lax.div(lane, group_size), axis=1)
    return pltpu.bitcast(spread, ref.dtype)


def from_rows(ref, block: pl.Slice, start: int, group_size: int) -> jax.Array:
    """``(outputs, 128)``: each input's entry of ``(groups, outputs)``, inputs from ``start``."""
    pairs = _outputs_of(ref) == 2
    lanes = words(block) if pairs else block
    size = min(group_size, _LANES)
    groups = [(start + lane) // group_size for lane in range(0, _LANES, size)]
    parts = []
    for first in range(0, lanes.size, _LANES):
        own = pl.ds(pl.multiple_of(lanes.start + first, _LANES), _LANES)
        entries = [jnp.broadcast_to(ref[pl.ds(group, 1), own], (size, _LANES)) for group in groups]
        parts.append(jnp.concatenate(entries).T)
    spread = jnp.concatenate(parts)
    return pltpu.bitcast(spread, jnp.bfloat16) if pairs else spread


def _by_lanes(array: jax.Array) -> jax.Array:
    """``(.., groups, outputs)`` with the groups along lanes: bf16 as it is, else f32."""
    array = array if array.dtype == jnp.bfloat16 else array.astype(jnp.float32)
    array = jnp.swapaxes(array, -1, -2)
    return jnp.pad(array, [*[(0, 0)] * (array.ndim - 1), (0, -array.shape[-1] % _LANES)])


def _by_rows(array: jax.Array) -> jax.Array:
    """``(.., groups, outputs)`` in 32 bits: words of two outputs' bf16, or f32."""
    if array.dtype != jnp.bfloat16:
        return array.astype(jnp.float32)
    array = jnp.pad(array, [*[(0, 0)] * (array.ndim - 1), (0, array.shape[-1] % 2)])
    return jax.lax.bitcast_convert_type(array.reshape(*array.shape[:-1], -1, 2), jnp.int32)


def _outputs_of(array) -> int:
    """Of how many outputs a number of ``_by_rows`` is."""
    return 2 if array.dtype == jnp.int32 else 1
