import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jaxcomp.kernels.quantized_matmul import (
    grouped_quantized_matmul,
    layer_of,
    prepare,
    quantized_matmul,
)

from tests.fuzz import fuzz
from tests.kernels.quantized_matmul import cases

FORMATS = tuple(cases.BITS)


class TestXla:
    """Every implementation passes these; a subclass names its own and its shapes."""

    implementation = "xla"
    interpret: object = False
    # (M, N, K, group size): nothing divides a tile.
    shape = (5, 72, 192, 32)
    one_group = (3, 40, 96, 96)

    def run(self, x, case, **options):
        call = functools.partial(
            quantized_matmul,
            **case.options,
            **options,
            implementation=self.implementation,
            interpret=self.interpret,
        )
        return call(x, *case.arguments())

    def case(self, rng, format, shape=None, **options):
        _, n, k, group_size = shape or self.shape
        return cases.make(rng, format, (n, k), group_size, **options)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("format", FORMATS)
    def test_formats(self, rng, format, dtype):
        case = self.case(rng, format, zeros=dtype == "bfloat16", scale_dtype=dtype)
        x = cases.rows(rng, (self.shape[0], self.shape[2]), dtype)
        y = self.run(x, case)
        assert y.dtype == dtype
        cases.assert_close(y, cases.product(x, case), dtype)

    @pytest.mark.parametrize("activation", [None, "relu", "silu", "gelu"])
    def test_bias_and_activation(self, rng, activation):
        case = self.case(rng, "int4", zeros=True)
        x = cases.rows(rng, (self.shape[0], self.shape[2]), "float32") / 30
        bias = jnp.asarray(rng.normal(size=self.shape[1]), jnp.float32)
        y = self.run(x, case, bias=bias, activation=activation)
        cases.assert_close(y, cases.product(x, case, bias, activation), "float32")

    def test_one_group_a_row_and_leading_axes(self, rng):
        case = self.case(rng, "int4", self.one_group)
        case.options["group_size"] = None
        m, _, k, _ = self.one_group
        x = cases.rows(rng, (2, m, k), "float32")
        cases.assert_close(self.run(x, case), cases.product(x, case), "float32")
        y = self.run(x[0, 0].astype(jnp.bfloat16), case, out_dtype=jnp.float32)
        assert y.dtype == jnp.float32
        cases.assert_close(y, cases.product(x[0, :1].astype(jnp.bfloat16), case)[0], "bfloat16")

    @pytest.mark.parametrize(
        ("format", "dtype"),
        [
            ("int8", "int8"),
            ("int4", "int8"),
            ("int2", "int8"),
            ("int4", "float8_e4m3fn"),
            ("fp8", "float8_e4m3fn"),
        ],
    )
    def test_quantized_activations(self, rng, format, dtype):
        case = self.case(rng, format, zeros=format == "int4")
        x = cases.rows(rng, (self.shape[0], self.shape[2]), "float32").at[0].set(0.0)
        y = self.run(x, case, activation_dtype=dtype)
        # The product is exact in the quantized rows.
        expected = cases.product(cases.quantized_rows(x, dtype), case)
        cases.assert_close(y, expected, "float32")

    def test_given_scales_of_rows(self, rng):
        case = self.case(rng, "int4", zeros=True)
        x = cases.rows(rng, (self.shape[0], self.shape[2]), "bfloat16")
        each = jnp.asarray(rng.uniform(0.01, 0.1, (self.shape[0], 1)), jnp.float32)
        for scale in (each, each[0, 0]):  # One for all rows, too; both cut the outliers off.
            y = self.run(x, case, activation_dtype="int8", x_scales=scale, out_dtype=jnp.float32)
            codes = np.asarray(x, np.float32) / np.asarray(scale)
            assert np.abs(codes).max() > 128
            rounded = np.clip(np.round(codes), -127, 127).astype(np.float64) * np.asarray(scale)
            cases.assert_close(y, cases.product(rounded, case), "float32")

    @pytest.mark.parametrize("activation_dtype", [None, "int8"])
    def test_rows_that_are_not_finite(self, rng, activation_dtype):
        case = self.case(rng, "int4")
        x = cases.rows(rng, (3, self.shape[2]), "float32")
        x = x.at[0, 5].set(jnp.nan).at[2, 7].set(jnp.inf)
        y = self.run(x, case, activation_dtype=activation_dtype)
        assert not np.any(np.isfinite(y[0])) and not np.any(np.isfinite(y[2]))
        assert np.all(np.isfinite(y[1]))

    @pytest.mark.parametrize("format", ["int4", "codebook"])
    def test_gradients(self, rng, format):
        case = self.case(rng, format, zeros=True)
        x = cases.rows(rng, (self.shape[0], self.shape[2]), "float32") / 30
        bias = jnp.asarray(rng.normal(size=self.shape[1]), jnp.float32)
        weights = jnp.asarray(rng.normal(size=(self.shape[0], self.shape[1])), jnp.float32)
        table = case.options.get("table")
        codes = np.asarray(case.codes)
        unsigned = np.stack([codes & 15, codes >> 4], axis=-1).reshape(codes.shape[0], -1)

        def dense(x, scales, zeros, bias, table):
            value = (
                table[unsigned]
                if table is not None
                else jnp.asarray(cases.value_of(unsigned, format, np.array(cases.NF4)), jnp.float32)
            )
            spread = functools.partial(jnp.repeat, repeats=self.shape[3], axis=1)
            w = spread(scales.T) * (value - spread(zeros.T))
            y = jax.nn.silu(jnp.dot(x, w.T, precision="highest") + bias)
            return jnp.sum(y * weights)

        def quantized(x, scales, zeros, bias, table):
            options = {**case.options, "table": table}
            y = quantized_matmul(
                x, case.codes, scales, zeros, **options, bias=bias, activation="silu",
                implementation=self.implementation, interpret=self.interpret,
            )  # fmt: skip
            return jnp.sum(y * weights)

        arguments = (x, case.scales, case.zeros, bias, table)
        which = (0, 1, 2, 3) if table is None else (0, 1, 2, 3, 4)
        expected = jax.grad(dense, which)(*arguments)
        actual = jax.grad(quantized, which)(*arguments)
        for ours, theirs in zip(actual, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-4 * np.abs(theirs).max())

    def test_stack(self, rng):
        case = self.case(rng, "int4", zeros=True, stack=(2,))
        x = cases.rows(rng, (2, self.shape[0], self.shape[2]), "float32")
        cases.assert_close(self.run(x, case), cases.product(x, case), "float32")

    @pytest.mark.parametrize("rows", [5, 80])
    def test_one_of_several_layers(self, rng, rows):
        """As its slice, to the bit; scales of the others have no gradient."""
        case = self.case(rng, "int4", zeros=True, stack=(3,), scale_dtype="bfloat16")
        x = cases.rows(rng, (rows, self.shape[2]), "bfloat16")
        weight = prepare(*case.arguments(), **case.options, chip="v5e")
        run = functools.partial(
            quantized_matmul, x, implementation=self.implementation, interpret=self.interpret
        )

        def loss(scales, of, index):
            y = run(of(dataclasses.replace(weight, scales=scales), index))
            return jnp.sum(y.astype(jnp.float32)), y

        def copied(weight, index):
            return weight.map(lambda a: a[index])

        both = [
            jax.jit(jax.value_and_grad(functools.partial(loss, of=of), has_aux=True))(
                case.scales, index=jnp.int32(1)
            )
            for of in (layer_of, copied)
        ]
        ((_, y), gradient), ((_, expected), of_slice) = both
        np.testing.assert_array_equal(y, expected)
        np.testing.assert_array_equal(gradient, of_slice)
        assert np.any(gradient[1]) and not np.any(gradient[jnp.array([0, 2])])
        cases.assert_close(y, np.asarray(x, np.float64) @ case.dense[1].T, "bfloat16")

    @pytest.mark.parametrize("format", ["int4", "fp8"])
    def test_prepared(self, rng, format):
        case = self.case(rng, format, zeros=True)
        x = cases.rows(rng, (self.shape[0], self.shape[2]), "float32")
        weight = prepare(*case.arguments(), **case.options, chip="v5e")

        def loss(weight):
            y = quantized_matmul(
                x, weight, implementation=self.implementation, interpret=self.interpret
            )
            return jnp.sum(y), y

        grads, y = jax.grad(loss, has_aux=True, allow_int=True)(weight)
        cases.assert_close(y, cases.product(x, case), "float32")
        assert grads.scales.shape == case.scales.shape


