"""N:M sparse products and their gradients against float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jaxcomp.kernels import chips
from jaxcomp.kernels.implementations import Unsupported
from jaxcomp.kernels.sparse_matmul import (
    layer_of,
    nm_matmul,
    nm_sparse,
    nm_stored,
    prepare_nm,
    tpu_nm,
)
from jaxcomp.kernels.sparse_matmul.reference import Options

from tests.fuzz import fuzz
from tests.kernels.sparse_matmul import cases


class TestXla:
    """Every implementation passes these; a subclass names its own and its shapes."""

    implementation = "xla"
    interpret: object = False
    shape = (11, 64)
    group_sizes = (4, 16, 64)
    dtypes = ("float32", "bfloat16", "bfloat16")  # of x, by group size

    def run(self, *args, **options):
        options = {"implementation": self.implementation, "interpret": self.interpret} | options
        return nm_matmul(*args, **options)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_dtypes(self, rng, dtype):
        w, dense = cases.nm(rng, self.shape, dtype=dtype)
        x = cases.rows(rng, (5, self.shape[1]), dtype)
        y = self.run(x, w)
        assert y.dtype == dtype
        cases.assert_close(y, cases.product(x, dense), dtype)

    @pytest.mark.parametrize("which", range(3))
    def test_int4_values(self, rng, which):
        w, dense = cases.nm(rng, self.shape, dtype="int4", group_size=self.group_sizes[which])
        dtype = self.dtypes[which]
        x = cases.rows(rng, (5, self.shape[1]), dtype)
        y = self.run(x, w, out_dtype=jnp.float32)
        assert y.dtype == jnp.float32
        cases.assert_close(y, cases.product(x, dense), dtype)

    def test_prepared_with_bias_and_activation(self, rng):
        w, dense = cases.nm(rng, self.shape)
        prepared = prepare_nm(w, chip="v5e")
        x = cases.rows(rng, (2, 3, self.shape[1]), "float32") / 10
        bias = jnp.asarray(rng.normal(size=self.shape[0]), jnp.float32)
        y = self.run(x, prepared, bias, "gelu")
        cases.assert_close(y, cases.product(x, dense, bias, "gelu"), "float32")

    @pytest.mark.parametrize("prepared", [False, True])
    def test_gradients(self, rng, prepared):
        w, dense = cases.nm(rng, self.shape)
        x = cases.rows(rng, (3, self.shape[1]), "float32") / 10
        bias = jnp.asarray(rng.normal(size=self.shape[0]), jnp.float32)
        weights = jnp.asarray(rng.normal(size=(3, self.shape[0])), jnp.float32)
        mask = dense != 0
        if prepared:
            w = prepare_nm(w, chip="v5e")

        def plain(x, w, bias):
            y = jax.nn.silu(jnp.dot(x, w.T, precision="highest") + bias)
            return jnp.sum(y * weights)

        def sparse(x, w, bias):
            return jnp.sum(self.run(x, w, bias, "silu") * weights)

        want = jax.grad(plain, (0, 1, 2))(x, jnp.asarray(dense, jnp.float32), bias)
        got = jax.grad(sparse, (0, 1, 2), allow_int=True)(x, w, bias)
        cases.assert_close(got[0], cases.double(want[0]), "float32")
        expected = nm_sparse(want[1], mask)
        if prepared:
            expected = prepare_nm(expected, chip="v5e")
        expected = cases.double(expected.values)
        np.testing.assert_allclose(got[1].values, expected, atol=2e-6 * np.abs(expected).max())
        cases.assert_close(got[2], cases.double(want[2]), "float32")

    def test_gradient_of_scales(self, rng):
        group_size = self.group_sizes[-1]
        w, dense = cases.nm(rng, self.shape, dtype="int4", group_size=group_size)
        x = cases.rows(rng, (3, self.shape[1]), "float32")
        dy = cases.rows(rng, (3, self.shape[0]), "float32")
        dx, dw = jax.vjp(self.run, x, w)[1](dy)
        cases.assert_close(dx, cases.double(dy) @ dense, "float32")
        scales = np.repeat(cases.double(w.scales).T, group_size, axis=1)
        each = (cases.double(dy).T @ cases.double(x)) * (dense / scales)
        want = each.reshape(self.shape[0], -1, group_size).sum(-1).T
        cases.assert_close(dw.scales, want, "float32")


class TestInterpretedTpu(TestXla):
    """The TPU kernel, interpreted, with the detection of races."""

    implementation = "mosaic_tpu"
    interpret = cases.INTERPRET
    shape = (72, 1024)
    group_sizes = (128, 32, 1024)

    def test_many_tiles(self, rng):
        w, dense = cases.nm(rng, (1100, 512))
        x = cases.rows(rng, (300, 512), "float32")
        cases.assert_close(self.run(x, w), cases.product(x, dense), "float32")

    @pytest.mark.parametrize("options", [{}, {"dtype": "int4", "group_size": 64}])
    def test_one_of_several_layers(self, rng, options):
        """Where few rows meet weights as they are written out, and where they do not."""
        each = [cases.nm(rng, self.shape, **options) for _ in range(3)]
        whole = jax.tree.map(lambda *a: jnp.stack(a), *(prepare_nm(w, "v5e") for w, _ in each))
        x = cases.rows(rng, (5, self.shape[1]), "float32")
        y = jax.jit(lambda i: self.run(x, layer_of(whole, i)))(1)
        cases.assert_close(y, cases.product(x, each[1][1]), "float32")

    def test_codes_in_float8(self, rng):
        w, dense = cases.nm(rng, (72, 1024), dtype="int4", group_size=256)
        x = cases.rows(rng, (5, 1024), "bfloat16")
        options = Options(None, "float32")
        y = tpu_nm.matmul(x, w, None, options, chips.BY_NAME["7x"], self.interpret)
        cases.assert_close(y, cases.product(x, dense), "bfloat16")

    @pytest.mark.parametrize(
        ("chip", "rows", "outputs", "dtype", "values"),
        [
            ("v6e", 70, 200, "bfloat16", {"dtype": "bfloat16"}),
            ("7x", 5, 72, "float32", {"dtype": "int4", "group_size": 256}),
        ],
    )
    def test_sums_wait_in_memory(self, rng, chip, rows, outputs, dtype, values):
        """Of four slabs of inputs: 7x adds up three at a time."""
        w, dense = cases.nm(rng, (outputs, 2048), **values)
        x = cases.rows(rng, (rows, 2048), dtype)
        options = Options(None, "float32")
        y = tpu_nm.matmul(x, w, None, options, chips.BY_NAME[chip], self.interpret)
        cases.assert_close(y, cases.product(x, dense), dtype)

    def test_what_does_not_fit_is_told(self, rng):
        def reason(words, *args, **options):
            w, _ = cases.nm(rng, *args, **options)
            with pytest.raises(Unsupported, match=words):
                self.run(jnp.ones((2, w.shape[1])), w)

        reason("it takes 2:4 sparsity, not 1:4", (8, 512), 1, 4)
        reason("the 256 inputs are not a multiple of 512", (8, 256))
        reason("groups of 96 inputs: a quarter", (8, 1536), dtype="int4", group_size=96)
        w, _ = cases.nm(rng, (8, 512))
        with pytest.raises(Unsupported, match="the chip is cpu, not a TPU"):
            self.run(jnp.ones((2, 512)), w, interpret=False)


@fuzz(6)
@given(
    st.integers(1, 4),
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from([(1, 2), (2, 4), (3, 4), (2, 5), (2, 8), (4, 4), (5, 16)]),
)
def test_any_sparsity(rows, outputs, groups, ratio):
    rng = np.random.default_rng(rows * outputs)
    w, dense = cases.nm(rng, (outputs, groups * ratio[1]), *ratio)
    x = cases.rows(rng, (rows, w.shape[1]), "float32")
    cases.assert_close(nm_matmul(x, w), cases.product(x, dense), "float32")
    again = nm_sparse(jnp.asarray(dense, jnp.float32), dense != 0, *ratio)
    np.testing.assert_array_equal(again.values, w.values)
    np.testing.assert_array_equal(again.positions, w.positions)


# Outputs enough that a row's largest is not one of its sums that cancel.
@fuzz(2)
@given(
    st.integers(1, 40),
    st.integers(32, 300),
    st.integers(1, 2),
    st.sampled_from([("float32", None), ("bfloat16", None), ("int4", 128), ("int4", 64)]),
)
def test_any_shape_interpreted(rows, outputs, inputs, values):
    rng = np.random.default_rng(rows)
    w, dense = cases.nm(rng, (outputs, 512 * inputs), dtype=values[0], group_size=values[1])
    dtype = "float32" if values[0] == "float32" else "bfloat16"
    x = cases.rows(rng, (rows, w.shape[1]), dtype)
    y = nm_matmul(x, w, implementation="mosaic_tpu", interpret=cases.INTERPRET)
    cases.assert_close(y, cases.product(x, dense), dtype)


def test_groups_with_fewer_values():
    w = nm_sparse(jnp.array([[0.0, 0.0, 0.0, 5.0, 0.0, 0.0, 0.0, 0.0]]))
    assert nm_matmul(jnp.ones((1, 8)), w).tolist() == [[5.0]]
    assert w.values.tolist() == [[0.0, 5.0, 0.0, 0.0]]


def test_preparing_keeps_the_bytes(rng):
    for dtype, group_size in (("bfloat16", None), ("int4", 128)):
        w, _ = cases.nm(rng, (16, 512), dtype=dtype, group_size=group_size)
        prepared = prepare_nm(w, chip="v6e")

        def bits(w):
            width = {"int4": 4, "uint8": 8, "bfloat16": 16}
            return sum(a.size * width[a.dtype.name] for a in (w.values, w.positions))

        assert bits(prepared) == bits(w)
        assert prepare_nm(prepared, chip="v6e") is prepared


class TestErrors:
    values = jnp.ones((8, 32))
    positions = jnp.zeros((8, 8), jnp.uint8)

    @pytest.mark.parametrize(
        ("change", "error", "words"),
        [
            ({"positions": positions[:, 1:]}, ValueError, ["(8, 7)", "(8, 32)", "(8, 8)"]),
            ({"positions": jnp.zeros((8, 8), jnp.int8)}, TypeError, ["(8, 8)", "int8", "uint8"]),
            ({"values": jnp.ones((8, 32), jnp.float16)}, TypeError, ["(8, 32)", "float16"]),
            ({"values": jnp.ones((8, 31))}, ValueError, ["(8, 31)", "groups of 2"]),
            ({"n": 5}, ValueError, ["5:4"]),
            ({"scales": jnp.ones((1, 8))}, ValueError, ["(8, 32)", "float32", "give none"]),
            ({"values": jnp.zeros((8, 16), jnp.uint8)}, ValueError, ["None", "(8, 16)", "(1, 8)"]),
            (
                {"values": jnp.zeros((8, 16), jnp.uint8), "group_size": 24},
                ValueError,
                ["(8, 16)", "K = 64", "24"],
            ),
            (
                {"values": jnp.zeros((8, 16), jnp.uint8), "scales": jnp.ones((3, 8)),
                 "group_size": 32},
                ValueError,
                ["(3, 8)", "(8, 16)", "(2, 8)"],
            ),
        ],
    )  # fmt: skip
    def test_stored(self, change, error, words):
        with pytest.raises(error) as caught:
            nm_stored(**{"values": self.values, "positions": self.positions, **change})
        for word in words:
            assert word in str(caught.value)

    def test_masks(self):
        with pytest.raises(ValueError, match=r"mask \(1, 4\) keeps 3 of a group of 4"):
            nm_sparse(jnp.array([[1.0, 2.0, 3.0, 0.0]]))
        with pytest.raises(ValueError, match=r"w \(1, 6\) does not consist of groups of 4"):
            nm_sparse(jnp.ones((1, 6)))
        with pytest.raises(ValueError, match=r"w \(1, 4\) must be .* mask \(4,\)"):
            nm_sparse(jnp.ones((1, 4)), jnp.ones((4,)))

    @pytest.mark.parametrize(
        ("change", "error", "words"),
        [
            ({"x": jnp.ones((3, 63))}, ValueError, ["(3, 63)", "(8, 64)"]),
            ({"out_dtype": "int8"}, TypeError, ["out_dtype is int8"]),
            ({"w": jnp.ones((8, 64))}, TypeError, ["an array (8, 64)", "nm_sparse(w)"]),
            ({"x": jnp.ones((3, 64), jnp.int32)}, TypeError, ["(3, 64)", "int32"]),
            ({"bias": jnp.ones((3,))}, ValueError, ["(3,)", "(8,)"]),
            ({"activation": "tanh"}, ValueError, ["tanh", "silu"]),
            ({"implementation": "cuda"}, ValueError, ["cuda", "xla"]),
        ],
    )
    def test_products(self, change, error, words):
        w = nm_stored(self.values, self.positions)
        with pytest.raises(error) as caught:
            nm_matmul(**{"x": jnp.ones((3, 64)), "w": w, **change})
        for word in words:
            assert word in str(caught.value)

    @pytest.mark.parametrize("chip", ["cpu", "v5e"])
    @pytest.mark.parametrize(
        ("change", "error", "words"),
        [
            ({"values": jnp.ones((4, 256))}, ValueError, ["(4, 256)", "(8, "]),
            ({"positions": jnp.zeros((4, 8), jnp.uint8)}, ValueError, ["positions (4, 8)", "(8, "]),
            ({"shape": (8, 256)}, ValueError, ["values (", "(8, 256)"]),
            ({"values": None}, TypeError, ["float16"]),
        ],
    )
    def test_arrays_that_do_not_belong_together(self, chip, change, error, words):
        w = prepare_nm(nm_stored(jnp.ones((8, 256)), jnp.zeros((8, 64), jnp.uint8)), chip=chip)
        if change.get("values", 0) is None:
            change = {"values": w.values.astype(jnp.float16)}
        with pytest.raises(error) as caught:
            nm_matmul(jnp.ones((2, 512)), dataclasses.replace(w, **change))
        for word in words:
            assert word in str(caught.value)

    def test_unknown_chips(self):
        with pytest.raises(ValueError, match="chip 'v4' is unknown; use one of v5e"):
            prepare_nm(nm_stored(self.values, self.positions), chip="v4")
