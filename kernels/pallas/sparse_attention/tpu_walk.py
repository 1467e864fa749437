"""How a kernel goes over the list of blocks: what each step reads, writes and does.

A step computes its block in tiles: two of them beside each other, of two heads or of two halves of
the block, and one pair after the other. One tile's products, maxima, weights and products again
wait for each other, some 200 cycles of latency each, and one runs in the waits of the other. Heads
of one step share its copies, some 250 cycles of scalar arithmetic, and what is masked.
"""

import dataclasses
import enum
import functools
import math
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxcomp.kernels.calls import apart, on_tpu
from jaxcomp.kernels.sparse_attention.rules import Mask
from jaxcomp.kernels.sparse_attention.schedule import FULL, RULE, SKIP, Schedule, Steps, schedule

LANES = 128
LOG2_E = math.log2(math.e)
# Operands that a kernel may not have; it finds None in their place.
OPTIONAL = (
    "span",
    "segments",
    "kv_segments",
    "k_scale",
    "v_scale",
    "bitmap",
    "limits",
    "bias",
    "slopes",
    "scores",
    "maxima",
    "top",
    "fade",
    "lse",
)
# The highest score over log 2, of either sign, whose power needs no maximum subtracted: of what
# float32 has, 2**-126 to 2**127, enough is left for values and for sums.
BOUND = 80
# Two heads share a step of blocks up to this size.
LARGE_BLOCK = 512 * 512
# Positions of a tile on the side that a block is walked along. A block's scores do not fit in
# registers, nor in the compiler's own limit of vector memory.
TILE = 512
VMEM_BYTES = 48 << 20
# Heads of a step of the gradients, and the most bytes that they may have of one operand: six are in
# vector memory, twice each.
MOST_HEADS = 8
HEADS_BYTES = 1 << 20


def together(heads: int, kv_heads: int, lists: int, area: int) -> int:
    """Query heads that a step of the forward kernel computes side by side.

    Where two heads have the same block they share what a step costs.

    Args:
      heads: query heads.
      kv_heads: key heads.
      lists: lists of blocks, 1 where all heads have the same mask.
      area: queries times keys of a block.
    """
    group = heads // kv_heads
    paired = group % 2 == 0 or (group == 1 and heads % 2 == 0)
    return 2 if paired and lists == 1 and area <= LARGE_BLOCK else 1


@dataclasses.dataclass(frozen=True)
class Config:
    """What is known before any number is."""

    mask: Mask
    heads: int
    kv_heads: int
    queries: int
    keys: int
    block_q: int
    block_k: int
    scale: float
    soft_cap: float | None
    ramp: float
    interpret: Any
    logsumexp: bool = True
    # A matrix unit wider than lanes gives products faster than a gradient is computed of them:
    # what waits would be spilled, and has memory of its own. Where it is not, that costs stores.
    wide: bool = True
    # Parts of a tile's scores whose maxima wait in memory, for the same reason; 0 for none.
    maxima: int = 1

    @property
    def group(self) -> int:
        """Query heads of a key head."""
        return self.heads // self.kv_heads

    @property
    def blocks(self) -> Schedule:
        """The blocks of the mask."""
        return schedule(self.mask, self.heads, self.queries, self.keys, self.block_q, self.block_k)

    @property
    def together(self) -> int:
        """Query heads of a step of the forward kernel."""
        lists = self.blocks.rows.lists
        return together(self.heads, self.kv_heads, lists, self.block_q * self.block_k)

    @property
    def bounded(self) -> bool:
        """Whether powers of capped scores are far within float32, without their maxima."""
        return bool(self.soft_cap) and self.soft_cap * LOG2_E <= BOUND

    @property
    def apart(self) -> bool:
        """Whether steps of gradients have code of their own: under a cap, for 3 to 7% more cycles.

        With narrow matrix units they would be a third more.
        """
        return self.wide and bool(self.soft_cap)

    @property
    def forward_apart(self) -> bool:
        """Whether steps of the forward kernel have code of their own: under a cap with maxima."""
        return self.apart and not self.bounded

    @property
    def factor(self) -> float:
        """What products are multiplied with before the cap, or before the power of two."""
        return self.scale / self.soft_cap if self.soft_cap else self.scale * LOG2_E


@dataclasses.dataclass(frozen=True)
class Tile:
    """A tile of a step.

    Attributes:
      head: its head's number within the step, which may be traced.
      part: its number among those beside each other that have this head.
      place: its number among all that are beside each other.
      at: where its queries and where its keys are within the block.
    """

    head: Any
    part: int
    place: int
    at: tuple[pl.Slice, pl.Slice]