@pytest.mark.parametrize("x_scales", [None, 0.02])
def test_gradients_of_quantized_rows(rng, x_scales):
    """Scales and zeros meet rows as they were quantized; what given scales clip has no gradient."""
    case = cases.make(rng, "int4", (8, 64), 32, zeros=True)
    x = cases.rows(rng, (5, 64), "float32")
    dy = rng.normal(size=(5, 8))

    def loss(x, scales, zeros):
        y = quantized_matmul(
            x, case.codes, scales, zeros, activation_dtype="int8", x_scales=x_scales, **case.options
        )
        return jnp.sum(y * dy.astype(np.float32))

    dx, dscales, dzeros = jax.grad(loss, (0, 1, 2))(x, case.scales, case.zeros)
    rounded, clipped = cases.quantized_rows(x, "int8"), np.zeros(x.shape, bool)
    if x_scales is not None:
        codes = np.asarray(x) / np.float32(x_scales)
        rounded, clipped = np.round(codes).clip(-127, 127) * x_scales, np.abs(codes) > 127
        assert 0 < clipped.sum() < x.size / 2
    np.testing.assert_allclose(dx, np.where(clipped, 0, dy @ case.dense), rtol=2e-4, atol=2e-3)

    def by_group(dw):
        return dw.reshape(8, 2, 32).sum(-1).T

    scales = np.repeat(np.asarray(case.scales, np.float64).T, 32, 1)
    each = case.dense / scales
    np.testing.assert_allclose(dscales, by_group(dy.T @ rounded * each), rtol=2e-4, atol=2e-3)
    np.testing.assert_allclose(dzeros, by_group(-dy.T @ rounded * scales), rtol=2e-4, atol=2e-3)


