"""The quantized matmul of experts on TPUs: rows sorted by expert, each tile with its experts only.

A grid step along the rows is a visit: one tile of rows and one expert that has rows in it. A tile
in which experts meet is visited once by each, one after the other, and keeps of every visit the
rows that are that expert's; an expert without rows is never read. Which expert's weight a visit
needs is known before it runs (scalars that are fetched ahead), so that it is loaded during the
visit before. As in the product with one weight, few rows an expert are multiplied by codes whose
sums are scaled, and many by weights that are scaled once an expert.

Source: Gale et al., MegaBlocks, arXiv 2211.15841. Differs from JAX's megablox: 1. weights are
packed and decoded here; 2. rows of no expert are zeros; 3. the experts may be a part of all.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxcomp.kernels.calls import on_tpu
from jaxcomp.kernels.chips import V5E, Chip
from jaxcomp.kernels.quantized_matmul import (
    layout,
    reference,
    tpu,
    tpu_dense,
    tpu_factors,
    tpu_rows,
    tpu_tiles,
)
from jaxcomp.kernels.quantized_matmul.reference import Options
from jaxcomp.kernels.quantized_matmul.tpu_tiles import Tile
from jaxcomp.kernels.quantized_matmul.weights import Weight


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["tile", "expert", "first", "last", "layer"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Visits:
    """Which tile of rows and which expert each grid step is for; int32 ``(visits,)`` each.

    - The visits of a tile are consecutive, and so are those of an expert.
    - Every tile is visited.
    - A visit that has nothing to multiply has ``first == last``, and the expert of a neighbour.

    Attributes:
      tile: number of the tile.
      expert: number of the expert.
      first: first row of the tile that is the expert's.
      last: row of the tile after the expert's last.
      layer: of codes of several layers int32 ``(1,)``, whose experts these are; or nothing.
    """

    tile: jax.Array
    expert: jax.Array
    first: jax.Array
    last: jax.Array
    layer: tuple[jax.Array, ...] = ()


def visits(bounds: jax.Array, m: int, rows: int) -> tuple[Visits, jax.Array]:
    """The order in which tiles and experts are visited.

    Args:
      bounds: int32 ``(E + 1,)``, not falling, in 0 to m: rows ``bounds[e]:bounds[e + 1]`` are those
        of expert e.
      m: rows.
      rows: of a tile.

    Returns:
      As many visits as there can be, and the int32 number of those to make, which come first.
    """
    experts, tiles = bounds.shape[0] - 1, -(-m // rows)
    most = tiles + min(experts, m) - 1
    starts, ends = bounds[:-1], bounds[1:]
    begin = starts // rows
    count = jnp.where(ends > starts, (ends - 1) // rows + 1 - begin, 0)
    # Whole tiles before the first expert's rows and after the last one's belong to no expert.
    before, after = bounds[:1] // rows, jnp.minimum(-(-bounds[-1:] // rows), tiles)
    none = bounds[:1] >= bounds[-1:]
    before = jnp.where(none, 0, before)
    after = jnp.where(none, 0, after)
    begin = jnp.concatenate([jnp.zeros_like(before), begin, after])
    count = jnp.concatenate([before, count, tiles - after])
    until = jnp.cumsum(count)
    step = jnp.minimum(jnp.arange(most, dtype=jnp.int32), until[-1] - 1)
    group = jnp.sum(until[None] <= step[:, None], axis=1, dtype=jnp.int32)
    tile = begin[group] + step - (until - count)[group]
    some = ends > starts
    lowest = jnp.argmax(some).astype(jnp.int32)
    highest = experts - 1 - jnp.argmax(some[::-1]).astype(jnp.int32)
    expert = jnp.clip(group - 1, lowest, jnp.maximum(lowest, highest))
    own = (group > 0) & (group <= experts)
    first = jnp.clip(starts[expert] - tile * rows, 0, rows)
    last = jnp.clip(ends[expert] - tile * rows, 0, rows)
    first, last = jnp.where(own, first, 0), jnp.where(own, last, 0)
    return Visits(*(a.astype(jnp.int32) for a in (tile, expert, first, last))), until[-1]


def matmul(
    x: jax.Array,
    bounds: jax.Array,
    weight: Weight,
    bias: jax.Array | None,
    options: Options,
    chip: Chip = V5E,
    interpret=False,
    tile: Tile | None = None,
) -> jax.Array:
    """Multiplies the rows of each expert: y = activation(x W[e]ᵀ + bias[e]).

    Args:
      x: ``(M, K)``, bf16 or f32, sorted by expert.
      bounds: int32 ``(E + 1,)``: rows ``bounds[e]:bounds[e + 1]`` are those of expert e.
      weight: with one stack axis of E experts; one that is not prepared is prepared on every call.
      bias: ``(E, N)`` or None.
      options: what is fused.
      chip: whose arithmetic to use.
      interpret: False, or ``pltpu.InterpretParams(..)``.
      tile: of the kernel of few rows; None for a good one.

    Returns:
      ``(M, N)``; rows of no expert are zeros.
    """
    weight = layout.prepare(weight.sliced()) if weight.layout == "stored" else weight
    m, (n, k), experts = x.shape[0], weight.shape, weight.stack[0]
    dense = tpu_tiles.grouped_dense(chip.name, m, experts, n, k, chip.mxu)
    exact = tpu.integers(chip, weight, options)
    if tile is None and dense and x.dtype == jnp.bfloat16 and not exact:
        return _dense(x, bounds, weight, bias, options, chip, interpret, dense)
    return _few(x, bounds, weight, bias, options, chip, interpret, tile)


def _few(x, bounds, weight, bias, options, chip, interpret, tile) -> jax.Array:
    """Rows times codes; the sums are scaled."""
    m, (n, k), experts = x.shape[0], weight.shape, weight.stack[0]
    how = tpu.arithmetic(chip, x.dtype, weight, options)
    pieces = how.pieces * how.copies
    tile = tile or tpu_tiles.grouped_few(
        chip.name, m, experts, n, k, weight.group_size, how.depth, pieces
    )
    x = jnp.pad(x, ((0, -m % tile.m), (0, 0)))
    rows, row_scales, sums = tpu_rows.split(x, None, weight, how, options, tile)
    rows = rows.reshape(-1, pieces * tile.m, k)
    steps, per_step = k // tile.k, max(tile.k // weight.group_size, 1)
    steps_per_scale = np.int32(max(weight.group_size // tile.k, 1))
    fields = 4 if weight.format == "int2" else 1

    def by_group(array):
        """(E, groups, N) as (E, .., groups a step, N)."""
        return array.reshape(experts, -1, per_step, n)

    def spec(shape, index):
        return pl.BlockSpec(shape, lambda j, visit, step, v: index(v, visit, j, step))

    def pinned(v, visit, step):
        """The step, or the last one where nothing is multiplied: that block is there already."""
        return jnp.where(v.first[visit] < v.last[visit], step, np.int32(steps - 1))

    scale_spec = spec(
        (None, None, per_step, tile.n),
        lambda v, i, j, step: (v.expert[i], jax.lax.div(pinned(v, i, step), steps_per_scale), 0, j),
    )
    operands = {
        "x": (
            rows,
            spec(
                (None, pieces * tile.m, tile.k),
                lambda v, i, j, step: (v.tile[i], 0, pinned(v, i, step)),
            ),
        ),
        "w": (
            weight.codes,
            spec(
                (*(None for _ in weight.scalars), None, tile.n, tile.k // fields),
                lambda v, i, j, step: (*_layer(v), v.expert[i], j, pinned(v, i, step)),
            ),
        ),
        "scales": (by_group(weight.scales), scale_spec),
    }
    if row_scales is not None:
        operands["row_scales"] = (
            row_scales, spec((tile.m, 1), lambda v, i, j, step: (v.tile[i], 0))
        )  # fmt: skip
    if weight.zeros is not None:
        operands["zeros"] = (by_group(weight.zeros), scale_spec)
        operands["sums"] = (
            sums,
            spec(
                (None, tile.m, per_step),
                lambda v, i, j, step: (pinned(v, i, step), v.tile[i], 0),
            ),
        )
    scratch = tpu.scratch_of(tile, steps, weight, how, chip)

    def body(refs, v, y_ref, *own):
        _few_kernel(
            refs, v, y_ref, **dict(zip(scratch, own, strict=True)),
            weight=tpu.static(weight), how=how, tile=tile, options=options, steps=steps,
        )  # fmt: skip

    return _call(
        body, operands, bounds, weight, bias, options, interpret,
        rows=(m, tile.m), outputs=tile.n, steps=(steps,),
        scratch=list(scratch.values()),
        memory=40 << 20, name=f"grouped_matmul_{weight.format}",
    )  # fmt: skip


def _few_kernel(
    refs, v, y_ref, products_ref=None, scales_ref=None, acc_ref=None, *, weight, how, tile,
    options, steps,
):  # fmt: skip
    """One visit, or one more tile of its inputs."""
    visit = pl.program_id(1)
    step = pl.program_id(2)
    works = v.first[visit] < v.last[visit]
    tpu.keep_scales(refs, scales_ref, how, works)
    tpu.keep_order(products_ref, visit == 0)
    for start in range(0, tile.n, tile.columns):
        columns = pl.ds(start, min(tile.columns, tile.n - start))

        @pl.when(works)
        def _(columns=columns):
            y = tpu.sums_of(refs, columns, weight, how, tile, products_ref, scales_ref)
            if steps == 1:
                _keep(v, visit, y_ref, columns, tpu.finish(refs, y, columns, options))
                return

            @pl.when(step == 0)
            def _():
                acc_ref[:, columns] = y

            @pl.when(step > 0)
            def _():
                acc_ref[:, columns] += y

            @pl.when(step == steps - 1)
            def _():
                done = tpu.finish(refs, acc_ref[:, columns], columns, options)
                _keep(v, visit, y_ref, columns, done)

    _nothing(v, visit, y_ref, jnp.logical_and(jnp.logical_not(works), step == 0))


def _dense(x, bounds, weight, bias, options, chip, interpret, tile) -> jax.Array:
    """Rows times weights that are scaled once for the visits of an expert."""
    m, (_, k) = x.shape[0], weight.shape
    row_scales = None
    if options.activation_dtype is not None:
        x, row_scales = reference.quantize_rows(x, options.activation_dtype)
        x = x.astype(jnp.bfloat16)  # Which holds eight bits exactly.
    fields = 4 if weight.format == "int2" else 1

    def spec(shape, index):
        return pl.BlockSpec(shape, lambda j, visit, v: index(v, visit, j))

    how = tpu_dense.Decoding.of(weight, chip, tile.m, experts=True)
    operands = {
        "x": (
            jnp.pad(x, ((0, -m % tile.m), (0, 0))),
            spec((tile.m, k), lambda v, i, j: (v.tile[i], 0)),
        ),
        "w": (
            weight.codes,
            spec(
                (*(None for _ in weight.scalars), None, tile.n, k // fields),
                lambda v, i, j: (*_layer(v), v.expert[i], j, 0),
            ),
        ),
    }
    if how.summed:
        sums = tpu_factors.sums(operands["x"][0], weight.group_size)
        operands["sums"] = sums, spec((tile.m, sums.shape[1]), lambda v, i, j: (v.tile[i], 0))
    for name, array in tpu_factors.factors(weight, how.unit, how.rows, how.summed).items():
        shape, index = tpu_factors.block(array, tile.n, how.lie_by_rows(name))
        operands[name] = (
            array,
            spec((None, *shape), lambda v, i, j, index=index: (v.expert[i], *index(j))),
        )
    if row_scales is not None:
        operands["row_scales"] = (
            jnp.pad(row_scales, ((0, -m % tile.m), (0, 0))),
            spec((tile.m, 1), lambda v, i, j: (v.tile[i], 0)),
        )
    body = functools.partial(_dense_kernel, how=how, options=options, columns=tile.columns)
    return _call(
        body, operands, bounds, weight, bias, options, interpret,
        rows=(m, tile.m), outputs=tile.n, steps=(),
        scratch=tpu_dense.scratch(tile, k, how),
        memory=48 << 20, name=f"grouped_matmul_dense_{weight.format}",
    )  # fmt: skip


def _dense_kernel(refs, v, y_ref, w_ref, acc_ref, entries_ref=None, *, how, options, columns):
    """One visit; the first of an expert decodes its weights for the others."""
    visit = pl.program_id(1)
    refs = tpu_dense.with_entries(refs, entries_ref, how, visit == 0)
    works = v.first[visit] < v.last[visit]
    before = jnp.maximum(visit - 1, 0)
    known = jnp.logical_and(visit > 0, v.expert[before] == v.expert[visit])
    known = jnp.logical_and(known, v.first[before] < v.last[before])

    def multiply(decoded, block):
        keep = functools.partial(_keep, v, visit, y_ref, block)
        tpu_dense.product(refs, w_ref, acc_ref, block, options, how, decoded, keep)

    tpu_dense.keep_in_memory(acc_ref)

    def run(decoded):
        tpu_dense.blocks(y_ref.shape[1], columns, functools.partial(multiply, decoded))

    pl.when(jnp.logical_and(works, jnp.logical_not(known)))(lambda: run(False))
    pl.when(jnp.logical_and(works, known))(lambda: run(True))
    _nothing(v, visit, y_ref, jnp.logical_not(works))


def _layer(v) -> tuple[jax.Array, ...]:
    """The index of a block among several layers, if there are several."""
    return tuple(number[0] for number in v.layer)


def _keep(v, visit, y_ref, columns, y):
    """Stores the expert's rows; the first visit of a tile stores zeros in its other rows."""
    row = jax.lax.broadcasted_iota(jnp.int32, y.shape, 0)
    own = jnp.logical_and(row >= v.first[visit], row < v.last[visit])
    before = jnp.maximum(visit - 1, 0)
    again = jnp.logical_and(visit > 0, v.tile[before] == v.tile[visit])
    others = jnp.where(again, y_ref[:, columns].astype(jnp.float32), 0.0)
    y_ref[:, columns] = jnp.where(own, y.astype(jnp.float32), others).astype(y_ref.dtype)


