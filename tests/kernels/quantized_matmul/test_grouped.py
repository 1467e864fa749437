"""Products with experts' quantized weights: XLA, and the TPU kernel interpreted and compiled."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from jaxcomp.kernels import chips
from jaxcomp.kernels.quantized_matmul import (
    grouped_quantized_matmul,
    layer_of,
    prepare,
    tpu_grouped,
)

from tests.fuzz import fuzz
from tests.kernels import aot
from tests.kernels.quantized_matmul import cases

INTERPRET = pltpu.InterpretParams(detect_races=True)


def product(x, sizes, case, bias=None, activation=None) -> np.ndarray:
    """The answer in float64; zeros in the rows of no expert."""
    y, start = np.zeros((x.shape[0], case.dense.shape[1])), 0
    for expert, size in enumerate(sizes):
        own = np.asarray(x[start : start + size], np.float64) @ case.dense[expert].T
        if bias is not None:
            own = own + np.asarray(bias[expert], np.float64)
        y[start : start + size] = cases.activate(own, activation)
        start += size
    return y


class TestXla:
    """Every implementation passes these."""

    implementation = "xla"
    interpret: object = False
    shape = (72, 192, 32)  # N, K, group size
    widest = "float32"  # of x
    prepared_for = "v5e"
    many = (70, 0, 100, 330), 800  # rows of experts, and of all

    def run(self, x, sizes, case, **options):
        call = functools.partial(
            grouped_quantized_matmul,
            **case.options,
            **options,
            implementation=self.implementation,
            interpret=self.interpret,
        )
        return call(x, jnp.array(sizes), *case.arguments())

    def case(self, rng, format, experts, **options):
        n, k, group_size = self.shape
        return cases.make(rng, format, (n, k), group_size, stack=(experts,), **options)

    @pytest.mark.parametrize("format", list(cases.BITS))
    def test_formats(self, rng, format):
        """bf16 rows and zero points, or f32 rows without."""
        sizes = (3, 0, 12)
        dtype = "bfloat16" if format in ("codebook", "int2") else self.widest
        case = self.case(rng, format, 3, zeros=format == "int4", scale_dtype=dtype)
        x = cases.rows(rng, (20, self.shape[1]), dtype)
        y = self.run(x, sizes, case)
        assert y.dtype == dtype
        cases.assert_close(y, product(x, sizes, case), dtype)

    @pytest.mark.parametrize("by_channel", [False, True])
    def test_many_rows(self, rng, by_channel):
        """More rows than a tile has, for most experts; the last tiles are no one's."""
        sizes, rows = self.many
        n, k, group_size = self.shape
        group_size = k if by_channel else group_size
        case = cases.make(rng, "int4", (n, k), group_size, zeros=not by_channel, stack=(4,))
        x = cases.rows(rng, (rows, self.shape[1]), "bfloat16")
        bias = jnp.asarray(rng.normal(size=(4, self.shape[0])), jnp.float32)
        y = self.run(x, sizes, case, bias=bias, out_dtype=jnp.float32)
        cases.assert_close(y, product(x, sizes, case, bias), "bfloat16")

    @pytest.mark.parametrize("sizes", [(3, 0, 7), (80, 150)])
    def test_one_of_several_layers(self, rng, sizes):
        """As its slice, to the bit."""
        n, k, group_size = self.shape
        case = cases.make(rng, "int4", (n, k), group_size, stack=(2, len(sizes)))
        x = cases.rows(rng, (sum(sizes), k), "bfloat16")
        weight = prepare(*case.arguments(), **case.options, chip=self.prepared_for)
        run = functools.partial(
            grouped_quantized_matmul, x, jnp.array(sizes),
            implementation=self.implementation, interpret=self.interpret,
        )  # fmt: skip
        y = jax.jit(lambda index: run(layer_of(weight, index)))(1)
        np.testing.assert_array_equal(y, run(weight.map(lambda a: a[1])))
        own = dataclasses.replace(case, dense=case.dense[1])
        cases.assert_close(y, product(x, sizes, own), "bfloat16")

    def test_rows_do_not_see_each_other(self, rng):
        """Of other experts, of no expert, and of the same one."""
        sizes = (2, 3)
        case = self.case(rng, "int4", 2)
        x = cases.rows(rng, (7, self.shape[1]), self.widest)
        spoiled = x.at[1].set(jnp.nan).at[5].set(jnp.inf)
        y = np.asarray(self.run(spoiled, sizes, case))
        assert not np.any(np.isfinite(y[1]))
        rest = [0, 2, 3, 4, 5, 6]
        cases.assert_close(y[rest], product(x, sizes, case)[rest], self.widest)

    def test_no_rows_for_anyone(self, rng):
        case = self.case(rng, "int4", 2)
        x = cases.rows(rng, (5, self.shape[1]), self.widest)
        assert not np.any(self.run(x, (0, 0), case, bias=jnp.ones((2, self.shape[0]))))
        assert self.run(x[:0], (0, 0), case).shape == (0, self.shape[0])

    def test_quantized_activations(self, rng):
        sizes = (4, 1)
        case = self.case(rng, "int4", 2, zeros=True)
        x = cases.rows(rng, (6, self.shape[1]), "float32")
        y = self.run(x, sizes, case, activation_dtype="int8")
        expected = product(cases.quantized_rows(x, "int8"), sizes, case)
        cases.assert_close(y, expected, "float32")

    def test_prepared_and_gradients(self, rng):
        """Against autodiff of the product with dense weights."""
        sizes, activation = (3, 0, 4), "silu"
        case = self.case(rng, "int4", 3, zeros=True)
        n, k, group_size = self.shape
        x = cases.rows(rng, (9, k), "float32") / 30
        bias = jnp.asarray(rng.normal(size=(3, n)), jnp.float32)
        factor = jnp.asarray(rng.normal(size=(9, n)), jnp.float32)
        spread = functools.partial(jnp.repeat, repeats=group_size, axis=2)
        scales, zeros = (jnp.swapaxes(a, 1, 2) for a in (case.scales, case.zeros))
        values = jnp.asarray(case.dense, jnp.float32) / spread(scales) + spread(zeros)
        expert = np.repeat(np.arange(4), (*sizes, 2))

        def dense(x, scales, zeros, bias):
            scales, zeros = jnp.swapaxes(scales, 1, 2), jnp.swapaxes(zeros, 1, 2)
            w = spread(scales) * (jnp.round(values) - spread(zeros))
            y = jnp.einsum("enk,mk->emn", w, x, precision="highest") + bias[:, None]
            y = jnp.where(jnp.arange(3)[:, None] == expert, 1.0, 0.0)[..., None] * jax.nn.silu(y)
            return jnp.sum(y.sum(0) * factor)

        def quantized(x, scales, zeros, bias, codes):
            weight = prepare(codes, scales, zeros, **case.options, chip="v5e")
            y = grouped_quantized_matmul(
                x, jnp.array(sizes), weight, bias=bias, activation=activation,
                implementation=self.implementation, interpret=self.interpret,
            )  # fmt: skip
            return jnp.sum(y * factor)

        arguments = (x, case.scales, case.zeros, bias)
        expected = jax.grad(dense, range(4))(*arguments)
        actual = jax.jit(jax.grad(quantized, range(4)))(*arguments, case.codes)
        for ours, theirs in zip(actual, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-4 * np.abs(theirs).max())