class TestGrouped:
    def test_gradients_of_quantized_rows(self, rng):
        """Of one expert those of ``quantized_matmul``."""
        case = cases.make(rng, "int4", (8, 64), 32, stack=(1,))
        x = cases.rows(rng, (5, 64), "float32")

        def loss(scales, product, *arguments):
            y = product(*arguments, scales, activation_dtype="int8", **case.options)
            return jnp.sum(jnp.sin(y))

        ours = jax.grad(loss)(case.scales, grouped_quantized_matmul, x, jnp.array([5]), case.codes)
        alone = jax.grad(loss)(case.scales[0], quantized_matmul, x, case.codes[0])
        np.testing.assert_allclose(ours[0], alone, rtol=1e-4, atol=1e-4 * np.abs(alone).max())

    def test_gradients_reach_each_expert(self, rng):
        case = cases.make(rng, "int4", (8, 32), 32, stack=(2,))
        x = cases.rows(rng, (5, 32), "float32")

        def loss(x, scales, activation_dtype=None):
            y = grouped_quantized_matmul(
                x, jnp.array([2, 2]), case.codes, scales, activation_dtype=activation_dtype,
                **case.options,
            )  # fmt: skip
            return jnp.sum(y)

        dx, dscales = jax.grad(loss, (0, 1))(x, case.scales)
        expected = np.repeat(case.dense.sum(1), 2, axis=0)
        np.testing.assert_allclose(dx[:4], expected, rtol=1e-4, atol=1e-4)
        assert not np.any(dx[4])
        assert np.all(np.any(dscales, axis=-1))
        # Quantized rows pass gradients on as they are.
        np.testing.assert_allclose(jax.grad(loss)(x, case.scales, "int8"), dx, rtol=1e-6)


