"""Every kernel through the real compiler, for each chip, at Llama-3-8B's heads."""

import re

import pytest

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
def test_a_ring_of_kernels_compiles():
    """32k tokens over four devices, heads over two: kernels inside, keys and values passed on."""
    ring = {
        "mesh": [2, 4], "queries": 1 << 15, "gradient": True, "block_q": 256, "block_k": 256,
        "specs": [[None, "model", "data"], [None, "model", "data"]],
    }  # fmt: skip
    (result,) = aot.compile_cases("v5e", [(PROGRAMS + "attend", ring)])
    assert result["error"] is None
    used = set(re.findall(COLLECTIVES, result["hlo"]))
    assert used == {"collective-permute"} and "tpu_custom_call" in result["hlo"]
    for kernel in ("forward", "dq", "dkv"):
        assert f"sparse_attention_{kernel}" in result["hlo"]