class TestMosaicTpu(TestXla):
    implementation = "mosaic_tpu"
    interpret = INTERPRET
    shape = (136, 512, 128)

    @pytest.fixture(autouse=True, params=["v5e", "7x"])
    def chip(self, request, monkeypatch):
        if request.param == "7x" and "formats" not in request.node.name:
            pytest.skip("does not depend on the chip's arithmetic")
        monkeypatch.setattr(chips, "chip_of", lambda *_: chips.BY_NAME[request.param])

    def test_races_are_looked_for(self, rng, watched):
        self.test_rows_do_not_see_each_other(rng)
        assert watched

    def test_many_quantized_rows(self, rng, monkeypatch):
        """Where weights are scaled before: in bf16, which holds the rows' codes."""
        monkeypatch.setattr(chips, "chip_of", lambda *_: chips.V6E)
        sizes = (70, 0, 130)
        case = self.case(rng, "int4", 3)
        x = cases.rows(rng, (202, self.shape[1]), "bfloat16")
        y = self.run(x, sizes, case, activation_dtype="int8", out_dtype=jnp.float32)
        expected = product(cases.quantized_rows(x, "int8"), sizes, case)
        cases.assert_close(y, expected, "bfloat16")


TILE = 16
planned = jax.jit(tpu_grouped.visits, static_argnums=(1, 2))


