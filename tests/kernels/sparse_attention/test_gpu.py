"""The kernel for Hopper GPUs: interpreted against float64, and through CUDA's assembler."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxcomp.kernels import chips
from jaxcomp.kernels.implementations import Unsupported
from jaxcomp.kernels.sparse_attention import (
    attention,
    causal,
    full,
    global_,
    gpu,
    gpu_lists,
    per_head,
    random,
    window,
)
from jaxcomp.kernels.sparse_attention.schedule import SKIP, schedule

from tests.kernels import aot_gpu
from tests.kernels.sparse_attention import cases, programs
from tests.kernels.sparse_attention.test_attention import TestReference as Reference
from tests.kernels.sparse_attention.test_attention import check

OLD = tuple(int(part) for part in jax.__version__.split(".")[:2]) < (0, 11)
needs_mosaic = pytest.mark.skipif(OLD, reason="Mosaic GPU kernels need jax 0.11")


def interpreted(q, k, v, mask, **options):
    """The kernel on a simulated GPU whose shared memory is watched for races."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    interpret = plgpu.InterpretGPUParams(detect_races=True)
    options |= {"implementation": "mosaic_gpu", "interpret": interpret, "return_logsumexp": True}
    return attention(q, k, v, mask, **options)


@needs_mosaic
class TestInterpreted(Reference):
    """Full blocks, rules, bitmaps, lists of each head, rows and heads with nothing to look at."""

    masks = ("bigbird", "per head")
    dtype = "bfloat16"
    sizes = {"dim": 64}  # noqa: RUF012
    run = staticmethod(interpreted)

    # These need other dtypes or widths, and are refused (``TestRefused``).
    test_lengths_and_widths_that_differ = None
    test_all_options_together = None
    test_quantized_keys_and_values = None
    test_caps_that_all_scores_reach = None
    test_spans_that_end_within_beyond_and_before_a_block = None
    test_gradients = None
    test_gradients_of_all_options = None
    test_gradients_of_heads_with_masks_of_their_own = None
    test_the_spans_gradient_is_its_definition = None
    test_what_is_no_number_reaches_those_that_look_at_it = None
    test_quantized_operands_are_constants = None

    def test_segments_a_cap_and_spans_in_float16(self):
        q, k, v = cases.operands(3, 2, queries=150, keys=270, heads=2, kv_heads=1, dim=64)
        rng = np.random.default_rng(3)
        check(
            self.run, q, k, v, global_(4) | causal(70), "float16", scale=-0.2, soft_cap=2.5,
            segment_ids=np.sort(rng.integers(-1, 3, (2, 150)), 1).astype(np.int32),
            kv_segment_ids=np.sort(rng.integers(-1, 3, (2, 270)), 1).astype(np.int32),
            span=np.array([3.0, 90.5], np.float32), span_ramp=24.0,
        )  # fmt: skip

    def test_caps_and_spans_that_are_reached(self):
        q, k, v = cases.operands(11, queries=150, keys=200, heads=2, kv_heads=1, dim=64)
        options = {"scale": 9.0, "soft_cap": 55.0, "span": np.array([500.0, 5.3], np.float32)}
        check(self.run, np.abs(q), -np.abs(k), v, causal(30), self.dtype, **options)
        check(self.run, q, k, v, causal(30), self.dtype, **options)

    def test_gradients_with_segments_and_a_cap(self):
        mask = window(64) & causal() | random(1, seed=2, block_size=64)
        segments = np.repeat([[0, 1, -1]], [60, 70, 20], axis=1).astype(np.int32)
        sizes = {"queries": 150, "keys": 150, "heads": 2, "kv_heads": 1, "dim": 128}
        self.gradients(mask, "bfloat16", soft_cap=3.0, segment_ids=segments, **sizes)

    def test_gradients_with_spans(self):
        # Not whole numbers: where a ramp ends on a distance, its slope is a matter of convention.
        span = np.array([5.3, 60.6], np.float32)
        sizes = {"queries": 140, "keys": 150, "heads": 2, "kv_heads": 1, "dim": 64}
        self.gradients(causal(), "bfloat16", soft_cap=3.0, span=span, **sizes)

    @pytest.mark.slow
    def test_gradients_of_heads_with_lists_of_their_own(self):
        mask = per_head([causal(), window(40), ~full(), causal() & random(1)])
        self.gradients(mask, "bfloat16", lse_too=False, queries=130, keys=140, dim=64)


