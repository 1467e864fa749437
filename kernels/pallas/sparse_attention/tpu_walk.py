"""How a kernel goes over the list of blocks: what each step reads, writes and does."""

import dataclasses
import functools
import math
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxcomp.kernels.sparse_attention.rules import Mask
from jaxcomp.kernels.sparse_attention.schedule import FULL, RULE, TABLE, Schedule, Steps, schedule

LANES = 128
LOG2_E = math.log2(math.e)
# Operands that a kernel may not have; it finds None in their place.
OPTIONAL = ("span", "segments", "kv_segments", "k_scale", "v_scale", "bitmap", "lse")
# The compiler's own limit of vector memory is enough for blocks up to this size.
LARGE_BLOCK = 512 * 512
VMEM_BYTES = 48 << 20


def together(heads: int, kv_heads: int, lists: int, area: int) -> int:
    """Query heads that a step of the forward kernel computes side by side.

    One block's products, maxima, weights and products again wait for each other, some 200 cycles
    of latency each. Where two heads have the same block, those of one run in the waits of the
    other, and they share what a step costs. Large blocks fill their own waits, and compile slowly.

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
    def factor(self) -> float:
        """What products are multiplied with before the cap, or before the power of two."""
        return self.scale / self.soft_cap if self.soft_cap else self.scale * LOG2_E


@dataclasses.dataclass(frozen=True)
class Part:
    """Which part of an array a step reads or writes, and which of that belongs to one head.

    Attributes:
      spec: the part.
      of_head: (reference to the part, the head's number within the step) -> reference.
    """

    spec: pl.BlockSpec
    of_head: Callable[[Any, int], Any] = lambda ref, head: ref


@dataclasses.dataclass(frozen=True, eq=False)
class Walk:
    """Where a step of the grid (batch, heads, step, member of the group) is.

    By rows, a step has as many query heads as ``together``, and its major block is one of queries.
    By columns, it has a key head with all its query heads, and the major block is one of keys.
    """

    config: Config
    steps: Steps
    by_rows: bool
    together: int = 1

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
        group = self.config.group
        if self.by_rows:
            steps = group // min(group, self.together)  # that share a key head
            return ids[1], ids[1] if steps == 1 else jax.lax.div(ids[1], steps)
        member = ids[3]
        if self.steps.lists > 1:
            member = member + ((what[self.at(ids[1], ids[2])] >> 8) & 0xFF)
        return ids[1] * group + member, ids[1]

    def wide(self, side: int) -> int:
        """Heads of queries (side 0) or of keys (1) in a step."""
        return self.together if side == 0 or self.config.group == 1 else 1

    @property
    def grid(self) -> tuple[int, ...]:
        """Steps in each dimension, after the batch."""
        config = self.config
        if self.by_rows:
            return config.heads // self.together, self.steps.count, 1
        return config.kv_heads, self.steps.count, config.group if self.steps.lists == 1 else 1

    # Which part of an array a step needs.

    def spec(self, shape, index):
        """A specification from index(ids of the grid, blocks, heads, what)."""

        def index_map(*ids_and_words):
            ids, (where, what) = ids_and_words[:4], ids_and_words[4:]
            return index(ids, self.blocks(ids, where), self.heads(ids, what), what)

        return pl.BlockSpec(shape, index_map)

    def rows_of(self, side: int, dim: int) -> Part:
        """A block of positions of a step's heads, of an array from ``_by_position``."""
        size, wide = (self.config.block_q, self.config.block_k)[side], self.wide(side)
        if dim % LANES == 0:
            spec = self.spec((None, size, wide * dim), lambda i, b, h, _: (i[0], b[side], h[side]))
            if wide == 1:
                return Part(spec)
            return Part(spec, lambda ref, head: ref.at[:, head * dim : (head + 1) * dim])
        shape = (None, wide, size, dim)
        spec = self.spec(shape, lambda i, b, h, _: (i[0], h[side], b[side], 0))
        return Part(spec, self._first_axis(wide))

    def along_lanes(self, side: int, per_head: bool = True) -> Part:
        """A number a position, of an array (batch, heads or 1, 1, positions)."""
        size = (self.config.block_q, self.config.block_k)[side]
        wide = self.wide(side) if per_head else 1
        spec = self.spec(
            (None, wide, 1, size),
            lambda i, b, h, _: (i[0], h[side] if per_head else 0, 0, b[side]),
        )
        return Part(spec, self._first_axis(wide))

    def down_rows(self, side: int) -> Part:
        """A number a position, the same for all heads, of an array (batch, positions, 1)."""
        size = (self.config.block_q, self.config.block_k)[side]
        return Part(self.spec((None, size, 1), lambda i, b, h, _: (i[0], b[side], 0)))

    def bitmap(self) -> Part:
        """The bitmap of a step."""
        sizes = (self.config.block_q, self.config.block_k)
        shape = (None, *(sizes if self.by_rows else sizes[::-1]))
        return Part(self.spec(shape, lambda i, b, h, what: (what[self.at(i[1], i[2])] >> 16, 0, 0)))

    @staticmethod
    def _first_axis(wide: int) -> Callable[[Any, int], Any]:
        # Heads that share a key head have its part.
        return lambda ref, head: ref.at[head if wide > 1 else 0]


def _each(parts: tuple[Callable[[], None], ...]) -> None:
    for part in parts:
        part()


def run(
    kernel: Callable,
    walk: Walk,
    batch: int,
    inputs: dict[str, tuple[jax.Array, Part]],
    outputs: dict[str, tuple[jax.ShapeDtypeStruct, Part]],
    scratch: dict[str, tuple[tuple[int, ...], jax.typing.DTypeLike]],
    name: str,
) -> tuple[jax.Array, ...]:
    """Runs a kernel, for each head of a step: it finds its operands by name.

    Args:
      kernel: (config, operands and where the step is, by_rows) -> what to do first, the products
        that a block begins with, what to add from them under a rule, and what to do last.
      walk: the steps.
      batch: its size.
      inputs: arrays, and what a step has of each.
      outputs: likewise.
      scratch: shapes and dtypes, of each head.
      name: of the compiled kernel.

    Returns:
      The outputs.
    """
    config, blocks = walk.config, walk.config.blocks
    large = walk.together * config.block_q * config.block_k > LARGE_BLOCK
    if len(blocks.bitmaps):
        bitmaps = blocks.bitmaps if walk.by_rows else blocks.bitmaps.swapaxes(1, 2)
        inputs = {**inputs, "bitmap": (jnp.asarray(bitmaps, jnp.int8), walk.bitmap())}
    names = [*inputs, *outputs, *scratch]
    codes = sorted(set(walk.steps.code.reshape(-1).tolist()))

    parts = [part.of_head for _, part in (*inputs.values(), *outputs.values())]
    parts += [lambda ref, head: ref.at[head]] * len(scratch)

    def body(where, what, *operands):
        ids = [pl.program_id(axis) for axis in range(4)]
        word = what[walk.at(ids[1], ids[2])]
        first, last = (word & 1) != 0, (word & 2) != 0
        if not walk.by_rows:
            first &= ids[3] == 0
            last &= ids[3] == walk.grid[2] - 1
        q_block, k_block = walk.blocks(ids, where)
        heads = []
        for head in range(walk.together):
            refs = types.SimpleNamespace(**dict.fromkeys(OPTIONAL))
            of_head = [part(ref, head) for part, ref in zip(parts, operands, strict=True)]
            vars(refs).update(zip(names, of_head, strict=True))
            refs.q_start, refs.k_start = q_block * config.block_q, k_block * config.block_k
            if refs.span is not None:
                refs.z = refs.span[walk.heads(ids, what)[0] * walk.together + head]
            heads.append(kernel(config, refs, walk.by_rows))
        start, products, add, finish = zip(*heads, strict=True)

        def add_all(rule):
            # The compiler keeps this order by and large: no head's products wait for the other's.
            ready = [first_of() for first_of in products]
            for head, of_head in zip(add, ready, strict=True):
                head(rule, of_head)

        def from_bitmap(q, k):
            del q, k
            return operands[names.index("bitmap")][...] != 0

        pl.when(first)(functools.partial(_each, start))
        code = (word >> 2) & 0x3F
        for here in codes:
            if here == FULL:
                pl.when(code == here)(functools.partial(add_all, None))
            elif here == TABLE:
                pl.when(code == here)(functools.partial(add_all, from_bitmap))
            elif here >= RULE:
                allowed = blocks.rules[here - RULE].allowed
                pl.when(code == here)(functools.partial(add_all, allowed))
        pl.when(last)(functools.partial(_each, finish))

    return pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, *walk.grid),
            in_specs=[part.spec for _, part in inputs.values()],
            out_specs=[part.spec for _, part in outputs.values()],
            scratch_shapes=[
                pltpu.VMEM((walk.together, *shape), dtype) for shape, dtype in scratch.values()
            ],
        ),
        out_shape=[shape for shape, _ in outputs.values()],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=VMEM_BYTES if large else None,
        ),
        interpret=config.interpret,
        name=name,
    )(*walk.steps.packed(), *(array for array, _ in inputs.values()))