@fuzz(60)
@given(st.integers(0, 60), st.lists(st.integers(0, 40), min_size=5, max_size=5))
def test_visits(before, sizes):
    """Each row of an expert is visited once with it; tiles and experts come one after another."""
    m = 90
    bounds = np.minimum(before + np.cumsum([0, *sizes]), m)
    plan, count = planned(jnp.asarray(bounds, jnp.int32), m, TILE)
    assert 1 <= count <= plan.tile.size
    tile, expert, first, last = (
        np.asarray(a)[:count] for a in (plan.tile, plan.expert, plan.first, plan.last)
    )
    owner, works = np.full(-(-m // TILE) * TILE, -1), first < last
    for t, e, a, b in zip(tile, expert, first, last, strict=True):
        assert np.all(owner[t * TILE + a : t * TILE + b] == -1)
        owner[t * TILE + a : t * TILE + b] = e
    expected = np.repeat(np.arange(-1, 6), [bounds[0], *np.diff(bounds), len(owner) - bounds[-1]])
    np.testing.assert_array_equal(owner, np.where(expected == 5, -1, expected))
    assert set(tile) == set(range(-(-m // TILE))) and np.all(np.diff(tile) >= 0)
    assert np.all(np.diff(expert) >= 0)
    # A tile of no one is visited once, so that its zeros are the only thing that it is given.
    assert all(np.sum(tile == t) == 1 for t in tile[~works])


@functools.cache
def sorted_product():
    """A product whose sizes are data, compiled once."""
    rng = np.random.default_rng(0)
    case = cases.make(rng, "int4", (128, 128), 64, zeros=True, stack=(5,))
    x = cases.rows(rng, (50, 128), "float32")

    call = functools.partial(
        grouped_quantized_matmul, **case.options, implementation="mosaic_tpu", interpret=INTERPRET
    )
    return x, case, jax.jit(call)


@fuzz(4)
@given(st.lists(st.integers(0, 14), min_size=5, max_size=5))
def test_any_sizes(sizes):
    x, case, run = sorted_product()
    sizes = np.diff(np.minimum(np.cumsum([0, *sizes]), len(x)))
    cases.assert_close(
        run(x, jnp.asarray(sizes), *case.arguments()), product(x, sizes, case), "float32"
    )


class TestChoice:
    def test_what_does_not_fit_is_told(self, rng):
        case = cases.make(rng, "int4", (128, 192), 64, stack=(2,))
        x, sizes = jnp.ones((3, 192)), jnp.array([1, 2])
        call = functools.partial(
            grouped_quantized_matmul, x, sizes, *case.arguments(), **case.options
        )
        with pytest.raises(NotImplementedError, match=r"2 experts' int4 \(128, 192\).*the chip is"):
            call(implementation="mosaic_tpu")
        with pytest.raises(NotImplementedError, match="192 inputs are not a multiple of 128"):
            call(implementation="mosaic_tpu", interpret=INTERPRET)
        with pytest.raises(NotImplementedError, match=r"mosaic_gpu: .*(jax 0.11|this is cpu)"):
            call(implementation="mosaic_gpu")
        with pytest.raises(ValueError, match=r"'cuda' is unknown; .*mosaic_tpu, mosaic_gpu, xla"):
            call(implementation="cuda")

    def test_on_a_tpu_the_kernel_runs(self, rng, monkeypatch):
        monkeypatch.setattr(chips, "chip_of", lambda *_: chips.V5E)
        case = cases.make(rng, "int4", (128, 128), 64, stack=(2,))
        call = functools.partial(grouped_quantized_matmul, **case.options)
        arguments = jnp.ones((3, 128)), jnp.array([1, 2]), *case.arguments()
        assert "pallas_call" in str(jax.make_jaxpr(call)(*arguments))
        assert "pallas_call" not in str(
            jax.make_jaxpr(lambda *a: call(*a, implementation="xla"))(*arguments)
        )

    @pytest.mark.parametrize(
        ("change", "error", "words"),
        [
            ({"group_sizes": jnp.array([1, 2, 3])}, ValueError, [r"\(3,\)", r"\(2, 2, 8\)"]),
            ({"group_sizes": jnp.ones(2)}, TypeError, ["float32", "integers"]),
            ({"x": jnp.ones((2, 3, 64))}, ValueError, [r"\(2, 3, 64\)", r"\(8, 64\)"]),
            ({"bias": jnp.ones(8)}, ValueError, [r"\(8,\)", r"\(2, 8\)"]),
        ],
    )
    def test_names_what_is_wrong(self, change, error, words):
        arguments = {
            "x": jnp.ones((3, 64)),
            "group_sizes": jnp.array([1, 2]),
            "codes": jnp.zeros((2, 8, 32), jnp.uint8),
            "scales": jnp.ones((2, 2, 8)),
            "group_size": 32,
        }
        with pytest.raises(error, match=".*".join(words)):
            grouped_quantized_matmul(**{**arguments, **change})


@pytest.mark.slow
@pytest.mark.skipif(not aot.available(), reason="the TPU compiler is not installed")
@pytest.mark.parametrize("chip", aot.TOPOLOGIES)
def test_compiles(chip):
    """Mixtral's experts for 16 and 2048 tokens of two experts each, and every format."""
    shapes = [
        {"m": 32, "n": 14336, "k": 4096},
        {"m": 4096, "n": 14336, "k": 4096},
        {"m": 4096, "n": 4096, "k": 14336, "zeros": True},
        {"m": 40, "n": 512, "k": 512, "format": "int2", "experts": 3},
        {"m": 40, "n": 512, "k": 512, "format": "fp8", "group_size": 512, "experts": 128},
        {"m": 40, "n": 512, "k": 512, "format": "codebook", "group_size": 64},
        {"m": 40, "n": 512, "k": 512, "format": "int8", "x_dtype": "float32"},
    ]
    if chip != "v5e":
        shapes.append({"m": 32, "n": 4096, "k": 14336, "zeros": True})
    name = "tests.kernels.quantized_matmul.aot_cases:grouped"
    results = aot.compile_cases(chip, [(name, {"chip": chip, **s}) for s in shapes])
    errors = [f"{s}: {r['error']}" for s, r in zip(shapes, results, strict=False) if r["error"]]
    assert not errors and len(results) == len(shapes), errors
    for shape, result in zip(shapes, results, strict=True):
        assert "tpu_custom_call" in result["hlo"]
        # No copy of the experts' weights, decoded or not: their codes alone would be this much.
        codes = shape.get("experts", 8) * shape["n"] * shape["k"] // 2
        assert shape["n"] < 4096 or result["memory"]["temporaries"] < codes / 2, shape
