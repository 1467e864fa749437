import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import pytest
from jaxcomp.kernels import chips
from jaxcomp.kernels.quantized_matmul import gpu, gpu_grouped, weights
from jaxcomp.kernels.quantized_matmul.reference import Options

from tests.kernels import aot_gpu
from tests.kernels.quantized_matmul import cases

OLD = tuple(int(part) for part in jax.__version__.split(".")[:2]) < (0, 11)
needs_mosaic = pytest.mark.skipif(OLD, reason="Mosaic GPU kernels need jax 0.11")


def weight_of(case: cases.Case) -> weights.Weight:
    format, group_size = case.options["format"], case.options["group_size"]
    return weights.stored(*case.arguments(), case.options.get("table"), format, group_size)


def tiles(tokens: int, depth: int = 64, **options) -> dict:
    return {"tokens": tokens, "depth": depth, "stages": 2, "rows": 1, **options}


def run(x, case, options, tiles, bias=None, prepared=False):
    """The kernel on a simulated GPU whose shared memory is watched for races."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    weight = gpu.prepare(weight_of(case)) if prepared else weight_of(case)
    assert gpu.reason(x, weight, options, None) is None
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    tiles = None if tiles is None else gpu.Tiles(**tiles)
    return gpu.run(x, weight, bias, options, interpret=interpret, tiles=tiles)


@needs_mosaic
class TestInterpreted:
    """Sizes that no tile divides: M by 8, N by two warpgroups' rows, K by the steps of a split."""

    @pytest.mark.parametrize(
        ("format", "group_size", "zeros", "tiles"),
        [
            ("int4", 128, False, tiles(8, 128, rows=2)),
            ("int4", 64, True, tiles(8, slices=2)),
            ("int4", 32, False, tiles(16, split=2)),
            ("int4", 32, True, tiles(128, stages=1)),  # wide: weights are scaled
            ("int4", 64, False, tiles(128, 128)),
            ("int4", 384, False, tiles(128, slices=2)),  # one group a row
            ("int8", 64, True, tiles(8, split=2, slices=2)),
        ],
    )
    def test_bfloat16(self, rng, format, group_size, zeros, tiles):
        m, n, k = (3 if tiles["tokens"] == 8 else 19), 64 * tiles["rows"], 384
        case = cases.make(rng, format, (n, k), group_size, zeros=zeros, scale_dtype="bfloat16")
        x = cases.rows(rng, (m, k), "bfloat16")
        y = run(x, case, Options(None, None, "float32"), tiles)
        assert y.dtype == jnp.float32
        cases.assert_close(y, cases.product(x, case), "bfloat16")

    @pytest.mark.parametrize(
        ("format", "group_size", "zeros", "prepared", "tiles"),
        [
            ("int4", 128, False, True, tiles(8, 128, slices=2)),
            ("int4", 32, True, True, tiles(128)),
            ("int4", 128, False, True, tiles(128)),
            ("int2", 64, True, False, tiles(8, 128)),
            ("int2", 128, False, True, tiles(16, 128, split=2)),
            ("codebook", 64, True, False, tiles(8, 64)),
            ("codebook", 128, False, True, tiles(8, 128)),
            ("fp8", 64, False, False, tiles(8, 128, slices=2)),
            ("fp8", 32, False, False, tiles(128)),
        ],
    )
    def test_words(self, rng, format, group_size, zeros, prepared, tiles):
        m, n, k = (3 if tiles["tokens"] == 8 else 19), 64, 384
        case = cases.make(rng, format, (n, k), group_size, zeros=zeros, scale_dtype="bfloat16")
        x = cases.rows(rng, (m, k), "bfloat16")
        y = run(x, case, Options(None, None, "float32"), tiles, prepared=prepared)
        cases.assert_close(y, cases.product(x, case), "bfloat16")

    @pytest.mark.parametrize(
        ("format", "dtype", "group_size", "zeros", "tiles"),
        [
            ("int4", "int8", 64, False, tiles(8)),
            ("int4", "int8", 128, True, tiles(16, slices=2)),
            ("int4", "float8_e4m3fn", 64, False, tiles(128, 128, slices=2)),
            ("int8", "int8", 64, True, tiles(16, 128)),
            ("fp8", "float8_e4m3fn", 64, False, tiles(8, split=2)),
        ],
    )
    def test_quantized_activations(self, rng, format, dtype, group_size, zeros, tiles):
        m, n, k = 5, 64, 320 if group_size == tiles["depth"] == 64 else 384
        case = cases.make(rng, format, (n, k), group_size, zeros=zeros)
        x = cases.rows(rng, (m, k), "bfloat16").at[0].set(0.0)
        y = run(x, case, Options(None, dtype, "float32"), tiles)
        # The product is exact in the quantized rows.
        expected = cases.product(cases.quantized_rows(x, dtype), case)
        cases.assert_close(y, expected, "float32")

    @pytest.mark.parametrize("activation", ["relu", "silu", "gelu"])
    def test_bias_and_activation_within_the_kernel(self, rng, activation):
        case = cases.make(rng, "int4", (64, 128), 64, scale_dtype="bfloat16")
        x = cases.rows(rng, (11, 128), "bfloat16") / 30
        bias = jnp.asarray(rng.normal(size=64), jnp.float32)
        y = run(x, case, Options(activation, None, "bfloat16"), tiles(16), bias)
        assert y.dtype == jnp.bfloat16
        cases.assert_close(y, cases.product(x, case, bias, activation), "bfloat16")

    def test_bias_and_activation_after_a_split(self, rng):
        case = cases.make(rng, "int4", (64, 256), 64, scale_dtype="bfloat16")
        x = cases.rows(rng, (2, 256), "bfloat16") / 30
        bias = jnp.asarray(rng.normal(size=64), jnp.float32)
        y = run(x, case, Options("gelu", None, "bfloat16"), None, bias)  # the table's tiles
        cases.assert_close(y, cases.product(x, case, bias, "gelu"), "bfloat16")


