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
    def factor(self) -> float:
        """What products are multiplied with before the cap, or before the power of two."""
        return self.scale / self.soft_cap if self.soft_cap else self.scale * LOG2_E


@dataclasses.dataclass(frozen=True, eq=False)
class Walk:
    """Where a step of the grid (batch, head, step, member of the group) is.

    By rows, the head is a query head and the step's major block one of queries. By columns, it is a
    key head with all its query heads, and the major block one of keys.
    """

    config: Config
    steps: Steps
    by_rows: bool

    def at(self, head, step):
        """The step's number in the flat list."""
        return step if self.steps.lists == 1 else head * self.steps.count + step

    def blocks(self, ids, where):
        """Block of queries and block of keys."""
        word = where[self.at(ids[1], ids[2])]
        major, minor = word >> 16, word & 0xFFFF
        return (major, minor) if self.by_rows else (minor, major)

    def heads(self, ids, what):
        """Query head and key head."""
        group = self.config.group
        if self.by_rows:
            return ids[1], ids[1] if group == 1 else jax.lax.div(ids[1], group)
        member = ids[3]
        if self.steps.lists > 1:
            member = member + ((what[self.at(ids[1], ids[2])] >> 8) & 0xFF)
        return ids[1] * group + member, ids[1]

    @property
    def grid(self) -> tuple[int, ...]:
        """Steps in each dimension, after the batch."""
        config = self.config
        if self.by_rows:
            return config.heads, self.steps.count, 1
        return config.kv_heads, self.steps.count, config.group if self.steps.lists == 1 else 1

    # Block specifications: which part of an array a step needs.

    def spec(self, shape, index):
        """A specification from index(ids of the grid, blocks, heads, what)."""

        def index_map(*ids_and_words):
            ids, (where, what) = ids_and_words[:4], ids_and_words[4:]
            return index(ids, self.blocks(ids, where), self.heads(ids, what), what)

        return pl.BlockSpec(shape, index_map)

    def rows_of(self, side: int, dim: int):
        """A block of positions of one head, of an array from ``_by_position``."""
        size = (self.config.block_q, self.config.block_k)[side]
        if dim % LANES == 0:
            return self.spec((None, size, dim), lambda i, b, h, _: (i[0], b[side], h[side]))
        shape = (None, None, size, dim)
        return self.spec(shape, lambda i, b, h, _: (i[0], h[side], b[side], 0))

    def along_lanes(self, side: int, per_head: bool = True):
        """A number a position, of an array (batch, heads or 1, 1, positions)."""
        size = (self.config.block_q, self.config.block_k)[side]
        return self.spec(
            (None, None, 1, size),
            lambda i, b, h, _: (i[0], h[side] if per_head else 0, 0, b[side]),
        )

    def down_rows(self, side: int):
        """A number a position, the same for all heads, of an array (batch, positions, 1)."""
        size = (self.config.block_q, self.config.block_k)[side]
        return self.spec((None, size, 1), lambda i, b, h, _: (i[0], b[side], 0))

    def bitmap(self):
        """The bitmap of a step."""
        sizes = (self.config.block_q, self.config.block_k)
        shape = (None, *(sizes if self.by_rows else sizes[::-1]))
        return self.spec(shape, lambda i, b, h, what: (what[self.at(i[1], i[2])] >> 16, 0, 0))


def run(
    kernel: Callable,
    walk: Walk,
    batch: int,
    inputs: dict[str, tuple[jax.Array, pl.BlockSpec]],
    outputs: dict[str, tuple[jax.ShapeDtypeStruct, pl.BlockSpec]],
    scratch: dict[str, Any],
    name: str,
) -> tuple[jax.Array, ...]:
    """Runs a kernel, which finds its operands by name and what its step is."""
    config, blocks = walk.config, walk.config.blocks
    large = config.block_q * config.block_k > LARGE_BLOCK
    if len(blocks.bitmaps):
        bitmaps = blocks.bitmaps if walk.by_rows else blocks.bitmaps.swapaxes(1, 2)
        inputs = {**inputs, "bitmap": (jnp.asarray(bitmaps, jnp.int8), walk.bitmap())}
    names = [*inputs, *outputs, *scratch]
    codes = sorted(set(walk.steps.code.reshape(-1).tolist()))

    def body(where, what, *operands):
        refs = types.SimpleNamespace(**dict.fromkeys(OPTIONAL))
        vars(refs).update(zip(names, operands, strict=True))
        ids = [pl.program_id(axis) for axis in range(4)]
        word = what[walk.at(ids[1], ids[2])]
        first, last = (word & 1) != 0, (word & 2) != 0
        if not walk.by_rows:
            first &= ids[3] == 0
            last &= ids[3] == walk.grid[2] - 1
        q_block, k_block = walk.blocks(ids, where)
        refs.q_start, refs.k_start = q_block * config.block_q, k_block * config.block_k
        refs.z = None if refs.span is None else refs.span[walk.heads(ids, what)[0]]
        start, add, finish = kernel(config, refs, walk.by_rows)
        pl.when(first)(start)
        code = (word >> 2) & 0x3F
        for here in codes:
            if here == FULL:
                pl.when(code == here)(functools.partial(add, None))
            elif here == TABLE:
                pl.when(code == here)(lambda: add(lambda q, k: refs.bitmap[...] != 0))
            elif here >= RULE:
                pl.when(code == here)(functools.partial(add, blocks.rules[here - RULE].allowed))
        pl.when(last)(finish)

    return pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, *walk.grid),
            in_specs=[spec for _, spec in inputs.values()],
            out_specs=[spec for _, spec in outputs.values()],
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=[shape for shape, _ in outputs.values()],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=VMEM_BYTES if large else None,
        ),
        interpret=config.interpret,
        name=name,
    )(*walk.steps.packed(), *(array for array, _ in inputs.values()))