class TestLists:
    """What the kernel reads is the schedule's list, each row's by kind."""

    @pytest.mark.parametrize("group", [None, 2])
    @pytest.mark.parametrize("name", [*cases.MASKS, "nothing"])
    def test_all_steps_are_there_once(self, name, group):
        listed = schedule(cases.MASKS.get(name, ~full()), 4, 500, 700, 128, 128)
        steps = listed.rows if group is None else listed.columns(group)
        found, kinds = gpu_lists.arrays(listed, group), gpu_lists.codes(listed)
        rows, columns = found["rows"], found["columns"]
        members = found.get("members", np.zeros_like(columns))
        assert ("members" in found) == (group is not None and name == "per head")
        for i in range(steps.lists):
            majors = listed.row_blocks if group is None else listed.column_blocks
            assert sorted(rows[i, :, 0]) == list(range(majors))
            lengths = rows[i, :, -1] - rows[i, :, 1]
            assert (np.diff(lengths) <= 0).all()
            got = {
                (row[0], columns[i, at], code, members[i, at])
                for row in rows[i]
                for code, first, last in zip(kinds, row[1:-1], row[2:], strict=True)
                for at in range(first, last)
            }
            fields = (steps.major[i], steps.minor[i], steps.code[i], steps.group[i])
            want = {step for step in zip(*fields, strict=True) if step[2] != SKIP}
            assert got == want and lengths.sum() == len(want)

    def test_bits_are_the_bitmaps(self):
        listed = schedule(random(1, block_size=64), 1, 300, 300, 128, 128)
        bits = gpu_lists.arrays(listed)["bits"]
        key = np.arange(128)
        for bitmap, words in zip(listed.bitmaps, bits, strict=True):
            np.testing.assert_array_equal(bitmap, words[key // 32].T >> key % 32 & 1)


class TestRefused:
    def operands(self, dim=64, dtype="bfloat16", value_dim=None, cache=None):
        q = jnp.ones((1, 8, 2, dim), dtype)
        k = jnp.ones((1, 8, 1, dim), cache or dtype)
        return q, k, jnp.ones((1, 8, 1, value_dim or dim), cache or dtype)

    @needs_mosaic
    @pytest.mark.parametrize(
        ("change", "options", "words"),
        [
            ({"dtype": "float32"}, {}, "bfloat16 and float16, not float32"),
            ({"cache": "int8"}, {}, "of q's dtype, not int8"),
            ({"dim": 32}, {}, "64 or 128, .* not 32 and 32"),
            ({"value_dim": 128}, {}, "not 64 and 128"),
            ({}, {"chip": chips.V5E}, "Hopper GPUs, not on v5e"),
            ({}, {"chip": None}, "an unknown chip"),
            ({}, {"blocks": (256, None)}, "128 by 128, not 256"),
        ],
    )
    def test_reasons(self, change, options, words):
        told = gpu.unfit(*self.operands(**change), **{"chip": chips.H100, **options})
        assert re.search(words, told)

    def test_versions(self):
        told = gpu.unfit(*self.operands(), chips.H100)
        assert "jax 0.11" in told if OLD else told is None

    def test_where_it_cannot_run(self):
        q, k, v = self.operands()
        with pytest.raises(Unsupported, match="mosaic_gpu: it runs on Hopper GPUs, not on cpu"):
            attention(q, k, v, implementation="mosaic_gpu")


def compiled(mask="causal", queries=2048, heads=32, kv_heads=8, dim=128, dtype="bfloat16",
             segments=False, span=False, gradient=False, **options):  # fmt: skip
    """Attention, or its gradients, and the shapes of its arguments, for the compiler."""
    struct = jax.ShapeDtypeStruct
    arguments = [struct((1, queries, heads, dim), dtype)]
    arguments += [struct((1, queries, kv_heads, dim), dtype)] * 2
    more = {"segment_ids": struct((1, queries), jnp.int32)} if segments else {}
    more |= {"span": struct((heads,), jnp.float32)} if span else {}

    def function(q, k, v, *others):
        return attention(
            q, k, v, programs.MASKS[mask], implementation="mosaic_gpu", return_logsumexp=True,
            **dict(zip(more, others, strict=True)), **options,
        )  # fmt: skip

    def loss(*arguments):
        return function(*arguments)[0].astype(jnp.float32).sum()

    wanted = (0, 1, 2, *([3 + list(more).index("span")] if span else []))
    return (jax.grad(loss, wanted) if gradient else function), (*arguments, *more.values())


PROGRAMS = [
    {"mask": "causal", "queries": 16384},
    {"mask": "full", "dtype": "float16", "dim": 64},
    {"mask": "heads", "dim": 64},
    {"mask": "strided", "segments": True},
    {"mask": "bigbird", "segments": True},
    {"mask": "bigbird", "segments": True, "soft_cap": 30.0},
    {"mask": "window", "queries": 1999},
    {"mask": "causal", "queries": 5},
    {"mask": "causal", "queries": 16384, "gradient": True},
    {"mask": "strided", "span": True, "segments": True, "soft_cap": 30.0},
    {"mask": "bigbird", "span": True, "gradient": True, "segments": True, "soft_cap": 30.0},
]
DEAR = [  # parts of the last, in other combinations
    {"mask": "bigbird", "gradient": True, "dtype": "float16"},
    {"mask": "heads", "gradient": True, "segments": True, "soft_cap": 30.0},
    {"mask": "causal", "span": True, "gradient": True},
]


@functools.cache
def built(dear: bool) -> list[dict]:
    programs = DEAR if dear else PROGRAMS
    return aot_gpu.compile_cases([(f"{__name__}:compiled", options) for options in programs])


@pytest.mark.skipif(OLD or not aot_gpu.available(), reason="needs JAX's CUDA plugin and a toolkit")
@pytest.mark.parametrize(
    "options", PROGRAMS + [pytest.param(o, marks=pytest.mark.slow) for o in DEAR], ids=str
)
def test_compiles_for_h100(options):
    dear = options in DEAR
    results, index = built(dear), (DEAR if dear else PROGRAMS).index(options)
    assert index < len(results), results[-1]["error"]
    result = results[index]
    assert result["error"] is None, result["error"]
    # A forward kernel that an earlier program had is not compiled again; those of gradients are.
    assert len(result["kernels"]) in ((2, 3) if options.get("gradient") else (1,))
    for kernel in result["kernels"]:
        assert kernel["spill_stores"] == kernel["spill_loads"] == 0
        assert not kernel["warnings"]
    # Segments in whole blocks; else what pads a length that is no multiple of 8, and statistics.
    if options.get("queries", 2048) % 8 == 0 and len(result["kernels"]) == 1:
        assert result["memory"]["temporaries"] < 1 << 16
