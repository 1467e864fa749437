"""Dispatch on Hopper GPUs: kernels run where a table of measurements, or the caller, says so."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxcomp.kernels import chips, tuning

import jaxcomp as jc
from jaxcomp import packed, packed_sparse
from jaxcomp.errors import JaxcompError
from jaxcomp.formats import NM, CompressedArray, Float, InputQuant, Int, Sparse, quantize, sparse
from jaxcomp.step import Activation
from tests.kernels import aot_gpu
from tests.kernels.sparse_attention.test_gpu import OLD, needs_mosaic

# Format of the weight and of its input, and what the table calls them and XLA's way.
CASES = {
    "W4A16": (Int(4, 128), None, "int4", None, "xla"),
    "W4A8": (Int(4, 128), "int8", "int4", "int8", "codes"),
    "W8A8": (Int(8), "int8", "int8", "int8", "codes"),
    "fp8": (Float("e4m3"), "e4m3", "fp8", "e4m3", "codes"),
    "2:4": (NM(2, 4), None, "2:4", None, "xla"),
    "2:4 int4": (NM(2, 4, Int(4, 128)), None, "2:4 int4", None, "xla"),
    "blocks": (Sparse(), None, "blocks", None, "xla"),
    "experts": (Int(4, 128), None, "int4", None, "xla"),
}
SPARSE = ("2:4", "2:4 int4", "blocks")
FEW, MANY = 16, 2048


def apply(params, x):
    w = params["w"]
    return x @ w if len(w.shape) == 2 else jax.lax.ragged_dot(x, w, jnp.array([5, 0, 11]))


def weight(name, size=256, out=128):
    """A leaf (in, out), or one for each of three experts."""
    fmt, kind, *_ = CASES[name]
    stack = (3,) if name == "experts" else ()
    w = jax.random.normal(jax.random.key(0), (*stack, out, size))
    if name in SPARSE:
        input = jnp.arange(size)
        kept = input < 128 if name == "blocks" else input % 4 < 2
        kept = jnp.broadcast_to(kept, w.shape)
        part = packed_sparse.listed(sparse.quantize(fmt, w.astype(jnp.bfloat16), kept))
    else:
        part = quantize(fmt, w)
    if kind is not None:
        part = InputQuant(part, spec=Activation(format=kind))
    axes = [(i,) for i in range(len(stack) + 2)]
    return CompressedArray.from_matrix(
        part, (*stack, size, out), jnp.bfloat16, sum(axes[:-2], ()), axes[-1], axes[-2]
    )


def rows(count, dtype=jnp.bfloat16, size=256):
    return jax.ShapeDtypeStruct((count, size), dtype)


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Measurements by which the kernel wins with few rows, and loses with many."""
    found = {"products": [], "sparse": [], "experts": []}
    for name, (_, _, format, kind, other) in CASES.items():
        for m, kernel in ((FEW, 1.0), (MANY, 3.0)):
            entry = {"format": format, "activation": kind, "m": m, "n": 128, "k": 256}
            entry["group_size"] = 128 if "int4" in format else 256
            entry |= {"density": 0.5} if format == "blocks" else {}
            list_of = name if name in found else "sparse" if name in SPARSE else "products"
            found[list_of].append(entry | {"seconds": {"kernel": kernel, other: 2.0}})
    path = tmp_path / "tuned.json"
    devices = {"h100": found}
    path.write_text(json.dumps({"version": tuning.VERSION, "devices": devices}))
    monkeypatch.setenv(tuning.VARIABLE, str(path))


@pytest.fixture
def hopper(monkeypatch):
    """Programs are traced for a GPU that is not here."""
    monkeypatch.setattr(chips, "chip_of", lambda *arrays: chips.H100)


def kernels_of(function, *arguments) -> int:
    """Mosaic kernels in a traced function."""
    return str(jax.make_jaxpr(function)(*arguments)).count("mpmd_map[")


@needs_mosaic
@pytest.mark.parametrize("name", CASES)
def test_the_table_decides(name, table, hopper):
    fast, params = jc.dispatch(apply), {"w": weight(name)}
    (few,), (many,) = (fast.report(params, rows(m)) for m in (FEW, MANY))
    assert (few.implementation, few.reason) == ("kernel", "measured to be faster than XLA on h100")
    assert many.implementation != "kernel"
    assert kernels_of(fast, params, rows(FEW)) == 1
    assert kernels_of(fast, params, rows(MANY)) == 0


