"""N:M sparse weights: N of every M consecutive inputs, and their positions.

A weight W (N, K), output by input, is stored as

- values: bf16 or f32 ``(N, K * n / m)``; or int4 codes, uint8 ``(N, K * n / m / 2)``, the low
  nibble first, two's complement;
- positions: uint8 ``(N, ceil(K * n / m * bits / 8))``, where in its group of m inputs each value
  is, ceil(log2 m) bits each, the lowest bits of a byte first; different ones in a group;
- scales, of codes: ``(K / group_size, N)``, where groups are counted in inputs of the dense weight.

A group with fewer than n values stores zeros.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxcomp.kernels import arguments
from jaxcomp.kernels.sparse_matmul.layers import Layers, check_layers

LAYOUT = "mosaic_tpu/1"
# What of a weight is not split with its arrays.
_STATIC = "shape and group_size"


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "positions", "scales", "layers"],
    meta_fields=["n", "m", "group_size", "shape", "layout"],
)
@dataclasses.dataclass(frozen=True)
class NMSparse:
    """An N:M sparse weight and what its arrays mean.

    Attributes:
      values: as stored; prepared: ``(2, N, K / 4)``, the first and the second value of each group,
        in the dtype of the values or int4.
      positions: as stored; prepared: int4 ``(N, K / 4)``, first + 4 * second.
      scales: as stored, or None; prepared: f32 ``(N, K / group_size)``.
      n: values of a group.
      m: inputs of a group.
      group_size: inputs of the dense weight that share a scale, or None.
      shape: (N, K).
      layout: "stored", or the name and version of what ``prepare_nm`` made.
      layers: values and positions of several layers, of which these are one's; or None.
    """

    values: jax.Array
    positions: jax.Array
    scales: jax.Array | None
    n: int
    m: int
    group_size: int | None
    shape: tuple[int, int]
    layout: str = "stored"
    layers: Layers | None = None

    @property
    def read(self) -> tuple[jax.Array, ...]:
        """What a kernel reads a part of at each step."""
        return self.values, self.positions

    @property
    def nbytes(self) -> int:
        """Bytes of one layer's arrays."""
        arrays = [a for a in (self.values, self.positions, self.scales) if a is not None]
        return sum(a.size * jax.dtypes.itemsize_bits(a.dtype) for a in arrays) // 8


