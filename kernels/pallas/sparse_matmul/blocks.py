"""Block-sparse weights: the blocks that are not zero, and a list of where they are."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxcomp.kernels import arguments
from jaxcomp.kernels.sparse_matmul.layers import Layers, check_layers


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "rows", "columns", "scales", "layers"],
    meta_fields=["shape", "parts"],
)
@dataclasses.dataclass(frozen=True)
class BlockSparse:
    """A weight (N, K) that is zero outside of some blocks.

    - Block b covers outputs ``rows[b] * bn`` and on, and inputs ``columns[b] * bk`` and on.
    - The list is sorted by row, then by column, and no block is in it twice.
    - Where ``split_blocks`` has divided it, that holds of each part's list. The lists of the parts
      are equally long and follow one another, those of the same outputs together.
    - Blocks at the edges are whole: what lies beyond (N, K) is zero.

    ``block_sparse`` and ``block_list`` make it and check this.

    Attributes:
      values: bf16, f32 or int8 ``(blocks, bn, bk)``.
      rows: int32 ``(blocks,)``.
      columns: int32 ``(blocks,)``.
      scales: f32 ``(blocks, bn)``, which multiply int8 values; None for others.
      shape: (N, K).
      parts: of the outputs and of the inputs, for as many devices.
      layers: values of several layers, of which these are one's; or None.
    """

    values: jax.Array
    rows: jax.Array
    columns: jax.Array
    scales: jax.Array | None
    shape: tuple[int, int]
    parts: tuple[int, int] = (1, 1)
    layers: Layers | None = None

    @property
    def read(self) -> tuple[jax.Array, ...]:
        """What a kernel reads a part of at each step."""
        return (self.values,)

    @property
    def block(self) -> tuple[int, int]:
        """Outputs and inputs of a block."""
        return self.values.shape[1:]

    @property
    def grid(self) -> tuple[int, int]:
        """Blocks of the whole weight, by outputs and inputs."""
        return tuple(-(-size // block) for size, block in zip(self.shape, self.block, strict=True))


def block_sparse(
    w: jax.Array, mask: jax.Array, block: tuple[int, int] | None = None
) -> BlockSparse:
    """Keeps the blocks of a dense weight that a mask names. Runs on the host.

    Args:
      w: ``(N, K)``, bf16 or f32.
      mask: bool ``(ceil(N / bn), ceil(K / bk))``, True for a block that is kept.
      block: (bn, bk), or None where the mask's shape divides the weight's.

    Returns:
      The weight, with zeros where the mask is False.

    Raises:
      TypeError: w has another dtype.
      ValueError: the mask does not cover the weight.

    Example:
      >>> import jax.numpy as jnp
      >>> w = block_sparse(jnp.ones((4, 6)), jnp.array([[1, 0, 1], [0, 0, 0]]))
      >>> w.values.shape, w.rows.tolist(), w.columns.tolist()
      ((2, 2, 2), [0, 0], [0, 2])
    """
    w, mask = np.asarray(w), np.asarray(mask)
    if w.ndim != 2 or mask.ndim != 2:
        raise ValueError(f"w {w.shape} must be (N, K), and mask {mask.shape} a matrix of blocks")
    if w.dtype not in (jnp.bfloat16, jnp.float32):
        raise TypeError(f"w {w.shape} is {w.dtype}; use bfloat16 or float32")
    divides = all(m and n % m == 0 for n, m in zip(w.shape, mask.shape, strict=True))
    if block is None and not divides:
        raise ValueError(
            f"mask {mask.shape} does not divide w {w.shape} into equal blocks; give block=(bn, "
            "bk), whose last blocks are then padded with zeros"
        )
    bn, bk = block or tuple(n // m for n, m in zip(w.shape, mask.shape, strict=True))
    grid = -(-w.shape[0] // bn), -(-w.shape[1] // bk)
    if mask.shape != grid:
        raise ValueError(f"mask {mask.shape} must be {grid}, a block of {(bn, bk)} of w {w.shape}")
    rows, columns = np.nonzero(mask)
    whole = np.pad(w, ((0, -w.shape[0] % bn), (0, -w.shape[1] % bk)))
    tiles = whole.reshape(grid[0], bn, grid[1], bk)
    return block_list(jnp.asarray(tiles[rows, :, columns]), rows, columns, w.shape)


def block_list(
    values: jax.Array,
    rows: jax.Array,
    columns: jax.Array,
    shape: tuple[int, int],
    scales: jax.Array | None = None,
) -> BlockSparse:
    """A block-sparse weight of blocks that are listed already. Runs on the host.

    Args:
      values: bf16, f32 or int8 ``(blocks, bn, bk)``.
      rows: ``(blocks,)``, which block of outputs each is.
      columns: ``(blocks,)``, which block of inputs.
      shape: (N, K).
      scales: ``(blocks, bn)`` for int8 values, else None.

    Returns:
      The weight.

    Raises:
      TypeError: a dtype is wrong.
      ValueError: shapes do not belong together, or the list is not sorted, has a block twice, or
        has one outside of the weight.

    Example:
      >>> import jax.numpy as jnp
      >>> block_list(jnp.ones((1, 2, 2)), jnp.array([1]), jnp.array([0]), (4, 4)).grid
      (2, 2)
    """
    host = [np.asarray(a) for a in (rows, columns)]
    for name, array in zip(("rows", "columns"), host, strict=True):
        if not np.issubdtype(array.dtype, np.integer):
            raise TypeError(f"{name} {array.shape} is {array.dtype}; use int32")
    if scales is not None:
        scales = jnp.asarray(scales, jnp.float32)
    weight = BlockSparse(
        values, *(jnp.asarray(a, jnp.int32) for a in host), scales, tuple(map(int, shape))
    )
    check(weight)
    for name, array, size in zip(("rows", "columns"), host, weight.grid, strict=True):
        if array.size and not 0 <= array.min() <= array.max() < size:
            raise ValueError(
                f"{name} {array.shape} go from {array.min()} to {array.max()}, but a weight of "
                f"{weight.shape} in blocks of {weight.block} has blocks 0 to {size - 1} there"
            )
    order = host[0].astype(np.int64) * weight.grid[1] + host[1]
    after = np.diff(order)
    if (after <= 0).any():
        at = int(np.argmax(after <= 0))
        one, two = ((int(host[0][i]), int(host[1][i])) for i in (at, at + 1))
        what = "is listed twice" if one == two else f"comes before {two}"
        raise ValueError(
            f"rows {host[0].shape} and columns {host[1].shape} must be sorted by row, then column, "
            f"without duplicates: block {one} {what}; sort by np.lexsort((columns, rows))"
        )
    return weight


def split_blocks(weight: BlockSparse, outputs: int = 1, inputs: int = 1) -> BlockSparse:
    """Divides the list of a weight, so that equal parts of it are equal parts of W. On the host.

    Devices can then hold a part each: ``values``, ``rows``, ``columns`` and ``scales`` are split
    along their first axis. A part with fewer blocks than the fullest lists some of its zero blocks
    as well, so that all are equally long; like any block in the list, these have a gradient.

    Args:
      weight: any, as it was listed.
      outputs: parts of N, for column-parallel products.
      inputs: parts of K, for row-parallel products.

    Returns:
      The same weight, which one device multiplies with as before.

    Raises:
      ValueError: a part would end inside of a block, or the weight is divided already.

    Example:
      >>> import jax.numpy as jnp
      >>> w = block_sparse(jnp.ones((4, 6)), jnp.array([[1, 0, 1], [0, 0, 0]]))
      >>> split = split_blocks(w, outputs=2)
      >>> split.rows.tolist(), split.columns.tolist()
      ([0, 0, 1, 1], [0, 2, 0, 1])
      >>> split.values[2:].sum().item()
      0.0
    """
    if weight.parts != (1, 1):
        raise ValueError(f"the weight {weight.shape} is divided into {weight.parts} parts already")
    parts = outputs, inputs
    for name, size, block, of in zip("NK", weight.shape, weight.block, parts, strict=True):
        if of < 1 or size % (of * block):
            raise ValueError(
                f"{of} parts of {name} = {size} of the weight {weight.shape} would not consist of "
                f"whole blocks of {block}; use fewer parts, smaller blocks, or pad {name}"
            )
    listed = np.full(weight.grid, -1)
    listed[np.asarray(weight.rows), np.asarray(weight.columns)] = np.arange(len(weight.values))
    size = weight.grid[0] // outputs, weight.grid[1] // inputs
    # (parts, blocks of a part): the number in the list, or -1 for a block that is zero.
    each = listed.reshape(outputs, size[0], inputs, size[1]).swapaxes(1, 2)
    each = each.reshape(outputs * inputs, -1)
    longest = max(int((each >= 0).sum(1).max(initial=0)), 1)
    # The listed blocks first, then zero ones to fill up, all in their order.
    chosen = np.sort(np.argsort(each < 0, axis=1, kind="stable")[:, :longest], axis=1)
    taken = np.take_along_axis(each, chosen, axis=1)
    part = np.arange(outputs * inputs)[:, None]
    rows = part // inputs * size[0] + chosen // size[1]
    columns = part % inputs * size[1] + chosen % size[1]

    def gathered(array):
        if array is None:
            return None
        host = np.asarray(array)
        zero = np.zeros((1, *host.shape[1:]), host.dtype)
        return jnp.asarray(np.concatenate([host, zero])[taken.reshape(-1)])

    return BlockSparse(
        gathered(weight.values),
        jnp.asarray(rows.reshape(-1), jnp.int32),
        jnp.asarray(columns.reshape(-1), jnp.int32),
        gathered(weight.scales),
        weight.shape,
        parts,
    )


def check(weight: BlockSparse) -> None:
    """What can be said of a weight without reading its lists.

    Args:
      weight: arrays or tracers.

    Raises:
      TypeError: a dtype is wrong.
      ValueError: shapes do not belong together.
    """
    values, scales = weight.values, weight.scales
    check_layers(weight)
    for name in ("values", "rows", "columns"):
        arguments.array(name, getattr(weight, name))
    if values.ndim != 3 or 0 in values.shape[1:]:
        raise ValueError(f"values {values.shape} must be (blocks, bn, bk)")
    for name in ("rows", "columns"):
        array = getattr(weight, name)
        if array.shape != values.shape[:1]:
            raise ValueError(
                f"{name} {array.shape} must be (blocks,) = {values.shape[:1]}, one for each block "
                f"of values {values.shape}"
            )
    if values.dtype not in (jnp.bfloat16, jnp.float32, jnp.int8):
        raise TypeError(f"values {values.shape} are {values.dtype}; use bfloat16, float32 or int8")
    for name in ("rows", "columns"):
        if not jnp.issubdtype(getattr(weight, name).dtype, jnp.integer):
            raise TypeError(f"{name} are {getattr(weight, name).dtype}; use int32")
    if len(values) > math.prod(weight.grid) or len(values) % math.prod(weight.parts):
        raise ValueError(
            f"values {values.shape} are {len(values)} blocks, in {weight.parts} parts of a weight "
            f"(N, K) = {weight.shape} that has {weight.grid} blocks in all"
            f"{arguments.in_parts('shape and parts')}"
        )
    if (scales is None) == (values.dtype == jnp.int8):
        raise ValueError(
            f"values {values.shape} are {values.dtype} and scales are "
            f"{None if scales is None else scales.shape}: int8 values take (blocks, bn) scales, "
            "others none"
        )
    if scales is not None and scales.shape != values.shape[:2]:
        raise ValueError(
            f"scales {scales.shape} must be (blocks, bn) = {values.shape[:2]}, one for each output "
            f"of each block of values {values.shape}"
        )