@fuzz(8)
@given(
    st.sampled_from(FORMATS),
    st.integers(1, 9),
    st.integers(1, 40),
    st.integers(1, 4),
    st.sampled_from([32, 40, 64]),
)
def test_any_shape(format, m, n, groups, group_size):
    rng = np.random.default_rng(m * n * groups)
    case = cases.make(rng, format, (n, groups * group_size), group_size)
    x = cases.rows(rng, (m, groups * group_size), "float32")
    y = quantized_matmul(x, *case.arguments(), **case.options)
    cases.assert_close(y, cases.product(x, case), "float32")


@pytest.mark.parametrize(("dtype", "kept"), [("int8", "bfloat16"), ("int16", "float32")])
def test_whole_zero_points_stay_exact(dtype, kept):
    zeros = jnp.asarray([[np.iinfo(dtype).min, np.iinfo(dtype).max]], dtype)
    weight = prepare(jnp.zeros((2, 128), jnp.uint8), jnp.ones((1, 2)), zeros, format="int8")
    assert weight.zeros.dtype == kept
    np.testing.assert_array_equal(weight.zeros, zeros)


class TestErrors:
    codes = jnp.zeros((8, 32), jnp.uint8)
    scales = jnp.ones((2, 8))
    x = jnp.ones((3, 64))

    @pytest.mark.parametrize(
        ("change", "error", "words"),
        [
            (
                {"codes": jnp.zeros((8, 32), jnp.int8)},
                TypeError,
                ["(8, 32)", "int8", "uint8", "astype(int4).reshape(.., 2)"],
            ),
            ({"scales": jnp.ones((2, 8), jnp.float16)}, TypeError, ["(2, 8)", "float16"]),
            ({"x": jnp.ones((3, 64), jnp.int32)}, TypeError, ["(3, 64)", "int32"]),
            ({"scales": jnp.ones((3, 8))}, ValueError, ["(3, 8)", "(8, 32)", "(2, 8)"]),
            ({"zeros": jnp.ones((2, 9))}, ValueError, ["(2, 9)", "(2, 8)"]),
            ({"group_size": 48}, ValueError, ["48", "64", "(8, 32)"]),
            ({"x": jnp.ones((3, 63))}, ValueError, ["(3, 63)", "(8, 64)"]),
            ({"bias": jnp.ones((3,))}, ValueError, ["(3,)", "(8,)"]),
            ({"format": "int5"}, ValueError, ["int5", "int4"]),
            ({"format": "nf4"}, ValueError, ["nf4", "'codebook'"]),
            ({"group_size": 32.0}, TypeError, ["group_size is 32.0"]),
            ({"group_size": True}, TypeError, ["group_size is True"]),
            ({"scales": [[1.0] * 8] * 2}, TypeError, ["scales is a list", "jnp.asarray"]),
            ({"bias": [1.0] * 8}, TypeError, ["bias is a list"]),
            ({"x_scales": [0.1, 0.1], "activation_dtype": "int8"}, ValueError, ["(2,)", "(3, 1)"]),
            ({"activation_dtype": "int9"}, TypeError, ["activation_dtype 'int9'"]),
            ({"out_dtype": "int8"}, TypeError, ["out_dtype is int8"]),
            ({"activation": "tanh"}, ValueError, ["tanh", "silu"]),
            ({"activation_dtype": "int4"}, ValueError, ["int4", "int8"]),
            ({"x_scales": jnp.ones(())}, ValueError, ["()", "activation_dtype"]),
            (
                {"x_scales": jnp.ones((7, 1)), "activation_dtype": "int8"},
                ValueError,
                ["(7, 1)", "(3, 1)", "(3, 64)"],
            ),
            ({"implementation": "cuda"}, ValueError, ["cuda", "xla"]),
            ({"table": jnp.ones((16,))}, ValueError, ["codebook"]),
        ],
    )
    def test_names_what_is_wrong(self, change, error, words):
        arguments = {"x": self.x, "codes": self.codes, "scales": self.scales, "group_size": 32}
        with pytest.raises(error) as caught:
            quantized_matmul(**{**arguments, **change})
        for word in words:
            assert word in str(caught.value)

    def test_numbers_of_any_kind_are_taken(self):
        run = functools.partial(
            quantized_matmul, self.x, self.codes, self.scales, activation_dtype="int8"
        )
        want = run(group_size=32, x_scales=jnp.ones((3, 1)))
        for x_scales in (1, [[1.0]] * 3, np.float64(1)):
            got = run(group_size=np.int64(32), x_scales=x_scales)
            np.testing.assert_array_equal(got, want)

    @pytest.mark.parametrize("chip", ["cpu", "v5e", "h100"])
    @pytest.mark.parametrize(
        ("change", "error", "words"),
        [
            ({"scales": jnp.ones((1, 8))}, ValueError, ["scales (1, 8)", "(8, 1024)", "(2, 8)"]),
            ({"codes": jnp.zeros((4, 512), jnp.uint8)}, ValueError, ["codes (4, 512)", "(8, "]),
            ({"zeros": jnp.ones((2, 4))}, ValueError, ["zeros (2, 4)", "(2, 8)"]),
            ({"scales": jnp.ones((2, 8), jnp.float16)}, TypeError, ["float16"]),
            ({"codes": None}, TypeError, ["codes (8, ", "float32", "must be "]),
            ({"table": jnp.ones(16)}, ValueError, ["table (16,)", "codebook"]),
            ({"group_size": 96}, ValueError, ["96", "(8, 1024)"]),
            ({"layout": "mosaic_tpu/0"}, ValueError, ["'mosaic_tpu/0'", "prepare it again"]),
        ],
    )
    def test_arrays_of_a_weight_that_do_not_belong_together(self, chip, change, error, words):
        weight = prepare(
            jnp.zeros((8, 512), jnp.uint8), jnp.ones((2, 8)), group_size=512, chip=chip
        )
        if change.get("codes", 0) is None:
            change = {"codes": weight.codes.astype(jnp.float32)}
        with pytest.raises(error) as caught:
            quantized_matmul(jnp.ones((3, 1024)), dataclasses.replace(weight, **change))
        for word in words:
            assert word in str(caught.value)

    def test_what_contradicts_a_weight(self):
        weight = prepare(self.codes, self.scales, group_size=32)
        for name, other in (("format", "int8"), ("group_size", 16)):
            with pytest.raises(ValueError, match=f"{name} {other!r} is given with a weight"):
                quantized_matmul(self.x, weight, **{name: other})
        want = quantized_matmul(self.x, weight)
        np.testing.assert_array_equal(
            quantized_matmul(self.x, weight, format="int4", group_size=32), want
        )

    def test_layers_that_there_are_not(self):
        weight = prepare(self.codes[None], self.scales[None], group_size=32)
        with pytest.raises(ValueError, match=r"index is 1, and .* are of 1 layers: .* 0 to 0"):
            layer_of(weight, 1)

    def test_a_part_of_a_weight_in_a_shard_map(self):
        """Its shape is that of the whole: the error says what to do, and that works."""
        weight = prepare(self.codes, self.scales, group_size=32)
        spec = jax.sharding.PartitionSpec
        split = dataclasses.replace(weight, codes=spec("x"), scales=spec(None, "x"))
        mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

        def run(body):
            options = {"mesh": mesh, "in_specs": (spec(), split), "out_specs": spec(None, "x")}
            return jax.shard_map(body, **options)(self.x, weight)

        with pytest.raises(ValueError, match=r"inside a jax.shard_map .* dataclasses.replace"):
            run(quantized_matmul)
        got = run(lambda x, w: quantized_matmul(x, dataclasses.replace(w, shape=(2, 64))))
        np.testing.assert_array_equal(got, quantized_matmul(self.x, weight))
