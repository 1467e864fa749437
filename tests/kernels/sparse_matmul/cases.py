"""Random sparse weights, and what float64 NumPy makes of them."""

import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu
from jaxcomp.kernels.sparse_matmul import BlockSparse, NMSparse, block_list, block_sparse, nm_stored

# Largest error over the largest expected number of a row, by the dtype that factors and results are
# rounded to.
TOLERANCE = {"float32": 2e-6, "bfloat16": 1e-2}
INTERPRET = pltpu.InterpretParams(detect_races=True)


def rows(rng, shape: tuple[int, ...], dtype: str):
    """Rows of very different sizes."""
    x = rng.normal(size=shape) * np.exp(rng.normal(size=(*shape[:-1], 1)))
    return jnp.asarray(x, dtype)


def double(x) -> np.ndarray:
    return np.asarray(jnp.asarray(x, jnp.float32), np.float64)


def blocks(
    rng, shape: tuple[int, int], block: tuple[int, int], mask, dtype: str = "float32"
) -> tuple[BlockSparse, np.ndarray]:
    """A weight with the blocks of a mask, and the dense one in float64."""
    mask = np.asarray(mask, bool)
    where = np.kron(mask, np.ones(block))[: shape[0], : shape[1]]
    if dtype != "int8":
        w = jnp.asarray(rng.normal(size=shape), dtype)
        return block_sparse(w, mask, block), double(w) * where
    at = np.nonzero(mask)
    count = len(at[0])
    codes = rng.integers(-127, 128, (count, *block)).astype(np.int8)
    scales = rng.uniform(0.5, 1.5, (count, block[0])).astype(np.float32)
    tiles = np.zeros((*mask.shape, *block))
    tiles[at] = codes.astype(np.float64) * scales[..., None]
    dense = tiles.swapaxes(1, 2).reshape(shape)
    return block_list(jnp.asarray(codes), *at, shape, jnp.asarray(scales)), dense


def nm(
    rng,
    shape: tuple[int, int],
    n: int = 2,
    m: int = 4,
    dtype: str = "float32",
    group_size: int | None = None,
) -> tuple[NMSparse, np.ndarray]:
    """A stored weight, packed here bit by bit, and the dense one in float64."""
    outputs, inputs = shape
    groups = (outputs, inputs // m)
    positions = np.sort(np.argsort(rng.random((*groups, m)), axis=-1)[..., :n], axis=-1)
    bits = (m - 1).bit_length()
    scales, spread = None, 1.0
    if dtype == "int4":
        codes = rng.integers(-8, 8, (*groups, n))
        values, kept = jnp.asarray(pack(codes.reshape(outputs, -1) & 15, 4)), codes.astype(float)
        scales = rng.uniform(0.5, 1.5, (inputs // group_size, outputs)).astype(np.float32)
        spread = np.repeat(scales.T.astype(np.float64), group_size, axis=1)
    else:
        values = jnp.asarray(rng.normal(size=(*groups, n)).reshape(outputs, -1), dtype)
        kept = double(values).reshape(*groups, n)
    dense = np.zeros((*groups, m))
    np.put_along_axis(dense, positions, kept, -1)
    weight = nm_stored(
        values,
        jnp.asarray(pack(positions.reshape(outputs, -1), bits)),
        None if scales is None else jnp.asarray(scales),
        n=n,
        m=m,
        group_size=group_size,
    )
    return weight, dense.reshape(shape) * spread


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Each row as one number whose lowest bits are the first code."""
    out = []
    for row in codes.tolist():
        number = sum(code << (bits * i) for i, code in enumerate(row))
        out.append(list(number.to_bytes(-(-len(row) * bits // 8), "little")))
    return np.array(out, np.uint8)


def activate(z: np.ndarray, name: str | None) -> np.ndarray:
    if name == "relu":
        return np.maximum(z, 0.0)
    if name == "silu":
        return z / (1.0 + np.exp(-z))
    if name == "gelu":
        return 0.5 * z * (1.0 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))
    return z


def product(x, dense: np.ndarray, bias=None, activation: str | None = None) -> np.ndarray:
    """The answer in float64."""
    y = double(x) @ dense.T
    return activate(y if bias is None else y + double(bias), activation)


def assert_close(actual, expected: np.ndarray, dtype: str) -> None:
    """Each row within the tolerance of its own largest entry."""
    actual = double(actual)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    size = np.abs(expected).max(-1, keepdims=True, initial=0.0) + 1e-30
    worst = (np.abs(actual - expected) / size).max(initial=0.0)
    assert worst <= TOLERANCE[dtype], f"error {worst:.2e}, tolerance {TOLERANCE[dtype]:.0e}"
