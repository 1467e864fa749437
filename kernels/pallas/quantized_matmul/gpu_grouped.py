"""The quantized matmul of experts on Hopper GPUs: each tile of tokens has one expert.

Rows are gathered so that each expert's begin with a tile of their own, as many tiles as they fill;
the kernel of one weight then computes all of them at once, and reads for each tile its expert's
weight. How many tiles there are is known only when it runs: there are as many as there can be, and
those that no rows are left for end at once. One gather more puts the results in their places. An
expert without rows is not read.

Nothing here was run on a GPU so far: compared with float64 in interpret mode, and compiled for H100
by CUDA's assembler. The choice of tiles is therefore a guess.

Source: Gale et al., MegaBlocks, arXiv 2211.15841. Differs from it in: 1. weights are packed and
decoded in the kernel; 2. rows are padded to whole tiles of an expert, not of the block-sparse
product that the paper makes of all experts.
"""

import jax
import jax.numpy as jnp
from jaxcomp.kernels.quantized_matmul import gpu, grouped_reference, reference
from jaxcomp.kernels.quantized_matmul.reference import Options
from jaxcomp.kernels.quantized_matmul.weights import Weight

_FEW = 16  # rows an expert, on average, up to which most experts should have a single tile
_MOST_TOKENS = 128  # of a tile: half of an expert's last one is empty, on average


def matmul(
    x: jax.Array,
    bounds: jax.Array,
    weight: Weight,
    bias: jax.Array | None,
    options: Options,
    interpret=False,
    tiles: "gpu.Tiles | None" = None,
) -> jax.Array:
    """Multiplies the rows of each expert: y = activation(x W[e]ᵀ + bias[e]).

    Args:
      x: ``(M, K)`` bf16, sorted by expert.
      bounds: int32 ``(E + 1,)``: rows ``bounds[e]:bounds[e + 1]`` are those of expert e.
      weight: stored or prepared, with one stack axis of E experts; one for which ``gpu.reason`` is
        None.
      bias: ``(E, N)`` or None.
      options: what is fused.
      interpret: False, or ``plgpu.InterpretGPUParams(..)``.
      tiles: how the product is divided; None for the table's choice.

    Returns:
      ``(M, N)``; rows of no expert are zeros.
    """
    row_scales, (m, _), experts = None, x.shape, weight.stack[0]
    if options.activation_dtype is not None:
        x, row_scales = reference.quantize_rows(x, options.activation_dtype)
    tiles = choose_tiles(x, weight) if tiles is None else tiles
    owners, sources, places = plan(bounds, m, tiles.tokens)
    x = jnp.take(x, sources, axis=0, mode="clip")
    if row_scales is not None:
        row_scales = jnp.take(row_scales[:, 0], sources, mode="clip")
    y, finished = gpu.product(
        x, weight, bias, options, row_scales, tiles, interpret, experts=owners
    )
    y, owner = jnp.take(y, places, axis=0, mode="clip"), grouped_reference.owner(bounds, m)
    if not finished:
        if bias is not None:
            y += jnp.take(bias.astype(jnp.float32), owner, axis=0, mode="clip")
        y = reference.finish(y, None, options)
    return jnp.where((owner < experts)[:, None], y, jnp.zeros((), y.dtype))


def plan(bounds: jax.Array, m: int, tokens: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Where the rows of each expert are while they are multiplied.

    Args:
      bounds: int32 ``(E + 1,)``, not falling, in 0 to m.
      m: rows.
      tokens: rows of a tile.

    Returns:
      int32: the expert of each tile, -1 where it has none; of each row of all tiles, which row of x
      it is (any, where it is none); and of each row of x, in which row of all tiles it is.

    Example:
      >>> import jax.numpy as jnp
      >>> owners, sources, places = plan(jnp.array([0, 3, 3, 5]), 5, 2)
      >>> owners.tolist(), places.tolist()  # three rows of expert 0, two of expert 2
      ([0, 0, 2, -1], [0, 1, 2, 4, 5])
    """
    experts = bounds.shape[0] - 1
    # Every expert with rows may have one tile that is not full.
    most = (m + min(experts, m) * (tokens - 1)) // tokens
    starts, sizes = bounds[:-1], bounds[1:] - bounds[:-1]
    until = jnp.cumsum((sizes + tokens - 1) // tokens)
    before = until - (sizes + tokens - 1) // tokens
    tile = jnp.arange(most, dtype=jnp.int32)
    expert = jnp.sum(until[None] <= tile[:, None], axis=1, dtype=jnp.int32)
    owners = jnp.where(expert < experts, expert, -1)
    expert = jnp.minimum(expert, experts - 1)
    first = starts[expert] + (tile - before[expert]) * tokens
    sources = (first[:, None] + jnp.arange(tokens, dtype=jnp.int32)).reshape(-1)
    row = jnp.arange(m, dtype=jnp.int32)
    own = jnp.minimum(grouped_reference.owner(bounds, m), experts - 1)
    places = before[own] * tokens + row - starts[own]
    return owners.astype(jnp.int32), sources.astype(jnp.int32), places.astype(jnp.int32)


def choose_tiles(x: jax.Array, weight: Weight) -> "gpu.Tiles":
    """Tiles for as many rows as an expert has on average.

    Args:
      x: ``(M, K)`` in the dtype of the products.
      weight: with one stack axis.

    Returns:
      The tiles.
    """
    (m, k), experts = x.shape, weight.stack[0]
    each = -(-m // experts)
    # Where one tile should hold all rows of most experts, room for twice the average.
    rows = min(m, 2 * each) if each <= _FEW else min(each, _MOST_TOKENS)
    return gpu.choose_tiles(jax.ShapeDtypeStruct((rows, k), x.dtype), weight, min(experts, m))