def nm_sparse(w: jax.Array, mask: jax.Array | None = None, n: int = 2, m: int = 4) -> NMSparse:
    """Stores what a mask keeps of a dense weight. Runs on the host.

    Args:
      w: ``(N, K)``, bf16 or f32.
      mask: bool ``(N, K)``, at most n True in each group of m inputs; None for w != 0.
      n: values of a group.
      m: inputs of a group.

    Returns:
      The weight, in the stored layout.

    Raises:
      TypeError: w has another dtype.
      ValueError: the mask has another shape, or keeps more than n of a group.

    Example:
      >>> import jax.numpy as jnp
      >>> w = nm_sparse(jnp.array([[1.0, 0.0, 0.0, 4.0]]))
      >>> w.values.tolist(), w.positions.tolist()  # positions 0 and 3
      ([[1.0, 4.0]], [[12]])
    """
    dense = np.asarray(w)
    mask = dense != 0 if mask is None else np.asarray(mask).astype(bool)
    if dense.ndim != 2 or mask.shape != dense.shape:
        raise ValueError(f"w {dense.shape} must be (N, K), and mask {mask.shape} of that shape")
    if dense.shape[1] % m or not 1 <= n <= m:
        raise ValueError(
            f"w {dense.shape} does not consist of groups of {m} inputs with {n} values each; K "
            "must be a multiple of m, and n at most m"
        )
    groups = mask.reshape(dense.shape[0], dense.shape[1] // m, m)
    most = int(groups.sum(-1).max(initial=0))
    if most > n:
        raise ValueError(
            f"mask {mask.shape} keeps {most} of a group of {m} inputs, more than {n}; prune to "
            f"{n}:{m} first"
        )
    # The kept inputs first, then others to fill up, all in their order.
    chosen = np.sort(np.argsort(~groups, axis=-1, kind="stable")[..., :n], axis=-1)
    kept = np.where(mask, dense, np.zeros((), dense.dtype)).reshape(groups.shape)
    rows = dense.shape[0], dense.shape[1] // m * n
    values = np.take_along_axis(kept, chosen, -1).reshape(rows)
    bits = (m - 1).bit_length()
    positions = _pack(chosen.reshape(rows), bits)
    return nm_stored(jnp.asarray(values), jnp.asarray(positions), n=n, m=m)


def nm_stored(
    values: jax.Array,
    positions: jax.Array,
    scales: jax.Array | None = None,
    *,
    n: int = 2,
    m: int = 4,
    group_size: int | None = None,
) -> NMSparse:
    """A weight of arrays as they are stored, checked against one another.

    Args:
      values: bf16 or f32 ``(N, K * n / m)``, or uint8 ``(N, K * n / m / 2)`` int4 codes.
      positions: uint8 ``(N, ceil(K * n / m * bits / 8))``.
      scales: bf16 or f32 ``(K / group_size, N)`` of codes, else None.
      n: values of a group.
      m: inputs of a group.
      group_size: inputs of the dense weight that share a scale; None for one group a row.

    Returns:
      The weight.

    Raises:
      TypeError: a dtype is wrong.
      ValueError: shapes do not belong together.

    Example:
      >>> import jax.numpy as jnp
      >>> codes, positions = jnp.array([[0x21]], jnp.uint8), jnp.array([[0xC]], jnp.uint8)
      >>> nm_stored(codes, positions, jnp.ones((1, 1))).shape
      (1, 4)
    """
    for name, array in (("values", values), ("positions", positions), ("scales", scales)):
        if array is not None:
            arguments.array(name, array)
    coded = values.dtype == jnp.uint8
    if not coded and values.dtype not in (jnp.bfloat16, jnp.float32):
        raise TypeError(
            f"values {values.shape} are {values.dtype}; use bfloat16, float32, or uint8 for packed "
            "int4 codes"
        )
    if positions.dtype != jnp.uint8:
        raise TypeError(f"positions {positions.shape} are {positions.dtype}; use uint8")
    if not 1 <= n <= m or m < 2:
        raise ValueError(f"{n}:{m} sparsity: n must be from 1 to m, and m at least 2")
    if values.ndim != 2:
        raise ValueError(f"values {values.shape} must be (N, K * {n} / {m})")
    kept = values.shape[1] * (2 if coded else 1)
    if kept % n:
        raise ValueError(
            f"values {values.shape} hold {kept} a row, which are not whole groups of {n} values"
        )
    size = kept // n * m
    bits = (m - 1).bit_length()
    expected = values.shape[0], -(-kept * bits // 8)
    if positions.shape != expected:
        raise ValueError(
            f"positions {positions.shape} do not belong to values {values.shape} of {n}:{m} "
            f"sparsity: {bits} bits each must be (N, bytes) = {expected}"
        )
    if not coded:
        if scales is not None or group_size is not None:
            raise ValueError(
                f"scales and group_size are for int4 codes in uint8, and values {values.shape} are "
                f"{values.dtype}: give none"
            )
        return NMSparse(values, positions, None, n, m, None, (values.shape[0], size))
    group_size = size if group_size is None else group_size
    group_size = arguments.integer("group_size", group_size, " or None")
    if group_size < 1 or size % group_size or group_size % m:
        raise ValueError(
            f"values {values.shape} have K = {size} inputs, and group_size {group_size} must "
            f"divide that and be a multiple of {m}"
        )
    expected = size // group_size, values.shape[0]
    if scales is None or scales.shape != expected:
        raise ValueError(
            f"scales {None if scales is None else scales.shape} do not belong to codes "
            f"{values.shape} in groups of {group_size} inputs: they must be (K / group_size, N) = "
            f"{expected}"
        )
    if scales.dtype not in (jnp.bfloat16, jnp.float32):
        raise TypeError(f"scales {scales.shape} are {scales.dtype}; use bfloat16 or float32")
    return NMSparse(values, positions, scales, n, m, group_size, (values.shape[0], size))


def dense(weight: NMSparse) -> jax.Array:
    """The weight in full; differentiable in values that are not codes, and in scales.

    Args:
      weight: stored or prepared.

    Returns:
      f32 ``(N, K)``.
    """
    values, positions = _grouped(weight)
    values = values.astype(jnp.float32)
    inputs = jnp.arange(weight.m)
    w = jnp.zeros((*positions.shape[:-1], weight.m), jnp.float32)
    for i in range(weight.n):
        w = jnp.where(positions[..., i, None] == inputs, values[..., i, None], w)
    w = w.reshape(weight.shape)
    if weight.scales is None:
        return w
    scales = weight.scales if weight.layout == LAYOUT else weight.scales.T
    return w * jnp.repeat(scales.astype(jnp.float32), weight.group_size, axis=1)


def prepare(weight: NMSparse) -> NMSparse:
    """Splits a stored 2:4 weight into planes, each of the first or second value of every group.

    Args:
      weight: stored, 2:4.

    Returns:
      The weight in this layout, of the same size.
    """
    values, positions = _grouped(weight)
    order = jnp.argsort(positions, axis=-1)
    positions = jnp.take_along_axis(positions, order, axis=-1)
    values = jnp.moveaxis(jnp.take_along_axis(values, order, axis=-1), -1, 0)
    if weight.scales is not None:
        values = values.astype(jnp.int4)
    code = positions[..., 0] + 4 * positions[..., 1]
    code = jnp.where(code < 8, code, code - 16).astype(jnp.int4)
    scales = None if weight.scales is None else weight.scales.astype(jnp.float32).T
    return dataclasses.replace(weight, values=values, positions=code, scales=scales, layout=LAYOUT)


def check(weight: NMSparse) -> None:
    """Refuses a weight that another version prepared, or whose arrays do not belong together.

    Args:
      weight: stored or prepared; arrays or tracers.

    Raises:
      TypeError: a dtype is wrong.
      ValueError: naming both layouts or both shapes.
    """
    if weight.layout not in ("stored", LAYOUT):
        raise ValueError(
            f"layout {weight.layout!r} of a weight {weight.shape} is not 'stored' or {LAYOUT!r}; "
            "prepare the stored weight again"
        )
    check_layers(weight)
    if weight.layout == LAYOUT:
        _check_prepared(weight)
        return
    options = {"n": weight.n, "m": weight.m, "group_size": weight.group_size}
    try:
        found = nm_stored(weight.values, weight.positions, weight.scales, **options)
    except ValueError as error:
        raise ValueError(f"{error}{arguments.in_parts(_STATIC)}") from None
    if (found.shape, found.group_size) != (weight.shape, weight.group_size):
        raise ValueError(
            f"values {weight.values.shape} of {weight.n}:{weight.m} sparsity are those of a weight "
            f"(N, K) = {found.shape} in groups of {found.group_size}, and this one says "
            f"{weight.shape} in groups of {weight.group_size}{arguments.in_parts(_STATIC)}"
        )


def _check_prepared(weight: NMSparse) -> None:
    n, k = weight.shape
    coded = weight.scales is not None
    groups = None if not coded or not weight.group_size else k // weight.group_size
    values = (jnp.int4,) if coded else (jnp.bfloat16, jnp.float32)
    for name, expected, dtypes in (
        ("values", (2, n, k // 4), values),
        ("positions", (n, k // 4), (jnp.int4,)),
        ("scales", (n, groups), (jnp.float32,)),
    ):
        array = getattr(weight, name)
        if array is None:
            continue
        if array.shape != expected:
            raise ValueError(
                f"{name} {array.shape} of a prepared 2:4 weight (N, K) = {weight.shape} in groups "
                f"of {weight.group_size} must be {expected}; prepare the stored weight again"
                f"{arguments.in_parts(_STATIC)}"
            )
        if array.dtype not in dtypes:
            names = " or ".join(jnp.dtype(dtype).name for dtype in dtypes)
            raise TypeError(f"{name} {array.shape} are {array.dtype}; they must be {names}")


def _grouped(weight: NMSparse) -> tuple[jax.Array, jax.Array]:
    """Values (int8 for codes) and positions (int32), each ``(N, K / m, n)``."""
    outputs, inputs = weight.shape
    shape = (outputs, inputs // weight.m, weight.n)
    kept = math.prod(shape[1:])
    if weight.layout == LAYOUT:
        code = weight.positions.astype(jnp.int32)
        positions = jnp.stack([code & 3, (code >> 2) & 3], axis=-1)
        values = weight.values
        if weight.scales is not None:
            values = values.astype(jnp.int8)
        return jnp.moveaxis(values, 0, -1), positions
    values = weight.values
    if weight.scales is not None:
        codes = _unpack(values, 4, kept)
        values = jnp.where(codes < 8, codes, codes - 16).astype(jnp.int8)
    positions = _unpack(weight.positions, (weight.m - 1).bit_length(), kept)
    return values.reshape(shape), positions.reshape(shape)


def _pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes of some bits each as the bytes of a row, the lowest bits first."""
    each = (codes[..., None] >> np.arange(bits)) & 1
    each = each.reshape(len(codes), codes.shape[1] * bits)
    return np.packbits(each.astype(np.uint8), axis=1, bitorder="little")


def _unpack(packed: jax.Array, bits: int, size: int) -> jax.Array:
    """Inverse of ``_pack``, int32."""
    if 8 % bits == 0:
        starts = jnp.arange(0, 8, bits, dtype=jnp.int32)
        codes = (packed[..., None].astype(jnp.int32) >> starts) & ((1 << bits) - 1)
        return codes.reshape(len(packed), packed.shape[1] * 8 // bits)[:, :size]
    each = (packed[..., None].astype(jnp.int32) >> jnp.arange(8)) & 1
    each = each.reshape(len(packed), packed.shape[1] * 8)[:, : size * bits]
    each = each.reshape(len(packed), size, bits)
    return jnp.sum(each << jnp.arange(bits), axis=-1)