@pytest.mark.parametrize("name", CASES)
def test_without_measurements_xla_runs(name, hopper):
    fast, params = jc.dispatch(apply), {"w": weight(name)}
    (choice,) = fast.report(params, rows(FEW))
    assert choice.implementation != "kernel"
    if CASES[name][-1] == "xla":
        assert ("jax 0.11" if OLD else "no measurement on h100 says") in choice.reason
    assert kernels_of(fast, params, rows(FEW)) == 0


def test_which_measurements_say_nothing(table):
    def sparse(format, density=1.0):
        shape, ways = (FEW, 128, 256), ("kernel", "xla")
        return tuning.fastest("h100", format, None, shape, 256, ways, "sparse", density)

    assert sparse("blocks", 0.5) == "kernel"
    assert sparse("blocks", 0.6) is None  # more blocks than were measured
    assert sparse("2:4 int2") is None  # another format


@needs_mosaic
@pytest.mark.parametrize("name", CASES)
def test_asked_for_it_runs(name, hopper):
    fast, params = jc.dispatch(apply, "kernel"), {"w": weight(name)}
    (choice,) = fast.report(params, rows(MANY))
    assert choice.reason == "asked for: decoded next to the matrix unit of the h100"
    assert kernels_of(fast, params, rows(MANY)) == 1
    # It writes what the caller wants, not float32 to be turned and rounded.
    if "2:4" not in name:
        assert "f32[1,128,2048]" not in str(jax.make_jaxpr(fast)(params, rows(MANY)))
    # What the kernel does not take, the operation does in XLA, and the report says so.
    (choice,) = fast.report(params, rows(FEW, jnp.float32))
    words = "it multiplies bfloat16, not x of float32" if name in SPARSE else "x is float32"
    assert f"asked for, and XLA runs it: {words}" in choice.reason
    assert kernels_of(fast, params, rows(FEW, jnp.float32)) == 0


def test_asked_for_where_no_kernel_reads_it(hopper):
    part = quantize(Int(3, 128), jnp.ones((128, 256)))
    leaf = CompressedArray.from_matrix(part, (256, 128), jnp.bfloat16, (), (1,), (0,))
    with pytest.raises(JaxcompError, match="no kernel reads 3 bits"):
        jc.dispatch(apply, "kernel").report({"w": leaf}, rows(FEW))


@needs_mosaic
def test_prepared_weights_are_the_same_weights(table, hopper):
    fast, params = jc.dispatch(apply), {"w": weight("W4A16")}
    ready = fast.prepare(params, rows(FEW))
    (part,) = ready["w"].parts
    assert isinstance(part, packed.Prepared) and part.weight.layout == "mosaic_gpu/1"
    assert ready["w"].nbits == params["w"].nbits
    np.testing.assert_array_equal(ready["w"].materialize(), params["w"].materialize())
    assert kernels_of(fast, ready, rows(FEW)) == 1
    assert kernels_of(fast, ready, rows(MANY)) == 0


def compiled(name, rows, implementation=None, ready=False):
    """A dispatched product, and its arguments, for the compiler."""
    x = jax.ShapeDtypeStruct((rows, 256), jnp.bfloat16)
    fast, params = jc.dispatch(apply, implementation), {"w": weight(name)}
    params = fast.prepare(params, x) if ready else params
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), params)
    return fast, (shapes, x)


@pytest.mark.skipif(OLD or not aot_gpu.available(), reason="needs JAX's CUDA plugin and a toolkit")
def test_compiles_for_h100_with_the_kernels_inside(table):
    requests = [{"name": name, "rows": FEW} for name in CASES]
    requests += [{"name": "W4A16", "rows": FEW, "ready": True}, {"name": "W4A16", "rows": MANY}]
    cases = [(f"{__name__}:compiled", options) for options in requests]
    for options, result in zip(requests, aot_gpu.compile_cases(cases), strict=True):
        assert result["error"] is None, (options, result["error"])
        assert ('custom_call_target="mosaic_gpu' in result["hlo"]) == (options["rows"] == FEW)
