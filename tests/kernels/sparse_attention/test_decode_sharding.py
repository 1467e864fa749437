"""Decoding with a cache on several devices against float64, and what is sent between them."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxcomp.kernels.sparse_attention import decode_attention, global_, window

from tests.kernels import aot
from tests.kernels.sparse_attention import cases
from tests.kernels.sparse_attention.test_decode import ROWS, check, check_rows, layered
from tests.kernels.sparse_attention.test_sharding import COLLECTIVES

P = PartitionSpec
KERNEL = {
    "implementation": "mosaic_tpu", "block_k": 128, "interpret": pltpu.InterpretParams(),
}  # fmt: skip
# Kind of mesh, shape of it, specs of q and of the cache, what is checked, options of the call. A
# part of the cache is 80 or 40 keys long or, for the kernel, 160: no multiple of its blocks.
CASES = {
    "length": ("Auto", (1, 4), P(), P(None, "y"), {}, {}),
    "length, by the cache's spec": ("Auto", (2, 2), None, P("x", "y"), {"soft_cap": 3.0}, {}),
    "length over two axes": (
        "Explicit", (2, 2), P(), P(None, ("x", "y")), {"mask": window(90, causal=True)}, {},
    ),
    "length and batch, int8": (
        "Explicit", (2, 2), P("x"), P("x", "y"), {"code": "int8", "dtype": "bfloat16"}, {},
    ),
    "length and heads, fp8": (
        "Auto", (2, 2), P(None, None, "x"), P(None, "y", "x"), {"code": "float8_e4m3fn"}, {},
    ),
    "length, whole key heads": (
        "Explicit", (2, 2), P(None, None, "x"), P(None, "y"), {"kv_heads": 1}, {},
    ),
    "batch and heads, layers": ("Auto", (2, 2), P("x", None, "y"), None, {}, {}),
    "length, any mask": ("Explicit", (1, 4), P(), P(None, "y"), {"rows": "segments and span"}, {}),
    "kernel, length, listed blocks": (
        "Auto", (1, 2), P(), P(None, "y"), {"rows": "bigbird"}, KERNEL,
    ),
    "kernel, length, layers": (
        "Auto", (1, 2), P(), P(None, "y"), {"mask": window(40) | global_(2)}, KERNEL,
    ),
    "kernel, length, int8": (
        "Explicit", (1, 2), P(), P(None, "y"), {"code": "int8", "dtype": "bfloat16"}, KERNEL,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_same_numbers_and_the_cache_stays_where_it_is(name):
    kind, shape, q_spec, kv_spec, checked, options = CASES[name]
    kind = AxisType[kind]
    mesh = jax.make_mesh(shape, ("x", "y"), axis_types=(kind, kind))
    told = {"q_spec": q_spec, "kv_spec": kv_spec} if kind is AxisType.Auto else {}
    of_keys = q_spec if kv_spec is None else kv_spec
    of_queries = P(of_keys[0]) if q_spec is None else q_spec

    def run(q, k, v, lengths, mask, **rest):
        more = {n: rest.pop(n) for n in tuple(rest) if isinstance(rest[n], jax.Array)}
        held = {"q": q, "k": k, "v": v, "lengths": lengths, **more}
        specs = dict.fromkeys(held, of_keys) | {"q": of_queries, "lengths": P(), "span": P()}
        specs |= {"segment_ids": P(), "kv_segment_ids": P(*of_keys[:2])}
        if "layers" in name:
            held |= layered(held)
            specs |= dict.fromkeys("kv", P(None, *of_keys)) | {"layer": P()}
        placed = {
            n: jax.device_put(x, NamedSharding(mesh, specs[n])) for n, x in held.items()
        }  # fmt: skip
        step = jax.jit(lambda held: decode_attention(**held, mask=mask, **rest, **told, **options))
        compiled = step.lower(placed).compile()
        used = set(re.findall(COLLECTIVES, compiled.as_text()))
        assert used == ({"all-reduce"} if "length" in name else set())
        return compiled(placed)

    if "rows" in checked:
        mask, more = ROWS[checked["rows"]]
        check_rows(run, mask, **more)
    else:
        check(run, **checked)


def test_what_cannot_be_split_is_an_error():
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    q, k, v = cases.operands(0, 2, 1, 30, 4, 2)
    q, k, v = (jax.device_put(x, NamedSharding(mesh, P())) for x in (q, k, v))
    for message, options in {
        "jax.reshard q": {"q_spec": P("x"), "kv_spec": P(None, "y")},
        "y would split both": {"q_spec": P(None, None, "y"), "kv_spec": P(None, "y")},
        "4 devices, which do not divide the cache's length, 30": {
            "kv_spec": P(None, ("x", "y")),
        },
        "4 devices, which do not divide the heads of k, 2": {
            "kv_spec": P(None, None, ("x", "y")),
        },
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=message):
            decode_attention(q, k, v, jnp.array([3, 4]), **options)


@pytest.mark.slow
@pytest.mark.skipif(not aot.available(), reason="the TPU compiler (libtpu) is not installed")
@pytest.mark.parametrize(
    ("chip", "cache", "ways"),
    [("v5e", None, 3), ("v5e", "int8", 3), ("v5p", "int8", 1), ("v6e", None, 1), ("7x", "int8", 1)],
)
def test_compiles_on_a_slice_without_a_gather(chip, cache, ways):
    """Llama-3-8B's heads, each of eight devices with one eighth of 32k tokens or of their heads."""
    program = "tests.kernels.sparse_attention.programs:decode"
    options = {"cache": cache, "capacity": 1 << 15, "batch": 4, "layers": 2, "mesh": [2, 4]}
    specs = [
        [None, [None, ["data", "model"]]],
        [None, ["data", "model"]],
        # Of less than four heads a device, XLA may store int8 head by head, and copy them.
        [[None, None, "data"], [None, "model", "data"]],
    ]
    specs = specs[:ways]
    requests = [(program, options | {"specs": spec}) for spec in specs]
    results = aot.compile_cases(chip, requests)
    assert [r["error"] for r in results] == [None] * len(specs)
    whole = 4 * (1 << 16) * 8 * (128 * (1 if cache else 2) + (4 if cache else 0)) * 2
    for result in results:
        assert "tpu_custom_call" in result["hlo"]
        assert set(re.findall(COLLECTIVES, result["hlo"])) == {"all-reduce"}
        # Each device is given one eighth, and reads it where it is.
        assert result["memory"]["arguments"] < 1.01 * whole / 8 + (1 << 20)
        assert result["memory"]["temporaries"] < whole / 8 / 50
