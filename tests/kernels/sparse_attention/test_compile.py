"""Every kernel through the real compiler, for each chip, at Llama-3-8B's heads."""

import re

import pytest
from jaxcomp.kernels import schedules

from tests.kernels import aot
from tests.kernels.sparse_attention.test_sharding import COLLECTIVES

PROGRAMS = "tests.kernels.sparse_attention.programs:"
# Every kernel on every chip, and what makes each different from chip to chip: types and options.
CASES = [
    ("attend", {"gradient": True}),
    ("attend", {
        "gradient": True, "queries": 2000, "mask": "bigbird", "segments": True, "soft_cap": 30.0,
        "span": True,
    }),
    ("attend", {"cache": "float8_e4m3fn"}),
    ("decode", {}),
    ("decode", {"cache": "int8", "queries": 4, "capacity": 5000}),
    ("decode", {"cache": "float8_e4m3fn"}),
]  # fmt: skip
# Other lists and rules of the same kernels, each for one chip of either generation: v5e and v5p
# have the same vector and matrix units, and so have v6e and 7x.
LISTS = {
    "v5e": [
        ("attend", {"gradient": True, "queries": 16384, "mask": "window"}),
        ("decode", {"mask": "bigbird", "queries": 2, "segments": True, "span": True}),
        ("decode", {"heads": 20, "kv_heads": 5, "queries": 2, "cache": "int8"}),
    ],
    "v5p": [
        ("attend", {"mask": "heads", "dim": 64, "dtype": "float32"}),
        ("attend", {"mask": "strided", "cache": "int8"}),
        ("attend", {"mask": "chunked", "queries": 4000}),
        ("decode", {"mask": "chunked"}),
    ],
}  # fmt: skip
LISTS |= {"7x": LISTS["v5e"], "v6e": LISTS["v5p"]}


@pytest.mark.slow
@pytest.mark.skipif(not aot.available(), reason="the TPU compiler (libtpu) is not installed")
@pytest.mark.parametrize("chip", aot.TOPOLOGIES)
def test_compiles(chip):
    programs = CASES + LISTS[chip]
    results = aot.compile_cases(chip, [(PROGRAMS + name, options) for name, options in programs])
    errors = [(case, r["error"]) for case, r in zip(programs, results, strict=False) if r["error"]]
    assert not errors and len(results) == len(programs)
    assert all("tpu_custom_call" in result["hlo"] for result in results)


@pytest.mark.slow
@pytest.mark.skipif(not aot.available(), reason="the TPU compiler (libtpu) is not installed")
@pytest.mark.parametrize("chip", aot.TOPOLOGIES)
def test_compiles_on_eight_devices(chip):
    """A ring: 32k tokens over four, heads over two; on v6e also sequences and heads that are split.

    Kernels are inside; keys and values are passed on in the ring, and nothing is sent without it.
    """
    ring = {
        "mesh": [2, 4], "queries": 1 << 15, "gradient": True, "block_q": 256, "block_k": 256,
        "mask": "causal" if chip in ("v5e", "v6e") else "window",
        "specs": [[None, "model", "data"], [None, "model", "data"]],
    }  # fmt: skip
    split = {
        "mesh": [2, 4], "batch": 2, "queries": 4096, "gradient": True, "mask": "bigbird",
        "specs": [["data", None, "model"], ["data", None, "model"]],
    }  # fmt: skip
    sent = [(ring, {"collective-permute"}), *([(split, set())] if chip == "v6e" else [])]
    results = aot.compile_cases(chip, [(PROGRAMS + "attend", options) for options, _ in sent])
    assert [r["error"] for r in results] == [None] * len(sent)
    for (_, collectives), result in zip(sent, results, strict=True):
        assert set(re.findall(COLLECTIVES, result["hlo"])) == collectives
        for kernel in ("forward", "dq", "dkv"):
            assert f"sparse_attention_{kernel}" in result["hlo"]
        assert "tpu_custom_call" in result["hlo"]


# Options that used to leave too few registers, with all that a gradient needs or all that waits.
SPILLED = {
    "v6e": [{"span": True, "gradient": True}, {"cache": "int8", "queries": 16384}],
    "7x": [{"soft_cap": 100.0, "gradient": True}],
}


@pytest.mark.slow
@pytest.mark.skipif(not aot.available(), reason="the TPU compiler (libtpu) is not installed")
@pytest.mark.parametrize("chip", SPILLED)
def test_options_spill_nothing(chip, tmp_path):
    results = aot.compile_cases(chip, [(PROGRAMS + "attend", x) for x in SPILLED[chip]], tmp_path)
    assert not any(result["error"] for result in results)
    found = schedules.schedules(tmp_path, "*sparse_attention")
    # Two more kernels where there is a gradient.
    assert len(found) == sum(3 if "gradient" in x else 1 for x in SPILLED[chip])
    assert not [(s.name, loop.spills) for s in found for loop in s.loops if loop.spills]


@pytest.mark.slow
@pytest.mark.skipif(not aot.available(), reason="the TPU compiler (libtpu) is not installed")
def test_decoding_spills_nothing(tmp_path):
    """Codes that are converted, and those past a sequence's end, took more than the registers."""
    # Of one sequence, whose number the compiler knows. And floats that are split.
    cases = [{"cache": "float8_e4m3fn", "batch": 1}, {"dtype": "float32"}]
    results = aot.compile_cases("v6e", [(PROGRAMS + "decode", x) for x in cases], tmp_path)
    found = schedules.schedules(tmp_path, "sparse_attention_decode")
    assert not any(result["error"] for result in results) and len(found) == len(cases)
    assert all(len(schedule.loops) > 1 for schedule in found)
    assert not any(loop.spills for schedule in found for loop in schedule.loops)
