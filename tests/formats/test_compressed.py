"""Compressed arrays in place of arrays: layouts, slicing, Flax layers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxcomp.errors import JaxcompError
from jaxcomp.formats import (
    CompressedArray,
    Dense,
    Int,
    is_compressed,
    materialize,
    nbits,
    quantize,
    to_matrix,
)


def compressed(w, stack_axes=(), out_axes=(1,), in_axes=(0,), fmt=None):
    """A leaf through its matrix: exact (Dense) without a format."""
    matrix = to_matrix(w, stack_axes, out_axes, in_axes)
    part = Dense(matrix) if fmt is None else quantize(fmt, matrix)
    return CompressedArray.from_matrix(part, w.shape, w.dtype, stack_axes, out_axes, in_axes)


LAYOUTS = [
    ((6, 4), (), (1,), (0,)),
    ((4, 6), (), (0,), (1,)),
    ((3, 6, 4), (0,), (2,), (1,)),
    ((6, 3, 4), (1,), (2,), (0,)),
    ((6, 2, 5), (), (1, 2), (0,)),
    ((6, 2, 5), (), (2, 1), (0,)),
    ((2, 5, 6), (), (2,), (0, 1)),
    ((3, 2, 6, 4), (0, 1), (3,), (2,)),
    ((2, 6, 3, 4), (2, 0), (3,), (1,)),
    ((3, 3, 5, 7), (), (3,), (0, 1, 2)),
    ((6, 2, 3), (0, 2), (1,), ()),
]


@pytest.mark.parametrize("shape, stack, out, into", LAYOUTS, ids=str)
def test_layouts_round_trip(shape, stack, out, into):
    w = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    matrix = to_matrix(w, stack, out, into)
    assert isinstance(matrix, np.ndarray)
    expected = w.transpose(*stack, *out, *into).reshape(matrix.shape)
    np.testing.assert_array_equal(matrix, expected)
    leaf = compressed(jnp.asarray(w), stack, out, into)
    assert leaf.shape == shape
    assert leaf.ndim == len(shape)
    assert leaf.size == w.size
    np.testing.assert_array_equal(leaf.materialize(), w)
    np.testing.assert_array_equal(leaf.matrix(), matrix)
    np.testing.assert_array_equal(np.asarray(leaf), w)
    np.testing.assert_array_equal(jnp.asarray(leaf), w)


@pytest.mark.parametrize("shape, stack, out, into", [c for c in LAYOUTS if c[1]], ids=str)
def test_slicing_takes_the_first_stack_axis_away(shape, stack, out, into):
    w = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    leaf = compressed(jnp.asarray(w), stack, out, into)
    for i in range(2):
        one = jax.tree.map(lambda a, i=i: a[i], leaf)
        expected = np.take(w, i, axis=stack[0])
        assert one.shape == expected.shape
        np.testing.assert_array_equal(one.materialize(), expected)
    if stack[0] == 0:
        assert is_compressed(leaf[1])
        np.testing.assert_array_equal(leaf[1].materialize(), w[1])
        np.testing.assert_array_equal(leaf[-1].materialize(), w[-1])
        assert len(list(leaf)) == len(leaf) == shape[0]
        with pytest.raises(IndexError):
            leaf[shape[0]]
    more = jax.tree.map(lambda a: jnp.stack([a, a]), leaf)
    assert more.shape == (2, *shape)
    np.testing.assert_array_equal(more.materialize()[1], w)
    scanned = jax.lax.scan(lambda c, x: (c, x.materialize()), 0, leaf)[1]
    np.testing.assert_array_equal(scanned, np.moveaxis(w, stack[0], 0))
    mapped = jax.vmap(lambda x: x.materialize())(leaf)
    np.testing.assert_array_equal(mapped, np.moveaxis(w, stack[0], 0))


def test_other_indices_are_those_of_the_dense_leaf():
    w = jnp.arange(24.0).reshape(2, 3, 4)
    leaf = compressed(w, (0,), (2,), (1,))
    assert leaf[...] is leaf
    assert leaf[:] is leaf
    np.testing.assert_array_equal(leaf[1, 2], w[1, 2])
    np.testing.assert_array_equal(leaf[:, 1], w[:, 1])
    flat = compressed(w[0])
    np.testing.assert_array_equal(flat[1], w[0, 1])


def test_sums_are_in_float32_and_returned_in_the_leafs_dtype():
    big, small = jnp.full((2, 4), 256.0), jnp.full((2, 4), 0.75)
    leaf = CompressedArray.from_matrix(
        [Dense(big), Dense(small), Dense(small)], (2, 4), jnp.bfloat16
    )
    assert leaf.dtype == jnp.bfloat16
    assert leaf.materialize().dtype == jnp.bfloat16
    # 257.5 rounds to 258 once; adding in bfloat16 would have stayed at 256.
    np.testing.assert_array_equal(leaf.materialize().astype(jnp.float32), 258.0)
    assert leaf.astype(jnp.float32).materialize().dtype == jnp.float32
    np.testing.assert_array_equal(leaf.astype(jnp.float32).materialize(), 257.5)
    assert "Dense + Dense + Dense" in repr(leaf)


def test_it_multiplies_like_an_array(rng):
    w = jnp.asarray(rng.standard_normal((8, 4)), jnp.float32)
    x = jnp.asarray(rng.standard_normal((3, 8)), jnp.float32)
    leaf = compressed(w, fmt=Int(4))
    expected = np.asarray(x @ leaf.materialize())
    np.testing.assert_allclose(x @ leaf, expected, rtol=1e-6)
    np.testing.assert_allclose(jnp.dot(x, leaf), expected, rtol=1e-6)
    np.testing.assert_allclose(
        jax.jit(lambda a, b: jnp.einsum("ab,bc->ac", a, b))(x, leaf), expected, rtol=1e-5
    )
    np.testing.assert_allclose(leaf.T @ x.T, expected.T, rtol=1e-5)
    np.testing.assert_allclose(leaf @ jnp.eye(4), leaf.materialize(), rtol=1e-6)


def test_trees():
    w = jnp.ones((8, 4), jnp.bfloat16)
    tree = {"a": compressed(w, fmt=Int(4)), "b": [w, jnp.zeros(3, jnp.int4)], "c": None}
    dense = materialize(tree)
    assert jax.tree.structure(dense) == jax.tree.structure({"a": 0, "b": [0, 0], "c": None})
    assert dense["a"].dtype == jnp.bfloat16
    # int4 kernel: 32 codes and 4 float32 scales; 32 bfloat16; 3 int4.
    assert nbits(tree) == (32 * 4 + 4 * 32) + 32 * 16 + 3 * 4
    assert nbits(jax.eval_shape(lambda: tree)) == nbits(tree)
    assert nbits({"host": np.zeros((2, 3), np.float64)}) == 6 * 64
    assert not is_compressed(w)


def test_errors():
    w = jnp.ones((8, 4))
    with pytest.raises(JaxcompError, match="each of its 2 axes once"):
        to_matrix(w, (), (1,), (1,))
    with pytest.raises(JaxcompError, match="each of its 2 axes once"):
        CompressedArray.from_matrix(Dense(w), (8, 4), jnp.float32, (), (0, 1), (1,))
    with pytest.raises(JaxcompError, match=r"its matrix is \(4, 8\), but a part of type Dense"):
        CompressedArray.from_matrix(Dense(w), (8, 4), jnp.float32, (), (1,), (0,))
    with pytest.raises(JaxcompError, match="at least one part"):
        CompressedArray.from_matrix((), (8, 4), jnp.float32)


@pytest.fixture
def x(rng):
    return jnp.asarray(rng.standard_normal((3, 64)), jnp.float32)


def assert_sums_agree(got, want, x, w):
    """Within the rounding of a float32 sum in any order: n eps of the sum of the magnitudes.

    A tolerance relative to the sum itself would not hold where its terms cancel.
    """
    bound = x.shape[-1] * np.finfo(np.float32).eps * (np.abs(x) @ np.abs(w))
    assert (np.abs(got - want) <= bound).all()


def test_an_unmodified_nnx_layer(x):
    """``nnx.Param`` holds it as a subtree: split, merge and jit see its arrays."""
    layer = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
    leaf = compressed(layer.kernel[...], fmt=Int(4, 32))
    dense = leaf.materialize()
    expected = x @ dense + layer.bias[...]
    layer.kernel = nnx.Param(leaf)
    assert_sums_agree(layer(x), expected, x, dense)
    assert_sums_agree(nnx.jit(lambda m, x: m(x))(layer, x), expected, x, dense)
    graph, state = nnx.split(layer)
    again = jax.jit(lambda s, x: nnx.merge(graph, s)(x))(state, x)
    assert_sums_agree(again, expected, x, dense)
    assert nbits(state) == leaf.nbits + 8 * 32


def test_an_unmodified_linen_layer(x):
    layer = nn.Dense(8)
    variables = layer.init(jax.random.key(0), x)
    leaf = compressed(variables["params"]["kernel"], fmt=Int(4, 32))
    params = {**variables["params"], "kernel": leaf}
    dense = leaf.materialize()
    assert_sums_agree(layer.apply({"params": params}, x), x @ dense, x, dense)
    again = jax.jit(lambda p, x: layer.apply({"params": p}, x))(params, x)
    assert_sums_agree(again, x @ dense, x, dense)


def test_unmodified_linen_scan_over_layers(rng):
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.Dense(16, use_bias=False, name="dense")(x), None

    scanned = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()
    x = jnp.asarray(rng.standard_normal((2, 16)), jnp.float32)
    params = scanned.init(jax.random.key(0), x, None)["params"]
    leaf = compressed(params["dense"]["kernel"], (0,), (2,), (1,), Int(4))
    out, _ = scanned.apply({"params": {"dense": {"kernel": leaf}}}, x, None)
    expected = x
    for i in range(3):
        expected = expected @ leaf.materialize()[i]
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


def test_an_unmodified_nnx_layer_with_several_out_axes(rng):
    layer = nnx.LinearGeneral(16, (2, 4), rngs=nnx.Rngs(0))
    leaf = compressed(layer.kernel[...], (), (1, 2), (0,), Int(8, full_range=False))
    x = jnp.asarray(rng.standard_normal((3, 16)), jnp.float32)
    expected = jnp.einsum("bi,ihd->bhd", x, leaf.materialize()) + layer.bias[...][None]
    layer.kernel = nnx.Param(leaf)
    np.testing.assert_allclose(layer(x), expected, rtol=1e-5, atol=1e-6)
