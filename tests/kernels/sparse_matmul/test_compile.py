"""Every kernel through the real compiler, for each chip."""

import re

import pytest
from jaxcomp.kernels import schedules

from tests.kernels import aot
from tests.kernels.sparse_matmul.test_sharding import COLLECTIVES

PROGRAMS = "tests.kernels.sparse_matmul.programs:"
CASES = [
    ("blocks", {"rows": 16, "block": 128, "density": 0.1}),
    ("blocks", {"rows": 16, "block": 256, "density": 0.5, "activation": "silu"}),
    ("blocks", {"rows": 2048, "block": 256, "density": 0.1, "gradient": True}),
    ("blocks", {"rows": 2048, "block": 128, "density": 0.5, "gradient": True}),
    ("blocks", {"rows": 300, "block": 128, "outputs": 700, "inputs": 900, "gradient": True,
                "activation": "gelu", "dtype": "float32"}),
    ("blocks", {"rows": 16, "block": 128, "values": "int8", "gradient": True}),
    ("nm", {"rows": 16}),
    ("nm", {"rows": 2048, "inputs": 14336, "activation": "silu"}),
    ("nm", {"rows": 16, "outputs": 700, "group_size": 128}),
    ("nm", {"rows": 2048, "group_size": 512}),
    ("nm", {"rows": 5, "dtype": "float32"}),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not aot.available(), reason="the TPU compiler (libtpu) is not installed")
@pytest.mark.parametrize("chip", aot.TOPOLOGIES)
def test_compiles(chip):
    results = aot.compile_cases(chip, [(PROGRAMS + name, options) for name, options in CASES])
    errors = [(case, r["error"]) for case, r in zip(CASES, results, strict=False) if r["error"]]
    assert not errors and len(results) == len(CASES)
    assert all("tpu_custom_call" in result["hlo"] for result in results)


@pytest.mark.slow
@pytest.mark.skipif(not aot.available(), reason="the TPU compiler (libtpu) is not installed")
def test_inner_loops_spill_nothing(tmp_path):
    # A few only, of those that had no registers before: a schedule takes long to write.
    cases = [
        {"rows": 256, "block": 512, "values": "int8", "density": 0.5},
        {"rows": 16, "block": 256, "dtype": "float32", "density": 0.5},
    ]
    cases = [(PROGRAMS + "blocks", case) for case in cases]
    floats = {"outputs": 1024, "inputs": 1024, "dtype": "float32"}
    cases += [(PROGRAMS + "nm", {"rows": rows} | floats) for rows in (16, 256)]
    results = aot.compile_cases("v6e", cases, tmp_path)
    assert not any(result["error"] for result in results)
    names = "block_sparse_matmul", "nm_matmul"
    found = [schedule for name in names for schedule in schedules.schedules(tmp_path, name)]
    assert len(found) == len(cases) and all(schedule.loops for schedule in found)
    assert not any(loop.spills for schedule in found for loop in schedule.loops)


@pytest.mark.slow
@pytest.mark.skipif(not aot.available(), reason="the TPU compiler (libtpu) is not installed")
@pytest.mark.parametrize("chip", aot.TOPOLOGIES)
def test_compiles_inside_a_sharded_program(chip):
    splits = {"outputs": ["model", None], "inputs": [None, "model"]}
    cases = [(kind, split) for kind in ("nm", "blocks") for split in splits]
    options = [{"mesh": [2, 4], "split": splits[split], "kind": kind} for kind, split in cases]
    results = aot.compile_cases(chip, [(PROGRAMS + "sharded", o) for o in options])
    for (kind, split), result in zip(cases, results, strict=True):
        assert result["error"] is None, result["error"]
        assert "tpu_custom_call" in result["hlo"]
        used = set(re.findall(COLLECTIVES, result["hlo"]))
        assert used == ({"all-reduce"} if split == "inputs" else set()), (kind, split)