@needs_mosaic
class TestTiles:
    @pytest.mark.parametrize("shape", [(4096, 4096), (14336, 4096), (4096, 14336), (192, 4160)])
    @pytest.mark.parametrize("group_size", [32, 64, 128])
    def test_fit(self, shape, group_size):
        n, k = shape
        if k % group_size:
            k = 4096
        codes = jax.ShapeDtypeStruct((n, k // 2), jnp.uint8)
        scales = jax.ShapeDtypeStruct((k // group_size, n), jnp.bfloat16)
        weight = weights.Weight(codes, scales, None, None, "int4", group_size, (n, k))
        for m, dtype in itertools.product([1, 9, 33, 100, 256, 2048], ["bfloat16", "int8"]):
            chosen = gpu.choose_tiles(jax.ShapeDtypeStruct((m, k), dtype), weight)
            assert k % chosen.depth == 0 and n % (64 * chosen.rows) == 0
            assert chosen.depth % group_size == 0 or group_size % chosen.depth == 0
            steps = -(-k // (chosen.depth * chosen.slices))
            assert 1 <= chosen.stages <= -(-steps // chosen.split)
            blocks = n // (64 * chosen.rows) * -(-m // chosen.tokens) * chosen.split
            assert blocks >= 64 or n < 4096 or m > 64


@needs_mosaic
@pytest.mark.parametrize("workers", range(1, 8))
def test_warpgroups_ask_for_the_registers_that_there_are(workers):
    first, later = gpu.gpu_kernel.registers(workers)
    assert 128 * (workers + 1) * first <= 65536
    assert workers * later + gpu.gpu_kernel._COPY_REGISTERS <= (workers + 1) * first
    assert first % 8 == later % 8 == 0 and later >= first


@needs_mosaic
@pytest.mark.parametrize("format", ["int4", "int2", "codebook"])
@pytest.mark.parametrize("group_size", [32, 64, 192, 256])
def test_prepare_is_undone_by_restore(rng, format, group_size):
    case = cases.make(rng, format, (3, 768), group_size)
    weight = weight_of(case)
    prepared = gpu.prepare(weight)
    assert prepared.layout == gpu.LAYOUT and prepared.codes.shape == weight.codes.shape
    assert not jnp.array_equal(prepared.codes, weight.codes)
    restored = gpu.restore(prepared)
    assert restored.layout == "stored"
    assert jnp.array_equal(restored.codes, weight.codes)


class TestReason:
    def weight(self, **change):
        codes, scales = jnp.zeros((128, 64), jnp.uint8), jnp.ones((1, 128))
        weight = weights.stored(codes, scales, None, None, "int4", 128)
        return dataclasses.replace(weight, **change)

    @pytest.mark.skipif(not OLD, reason="for older versions of jax")
    def test_old_jax(self):
        x = jnp.ones((1, 128), jnp.bfloat16)
        told = gpu.reason(x, self.weight(), Options(None, None, "bfloat16"), chips.H100)
        assert "needs jax 0.11" in told

    @needs_mosaic
    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"chip": chips.V5E}, "v5e"),
            ({"dtype": "float32"}, "float32"),
            ({"layout": "mosaic_tpu/1"}, "mosaic_tpu/1"),
            ({"format": "int2", "group_size": 32}, "32 int2 codes"),
            ({"shape": (72, 128)}, "multiples of 64"),
            ({"group_size": 96}, "groups of 96"),
            ({"out_dtype": "int8"}, "out_dtype int8"),
        ],
    )
    def test_told(self, change, words):
        x = jnp.ones((1, 128), change.pop("dtype", "bfloat16"))
        chip = change.pop("chip", chips.H100)
        options = Options(None, None, change.pop("out_dtype", "bfloat16"))
        assert words in gpu.reason(x, self.weight(**change), options, chip)

    @needs_mosaic
    def test_fits(self):
        x, options = jnp.ones((1, 128), jnp.bfloat16), Options(None, None, "bfloat16")
        weight = self.weight(group_size=64)
        assert gpu.reason(x, weight, options, chips.H100) is None
        assert "no measurement on h100" in gpu.slower(1, weight, options, chips.H100)

    @needs_mosaic
    def test_tiles_that_do_not_fit_are_refused(self):
        x, options = jnp.ones((1, 128), jnp.bfloat16), Options(None, None, "bfloat16")
        with pytest.raises(ValueError, match=r"rows=3.*\(128, 128\)"):
            gpu.run(x, self.weight(), None, options, tiles=gpu.Tiles(8, 64, rows=3))


def compiled(
    m, n, k, format="int4", group_size=128, dtype=None, zeros=False, full=False, prepared=False,
    experts=None,
):  # fmt: skip
    """A product and the shapes of its arguments, for the compiler."""
    struct = jax.ShapeDtypeStruct
    stack = () if experts is None else (experts,)
    scales = struct((*stack, k // group_size, n), jnp.bfloat16)
    arguments = (
        struct((m, k), jnp.bfloat16),
        struct((*stack, n, k * cases.BITS[format] // 8), jnp.uint8),
        scales,
        scales if zeros else None,
        struct((*stack, n), jnp.bfloat16) if full else None,
        struct((experts + 1,), jnp.int32) if experts else None,
    )

    def function(x, codes, scales, zeros, bias, bounds):
        weight = weights.stored(codes, scales, zeros, None, format, group_size)  # NF4
        if prepared:
            weight = dataclasses.replace(weight, layout=gpu.LAYOUT)
        options = Options("silu" if full else None, dtype, "bfloat16")
        assert gpu.reason(x, weight, options, chips.H100) is None
        if experts is not None:
            return gpu_grouped.matmul(x, bounds, weight, bias, options)
        return gpu.run(x, weight, bias, options)

    return function, arguments


LLAMA = [(4096, 14336), (14336, 4096)]
PROGRAMS = [{"m": m, "n": n, "k": k} for n, k in LLAMA for m in (1, 16, 256, 2048)]
PROGRAMS += [{"m": m, "n": 14336, "k": 4096, "prepared": True} for m in (1, 16, 256, 2048)]
PROGRAMS += [
    {"m": 1, "n": 4096, "k": 4096, "group_size": 32, "zeros": True, "full": True},
    {"m": 2048, "n": 4096, "k": 4096, "group_size": 32, "zeros": True, "full": True},
    {"m": 33, "n": 4096, "k": 4096, "group_size": 64, "full": True},
    {"m": 16, "n": 4096, "k": 4096, "format": "int2"},
    {"m": 16, "n": 4096, "k": 4096, "format": "codebook", "group_size": 64},
    {"m": 256, "n": 4096, "k": 4096, "format": "codebook", "prepared": True},
    {"m": 1, "n": 4096, "k": 14336, "format": "int2", "group_size": 64, "prepared": True},
    {"m": 16, "n": 4096, "k": 14336, "dtype": "int8"},
    {"m": 256, "n": 14336, "k": 4096, "dtype": "int8"},
    {"m": 256, "n": 14336, "k": 4096, "dtype": "float8_e4m3fn"},
    {"m": 16, "n": 4096, "k": 4096, "dtype": "int8", "zeros": True, "group_size": 64},
    {"m": 256, "n": 14336, "k": 4096, "dtype": "int8", "zeros": True, "full": True},
    {"m": 16, "n": 4096, "k": 4096, "format": "int8"},
    {"m": 256, "n": 4096, "k": 4096, "format": "int8", "dtype": "int8"},
    {"m": 256, "n": 4096, "k": 4096, "format": "fp8", "dtype": "float8_e4m3fn"},
    {"m": 16, "n": 4096, "k": 14336, "format": "fp8"},
    {"m": 2048, "n": 4096, "k": 4096, "format": "fp8", "full": True},
    # Mixtral's experts for 16 and 2048 tokens of two experts each.
    {"m": 32, "n": 14336, "k": 4096, "experts": 8, "prepared": True},
    {"m": 4096, "n": 14336, "k": 4096, "experts": 8, "full": True},
    {"m": 4096, "n": 4096, "k": 14336, "experts": 8, "dtype": "int8"},
]


@functools.cache
def programs() -> list[dict]:
    return aot_gpu.compile_cases([(f"{__name__}:compiled", options) for options in PROGRAMS])


@pytest.mark.skipif(OLD or not aot_gpu.available(), reason="needs JAX's CUDA plugin and a toolkit")
@pytest.mark.parametrize("index", range(len(PROGRAMS)), ids=lambda index: str(PROGRAMS[index]))
def test_compiles_for_h100(index):
    results = programs()
    assert index < len(results), results[-1]["error"]
    result = results[index]
    assert result["error"] is None, result["error"]
    assert len(result["kernels"]) == 1
    [kernel] = result["kernels"]
    assert kernel["spill_stores"] == kernel["spill_loads"] == 0
    assert not kernel["warnings"]
    # No copy of the weight, in any dtype: what is written are sums and rows of x.
    options = PROGRAMS[index]
    room = options["n"] * options["k"] / 4
    if options.get("format") == "fp8" and "dtype" not in options:  # x in the order of its words
        room += 2 * options["m"] * options["k"]
    if "experts" in options:  # Rows of x and y, in whole tiles of an expert.
        room += (options["m"] + 128 * options["experts"]) * 2 * (options["n"] + options["k"])
    assert result["memory"]["temporaries"] < room
