"""Decoding quantized weights on Hopper GPUs, in the registers that feed the matrix unit.

A thread holds pairs of neighbours along K, 32 bits in bf16. int4 and int8 arrays, and fp8 ones for
fp8 products, are converted by Mosaic, which exchanges codes between threads first. Words of 16 bits
need no exchange: shifted and masked, they are weights of other inputs in the same place, and the
order of the inputs is chosen to match.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import vector
from jaxlib.mlir.dialects import llvm


def block_of(group_size: int) -> int:
    """Consecutive inputs within which words hold codes in an order of their own.

    Word c of a block of B inputs holds the codes of inputs c, c + B / packed, c + 2 B / packed, ..,
    lowest bits first: shifted and masked, the words of a block are its inputs in order.
    """
    return 32 if group_size % 64 else 64


def table_bytes(table: jax.Array) -> jax.Array:
    """int32 ``(8,)``: the high bytes of 16 bf16 values, four in a word, then the low bytes."""
    patterns = lax.bitcast_convert_type(table.astype(jnp.bfloat16), jnp.uint16)
    both = jnp.stack([patterns >> 8, patterns & 255]).astype(jnp.uint8)
    return lax.bitcast_convert_type(both.reshape(8, 4), jnp.int32)


def decode(
    codes,
    dtype: jax.typing.DTypeLike,
    table: list[jax.Array] | None,
    bits: int | None,
    group_size: int,
    staged: bool,
) -> jax.Array:
    """Codes as weights, in the order in which the matrix unit takes its left factor.

    Args:
      codes: reference to ``(64, K)`` codes in shared memory, or ``(64, K * bits / 16)`` words.
      dtype: of the weights.
      table: the int32 scalars of ``table_bytes``, or None for integers.
      bits: width of the codes that uint16 words hold, or None where codes have their own dtype.
      group_size: inputs that share a scale.
      staged: whether to do without assembly, as interpret mode needs.

    Returns:
      ``(64, K)``, in registers.
    """
    if bits is not None:
        words = plgpu.load(codes, layout=plgpu.Layout.WGMMA)
        block = block_of(group_size) * bits // 16
        blocks = [words[:, i : i + block] for i in range(0, words.shape[1], block)]
        if bits == 8:
            return _floats(blocks, staged)
        if table is None:
            return _integers(blocks, bits, staged)
        patterns = [pattern for block in blocks for pattern in _look_up(block, table, staged)]
        return lax.bitcast_convert_type(lax.concatenate(patterns, 1), jnp.bfloat16)
    if jnp.dtype(dtype).itemsize == 1:
        return plgpu.load(codes, layout=plgpu.Layout.WGMMA_8BIT).astype(dtype)
    if codes.dtype == jnp.int4:
        w = plgpu.load(codes, layout=plgpu.Layout.WGMMA_UPCAST_4X)
    else:
        w = plgpu.load(codes, layout=plgpu.Layout.WGMMA_UPCAST_2X)
    return plgpu.layout_cast(w, plgpu.Layout.WGMMA).astype(dtype)


def _integers(blocks: list[jax.Array], bits: int, staged: bool) -> jax.Array:
    """bf16 weights of words of integers, in three instructions for two of them.

    0x4300 is 128 in bf16, whose last bit is worth 1: a code in the low bits of that pattern, its
    sign bit flipped, is 128 + half the codes + code.
    """
    half = 1 << (bits - 1)
    patterns = [
        _shift_and_mask(block, shift, 2 * half - 1, 0x4300 + half, staged)
        for block in blocks
        for shift in range(0, 16, bits)
    ]
    w = lax.bitcast_convert_type(lax.concatenate(patterns, 1), jnp.bfloat16)
    return w - jnp.asarray(128 + half, jnp.bfloat16)


# An e4m3 code's bits in a bf16: its sign at the top, the others where exponent and mantissa meet.
_FLOATS = """{
    .reg .b32 sign, other;
    shl.b32 other, $2, 4;
    shl.b32 sign, $2, 8;
    and.b32 other, other, 0x07f007f0;
    lop3.b32 $0, sign, 0x80008000, other, (0xf0 & 0xcc) | 0xaa;
    shr.b32 other, $2, 4;
    and.b32 other, other, 0x07f007f0;
    lop3.b32 $1, $2, 0x80008000, other, (0xf0 & 0xcc) | 0xaa;
}"""


def _floats(blocks: list[jax.Array], staged: bool) -> jax.Array:
    """bf16 weights of words of two e4m3 codes: bits moved, then the exponent's bias, exactly."""
    patterns = []
    for words in blocks:
        if staged:
            shifts = (
                (words << jnp.uint16(8), words << jnp.uint16(4)),
                (words, words >> jnp.uint16(4)),
            )
            patterns += [
                (sign & jnp.uint16(0x8000)) | (other & jnp.uint16(0x07F0)) for sign, other in shifts
            ]
        else:
            patterns += _in_pairs(_FLOATS, words, [], 2)
    w = lax.bitcast_convert_type(lax.concatenate(patterns, 1), jnp.bfloat16)
    return w * jnp.asarray(2.0**120, jnp.bfloat16)