@dataclasses.dataclass(frozen=True)
class Part:
    """Which part of an array a step reads or writes, and which of that belongs to one tile.

    Attributes:
      spec: the part.
      of_tile: (reference to the part, the tile) -> reference.
    """

    spec: pl.BlockSpec
    of_tile: Callable[[Any, Tile], Any] = lambda ref, tile: ref


@dataclasses.dataclass(frozen=True, eq=False)
class Walk:
    """Where a step of the grid (batch, heads, step, member of the group) is.

    A step has ``together`` query heads beside each other, and ``turns`` times as many in all. By
    rows, its major block is one of queries. By columns, it is one of keys, and all query heads of a
    key head add to it. A tile has at most ``longest`` positions of the minor block.
    """

    config: Config
    steps: Steps
    by_rows: bool
    together: int = 1
    turns: int = 1
    longest: int = TILE

    def at(self, head, step):
        """The step's number in the flat list."""
        return step if self.steps.lists == 1 else head * self.steps.count + step

    def blocks(self, ids, where):
        """Block of queries and block of keys."""
        word = where[self.at(ids[1], ids[2])]
        major, minor = word >> 16, word & 0xFFFF
        return (major, minor) if self.by_rows else (minor, major)

    def heads(self, ids, what):
        """Query head and key head, counted in those of a step (``wide``)."""
        if self.by_rows:
            steps = self.members  # that share a key head
            return ids[1], ids[1] if steps == 1 else jax.lax.div(ids[1], steps)
        member = ids[3]
        if self.steps.lists > 1:
            member = member + ((what[self.at(ids[1], ids[2])] >> 8) & 0xFF)
        # Where lists differ, a list has the steps of all query heads of a key head.
        return ids[1] * self.members + member, ids[1]

    @property
    def major(self) -> int:
        """The side of the major block."""
        return 0 if self.by_rows else 1

    @property
    def members(self) -> int:
        """Steps that the query heads of a key head take."""
        return self.config.group // min(self.config.group, self.together * self.turns)

    def wide(self, side: int) -> int:
        """Heads of queries (side 0) or of keys (1) in a step."""
        return self.together * self.turns if side == 0 or self.config.group == 1 else 1

    @property
    def results(self) -> int:
        """Turns whose heads have a result of their own."""
        return self.turns if self.wide(self.major) > 1 else 1

    @property
    def grid(self) -> tuple[int, ...]:
        """Steps in each dimension, after the batch."""
        config = self.config
        if self.by_rows:
            return config.heads // self.wide(0), self.steps.count, 1
        members = self.members if self.steps.lists == 1 else 1
        return config.kv_heads // self.wide(1), self.steps.count, members

    @property
    def sizes(self) -> tuple[int, int]:
        """Queries and keys of a block."""
        return self.config.block_q, self.config.block_k

    @property
    def parts(self) -> int:
        """Parts of the major block that are computed beside each other, of each head."""
        major = self.sizes[self.major]
        return 2 if self.together == 1 and major % (2 * LANES) == 0 else 1

    @property
    def tile(self) -> tuple[int, int]:
        """Positions of a tile: of the major block, and of the minor one that is walked along."""
        major, minor = self.sizes if self.by_rows else self.sizes[::-1]
        lanes = minor // LANES
        widest = max(n for n in range(1, self.longest // LANES + 1) if lanes % n == 0)
        return major // self.parts, widest * LANES if minor > self.longest else minor

    def tiles(self, turn: Any, minor: Any) -> list[Tile]:
        """Those of a turn, beside each other, from where the minor block has them."""
        heads = [turn * self.together + number for number in range(self.together)]
        pairs = [(head, part) for head in heads for part in range(self.parts)]
        return [
            Tile(head, part, place, self.place_of(part, minor))
            for place, (head, part) in enumerate(pairs)
        ]

    def place_of(self, part: Any, minor: Any) -> tuple[pl.Slice, pl.Slice]:
        """Where the queries and the keys of a part are within the block."""
        rows, columns = self.tile
        first = part * rows if isinstance(part, int) else pl.multiple_of(part * rows, rows)
        at = pl.ds(first, rows), pl.ds(minor, columns)
        return at if self.by_rows else at[::-1]

    # Which part of an array a step needs.

    def spec(self, shape, index):
        """A specification from index(ids of the grid, blocks, heads, what)."""

        def index_map(*ids_and_words):
            ids, (where, what) = ids_and_words[:4], ids_and_words[4:]
            return index(ids, self.blocks(ids, where), self.heads(ids, what), what)

        return pl.BlockSpec(shape, index_map)

    def rows_of(self, side: int, dim: int) -> Part:
        """A block of positions of a step's heads, of an array from ``_by_position``."""
        size, wide = self.sizes[side], self.wide(side)
        if dim % LANES == 0:
            spec = self.spec((None, size, wide * dim), lambda i, b, h, _: (i[0], b[side], h[side]))

            def columns(ref, tile):
                head = self._head(tile, wide)
                first = head * dim if isinstance(head, int) else pl.multiple_of(head * dim, LANES)
                return ref.at[tile.at[side], pl.ds(first, dim)]

            return Part(spec, columns)
        shape = (None, wide, size, dim)
        spec = self.spec(shape, lambda i, b, h, _: (i[0], h[side], b[side], 0))
        return Part(spec, lambda ref, tile: ref.at[self._head(tile, wide), tile.at[side]])

    def along_lanes(self, side: int, per_head: bool = True) -> Part:
        """A number a position, of an array (batch, heads or 1, 1, positions)."""
        wide = self.wide(side) if per_head else 1
        spec = self.spec(
            (None, wide, 1, self.sizes[side]),
            lambda i, b, h, _: (i[0], h[side] if per_head else 0, 0, b[side]),
        )
        return Part(spec, lambda ref, tile: ref.at[self._head(tile, wide), :, tile.at[side]])

    def down_rows(self, side: int) -> Part:
        """A number a position in 128 lanes, the same for all heads: (batch, positions, 128)."""
        shape = (None, self.sizes[side], LANES)
        spec = self.spec(shape, lambda i, b, h, _: (i[0], b[side], 0))
        return Part(spec, lambda ref, tile: ref.at[tile.at[side]])

    def bitmap(self) -> Part:
        """The bitmap of a step."""
        order = slice(None, None, 1 if self.by_rows else -1)
        shape = (None, *self.sizes[order])
        spec = self.spec(shape, lambda i, b, h, what: (what[self.at(i[1], i[2])] >> 16, 0, 0))
        return Part(spec, lambda ref, tile: ref.at[tile.at[order]])

    def result(self, ref, tile: Tile):
        """A tile's part of memory that a result has."""
        head = self._head(tile, self.wide(self.major))
        return ref.at[head * self.parts + tile.part]

    @staticmethod
    def _head(tile: Tile, wide: int) -> Any:
        # Heads that share a key head have its part.
        return tile.head if wide > 1 else 0


class Left(enum.Enum):
    """What is left of a tile's scores: all, by the mask's limits, or by a bias of mask and span."""

    ALL = enum.auto()
    LIMITS = enum.auto()
    BIAS = enum.auto()


class Spanned(NamedTuple):
    """What a tile does for an adaptive span.

    Attributes:
      write: (what the mask leaves) writes what is left.
      gather: adds to the span's gradient, after all else.
      inside: whether nothing is left out by the span, traced.
      outside: whether nothing is left.
    """

    write: Callable[[Left], None]
    gather: Callable[[], None]
    inside: Any
    outside: Any


class Kernel(NamedTuple):
    """What is done of a tile.

    Attributes:
      start: what begins a result, in steps.
      limit: (rule) writes what it masks.
      spanned: what is done for an adaptive span, None without.
      steps: (what is left of its scores) compute the tile, one after the other. In one piece of
        code all that can be computed early is, and may be spilled: they may each have their own.
      finish: what ends a result.
    """

    start: tuple[Callable[[], None], ...]
    limit: Callable[[Any], None]
    spanned: Spanned | None
    steps: tuple[Callable[[Left], None], ...]
    finish: Callable[[], None]


def gradient_walk(config: Config, by_rows: bool, row_bytes: int) -> Walk:
    """How a kernel for gradients goes over the blocks.

    Args:
      config: of the kernel.
      by_rows: whether for those of queries, not for those of keys and values.
      row_bytes: of a position and head of the widest operand.

    Returns:
      The steps, of as many heads as have the same blocks and fit in memory.
    """
    steps = config.blocks.rows if by_rows else config.blocks.columns(config.group)
    size = max(config.block_q, config.block_k) * row_bytes
    most = max(min(MOST_HEADS, HEADS_BYTES // size), 1) if steps.lists == 1 else 1
    of = config.heads if config.group == 1 else config.group
    heads = max(n for n in range(1, most + 1) if of % n == 0)
    # Products of two halves load the matrix unit twice as often as those of two heads.
    major = config.block_q if by_rows else config.block_k
    together = 2 if heads % 2 == 0 and major <= TILE else 1
    # What a tile waits for at its begin and end is once for twice the products. Of queries the
    # narrow units' compiler would spill.
    longest = 2 * TILE if config.wide or not by_rows else TILE
    return Walk(config, steps, by_rows, together, heads // together, longest)


Memory = tuple[tuple[int, ...], jax.typing.DTypeLike]  # shape and dtype


def run(
    kernel: Callable[..., Kernel],
    walk: Walk,
    batch: int,
    inputs: dict[str, tuple[jax.Array, Part]],
    outputs: dict[str, tuple[jax.ShapeDtypeStruct, Part]],
    kept: dict[str, Memory],
    passing: dict[str, Memory],
    name: str,
    width: int,
) -> tuple[jax.Array, ...]:
    """Runs a kernel, for each tile of a step: it finds its operands by name.

    Args:
      kernel: (config, operands and where the tile is, by_rows) -> what to do.
      walk: the steps.
      batch: its size.
      inputs: arrays, and what a step has of each.
      outputs: likewise.
      kept: memory that a result has for each part, while its steps add to it.
      passing: memory of each tile beside others.
      name: of the compiled kernel.
      width: multiplications that a pair of query and key takes.

    Returns:
      The outputs.
    """
    config, blocks = walk.config, walk.config.blocks
    if len(blocks.bitmaps):
        bitmaps = blocks.bitmaps if walk.by_rows else blocks.bitmaps.swapaxes(1, 2)
        inputs = {**inputs, "bitmap": (jnp.asarray(bitmaps, jnp.int8), walk.bitmap())}
    codes = sorted(set(walk.steps.code.reshape(-1).tolist()))
    segmented = "segments" in inputs
    limits = max(codes) > FULL or segmented
    if config.soft_cap or "k_scale" in inputs:
        passing = {**passing, "scores": (walk.tile, jnp.float32)}
    gradients = "d_scores" in passing
    if config.soft_cap and gradients:
        passing = {**passing, "slopes": (walk.tile, jnp.float32)}
    if "span" in inputs:
        passing = {**passing, "bias": (walk.tile, jnp.float32)}
    names = [*inputs, *outputs, *kept, *passing]
    parts = [part.of_tile for _, part in (*inputs.values(), *outputs.values())]
    parts += [walk.result] * len(kept)
    parts += [lambda ref, tile: ref.at[tile.place]] * len(passing)
    tiles, results = walk.parts * walk.together, walk.parts * walk.wide(walk.major)
    counts = [results] * len(kept) + [tiles] * len(passing)
    memory = [
        pltpu.VMEM((count, *shape), dtype)
        for count, (shape, dtype) in zip(counts, [*kept.values(), *passing.values()], strict=True)
    ]
    if limits:
        names.append("limits")
        parts.append(lambda ref, tile: ref.at[tile.part, :, tile.at[walk.by_rows]])
        memory.append(pltpu.VMEM((walk.parts, walk.tile[0], walk.sizes[walk.by_rows]), jnp.float32))
    trips = walk.sizes[walk.by_rows] // walk.tile[1]

    def body(where, what, *operands):
        ids = [pl.program_id(axis) for axis in range(4)]
        word = what[walk.at(ids[1], ids[2])]
        first, last = (word & 1) != 0, (word & 2) != 0
        if not walk.by_rows:
            first &= ids[3] == 0
            last &= ids[3] == walk.grid[2] - 1
        q_block, k_block = walk.blocks(ids, where)

        def of(tile) -> Kernel:
            refs = types.SimpleNamespace(**dict.fromkeys(OPTIONAL))
            of_tile = [part(ref, tile) for part, ref in zip(parts, operands, strict=True)]
            vars(refs).update(zip(names, of_tile, strict=True))
            refs.q_start = q_block * config.block_q + tile.at[0].start
            refs.k_start = k_block * config.block_k + tile.at[1].start
            if refs.span is not None:
                refs.z = refs.span[walk.heads(ids, what)[0] * walk.wide(0) + tile.head]
            return kernel(config, refs, walk.by_rows)

        def minor(trip):
            return trip if isinstance(trip, int) else pl.multiple_of(trip * walk.tile[1], LANES)

        def beside(turn, trip) -> list[Kernel]:
            return [of(tile) for tile in walk.tiles(turn, minor(trip))]

        def limit(rule):
            def work(number):
                part, trip = _split(number, walk.parts, trips)
                of(Tile(0, part, 0, walk.place_of(part, minor(trip)))).limit(rule)

            # Heads share what is masked. Parts beside each other would share positions: too many.
            repeat(walk.parts * trips, work)

        def in_turn(tiles, separate, *told):
            """Each step of all tiles that are beside each other, before the next."""

            def work(steps):
                for step in steps:
                    step(*told)

            first, *rest = [functools.partial(work, steps) for steps in zip(*tiles, strict=True)]
            first()
            if separate:
                apart(rest, word)
            else:
                for body in rest:
                    body()

        def begin(turn):
            in_turn([tile.start for tile in beside(turn, 0)], config.wide)

        def compute(tiles, left):
            # No tile's products wait for the other's weights.
            separate = config.apart if gradients else config.forward_apart
            in_turn([tile.steps for tile in tiles], separate, left)

        def spanned(tiles, left):
            """What is in the spans of the tiles' heads."""
            spans = [tile.spanned for tile in tiles]
            inside = functools.reduce(jnp.logical_and, [span.inside for span in spans])
            outside = functools.reduce(jnp.logical_and, [span.outside for span in spans])
            pl.when(inside)(functools.partial(compute, tiles, left))

            @pl.when(~inside & ~outside)
            def _():
                for span in spans:
                    span.write(left)
                compute(tiles, Left.BIAS)
                if "span_sum" in kept:
                    for span in spans:
                        span.gather()

        def add(left):
            def work(number):
                turn, trip = _split(number, walk.turns, trips)
                (spanned if "span" in inputs else compute)(beside(turn, trip), left)

            repeat(walk.turns * trips, work)

        @pl.when(first)
        def _():
            repeat(walk.results, begin)

        code = (word >> 2) & 0x3F
        limited = [here for here in codes if here > FULL or (here == FULL and segmented)]
        for here in limited:
            rule = blocks.rules[here - RULE].allowed if here >= RULE else here
            pl.when(code == here)(functools.partial(limit, None if here == FULL else rule))
        if FULL in codes and not segmented:
            pl.when(code == FULL)(functools.partial(add, Left.ALL))
        if limited:
            pl.when(code >= limited[0])(functools.partial(add, Left.LIMITS))

        @pl.when(last)
        def _():
            # Those that share a result have it in the same memory.
            own = walk.parts * min(walk.together, walk.wide(walk.major))
            repeat(walk.results, lambda turn: [t.finish() for t in beside(turn, 0)[:own]])

    return on_tpu(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, *walk.grid),
            in_specs=[part.spec for _, part in inputs.values()],
            out_specs=[part.spec for _, part in outputs.values()],
            scratch_shapes=memory,
        ),
        out_shape=[shape for shape, _ in outputs.values()],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=VMEM_BYTES,
        ),
        cost_estimate=_cost(walk, batch, inputs, outputs, width),
        interpret=config.interpret,
        name=name,
    )(*walk.steps.packed(), *(array for array, _ in inputs.values()))


def _cost(walk: Walk, batch: int, inputs, outputs, width: int) -> pl.CostEstimate:
    """What a kernel costs, for XLA's scheduler and counts."""
    steps, config = walk.steps, walk.config
    heads = config.heads if steps.lists == 1 else 1
    blocks = batch * heads * int((steps.code != SKIP).sum())
    trips = batch * math.prod(walk.grid)
    # A major block stays in memory for all of its steps; what meets it is read at each.
    of_keys = ("k", "v", "k_scale", "v_scale", "kv_segments")
    moved = 0
    for name, (array, part) in (*inputs.items(), *outputs.items()):
        block = part.spec.block_shape
        if name in outputs or block is None or walk.by_rows != (name in of_keys):
            moved += array.size * array.dtype.itemsize
        else:
            moved += trips * math.prod(n or 1 for n in block) * array.dtype.itemsize
    pairs = blocks * config.block_q * config.block_k
    return pl.CostEstimate(flops=2 * width * pairs, transcendentals=pairs, bytes_accessed=moved)


def repeat(count: int, work: Callable[[Any], Any]) -> None:
    """A loop, or the work itself where it is done once."""
    if count == 1:
        work(0)
    else:
        jax.lax.fori_loop(0, count, lambda number, _: (work(number), None)[1], None)


def _split(number: Any, outer: int, inner: int) -> tuple[Any, Any]:
    """Numbers in an outer and in an inner loop, of a number in both together."""
    if inner == 1 or outer == 1:
        return (number, 0) if inner == 1 else (0, number)
    return jax.lax.div(number, inner), jax.lax.rem(number, inner)
