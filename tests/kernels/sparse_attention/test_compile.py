"""Every kernel through the real compiler, for each chip, at Llama-3-8B's heads."""

import re

import pytest

from tests.kernels import aot
from tests.kernels.sparse_attention.test_sharding import COLLECTIVES

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
    ("decode", {"mask": "bigbird", "queries": 2, "segments": True, "span": True}),
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
def test_a_ring_of_kernels_compiles():
    """32k tokens over four devices, heads over two: kernels inside, keys and values passed on."""
    ring = {
        "mesh": [2, 4], "queries": 1 << 15, "gradient": True, "block_q": 512, "block_k": 512,
        "specs": [[None, "model", "data"], [None, "model", "data"]],
    }  # fmt: skip
    (result,) = aot.compile_cases("v5e", [(PROGRAMS + "attend", ring)])
    assert result["error"] is None
    used = set(re.findall(COLLECTIVES, result["hlo"]))
    assert used == {"collective-permute"} and "tpu_custom_call" in result["hlo"]
    for kernel in ("forward", "dq", "dkv"):
        assert f"sparse_attention_{kernel}" in result["hlo"]
