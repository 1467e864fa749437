"""Every kernel through the real compiler, for each chip, at Llama-3-8B's heads."""

import pytest

from tests.kernels import aot

PROGRAMS = "tests.kernels.sparse_attention.programs:"
CASES = [
    ("attend", {"gradient": True}),
    ("attend", {"gradient": True, "queries": 16384, "mask": "window"}),
    ("attend", {
        "gradient": True, "queries": 2000, "mask": "bigbird", "segments": True, "soft_cap": 30.0,
        "span": True,
    }),
    ("attend", {"mask": "heads", "dim": 64, "dtype": "float32"}),
    ("attend", {"mask": "strided", "cache": "int8"}),
    ("attend", {"cache": "float8_e4m3fn"}),
    ("decode", {}),
    ("decode", {"cache": "int8", "queries": 4, "capacity": 5000}),
    ("decode", {"cache": "float8_e4m3fn"}),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not aot.available(), reason="the TPU compiler (libtpu) is not installed")
@pytest.mark.parametrize("chip", aot.TOPOLOGIES)
def test_compiles(chip):
    results = aot.compile_cases(chip, [(PROGRAMS + name, options) for name, options in CASES])
    errors = [(case, r["error"]) for case, r in zip(CASES, results, strict=False) if r["error"]]
    assert not errors and len(results) == len(CASES)
    assert all("tpu_custom_call" in result["hlo"] for result in results)
