"""Sizes of the TPU kernels' tiles, from ``tpu_tiles.json``.

For each chip and each of the two kernels ("few" rows, whose sums are scaled, and "dense", whose
weights are) the file says the rows of a tile, and pairs (most inputs, outputs of a tile); also, if
it matters, the most inputs of 9 to 16 rows in small groups, and of how many outputs at a time up to
16 keep their sums. Which products are of many rows is said by ``tpu.many_rows``; the kernel of
codes has the tiles of the dense one.
"""

import dataclasses
import functools
import json
import pathlib

from jaxcomp.kernels import tuning

LANES = 128
# Most bytes of VMEM for two tiles of bf16 rows.
_ROW_BYTES = 28 << 20


@dataclasses.dataclass(frozen=True)
class Tile:
    """Rows, outputs and inputs of a grid step, and outputs whose sums are kept at a time."""

    m: int
    n: int
    k: int
    columns: int


def table(chip: str, kernel: str) -> dict:
    """What the user's table of measurements, or else the file, says of a kernel on a chip."""
    return tuning.tiles(chip, kernel) or _shipped(chip, kernel)


@functools.cache
def _shipped(chip: str, kernel: str) -> dict:
    text = pathlib.Path(__file__).with_name("tpu_tiles.json").read_text()
    return json.loads(text)[chip][kernel]


def few(chip: str, m: int, n: int, k: int, group_size: int, depth: int, pieces: int) -> Tile:
    """The tile of a product whose sums are scaled.

    Args:
      chip: name of the chip.
      m: rows.
      n: outputs.
      k: inputs.
      group_size: inputs that share a scale.
      depth: inputs that are multiplied at a time.
      pieces: rows that each row of x becomes.

    Returns:
      The tile; its inputs divide k, and divide a group or are whole groups.
    """
    sizes = table(chip, "few")
    # The rows of all pieces together are what the matrix unit is given.
    rows = max(32 if pieces < 16 else 16, sizes["rows"] * 4 // pieces // 32 * 32)
    rows = min(rows, -(-m // 8) * 8)
    most, columns = sizes["outputs"][-1][0], 256 if rows <= 64 else LANES
    if depth > group_size and rows <= 16:
        inputs, columns = sizes.get("small_groups", (most, columns))
        # Eight rows leave registers for more.
        most = inputs if rows > 8 else most
    tile_k = max(
        size
        for size in range(depth, k + 1, depth)
        if k % size == 0
        and (size % group_size == 0 or group_size % size == 0)
        and (size <= most or size == depth)
    )
    tile_n = next(outputs for inputs, outputs in sizes["outputs"] if max(tile_k, 1) <= inputs)
    tile_n = min(tile_n, -(-n // columns) * columns)
    return Tile(rows, tile_n, tile_k, columns)


def dense(chip: str, m: int, n: int, k: int, columns: int) -> Tile | None:
    """The tile of a product with scaled weights, or None where its inputs do not fit into VMEM.

    Args:
      chip: name of the chip.
      m: rows.
      n: outputs.
      k: inputs.
      columns: outputs whose sums are kept at a time.
    """
    sizes = table(chip, "dense")
    outputs = next((outputs for inputs, outputs in sizes["outputs"] if k <= inputs), None)
    if outputs is None:
        return None
    # Rows of long inputs fill VMEM, twice: the next ones are loaded meanwhile. As many as fit: what
    # decodes a tile of weights works beside the matrix unit, which fewer keep busy for less long.
    most = min(sizes["rows"], _ROW_BYTES // (4 * k)) if k <= 16384 else sizes["rows"] // 4
    # As many tiles as it takes, and no larger than they have to be.
    rows = -(-m // -(-m // most))
    # Of one block of outputs, which is no loop, the compiler keeps too much in registers.
    if outputs == columns and 2 * rows * 4 * k <= _ROW_BYTES:
        outputs *= 2
    return Tile(-(-rows // 16) * 16, min(outputs, -(-n // columns) * columns), k, columns)


def grouped_few(
    chip: str, m: int, experts: int, n: int, k: int, group_size: int, depth: int, pieces: int
) -> Tile:
    """The tile of experts' products whose sums are scaled.

    Args:
      chip: name of the chip.
      m: rows of all experts.
      experts: their number.
      n: outputs.
      k: inputs.
      group_size: inputs that share a scale.
      depth: inputs that are multiplied at a time.
      pieces: rows that each row of x becomes.

    Returns:
      The tile, as of ``few``.
    """
    one = few(chip, m, n, k, group_size, depth, pieces)
    # An expert's rows begin anywhere in a tile, and each tile that they touch multiplies all of its
    # rows: tiles are as small as the decoding of a weight is worth.
    each = -(-m // experts)
    rows = 16 if each <= 16 else 32
    rows = min(rows, one.m)
    columns = 256 if rows <= 16 or pieces == 1 else LANES
    return dataclasses.replace(one, m=rows, columns=columns)


def grouped_dense(chip: str, m: int, experts: int, n: int, k: int, columns: int) -> Tile | None:
    """The tile of experts' products with scaled weights, or None where few rows ask for the other.

    Args:
      chip: name of the chip.
      m: rows of all experts.
      experts: their number.
      n: outputs.
      k: inputs.
      columns: outputs whose sums are kept at a time.
    """
    each = -(-m // experts)
    if each <= table(chip, "few")["rows"]:
        return None
    tile = dense(chip, m, n, k, columns)
    # A tile in which experts meet is multiplied for each of them: it is smaller than of one weight.
    # With fewer rows a wide matrix unit waits for weights.
    rows = table(chip, "dense")["rows"] // (2 if each >= 1024 or columns > LANES else 4)
    return tile and dataclasses.replace(tile, m=min(tile.m, rows))
