"""Decoding on Hopper GPUs: interpreted against float64, and through CUDA's assembler."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jaxcomp.kernels import chips
from jaxcomp.kernels.sparse_attention import causal, decode, decode_attention, gpu_decode, window

from tests.kernels import aot_gpu
from tests.kernels.sparse_attention import cases
from tests.kernels.sparse_attention.test_decode import ROWS, check, check_rows
from tests.kernels.sparse_attention.test_decode import TestPlain as Plain
from tests.kernels.sparse_attention.test_gpu import OLD, needs_mosaic


@needs_mosaic
class TestInterpreted(Plain):
    """The kernel on a simulated GPU whose shared memory is watched for races."""

    dtype = "bfloat16"
    sizes = {"lengths": (300, 2), "kv_heads": 1}  # noqa: RUF012

    def run(self, *args, **options):
        from jax.experimental.pallas import mosaic_gpu as plgpu

        interpret = plgpu.InterpretGPUParams(detect_races=True)
        options |= {"implementation": "mosaic_gpu", "interpret": interpret}
        return decode_attention(*args, **options)

    def test_rows_of_any_mask(self):
        span = {"span": [0.0] * 4, "lengths": (3,)}
        for mask, options in ((ROWS["bigbird"][0], {}), (causal(), span)):
            with pytest.raises(NotImplementedError, match=r"one rule on positions|adaptive span"):
                check_rows(self.run, mask, dtype="bfloat16", **options)

    def test_narrow_heads_in_float16_and_a_cache_of_odd_size(self):
        options = {"lengths": (150,), "capacity": 152, "dim": 64}
        check(self.run, dtype="float16", scale=-0.2, soft_cap=3.0, **options)


@needs_mosaic
def test_a_part_of_a_cache():
    """As a device has it that holds the positions from 128 on; one sequence ends before them."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in cases.operands(2, 2, 2, 320, dim=64))
    parts, lengths = (k[:, 128:], v[:, 128:]), jnp.array([300, 100])
    options = {"scale": 0.2, "start": jnp.int32(128), "out_dtype": jnp.float32}
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    rule = window(150, causal=True)
    out, lse = gpu_decode.attention(
        q, *parts, lengths, rule, interpret=interpret, splits=1, **options
    )
    want, want_lse = decode.plain(q, *parts, lengths, rule, **options)
    assert out.dtype == jnp.float32
    cases.assert_close(out, want, "bfloat16")
    cases.assert_close(lse, want_lse, "bfloat16")
    assert not out[1].any() and jnp.isneginf(lse[1]).all()


def test_a_result_of_nothing_merges_to_nothing():
    parts = jnp.stack([jnp.ones((1, 1, 2, 4)), jnp.zeros((1, 1, 2, 4))], 2)
    lses = jnp.array([[0.5, -jnp.inf], [-jnp.inf, -jnp.inf]]).reshape(1, 1, 2, 2)
    out, lse = gpu_decode._merged(parts, lses)
    assert out[0, 0].tolist() == [[1.0] * 4, [0.0] * 4]
    assert lse[0, 0].tolist() == [0.5, -jnp.inf]


@pytest.mark.parametrize(("cells", "steps"), [(1, 256), (8, 256), (100, 64), (8, 1), (600, 256)])
def test_splits_keep_the_cores_busy(cells, steps):
    splits = gpu_decode.split(cells, steps)
    assert 1 <= splits <= steps
    # Starts counted, against a division without remainders.
    start, waves = gpu_decode.START, -(-cells * splits // 132)
    ideal = max(cells * steps / 132, 1)
    assert waves * (-(-steps // splits) + start) <= 1.35 * ideal + start


@needs_mosaic
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("cache", ["bfloat16", "int8"])
def test_each_warpgroup_has_stages_to_spare(dim, cache):
    from jaxcomp.kernels.sparse_attention import gpu_decode_kernel as kernel

    stages = kernel.stage_count(dim, "bfloat16", cache)
    assert stages % kernel.WORKERS == 0 and stages >= 2 * kernel.WORKERS


class TestRefused:
    def operands(self, dim=64, dtype="bfloat16", capacity=64, cache=None, queries=1):
        q = jnp.ones((1, queries, 4, dim), dtype)
        return q, *[jnp.ones((1, capacity, 1, dim), cache or dtype)] * 2

    @needs_mosaic
    @pytest.mark.parametrize(
        ("change", "chip", "words"),
        [
            ({"dtype": "float32"}, chips.H100, "bfloat16 and float16, not float32"),
            (
                {"cache": "float16"},
                chips.H100,
                "of q's dtype, or of one of int8 and fp8, not float",
            ),
            ({"dim": 32}, chips.H100, "64 or 128, .* not 32 and 32"),
            ({"queries": 17}, chips.H100, "up to 64 rows .* not 17 x 4"),
            ({"capacity": 65}, chips.H100, "multiple of 8, not 65"),
            ({}, chips.V5E, "Hopper GPUs, not on v5e"),
            ({}, None, "an unknown chip"),
        ],
    )
    def test_reasons(self, change, chip, words):
        assert re.search(words, gpu_decode.unfit(*self.operands(**change), chip))

    def test_versions(self):
        told = gpu_decode.unfit(*self.operands(), chips.H100)
        assert "jax 0.11" in told if OLD else told is None


def compiled(batch=1, queries=1, capacity=32768, heads=32, kv_heads=8, dim=128, dtype="bfloat16",
             cache=None, mask=None, **options):  # fmt: skip
    """Decoding, and the shapes of its arguments, for the compiler."""
    struct = jax.ShapeDtypeStruct
    cached = (batch, capacity, kv_heads)
    arguments = [struct((batch, queries, heads, dim), dtype)]
    arguments += [struct((*cached, dim), cache or dtype)] * 2 + [struct((batch,), jnp.int32)]
    arguments += [struct(cached, jnp.bfloat16)] * 2 if cache else []
    rule = window(1024, causal=True) if mask else causal()

    def function(q, k, v, lengths, *scales):
        scales = dict(zip(("k_scale", "v_scale"), scales, strict=False))
        options_of = options | scales | {"implementation": "mosaic_gpu", "return_logsumexp": True}
        return decode_attention(q, k, v, lengths, rule, **options_of)

    return function, tuple(arguments)


PROGRAMS = [
    {},
    {"cache": "int8", "batch": 16},
    {"cache": "float8_e4m3fn", "mask": "window", "queries": 8, "soft_cap": 30.0},
    {"cache": "float8_e5m2", "dtype": "float16", "dim": 64, "capacity": 1000},
    {"mask": "window", "queries": 3, "heads": 12, "kv_heads": 4, "soft_cap": 30.0},
]


@functools.cache
def built() -> list[dict]:
    return aot_gpu.compile_cases([(f"{__name__}:compiled", options) for options in PROGRAMS])


@pytest.mark.skipif(OLD or not aot_gpu.available(), reason="needs JAX's CUDA plugin and a toolkit")
@pytest.mark.parametrize("index", range(len(PROGRAMS)), ids=lambda index: str(PROGRAMS[index]))
def test_compiles_for_h100(index):
    results = built()
    assert index < len(results), results[-1]["error"]
    result, options = results[index], PROGRAMS[index]
    assert result["error"] is None, result["error"]
    (kernel,) = result["kernels"]
    assert kernel["spill_stores"] == kernel["spill_loads"] == 0
    assert not kernel["warnings"]
    # The cache is read where it lies: only scales, turned, and results of parts are written.
    cache = 2 * 2 * options.get("batch", 1) * 32768 * 8 * options.get("dim", 128)
    assert result["memory"]["temporaries"] < cache / 16