def _shift_and_mask(words, shift: int, mask: int, flip: int, staged: bool) -> jax.Array:
    """((words >> shift) & mask) ^ flip, of uint16."""
    if staged:
        shifted = lax.shift_right_logical(words, jnp.uint16(shift))
        return (shifted & jnp.uint16(mask)) ^ jnp.uint16(flip)

    # The compiler splits a shift of a 16-bit pair in two, and keeps mask and flip apart. Here it is
    # shifted as 32 bits; what comes over from the neighbour is masked.
    assembly = f"""{{
    .reg .b32 shifted;
    shr.b32 shifted, $1, {shift};
    lop3.b32 $0, shifted, {mask * 0x10001:#x}, {flip * 0x10001:#x}, (0xf0 & 0xcc) ^ 0xaa;
    }}"""
    return _in_pairs(assembly, words, [], 1)[0]


# Of 8 nibbles, each the index of an entry: the high and the low bytes of 4 entries at a time, from
# the table's two halves, then the half that the index's top bit names, then bytes into pairs.
_LOOK_UP = """{
    .reg .b32 low, high, select, half, a, b, l<2>, h<2>, p<4>;
    and.b32 select, $4, 0x77777777;
    shr.b32 half, $4, 1;
    lop3.b32 half, half, 0x44444444, 0x32103210, (0xf0 & 0xcc) | 0xaa;
    prmt.b32 a, $5, $6, select;
    prmt.b32 b, $7, $8, select;
    prmt.b32 h0, a, b, half;
    prmt.b32 a, $9, $10, select;
    prmt.b32 b, $11, $12, select;
    prmt.b32 l0, a, b, half;
    shr.b32 select, select, 16;
    shr.b32 half, half, 16;
    prmt.b32 a, $5, $6, select;
    prmt.b32 b, $7, $8, select;
    prmt.b32 h1, a, b, half;
    prmt.b32 a, $9, $10, select;
    prmt.b32 b, $11, $12, select;
    prmt.b32 l1, a, b, half;
    prmt.b32 p0, l0, h0, 0x5140;
    prmt.b32 p1, l1, h1, 0x5140;
    prmt.b32 p2, l0, h0, 0x7362;
    prmt.b32 p3, l1, h1, 0x7362;
    prmt.b32 $0, p0, p1, 0x5410;
    prmt.b32 $1, p0, p1, 0x7632;
    prmt.b32 $2, p2, p3, 0x5410;
    prmt.b32 $3, p2, p3, 0x7632;
}"""


def _look_up(words, table: list[jax.Array], staged: bool) -> list[jax.Array]:
    """bf16 patterns of the four indices in each word, lowest first; a table of ``table_bytes``."""
    if not staged:
        return _in_pairs(_LOOK_UP, words, table, 4)
    found = []
    for shift in range(0, 16, 4):
        index = lax.shift_right_logical(words, jnp.uint16(shift)) & jnp.uint16(15)
        pattern = jnp.zeros_like(words)
        for i in range(16):
            high, low = ((table[part + i // 4] >> (i % 4 * 8)) & 255 for part in (0, 4))
            entry = (high * 256 + low).astype(jnp.uint16)
            pattern = jnp.where(index == i, entry, pattern)
        found.append(pattern)
    return found


def _in_pairs(assembly: str, words, scalars: list, count: int) -> list[jax.Array]:
    """Arrays of uint16 that assembly makes of each two neighbours in ``words``, as 32 bits.

    Its operands are the results, the pair and the 32-bit scalars, in this order.
    """
    result = plgpu.ShapeDtypeStruct(words.shape, jnp.uint16, layout=plgpu.Layout.WGMMA)
    constraints = ",".join(["=r"] * count + ["r"] * (1 + len(scalars)))

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA, *[plgpu.Layout.WG_SPLAT(())] * len(scalars)),
        return_type=[result] * count,
    )
    def run(_, words, *scalars):
        i32 = ir.IntegerType.get_signless(32)
        whole = ir.VectorType.get((1,), i32)
        every = i32 if count == 1 else llvm.StructType.get_literal([i32] * count)
        others = [scalar.registers.item() for scalar in scalars]
        results = [np.empty_like(words.registers) for _ in range(count)]
        for index, pair in np.ndenumerate(words.registers):
            bits = vector.extract(vector.bitcast(whole, pair), [], [0])
            made = llvm.inline_asm(every, [bits, *others], assembly, constraints)
            for i, registers in enumerate(results):
                one = made if count == 1 else llvm.extractvalue(i32, made, [i])
                registers[index] = vector.bitcast(pair.type, vector.broadcast(whole, one))
        return [
            mgpu.FragmentedArray(_registers=registers, _layout=words.layout, _is_signed=False)
            for registers in results
        ]

    return run(words, *scalars)
