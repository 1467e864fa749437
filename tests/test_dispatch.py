"""dispatch: a model function on compressed parameters, in every setting a function can be in."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxcomp as jc
from jaxcomp.formats import (
    NM,
    Affine,
    Codebook,
    CompressedArray,
    DenseColumns,
    Float,
    InputQuant,
    InputScale,
    Int,
    quantize,
)
from jaxcomp.quantization import RTN
from jaxcomp.recipe import Recipe
from jaxcomp.step import Activation
from tests.graph.test_sites import CASES


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def rtn(apply, params, *inputs, fmt=None, activation=None, include=("*", "re:.+")):
    """Every weight rounded to nearest, embeddings too."""
    step = RTN(format=fmt or Int(8), activation=activation, include=include)
    return jc.compress(apply, params, Recipe(steps=(step,)), [inputs]).params


UNCOMPRESSIBLE_GROUPS = {"convolution": Int(8), "ragged": Int(8)}


@pytest.mark.parametrize("case", CASES)
def test_equals_dequantize_then_compute(case):
    apply, params, x, _ = CASES[case]
    include = ("re:w|a",) if "b" in params and params["b"].ndim == 2 else ("re:.+",)
    if "a" in params:
        include = ("a", "b")
    compressed = rtn(apply, params, x, include=include)
    assert any(isinstance(v, CompressedArray) for v in compressed.values())
    dense = jc.materialize(compressed)
    expected = jax.tree.leaves(jax.jit(apply)(dense, x))
    for got in (jc.dispatch(apply)(compressed, x), jax.jit(jc.dispatch(apply))(compressed, x)):
        for a, b in zip(expected, jax.tree.leaves(got), strict=True):
            np.testing.assert_allclose(
                np.asarray(a, np.float32), np.asarray(b, np.float32), atol=1e-5, rtol=1e-5
            )


def test_weight_only_is_bitwise_dequantize_then_matmul():
    apply = lambda p, x: x @ p["w"]  # noqa: E731
    params = {"w": normal(64, 32)}
    compressed = rtn(apply, params, normal(4, 64), fmt=Int(4, group_size=32))
    x = normal(4, 64, seed=1)
    expected = jax.jit(lambda p, x: apply(jc.materialize(p), x))(compressed, x)
    np.testing.assert_array_equal(jax.jit(jc.dispatch(apply))(compressed, x), expected)


def test_dense_params_are_left_to_apply():
    calls = []
    fast = jc.dispatch(lambda p, x: (calls.append(1), x @ p["w"])[1])
    np.testing.assert_array_equal(fast({"w": jnp.eye(3)}, jnp.ones((2, 3))), jnp.ones((2, 3)))
    assert len(calls) == 1


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_integer_matmul_equals_simulated(bits, symmetric):
    """int8 x int8 -> int32 and the zero-point corrections, against float64 arithmetic."""
    apply = lambda p, x: x @ p["w"]  # noqa: E731
    params = {"w": normal(64, 32)}
    fmt = Int(bits, group_size=32, symmetric=symmetric, full_range=not symmetric)
    act = Activation(format="int8", granularity="token", symmetric=symmetric)
    x = normal(5, 64, seed=1)
    compressed = rtn(apply, params, x, fmt=fmt, activation=act)
    fast = jc.dispatch(apply, "int8")
    got = fast(compressed, x)
    # Independent: quantize the tokens in NumPy, multiply in float64.
    low, high = np.asarray(x).min(-1, keepdims=True), np.asarray(x).max(-1, keepdims=True)
    if symmetric:
        scale = np.maximum(-low, high) / np.float32(127)
        rounded = np.clip(np.round(np.asarray(x) / scale), -127, 127) * scale
    else:
        low, high = np.minimum(low, 0), np.maximum(high, 0)
        scale = (high - low) / np.float32(255)
        zero = -128 - np.round(low / scale)
        rounded = (np.clip(np.round(np.asarray(x) / scale) + zero, -128, 127) - zero) * scale
    expected = rounded.astype(np.float64) @ np.asarray(jc.materialize(compressed)["w"], np.float64)
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)


def test_fp8_matmul():
    apply = lambda p, x: x @ p["w"]  # noqa: E731
    params, x = {"w": normal(64, 32)}, normal(5, 64, seed=1)
    compressed = rtn(apply, params, x, fmt=Float("e4m3"), activation=Activation(format="e4m3"))
    (choice,) = jc.dispatch(apply).report(compressed, x)  # On a CPU.
    assert choice.implementation == "parts" and "float8" in choice.reason
    fast = jc.dispatch(apply, "fp8")
    exact = np.asarray(x, np.float64) @ np.asarray(params["w"], np.float64)
    error = np.linalg.norm(fast(compressed, x) - exact) / np.linalg.norm(exact)
    # Each factor is off by at most 2^-4 relative, on average about 2^-5 / sqrt(3) each.
    assert 0 < error < 2 * 2.0**-4


def test_several_parts_and_scaled_inputs():
    w, x = normal(32, 64), normal(3, 5, 64, seed=1)
    scale = jnp.exp(normal(64, seed=2))
    columns = DenseColumns(normal(32, 3, seed=3), jnp.array([1, 7, 63]), in_size=64)
    inner = quantize(Int(8, full_range=False), w / scale)
    parts = (InputScale(InputQuant(inner, spec=Activation()), scale), columns)
    array = CompressedArray.from_matrix(parts, (64, 32), jnp.float32, (), (1,), (0,))
    apply = lambda p, x: x @ p["w"]  # noqa: E731
    got = jc.dispatch(apply)({"w": array}, x)
    scaled = np.asarray(x * scale, np.float64)
    step = np.abs(scaled).max(-1, keepdims=True) / 127
    rounded = np.round(scaled / step) * step
    expected = rounded @ np.asarray(inner.materialize(), np.float64).T
    expected += np.asarray(x, np.float64) @ np.asarray(columns.materialize(), np.float64).T
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_experts_with_quantized_inputs():
    apply = lambda p, x: jnp.einsum("ebi,eio->beo", x, p["w"])  # noqa: E731
    params, x = {"w": normal(3, 16, 8)}, normal(3, 4, 16, seed=1)
    fmt = Int(8, full_range=False)
    compressed = rtn(apply, params, x, fmt=fmt, activation=Activation())
    got = jc.dispatch(apply)(compressed, x)
    one = lambda p, x: x @ p["w"]  # noqa: E731
    for e in range(3):
        alone = rtn(one, {"w": params["w"][e]}, x[e], fmt=fmt, activation=Activation())
        np.testing.assert_allclose(got[:, e], jc.dispatch(one)(alone, x[e]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fmt", [Int(4, group_size=8), Int(8, symmetric=False), Float("mxfp4")])
def test_look_ups_dequantize_only_their_rows(fmt):
    params, ids = {"w": normal(10, 32)}, jnp.array([[0, 9], [3, -1], [10, 99]])

    def apply(p, i):
        return p["w"][i], jnp.take(p["w"], i, axis=0), p["w"].at[i].get(mode="clip")

    compressed = rtn(apply, params, ids, fmt=fmt, include=("re:.+",))
    fast = jc.dispatch(apply)
    assert {c.implementation for c in fast.report(compressed, ids)} == {"rows"}
    expected = apply(jc.materialize(compressed), ids)
    for a, b in zip(expected, fast(compressed, ids), strict=True):
        np.testing.assert_array_equal(a, b)
    text = str(jax.make_jaxpr(fast)(compressed, ids))
    assert "f32[10,32]" not in text  # the table is never dense


def test_gradient_to_the_input():
    apply = lambda p, x: jnp.tanh(x @ p["w"]).sum()  # noqa: E731
    params, x = {"w": normal(16, 8)}, normal(4, 16, seed=1)
    compressed = rtn(apply, params, x, fmt=Int(4, group_size=8))
    got = jax.grad(lambda x: jc.dispatch(apply)(compressed, x))(x)
    expected = jax.grad(lambda x: apply(jc.materialize(compressed), x))(x)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_vmap_over_stacked_compressed_weights():
    apply = lambda p, x: x @ p["w"]  # noqa: E731
    params, x = {"w": normal(3, 16, 8)}, normal(4, 16, seed=1)
    stacked = rtn(lambda p, x: jax.vmap(apply, (0, None))(p, x), params, x)
    experts = rtn(lambda p, x: jnp.einsum("ebi,eio->ebo", x, p["w"]), params, normal(3, 4, 16))
    got = jax.vmap(jc.dispatch(apply), (0, None))(experts, x)
    expected = jnp.einsum("bi,eio->ebo", x, jc.materialize(experts)["w"])
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    assert stacked["w"].shape == (3, 16, 8)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_under_a_mesh(kind):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
    apply = lambda p, x: jnp.tanh(x @ p["w"])  # noqa: E731
    x = normal(8, 16)
    compressed = rtn(apply, {"w": normal(16, 8)}, x)
    expected = jc.dispatch(apply)(compressed, x)
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, NamedSharding(mesh, P("data")))
        got = jax.jit(jc.dispatch(apply))(compressed, placed)
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)
    assert not got.sharding.is_fully_replicated


@pytest.mark.parametrize("spec, reported", [(P(), "materialize"), (P(None, "b"), "materialize")])
def test_inside_shard_map(spec, reported):
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)

    def apply(p, x):
        out = P("a", "b") if len(spec) else P("a")
        fn = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(P("a"), spec), out_specs=out)
        return fn(x, p["w"])

    x = normal(4, 16)
    compressed = rtn(apply, {"w": normal(16, 8)}, x)
    got = jax.jit(jc.dispatch(apply))(compressed, x)
    np.testing.assert_allclose(got, x @ jc.materialize(compressed)["w"], rtol=1e-5, atol=1e-5)
    assert {c.implementation for c in jc.dispatch(apply).report(compressed, x)} == {reported}


def test_a_quantized_input_is_not_lost_inside_shard_map():
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)

    def apply(p, x):
        specs = (P("a"), P(None, "b"))
        fn = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=specs, out_specs=P("a", "b"))
        return fn(x, p["w"])

    x = normal(4, 16)
    compressed = rtn(apply, {"w": normal(16, 8)}, x, activation=Activation())
    with pytest.raises(jc.JaxcompError, match=r"w \(16, 8\): enters a shard_map with the spec"):
        jc.dispatch(apply)(compressed, x)


def test_weights_in_odd_places_are_reported():
    apply = lambda p, x: x @ p["w"] + jnp.sum(p["w"] ** 2)  # noqa: E731
    params, x = {"w": normal(16, 8)}, normal(4, 16)
    compressed = {"w": rtn(lambda p, x: x @ p["w"], params, x)["w"]}
    fast = jc.dispatch(apply)
    np.testing.assert_allclose(
        fast(compressed, x), apply(jc.materialize(compressed), x), rtol=1e-5, atol=1e-5
    )
    kinds = [c.kind for c in fast.report(compressed, x)]
    assert len(kinds) == 2 and kinds[0] == "dot_general" and kinds[1] != "dot_general"


def test_forcing_an_implementation():
    apply = lambda p, x: x @ p["w"]  # noqa: E731
    x = normal(4, 16)
    compressed = rtn(apply, {"w": normal(16, 8)}, x, activation=Activation())
    got = [jc.dispatch(apply, name)(compressed, x) for name in ("int8", "parts")]
    np.testing.assert_allclose(*got, rtol=1e-5, atol=1e-5)
    with pytest.raises(jc.JaxcompError, match=r"'fp8' does not fit .*quantized to int8"):
        jc.dispatch(apply, "fp8")(compressed, x)
    with pytest.raises(jc.JaxcompError, match="int8, fp8, kernel, parts, rows"):
        jc.dispatch(apply, "triton")
    with pytest.raises(jc.JaxcompError, match="apply is a int; give a function"):
        jc.dispatch(3)
    whole = jc.compress(apply, {"w": normal(16, 8)}, jc.presets.w4a16_rtn(group_size=8), [(x,)])
    with pytest.raises(jc.JaxcompError, match=r"params is a Result, .*; give its .params"):
        jc.dispatch(apply)(whole, x)


@pytest.mark.parametrize("fmt", [Int(3), Codebook("nf4", group_size=8), NM(2, 4), Float("mxfp4")])
def test_every_format_runs_in_a_scan(fmt):
    def apply(p, x):
        return jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["w"])[0]

    from jaxcomp.pruning import Magnitude

    params, x = {"w": normal(2, 32, 32)}, normal(4, 32)
    step = Magnitude(n=2, m=4) if isinstance(fmt, NM) else RTN(format=fmt)
    compressed = jc.compress(apply, params, Recipe(steps=(step,)), [(x,)]).params
    expected = apply(jc.materialize(compressed), x)
    np.testing.assert_allclose(jax.jit(jc.dispatch(apply))(compressed, x), expected, atol=1e-5)


def test_static_arguments_and_keywords():
    def apply(p, x, flip, *, power=1, name="y"):
        y = (x @ p["w"]) ** power
        return {name: -y if flip else y}

    x = normal(4, 16)
    compressed = rtn(lambda p, x: x @ p["w"], {"w": normal(16, 8)}, x)
    got = jc.dispatch(apply)(compressed, x, True, power=2, name="z")
    expected = apply(jc.materialize(compressed), x, True, power=2, name="z")
    np.testing.assert_allclose(got["z"], expected["z"], rtol=1e-5, atol=1e-5)


def test_no_retrace_under_jit():
    traces = []

    def apply(p, x):
        traces.append(1)
        return x @ p["w"]

    compressed = rtn(lambda p, x: x @ p["w"], {"w": normal(16, 8)}, normal(4, 16))
    fast = jax.jit(jc.dispatch(apply))
    for seed in range(3):
        fast(compressed, normal(4, 16, seed=seed))
    assert len(traces) == 1


def test_affine_codes_stay_packed_in_the_jitted_arguments():
    apply = lambda p, x: x @ p["w"]  # noqa: E731
    compressed = rtn(apply, {"w": normal(64, 32)}, normal(4, 64), fmt=Int(4))
    part = compressed["w"].parts[0]
    assert isinstance(part, Affine) and part.values.nbytes == 64 * 32 // 2
    lowered = jax.jit(functools.partial(jc.dispatch(apply))).lower(compressed, normal(4, 64))
    assert "ui8" in lowered.as_text().splitlines()[1] or "ui8" in lowered.as_text()


PACKED = [
    Int(4, 32, scale_dtype="bfloat16"),
    Int(4, 32, symmetric=False),
    Int(2, 16),
    Int(8),
    Float("e4m3"),
    Codebook("nf4", group_size=16),
    Codebook("nf4", group_size=16, double_quantization=True),
]


@pytest.mark.parametrize("fmt", PACKED)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_packed_operands_mean_what_the_parts_mean(fmt, dtype):
    """The kernels' operation on the parts' own arrays against the dense weight, stacked too."""
    apply = lambda p, x: jnp.einsum("eti,eio->eto", x @ p["a"], p["b"])  # noqa: E731
    params = {"a": normal(2, 64, 64), "b": normal(2, 64, 24, seed=1)}
    x = normal(2, 5, 64, seed=2)
    compressed = rtn(apply, params, x, fmt=fmt)
    fast = jc.dispatch(apply, "kernel")
    report = fast.report(compressed, x)
    assert {c.implementation for c in report} == {"kernel"}
    assert {c.reason for c in report} == {
        "asked for, and XLA runs it: the chip is cpu, not a TPU or GPU"
    }
    expected = apply(jc.materialize(compressed), x.astype(dtype).astype(jnp.float32))
    got = jax.jit(fast)(compressed, x.astype(dtype))
    scale = float(jnp.abs(expected).max())
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    np.testing.assert_allclose(got / scale, expected / scale, atol=tolerance)


@pytest.mark.parametrize(
    "fmt, reason",
    [(Int(3), "3 bits"), (Float("mxfp4"), "mxfp4"), (Int(16), "16 bits")],
)
def test_formats_without_a_kernel_say_so(fmt, reason):
    apply = lambda p, x: x @ p["w"]  # noqa: E731
    x = normal(4, 64)
    compressed = rtn(apply, {"w": normal(64, 32)}, x, fmt=fmt)
    with pytest.raises(jc.JaxcompError, match=f"'kernel' does not fit .*{reason}"):
        jc.dispatch(apply, "kernel")(compressed, x)
    (choice,) = jc.dispatch(apply).report(compressed, x)
    assert choice.implementation == "materialize" and reason in choice.reason
