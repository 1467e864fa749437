"""The quantized matmul on Hopper GPUs: what fits, how it is divided, and the call of its kernel."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
from jax import lax
from jaxcomp.kernels import tuning
from jaxcomp.kernels.chips import Chip
from jaxcomp.kernels.quantized_matmul import layout, reference, weights
from jaxcomp.kernels.quantized_matmul.reference import Options
from jaxcomp.kernels.quantized_matmul.weights import FORMATS, Weight

try:
    from jaxcomp.kernels.quantized_matmul import gpu_decode, gpu_kernel
    from jaxcomp.kernels.quantized_matmul.gpu_kernel import Tiles
except ImportError:  # a jaxlib without Mosaic GPU
    gpu_decode = gpu_kernel = Tiles = None

_OLDEST = (0, 11)
_ACTIVATIONS = {None: None, "int8": "int8", "float8_e4m3fn": "e4m3"}  # as tables call them
LAYOUT = layout.GPU_LAYOUT  # codes in the order of ``gpu_decode.block_of``
_CORES = 132
_SHARED_BYTES = 227 * 1024
_TABLE = pathlib.Path(__file__).with_name("gpu_tiles.json")


def reason(x: jax.Array, weight: Weight, options: Options, chip: Chip | None) -> str | None:
    """Why the kernel cannot compute a product.

    Args:
      x: ``(M, K)``.
      weight: without stack axes.
      options: what is fused.
      chip: that it would run on, or None for interpret mode.

    Returns:
      The reason, or None where it can.
    """
    version = tuple(int(part) for part in jax.__version__.split(".")[:2])
    if gpu_kernel is None or version < _OLDEST:
        return "needs jax 0.11"
    if chip is not None and chip.name != "h100":
        return f"written for Hopper GPUs, and this is {chip.name}"
    if weight.layout not in ("stored", LAYOUT):
        return f"the weight was prepared for another chip ({weight.layout})"
    if x.dtype != jnp.bfloat16:
        return f"x is {jnp.dtype(x.dtype).name}: the matrix unit takes bfloat16"
    if options.out_dtype not in ("bfloat16", "float16", "float32"):
        return f"out_dtype {options.out_dtype} is not written"
    quantized = options.activation_dtype
    if quantized is not None and _word_bits(weight, jnp.dtype(quantized)) is not None:
        return f"words of {weight.format} codes are decoded to bfloat16 only"
    (n, k), group_size = weight.shape, weight.group_size
    if not k or n % 64 or k % 64:
        return f"N and K (here {n}, {k}) must be multiples of 64"
    if weight.format == "int2" and group_size % 64:
        return f"groups of {group_size} int2 codes are no multiple of 64"
    if quantized == "int8" and group_size < 64:
        return f"groups of {group_size} are too small for int8 products; 64 is the least"
    if _depth(weight, 256) is None:
        return (
            f"no step of 64, 128 or 256 inputs divides K = {k} and holds whole groups of "
            f"{group_size}, or lies in one"
        )
    return None


def slower(
    rows: int, weight: Weight, options: Options, chip: Chip, kind: str = "products"
) -> str | None:
    """Why XLA is to compute a product that the kernel can: no measurement speaks for the kernel.

    Args:
      rows: of x.
      weight: its product, that of one matrix of a stack.
      options: what is fused.
      chip: that it would run on.
      kind: "products", or "experts".

    Returns:
      The reason, or None where the kernel was measured to be faster (``tuning``).
    """
    activation = _ACTIVATIONS[options.activation_dtype]
    ways = ("kernel", "xla" if activation is None else "codes")
    shape = (rows, *weight.shape)
    return tuning.unproven(
        chip.name, weight.format, activation, shape, weight.group_size, ways, kind
    )


def run(
    x: jax.Array,
    weight: Weight,
    bias: jax.Array | None,
    options: Options,
    *,
    interpret=False,
    tiles: "Tiles | None" = None,
    x_scales: jax.Array | None = None,
) -> jax.Array:
    """Computes y = activation(x Wᵀ + bias), for operands for which ``reason`` is None.

    Args:
      x: ``(M, K)`` bf16.
      weight: stored or prepared, without stack axes.
      bias: ``(N,)`` or None.
      options: what is fused.
      interpret: False, or ``plgpu.InterpretGPUParams(..)``.
      tiles: how the product is divided; None for the table's choice.
      x_scales: f32 ``(M, 1)`` that rows are quantized with, or None.

    Returns:
      ``(M, N)``.
    """
    row_scales = None
    if options.activation_dtype is not None:
        x, row_scales = reference.quantize_rows(x, options.activation_dtype, x_scales)
        row_scales = row_scales[:, 0]
    if tiles is None:
        tiles = choose_tiles(x, weight)
    y, finished = product(x, weight, bias, options, row_scales, tiles, interpret)
    return y if finished else reference.finish(y, bias, options)


def product(
    x: jax.Array,
    weight: Weight,
    bias: jax.Array | None,
    options: Options,
    row_scales: jax.Array | None,
    tiles: "Tiles",
    interpret=False,
    experts: jax.Array | None = None,
) -> tuple[jax.Array, bool]:
    """The kernel's part of a product.

    Args:
      x: ``(M, K)`` in the dtype of the products.
      weight: stored or prepared; with an axis of experts where there are some.
      bias: ``(N,)`` or ``(E, N)``, or None.
      options: what is fused.
      row_scales: f32 ``(M,)``, of quantized rows.
      tiles: how the product is divided.
      interpret: False, or ``plgpu.InterpretGPUParams(..)``.
      experts: as in ``gpu_kernel.product``.

    Returns:
      ``(M, N)``, and whether that is y: else it is the f32 sums, to be finished.
    """
    m = x.shape[0]
    if m > 8 and m % 8:  # tiles of shared memory have 8 rows
        x = jnp.pad(x, ((0, -m % 8), (0, 0)))
        row_scales = None if row_scales is None else jnp.pad(row_scales, (0, -m % 8))
    # Sums over a split of K, and 4-byte outputs, which the kernel does not transpose.
    finished = tiles.split == 1 and options.out_dtype != "float32"
    problem = gpu_kernel.Problem(
        group_size=weight.group_size,
        activation=options.activation if finished else None,
        out_dtype=options.out_dtype if finished else None,
        tiles=tiles,
        bits=_word_bits(weight, x.dtype),
        staged=bool(interpret),
    )
    if problem.bits is not None and weight.layout == "stored":
        x = _in_blocks(x, weight)
    y = gpu_kernel.product(
        x,
        _codes(weight, problem.bits),
        weight.scales,
        weight.zeros,
        weight.table,
        row_scales,
        bias.astype(jnp.float32) if bias is not None and finished else None,
        problem,
        interpret,
        experts,
    )
    return (y[:m], True) if finished else (jnp.sum(y, axis=0)[:, :m].T, False)


def choose_tiles(x: jax.Array, weight: Weight, products: int = 1) -> "Tiles":
    """The table's tiles for a product, with K split where N alone would leave cores idle.

    Args:
      x: ``(M, K)`` in the dtype of the products.
      weight: one matrix is looked at.
      products: how many such are computed at once, of experts.

    Returns:
      The tiles.

    Example:
      >>> import jax
      >>> x = jax.ShapeDtypeStruct((1, 4096), "bfloat16")
      >>> codes, scales = jnp.zeros((14336, 2048), "uint8"), jnp.zeros((32, 14336))
      >>> tiles = choose_tiles(x, Weight(codes, scales, None, None, "int4", 128, (14336, 4096)))
      >>> tiles.tokens, tiles.split
      (8, 1)
    """
    (m, k), n = x.shape, weight.shape[0]
    entries = _table()["bfloat16" if x.dtype == jnp.bfloat16 else "8 bits"]
    entry = next(e for e in entries if e["rows_to"] is None or m <= e["rows_to"])
    tiles = Tiles(**{key: value for key, value in entry.items() if key != "rows_to"})
    tiles = dataclasses.replace(tiles, depth=_depth(weight, tiles.depth))

    def blocks(tiles):
        return products * n // (64 * tiles.rows) * -(-m // tiles.tokens)

    # Few blocks leave cores idle: narrower ones first, then more of them along K.
    if tiles.tokens > 128 and blocks(tiles) < _CORES // 2:
        tiles = dataclasses.replace(tiles, tokens=128)
    if n // 64 % tiles.rows or blocks(tiles) < _CORES // 2:
        tiles = dataclasses.replace(tiles, rows=1, slices=tiles.rows * tiles.slices)
    steps = -(-k // (tiles.depth * tiles.slices))
    split = 1 if tiles.tokens > 64 else max(1, min(_CORES // blocks(tiles), steps))
    stage = _stage_bytes(tiles, x, weight)
    kept = tiles.rows * 64 * min(tiles.tokens, 64) * 4
    kept += (tiles.slices - 1) * tiles.rows * 64 * tiles.tokens * 4 + 2048
    stages = max(1, min(tiles.stages, (_SHARED_BYTES - kept) // stage, -(-steps // split)))
    return dataclasses.replace(tiles, stages=stages, split=split)


def _stage_bytes(tiles: "Tiles", x: jax.Array, weight: Weight) -> int:
    """Bytes of shared memory that one stage takes."""
    bits = FORMATS[weight.format].bits
    code_bytes = tiles.rows * 64 * tiles.depth * bits // 8
    x_bytes = tiles.tokens * tiles.depth * jnp.dtype(x.dtype).itemsize
    groups = max(1, tiles.depth // weight.group_size)
    scale_bytes = tiles.rows * groups * 64 * weight.scales.dtype.itemsize
    if weight.zeros is not None:
        scale_bytes += tiles.rows * groups * 64 * weight.zeros.dtype.itemsize
        if x.dtype != jnp.bfloat16:  # sums of x over groups
            scale_bytes += groups * max(tiles.tokens, gpu_kernel.COPIED) * 4
    return tiles.slices * (code_bytes + x_bytes + scale_bytes)


def prepare(weight: Weight) -> Weight:
    """Reorders codes so that decoding them takes no exchange between threads.

    Args:
      weight: stored; int4, int2 or a codebook.

    Returns:
      The weight in the layout "mosaic_gpu/1", of the same size; other formats as they are.
    """
    if weight.format not in ("int4", "int2", "codebook") or weight.layout != "stored":
        return weight
    unpacked = weights.unpack(weight.codes, weight.format)
    codes = _pack(_in_blocks(unpacked, weight, back=True), weight.format)
    return dataclasses.replace(weight, codes=codes, layout=LAYOUT)


def restore(weight: Weight) -> Weight:
    """The stored weight of a prepared one."""
    if weight.layout != LAYOUT:
        return weight
    unpacked = weights.unpack(weight.codes, weight.format)
    codes = _pack(_in_blocks(unpacked, weight), weight.format)
    return dataclasses.replace(weight, codes=codes, layout="stored")


def _pack(codes: jax.Array, format: str) -> jax.Array:
    """Bytes of codes, the inverse of ``weights.unpack``."""
    bits = FORMATS[format].bits
    codes = lax.bitcast_convert_type(codes, jnp.uint8) & jnp.uint8((1 << bits) - 1)
    parts = codes.reshape(*codes.shape[:-1], -1, 8 // bits)
    shifted = parts << (bits * jnp.arange(8 // bits, dtype=jnp.uint8))
    return functools.reduce(jnp.bitwise_or, jnp.moveaxis(shifted, -1, 0))


def _in_blocks(array: jax.Array, weight: Weight, back: bool = False) -> jax.Array:
    """Inputs, on the last axis, in the order in which words of consecutive codes give them.

    Words hold consecutive inputs as stored; shifting and masking a block of them gives every
    fourth (int4) or eighth (int2) input, from the first, then from the second, and so on.
    """
    packed = 16 // FORMATS[weight.format].bits
    block = gpu_decode.block_of(weight.group_size)
    inner = (packed, block // packed) if back else (block // packed, packed)
    split = array.reshape(*array.shape[:-1], -1, *inner)
    return jnp.swapaxes(split, -1, -2).reshape(array.shape)


def _word_bits(weight: Weight, dtype: jnp.dtype) -> int | None:
    """Width of the codes in the words that the kernel reads for products in a dtype, if it does."""
    words = weight.format in ("int2", "codebook") or weight.layout == LAYOUT
    words = words or (weight.format == "fp8" and dtype == jnp.bfloat16)
    return FORMATS[weight.format].bits if words else None


def _codes(weight: Weight, word_bits: int | None) -> jax.Array:
    """Codes in the dtype that the kernel reads: no byte moves."""
    *lead, size = weight.codes.shape
    if word_bits is not None:
        pairs = weight.codes.reshape(*lead, size // 2, 2)
        return lax.bitcast_convert_type(pairs, jnp.uint16)
    dtype = {"int4": jnp.int4, "int8": jnp.int8, "fp8": jnp.float8_e4m3fn}[weight.format]
    return lax.bitcast_convert_type(weight.codes, dtype).reshape(*lead, weight.shape[1])


def _depth(weight: Weight, most: int) -> int | None:
    """The deepest step, up to a limit, that divides K and holds whole groups or lies in one."""
    group_size = weight.group_size
    least = 256 // FORMATS[weight.format].bits  # rows of 32 bytes in shared memory
    depths = [d for d in (256, 128, 64) if weight.shape[1] % d == 0 and d >= least]
    fitting = [d for d in depths if d % group_size == 0 or group_size % d == 0]
    return next((d for d in fitting if d <= most), fitting[-1] if fitting else None)


@functools.cache
def _table() -> dict:
    """What is known of Hopper GPUs; an H200 takes the tiles of an H100."""
    return json.loads(_TABLE.read_text())["h100"]
