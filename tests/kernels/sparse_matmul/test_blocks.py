"""Block-sparse products and their gradients against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jaxcomp.kernels.implementations import Unsupported
from jaxcomp.kernels.sparse_matmul import (
    BlockSparse,
    block_list,
    block_sparse,
    block_sparse_matmul,
    layer_of,
    tpu,
    tpu_many,
)

from tests.fuzz import fuzz
from tests.kernels.sparse_matmul import cases

MASK = [[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 1, 0]]


class TestXla:
    """Every implementation passes these; a subclass names its own and its blocks."""

    implementation = "xla"
    interpret: object = False
    block = (8, 12)
    activations = ("relu", "silu", "gelu")

    def run(self, *args, **options):
        options = {"implementation": self.implementation, "interpret": self.interpret} | options
        return block_sparse_matmul(*args, **options)

    def case(self, rng, mask=MASK, dtype="float32", cut=3):
        """A weight whose last blocks are cut off: its sizes divide nothing."""
        sizes = zip(np.shape(mask), self.block, strict=True)
        shape = tuple(count * size - cut for count, size in sizes)
        return cases.blocks(rng, shape, self.block, mask, dtype)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_dtypes(self, rng, dtype):
        w, dense = self.case(rng, dtype=dtype)
        x = cases.rows(rng, (5, w.shape[1]), dtype)
        y = self.run(x, w)
        assert y.dtype == dtype
        cases.assert_close(y, cases.product(x, dense), dtype)
        assert not np.asarray(y, np.float32)[:, self.block[0] : 2 * self.block[0]].any()

    def test_bias_reaches_rows_without_blocks(self, rng):
        w, dense = self.case(rng)
        x = cases.rows(rng, (2, 3, w.shape[1]), "float32") / 10
        bias = jnp.asarray(rng.normal(size=w.shape[0]), jnp.float32)
        for activation in self.activations:
            y = self.run(x, w, bias, activation=activation)
            cases.assert_close(y, cases.product(x, dense, bias, activation), "float32")

    def test_int8_values(self, rng):
        w, dense = self.case(rng, dtype="int8", cut=0)
        x = cases.rows(rng, (5, w.shape[1]), "float32")
        cases.assert_close(self.run(x, w), cases.product(x, dense), "float32")
        x = x.astype(jnp.bfloat16)
        y = self.run(x, w, out_dtype=jnp.float32)
        assert y.dtype == jnp.float32
        cases.assert_close(y, cases.product(x, dense), "bfloat16")

    @pytest.mark.parametrize("mask", [[[1]], [[0, 0, 1]], [[0], [1], [0]]])
    def test_one_block(self, rng, mask):
        w, dense = self.case(rng, mask)
        x = cases.rows(rng, (1, w.shape[1]), "float32")
        cases.assert_close(self.run(x, w), cases.product(x, dense), "float32")

    def test_gradients(self, rng):
        w, dense = self.case(rng)
        x = cases.rows(rng, (5, w.shape[1]), "float32") / 10
        bias = jnp.asarray(rng.normal(size=w.shape[0]), jnp.float32)
        weights = jnp.asarray(rng.normal(size=(5, w.shape[0])), jnp.float32)

        def plain(x, w, bias):
            y = jax.nn.silu(jnp.dot(x, w.T, precision="highest") + bias)
            return jnp.sum(y * weights)

        def sparse(x, w, bias):
            return jnp.sum(self.run(x, w, bias, "silu") * weights)

        want = jax.grad(plain, (0, 1, 2))(x, jnp.asarray(dense, jnp.float32), bias)
        got = jax.grad(sparse, (0, 1, 2), allow_int=True)(x, w, bias)
        mask = np.zeros(w.grid, bool)
        mask[np.asarray(w.rows), np.asarray(w.columns)] = True
        cases.assert_close(got[0], cases.double(want[0]), "float32")
        expected = cases.double(block_sparse(want[1], mask, self.block).values)
        np.testing.assert_allclose(got[1].values, expected, atol=2e-6 * np.abs(expected).max())
        cases.assert_close(got[2], cases.double(want[2]), "float32")

    def test_gradients_of_int8_values(self, rng):
        w, dense = self.case(rng, dtype="int8", cut=0)
        x = cases.rows(rng, (3, w.shape[1]), "float32")
        dy = cases.rows(rng, (3, w.shape[0]), "float32")
        pullback = jax.vjp(self.run, x, w)[1]
        dx, dw = pullback(dy)
        cases.assert_close(dx, cases.double(dy) @ dense, "float32")
        tiles = (cases.double(dy).T @ cases.double(x)).reshape(
            w.grid[0], self.block[0], w.grid[1], self.block[1]
        )
        each = tiles[np.asarray(w.rows), :, np.asarray(w.columns)] * cases.double(w.values)
        cases.assert_close(dw.scales, each.sum(-1), "float32")

    def test_bfloat16_gradients(self, rng):
        w, dense = self.case(rng, dtype="bfloat16")
        x = cases.rows(rng, (5, w.shape[1]), "bfloat16")
        dy = cases.rows(rng, (5, w.shape[0]), "bfloat16")
        dx, dw = jax.vjp(self.run, x, w)[1](dy)
        assert (dx.dtype, dw.values.dtype) == (jnp.bfloat16, jnp.bfloat16)
        cases.assert_close(dx, cases.double(dy) @ dense, "bfloat16")


class TestInterpretedTpu(TestXla):
    """The TPU kernels, interpreted, with the detection of races."""

    implementation = "mosaic_tpu"
    interpret = cases.INTERPRET
    block = (128, 128)
    activations = ("gelu",)

    def test_many_copies(self, rng, monkeypatch):
        # Two blocks a copy, of five, and gradients to two at a time.
        monkeypatch.setattr(tpu, "_COPY", 2 * 4 * 128 * 256)
        monkeypatch.setattr(tpu, "_SUMS", 2 * 4 * 128 * 256)
        self.block = (128, 256)
        w, dense = self.case(rng)
        self.check_gradients(rng, w, dense, MASK, 100)

    def test_many_rows(self, rng, monkeypatch):
        # Two tiles, each in two chunks, two blocks at a time, and slots for no more than four.
        monkeypatch.setattr(tpu_many, "_TALLEST", 160)
        monkeypatch.setattr(tpu_many, "_CHUNK", 48)
        monkeypatch.setattr(tpu_many, "_TOGETHER", 2)
        monkeypatch.setattr(tpu_many, "_RING", 1)
        mask = [[1, 1, 1, 1], [0, 0, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0]]
        w, dense = self.case(rng, mask)
        self.check_gradients(rng, w, dense, mask, 140)
        w, dense = self.case(rng, mask, dtype="int8", cut=0)
        x = cases.rows(rng, (140, w.shape[1]), "bfloat16")
        bias = jnp.asarray(100 * rng.normal(size=w.shape[0]), jnp.float32)
        y, pullback = jax.vjp(lambda x: self.run(x, w, bias, "relu"), x)
        cases.assert_close(y, cases.product(x, dense, bias, "relu"), "bfloat16")
        dz = cases.double(x) * (cases.double(y) > 0)
        cases.assert_close(pullback(x)[0], dz @ dense, "bfloat16")
        # Blocks of f32 that are split in code of its own.
        monkeypatch.setattr(tpu_many, "_APART", ("v5e",))
        self.block = (128, 256)
        w, dense = self.case(rng, mask)
        x = cases.rows(rng, (140, w.shape[1]), "float32")
        cases.assert_close(self.run(x, w), cases.product(x, dense), "float32")

    def check_gradients(self, rng, w, dense, mask, rows):
        x = cases.rows(rng, (rows, w.shape[1]), "float32")
        dy = cases.rows(rng, (rows, w.shape[0]), "float32")
        y, pullback = jax.vjp(self.run, x, w)
        cases.assert_close(y, cases.product(x, dense), "float32")
        dx, dw = pullback(dy)
        cases.assert_close(dx, cases.double(dy) @ dense, "float32")
        got = block_sparse(
            jnp.asarray(cases.double(dy).T @ cases.double(x), jnp.float32), mask, self.block
        )
        np.testing.assert_allclose(
            dw.values, got.values, atol=2e-6 * np.abs(np.asarray(got.values)).max()
        )

    @pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
    def test_large_blocks(self, rng, dtype):
        # Of which some outputs, inputs and, for the gradient to values, rows are taken at a time.
        self.block = (384, 384)
        w, dense = self.case(rng, [[1]], dtype=dtype, cut=0)
        x = cases.rows(rng, (256, w.shape[1]), "bfloat16")
        dy = cases.rows(rng, (256, w.shape[0]), "bfloat16")
        y, pullback = jax.vjp(self.run, x, w)
        cases.assert_close(y, cases.product(x, dense), "bfloat16")
        dx, dw = pullback(dy)
        cases.assert_close(dx, cases.double(dy) @ dense, "bfloat16")
        if dtype == "bfloat16":
            cases.assert_close(dw.values[0], cases.double(dy).T @ cases.double(x), "bfloat16")

    @pytest.mark.parametrize(("rows", "dtype"), [(5, "int8"), (144, "float32"), (144, "int8")])
    def test_one_of_several_layers(self, rng, rows, dtype):
        masks = [[1, 1, 0], [0, 1, 0]], [[0, 1, 1], [1, 0, 0]]
        each = [cases.blocks(rng, (256, 384), (128, 128), mask, dtype) for mask in masks]
        whole = jax.tree.map(lambda *a: jnp.stack(a), *(w for w, _ in each))
        x = cases.rows(rng, (rows, 384), "float32")
        y = jax.jit(lambda i: self.run(x, layer_of(whole, i)))(1)
        cases.assert_close(y, cases.product(x, each[1][1]), "float32")

    def test_what_does_not_fit_is_told(self, rng):
        w, _ = cases.blocks(rng, (16, 24), (8, 12), [[1, 0], [0, 1]])
        with pytest.raises(Unsupported, match=r"blocks of \(8, 12\) are not multiples of 128"):
            self.run(jnp.ones((2, 24)), w)
        with pytest.raises(Unsupported, match="the chip is cpu, not a TPU"):
            self.run(jnp.ones((2, 24)), w, interpret=False)
        w = block_sparse(jnp.ones((128, 128)), np.zeros((1, 1)))
        with pytest.raises(Unsupported, match="not 0"):
            self.run(jnp.ones((2, 128)), w)


@fuzz(6)
@given(
    st.integers(1, 5),
    st.tuples(st.integers(1, 20), st.integers(1, 20)),
    st.tuples(st.integers(1, 7), st.integers(1, 7)),
    st.floats(0, 1),
)
def test_any_shape(rows, shape, block, density):
    rng = np.random.default_rng(rows)
    grid = [-(-size // b) for size, b in zip(shape, block, strict=True)]
    w, dense = cases.blocks(rng, shape, block, rng.random(grid) < density)
    x = cases.rows(rng, (rows, shape[1]), "float32")
    cases.assert_close(block_sparse_matmul(x, w), cases.product(x, dense), "float32")


@fuzz(2)
@given(
    st.integers(1, 300),
    st.tuples(st.integers(1, 400), st.integers(1, 400)),
    st.floats(0, 1),
    st.sampled_from(["float32", "bfloat16"]),
)
def test_any_shape_interpreted(rows, shape, density, dtype):
    rng = np.random.default_rng(rows)
    mask = rng.random([-(-size // 128) for size in shape]) < density
    mask[0, 0] = True  # The kernel refuses none.
    w, dense = cases.blocks(rng, shape, (128, 128), mask, dtype)
    x = cases.rows(rng, (rows, shape[1]), dtype)
    options = {"implementation": "mosaic_tpu", "interpret": cases.INTERPRET}
    cases.assert_close(block_sparse_matmul(x, w, **options), cases.product(x, dense), dtype)


class TestErrors:
    values = jnp.ones((3, 4, 6))
    rows, columns = np.array([0, 0, 2]), np.array([0, 1, 1])

    @pytest.mark.parametrize(
        ("change", "error", "words"),
        [
            ({"rows": np.array([0, 2, 0])}, ValueError, ["sorted", "(2, 1)", "before", "(0, 1)"]),
            ({"columns": np.array([1, 1, 0])}, ValueError, ["(0, 1) is listed twice", "lexsort"]),
            ({"columns": np.array([0, 2, 1])}, ValueError, ["0 to 2", "(12, 12)", "0 to 1"]),
            ({"rows": np.array([0, 0])}, ValueError, ["(2,)", "(3,)", "(3, 4, 6)"]),
            ({"rows": np.array([0.0, 0.0, 1.0])}, TypeError, ["(3,)", "float64", "int32"]),
            ({"values": jnp.ones((4, 6))}, ValueError, ["(4, 6)", "(blocks, bn, bk)"]),
            ({"values": values.astype(jnp.float16)}, TypeError, ["(3, 4, 6)", "float16"]),
            ({"values": values.astype(jnp.int8)}, ValueError, ["(3, 4, 6)", "int8", "scales"]),
            ({"scales": jnp.ones((3, 4))}, ValueError, ["(3, 4)", "float32", "int8"]),
            (
                {"values": values.astype(jnp.int8), "scales": jnp.ones((3, 6))},
                ValueError,
                ["(3, 6)", "(3, 4)", "(3, 4, 6)"],
            ),
        ],
    )
    def test_lists(self, change, error, words):
        arguments = {"values": self.values, "rows": self.rows, "columns": self.columns}
        with pytest.raises(error) as caught:
            block_list(**{**arguments, "shape": (12, 12), **change})
        for word in words:
            assert word in str(caught.value)

    @pytest.mark.parametrize(
        ("w", "mask", "block", "error", "words"),
        [
            (jnp.ones((4, 6)), np.ones((3, 2)), None, ValueError, ["(3, 2)", "(4, 6)", "block="]),
            (jnp.ones((4, 6)), np.ones((2, 2)), (2, 2), ValueError, ["(2, 2)", "(2, 3)", "(4, 6)"]),
            (jnp.ones((4,)), np.ones((2, 2)), None, ValueError, ["(4,)", "(2, 2)"]),
            (jnp.ones((4, 6), jnp.int32), np.ones((2, 2)), None, TypeError, ["(4, 6)", "int32"]),
        ],
    )
    def test_masks(self, w, mask, block, error, words):
        with pytest.raises(error) as caught:
            block_sparse(w, mask, block)
        for word in words:
            assert word in str(caught.value)

    @pytest.mark.parametrize(
        ("change", "error", "words"),
        [
            ({"x": jnp.ones((3, 11))}, ValueError, ["(3, 11)", "(12, 12)"]),
            ({"x": jnp.ones((3, 12), jnp.int32)}, TypeError, ["(3, 12)", "int32"]),
            ({"bias": jnp.ones((11,))}, ValueError, ["(11,)", "(12,)"]),
            ({"activation": "tanh"}, ValueError, ["tanh", "silu"]),
            ({"implementation": "cuda"}, ValueError, ["cuda", "xla"]),
            ({"out_dtype": "int8"}, TypeError, ["out_dtype is int8"]),
            ({"w": jnp.ones((12, 12))}, TypeError, ["an array (12, 12)", "block_sparse(w, mask)"]),
        ],
    )
    def test_products(self, change, error, words):
        w = block_list(self.values, self.rows, self.columns, (12, 12))
        with pytest.raises(error) as caught:
            block_sparse_matmul(**{"x": jnp.ones((3, 12)), "w": w, **change})
        for word in words:
            assert word in str(caught.value)

    def test_a_weight_made_by_hand_is_checked(self):
        lists = jnp.zeros((2,), jnp.int32), jnp.zeros((3,), jnp.int32)
        with pytest.raises(ValueError, match=r"rows \(2,\) must be \(blocks,\) = \(3,\)"):
            block_sparse_matmul(jnp.ones((3, 12)), BlockSparse(self.values, *lists, None, (12, 12)))
        lists = [jnp.zeros((3,), jnp.int32)] * 2
        with pytest.raises(ValueError, match=r"3 blocks, .* \(4, 6\) that has \(1, 1\) blocks"):
            block_sparse_matmul(jnp.ones((3, 6)), BlockSparse(self.values, *lists, None, (4, 6)))


def test_the_weight_is_a_pytree(rng):
    w, dense = cases.blocks(rng, (8, 12), (4, 6), [[1, 0], [1, 1]])
    x = cases.rows(rng, (3, 12), "float32")
    y = jax.jit(functools.partial(block_sparse_matmul, activation="relu"))(x, w)
    cases.assert_close(y, cases.product(x, dense, activation="relu"), "float32")