def _nothing(v, visit, y_ref, condition):
    """Stores zeros in a tile whose rows are no expert's: it has one visit."""

    @pl.when(condition)
    def _():
        y_ref[...] = jnp.zeros_like(y_ref)


def _call(
    body, operands, bounds, weight, bias, options, interpret, *,
    rows, outputs, steps, scratch, memory, name,
) -> jax.Array:  # fmt: skip
    """Runs a kernel over tiles of outputs, visits and steps of inputs."""
    (m, tile_m), (n, _) = rows, weight.shape
    plan, count = visits(bounds, m, tile_m)
    plan = dataclasses.replace(plan, layer=weight.scalars)
    if bias is not None:
        operands["bias"] = (
            bias.astype(jnp.float32)[:, None],
            pl.BlockSpec((None, 1, outputs), lambda j, i, *rest: (rest[-1].expert[i], 0, j)),
        )
    if weight.table is not None:
        operands["table"] = (weight.table, pl.BlockSpec(memory_space=pltpu.SMEM))
    names = tuple(operands)

    def kernel(v, *refs):
        body(dict(zip(names, refs, strict=False)), v, *refs[len(names) :])

    y = on_tpu(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(-(-n // outputs), count, *steps),
            in_specs=[spec for _, spec in operands.values()],
            out_specs=pl.BlockSpec((tile_m, outputs), lambda j, i, *rest: (rest[-1].tile[i], j)),
            scratch_shapes=scratch,
        ),
        out_shape=jax.ShapeDtypeStruct((-(-m // tile_m) * tile_m, n), options.out_dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=None
            if interpret
            else ("parallel", "arbitrary", *("arbitrary" for _ in steps)),
            vmem_limit_bytes=memory,
        ),
        # As many experts as there can be have rows.
        cost_estimate=tpu.cost(m, weight, options, min(1.0, m / weight.stack[0])),
        interpret=interpret,
        name=name,
    )(plan, *(array for array, _ in operands.values()))
    return y[:m]
