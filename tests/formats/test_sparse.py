"""N:M and unstructured sparse parts, and the other parts of sums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.errors import JaxcompError
from jaxcomp.formats import (
    NM,
    CompressedArray,
    Dense,
    DenseColumns,
    Float,
    Int,
    NMPart,
    Sparse,
    SparsePart,
    grid,
    low_rank,
    quantize,
    sparse,
)
from tests.helpers import x64


def nm_mask(w, n, m):
    blocks = np.abs(w).reshape(*w.shape[:-1], -1, m)
    order = np.argsort(np.argsort(-blocks, -1), -1)
    return (order < n).reshape(w.shape)


@pytest.mark.parametrize(
    "n, m, bits",
    # Of more than 8 positions are summed; from 128 on they do not fit into a signed byte.
    [(1, 4, 2), (2, 4, 2), (4, 8, 3), (2, 5, 3), (1, 2, 1), (3, 9, 4), (5, 127, 7), (5, 128, 7)],
)
def test_n_of_m_is_exact_and_its_bits_are_those_by_hand(n, m, bits, rng):
    w = rng.standard_normal((2, 3, 8 * m)).astype(np.float32)
    mask = nm_mask(w, n, m)
    part = sparse.build(NM(n, m), jnp.asarray(mask), jnp.asarray(w))
    assert isinstance(part, NMPart)
    np.testing.assert_array_equal(part.materialize(), np.where(mask, w, 0))
    kept = 8 * n
    assert part.nbits == 2 * 3 * (kept * 32 + -(-kept * bits // 8) * 8)
    positions = np.asarray(part.positions(), int)
    assert (np.diff(positions, axis=-1) > 0).all()


def test_blocks_that_keep_fewer(rng):
    w = rng.standard_normal((4, 32)).astype(np.float32)
    mask = nm_mask(w, 2, 4) & (rng.random(w.shape) < 0.6)
    mask[0] = False
    for values in (None, Int(4, 16, symmetric=False), Float("e4m3")):
        part = sparse.quantize(NM(2, 4, values), jnp.asarray(w + 5), jnp.asarray(mask))
        dense = np.asarray(part.materialize())
        assert (dense[~mask] == 0).all()
        np.testing.assert_allclose(dense[mask], (w + 5)[mask], rtol=0.2)


@pytest.mark.parametrize("values", [Int(4, 16), Int(3, 16, symmetric=False), Float("e2m1", 16)])
@pytest.mark.parametrize("fmt", [NM(2, 4), NM(4, 8), Sparse()], ids=str)
def test_quantized_kept_values_are_the_dense_grids(fmt, values, rng):
    """The same grid, fitted to the kept weights over dense groups, as the dense part has."""
    w = rng.standard_normal((2, 4, 32)).astype(np.float32)
    mask = nm_mask(w, fmt.n, fmt.m) if isinstance(fmt, NM) else rng.random(w.shape) < 0.4
    fmt = NM(fmt.n, fmt.m, values) if isinstance(fmt, NM) else Sparse(values)
    part = sparse.quantize(fmt, jnp.asarray(w), jnp.asarray(mask), clipping="mse")
    dense = quantize(values, jnp.asarray(w), clipping="mse", mask=jnp.asarray(mask))
    expected = np.where(mask, dense.materialize(), 0)
    np.testing.assert_array_equal(part.materialize(), expected)


def test_two_of_four_int4_by_hand(rng):
    """4-bit values and 2-bit positions of half the weights, a scale a group of dense inputs."""
    w = rng.standard_normal((8, 128)).astype(np.float32)
    mask = jnp.asarray(nm_mask(w, 2, 4))
    part = sparse.quantize(NM(2, 4, Int(4, 64, scale_dtype="bfloat16")), jnp.asarray(w), mask)
    assert part.nbits == 8 * (64 * 4 + 64 * 2 + 2 * 16)
    assert part.values.shape == (8, 64)
    assert part.values.group_size == 32
    assert part.index_bits == 2


def test_unstructured_by_hand(rng):
    w = rng.standard_normal((3, 33)).astype(np.float32)
    mask = rng.random((3, 33)) < 0.3
    kept = int(mask.sum())
    part = sparse.build(Sparse(), jnp.asarray(mask), jnp.asarray(w, jnp.bfloat16))
    assert part.kept == kept
    assert part.nbits == 3 * 5 * 8 + kept * 16
    expected = jnp.where(mask, jnp.asarray(w, jnp.bfloat16), 0).astype(jnp.float32)
    np.testing.assert_array_equal(part.materialize(), expected)
    part = sparse.quantize(Sparse(Int(3)), jnp.asarray(w), jnp.asarray(mask))
    assert part.nbits == 3 * 5 * 8 + -(-kept * 3 // 8) * 8 + 3 * 32
    np.testing.assert_array_equal(part.kept_mask(), mask)


def test_stacks_that_keep_different_counts(rng):
    w = rng.standard_normal((3, 4, 16)).astype(np.float32)
    mask = rng.random(w.shape) < np.array([0.1, 0.9, 0.5])[:, None, None]
    mask[0] = False
    for values in (None, Int(8, full_range=False)):
        part = sparse.quantize(Sparse(values), jnp.asarray(w), jnp.asarray(mask))
        assert part.kept == mask.sum((1, 2)).max()
        np.testing.assert_allclose(part.materialize(), np.where(mask, w, 0), atol=0.03)
        for i in range(3):
            alone = sparse.quantize(Sparse(values), jnp.asarray(w[i]), jnp.asarray(mask[i]))
            wide = alone.padded(part.kept)
            assert wide.kept == part.kept
            assert wide.values.shape == part.values.shape[1:]
            np.testing.assert_array_equal(wide.materialize(), alone.materialize())
            np.testing.assert_array_equal(wide.materialize(), part.materialize()[i])


def test_sparse_with_activation_order(rng):
    w = rng.standard_normal((4, 32)).astype(np.float32)
    mask = rng.random(w.shape) < 0.5
    fmt = Int(4, 8)
    order = rng.permutation(32)
    index = jnp.asarray(np.argsort(order) // 8)
    qparams = grid.fit(fmt, jnp.asarray(w[:, order]))
    q = grid.expand(fmt, qparams, 4, 32)
    codes = grid.encode(fmt, jnp.asarray(w[:, order]), q)[:, np.argsort(order)]
    whole = grid.build(fmt, codes, qparams, group_index=index)
    part = sparse.build(
        Sparse(fmt), jnp.asarray(mask), codes=codes, qparams=qparams, group_index=index
    )
    np.testing.assert_array_equal(part.materialize(), np.where(mask, whole.materialize(), 0))
    with pytest.raises(JaxcompError, match="static_groups"):
        sparse.build(
            NM(2, 4, fmt),
            jnp.asarray(nm_mask(w, 2, 4)),
            codes=codes,
            qparams=qparams,
            group_index=index,
        )


def test_pattern_takes_the_cheapest_that_fits(rng):
    w = rng.standard_normal((2, 4, 32)).astype(np.float32)
    assert sparse.pattern(nm_mask(w, 1, 4)) == NM(1, 4)
    assert sparse.pattern(nm_mask(w, 2, 4)) == NM(2, 4)
    assert sparse.pattern(nm_mask(w, 4, 8), Int(4)) == NM(4, 8, Int(4))
    crowded = nm_mask(w, 2, 4)
    crowded[0, 0, :8] = True
    assert sparse.pattern(crowded) == Sparse()
    assert sparse.pattern(nm_mask(w[..., :30], 1, 2)) == Sparse()


def test_errors_of_sparse_parts(rng):
    w = jnp.asarray(rng.standard_normal((2, 16)), jnp.float32)
    full = jnp.ones((2, 16), bool)
    with pytest.raises(JaxcompError, match=r"mlp/kernel \(2, 16\): a block of 4 inputs keeps 4"):
        sparse.build(NM(2, 4), full, w, path="mlp/kernel")
    with pytest.raises(JaxcompError, match="pass w"):
        sparse.build(Sparse(), full)
    with pytest.raises(JaxcompError, match="pass codes and qparams"):
        sparse.build(Sparse(Int(4)), full, w)
    with pytest.raises(JaxcompError, match="pass kept"):
        jax.jit(lambda m: sparse.build(Sparse(), m, w))(full)
    part = jax.jit(lambda m: sparse.build(Sparse(), m, w, kept=32))(full)
    np.testing.assert_array_equal(part.materialize(), w)


def test_nothing_kept():
    none = jnp.zeros((2, 16), bool)
    part = sparse.build(Sparse(), none, jnp.ones((2, 16)))
    assert isinstance(part, SparsePart)
    assert part.kept == 0
    np.testing.assert_array_equal(part.materialize(), 0)


def test_low_rank_is_the_truncated_svd(rng):
    """The residual is the sum of the dropped squared singular values; full rank gives W back."""
    w = rng.standard_normal((2, 6, 9))
    with x64():
        for rank in (1, 4, 6):
            part = low_rank(jnp.asarray(w), rank)
            off = np.asarray(part.materialize(jnp.float64)) - w
            dropped = np.linalg.svd(w, compute_uv=False)[:, rank:]
            np.testing.assert_allclose((off**2).sum((1, 2)), (dropped**2).sum(-1), atol=1e-12)
            assert part.shape == w.shape
            assert part.nbits == 2 * rank * (6 + 9) * 64


def test_outlier_columns_and_sums(rng):
    """LLM.int8's split: quantized rest plus dense columns is exact on the columns."""
    w = rng.standard_normal((3, 4, 16)).astype(np.float32)
    at = np.array([[1, 4], [0, 15], [7, 16]])  # 16 is an unused place
    columns = np.take_along_axis(w, np.minimum(at, 15)[:, None, :], -1)
    part = DenseColumns(jnp.asarray(columns), jnp.asarray(at), in_size=16)
    dense = np.asarray(part.materialize())
    expected = np.zeros_like(w)
    for i in range(3):
        for k in at[i]:
            if k < 16:
                expected[i, :, k] = w[i, :, k]
    np.testing.assert_array_equal(dense, expected)
    rest = Dense(jnp.asarray(w - expected))
    leaf = CompressedArray.from_matrix((rest, part), w.shape, np.float32, (0,), (1,), (2,))
    np.testing.assert_array_equal(leaf.materialize(), w)
    assert leaf.nbits == w.size * 32 + 3 * (4 * 2 * 32 + 2 * 32)


@pytest.mark.parametrize("shape", [(3, 5), (2, 7, 1001), (1, 40_000)])
def test_values_find_their_places_at_any_size(shape, rng):
    w = rng.standard_normal(shape).astype(np.float32)
    mask = rng.random(shape) < 0.4
    part = sparse.build(Sparse(), jnp.asarray(mask), jnp.asarray(w))
    np.testing.assert_array_equal(part.materialize(), np.where(mask, w, 0))
