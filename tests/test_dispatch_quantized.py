"""Sites whose input is quantized as well, on the kernels: W4A8, W8A8 and float8."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxcomp.kernels import chips

import jaxcomp as jc
from jaxcomp import packed
from jaxcomp.errors import JaxcompError
from jaxcomp.formats import CompressedArray, Float, InputQuant, InputScale, Int, quantize
from jaxcomp.quantization import RTN
from jaxcomp.recipe import Recipe
from jaxcomp.step import Activation
from tests.kernels import aot
from tests.test_dispatch_sharded import auto_mesh, moved

STATIC = Activation(granularity="tensor", dynamic=False)
CASES = {
    "w4a8 in groups": (Int(4, 32, symmetric=False), Activation()),
    "w8a8 in groups": (Int(8, 128), Activation()),
    "w8a8 of whole rows": (Int(8), Activation()),
    "w4a8, one scale a tensor": (Int(4, 128), Activation(granularity="tensor")),
    "w4a8, static": (Int(4, 128), STATIC),
    "w4, float8 inputs": (Int(4, 128), Activation(format="e4m3")),
    "float8": (Float("e4m3"), Activation(format="e4m3")),
}


def apply(params, x):
    return x @ params["w"]


def compressed(fmt, activation, shape=(256, 192), smooth=None):
    """A random ``(*stack, in, out)`` weight with a quantized input, static scales from 0.02 on."""
    *stack, size, out = shape
    w = jax.random.normal(jax.random.key(0), (*stack, out, size))
    scale = 0.02 * (1 + jnp.arange(math.prod(stack))).reshape(stack)
    scale = None if activation.dynamic else scale
    part = InputQuant(quantize(fmt, w), spec=activation, scale=scale)
    if smooth is not None:
        part = InputScale(part, smooth)
    axes = tuple(range(len(stack)))
    return {
        "w": CompressedArray.from_matrix(
            part, shape, jnp.float32, axes, (len(stack) + 1,), (len(stack),)
        )
    }


def rows(*shape, seed=1):
    x = jax.random.normal(jax.random.key(seed), shape)
    return x * jnp.exp(jax.random.normal(jax.random.key(seed + 1), (*shape[:-1], 1)))


def fake_quantized(params, x, axes=-1):
    """Float64 product of dequantized inputs and weights, and sums of its terms' magnitudes."""
    part = params["w"].parts[0]
    x32 = np.asarray(x, np.float32)
    top = np.float32({"int8": 127, "e4m3": 448}[part.spec.format])
    axes = axes if part.spec.granularity == "token" else None
    scale = np.abs(x32).max(axes, keepdims=True) / top
    if part.scale is not None:
        scale = np.asarray(part.scale)
    codes = np.clip(x32 / scale, -top, top)
    if part.spec.format == "int8":
        codes = np.round(codes)
    else:
        codes = np.asarray(jnp.asarray(codes).astype(jnp.float8_e4m3fn), np.float32)
    x64 = codes.astype(np.float64) * scale
    w64 = np.asarray(params["w"].materialize(), np.float64)
    return x64 @ w64, np.abs(x64) @ np.abs(w64)


def assert_rounding(got, expected, magnitude, terms=256):
    """Equal up to the rounding of sums of so many float32 terms."""
    limit = terms * np.finfo(np.float32).eps * magnitude
    assert np.all(np.abs(np.asarray(got, np.float64) - expected) <= limit)


@pytest.fixture
def on_tpu(monkeypatch):
    """Makes this machine count as a TPU whose kernels are interpreted; counts their calls."""
    calls = []
    run = packed.kernels.quantized_matmul

    def interpreted(*operands, **options):
        calls.append(options["activation_dtype"])
        options |= {"implementation": "mosaic_tpu", "interpret": pltpu.InterpretParams()}
        return run(*operands, **options)

    def become(name):
        monkeypatch.setattr(chips, "chip_of", lambda *_: chips.BY_NAME[name])
        monkeypatch.setattr(packed.kernels, "quantized_matmul", interpreted)
        return calls

    return become


@pytest.mark.parametrize("name", CASES)
def test_in_xla_as_simulated(name):
    params, x = compressed(*CASES[name]), rows(2, 3, 256)
    got = jax.jit(jc.dispatch(apply, "kernel"))(params, x)
    assert_rounding(got, *fake_quantized(params, x))


@pytest.mark.parametrize("name", ["w4a8 in groups", "w4a8, static", "float8"])
def test_on_the_kernel_as_simulated(name, on_tpu):
    fmt, activation = CASES[name]
    x = rows(2, 3, 256)
    params = compressed(fmt, activation)
    calls = on_tpu("v5e")
    fast = jc.dispatch(apply, "kernel")
    ready = fast.prepare(params, x)
    assert isinstance(ready["w"].parts[0].part, packed.Prepared)
    assert_rounding(jax.jit(fast)(ready, x), *fake_quantized(params, x))
    assert calls == ["int8" if activation.format == "int8" else "float8_e4m3fn"]


def test_which_products_go_to_the_kernel(on_tpu):
    """XLA multiplies whole rows of int8 as well as a kernel; all else it would unpack in memory."""
    on_tpu("v5e")
    x = rows(3, 256)
    told = {}
    for name, (fmt, activation) in CASES.items():
        params = compressed(fmt, activation)
        told[name] = jc.dispatch(apply).report(params, x)[0].implementation
    assert told == dict.fromkeys(CASES, "kernel") | {"w8a8 of whole rows": "int8"}
    on_tpu("7x")  # Has no integer arithmetic.
    for name, expected in (("w4a8 in groups", "int8"), ("w4, float8 inputs", "kernel")):
        params = compressed(*CASES[name])
        assert jc.dispatch(apply).report(params, x)[0].implementation == expected


@pytest.mark.parametrize(
    ("fmt", "activation", "reason"),
    [
        (Int(4), Activation(symmetric=False), "the quantized input has zero points"),
        (Int(4), Activation(format="int4"), "no kernel multiplies inputs of int4 with int4"),
        (Int(8), Activation(format="e4m3"), "no kernel multiplies inputs of e4m3 with int8"),
        (Float("e4m3"), Activation(), "no kernel multiplies inputs of int8 with fp8"),
    ],
)
def test_what_does_not_fit_is_told(fmt, activation, reason):
    x = rows(3, 256)
    params = compressed(fmt, activation)
    with pytest.raises(JaxcompError, match=f"kernel: {reason}"):
        jc.dispatch(apply, "kernel").report(params, x)


def test_stacks_and_scaled_inputs(on_tpu):
    """Scanned layers with a static scale each, and a smoothing scale before the quantization."""

    def scanned(params, x):
        return jax.lax.scan(lambda _, a: (None, a[1] @ a[0]), None, (params["w"], x))[1]

    x = rows(2, 3, 128)
    smooth = jnp.exp(jax.random.normal(jax.random.key(7), (2, 128)))
    plain = compressed(Int(4, 32), STATIC, (2, 128, 64))
    params = compressed(Int(4, 32), STATIC, (2, 128, 64), smooth)
    each = [
        fake_quantized(jax.tree.map(lambda a, i=i: a[i], plain), x[i] * smooth[i]) for i in range(2)
    ]
    calls = on_tpu("v5e")
    got = jax.jit(jc.dispatch(scanned, "kernel"))(params, x)
    assert_rounding(got, *np.array(each).swapaxes(0, 1), 128)
    assert calls == ["int8"]


def test_gradient_goes_straight_through():
    x = rows(3, 256)
    params = compressed(Int(4, 32), Activation())
    fast = jc.dispatch(apply, "kernel")
    got = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(fast(params, x)))))(x)
    expected, magnitude = fake_quantized(params, x)
    w64 = np.asarray(params["w"].materialize(), np.float64)
    slack = 256 * np.finfo(np.float32).eps * magnitude  # What the argument of cos is off by.
    off = np.abs(np.asarray(got) - np.cos(expected) @ w64.T)
    rounding = 192 * np.finfo(np.float32).eps * (np.ones_like(expected) @ np.abs(w64.T))
    assert np.all(off <= slack @ np.abs(w64.T) + rounding)


RULES = {"column": [("w", P(None, "model"))], "row": [("w", P("model"))]}


@pytest.mark.parametrize(
    ("name", "rule"),
    [("w4a8 in groups", "column"), ("w4a8 in groups", "row"), ("w4a8, static", "row")],
)
def test_on_a_mesh_as_on_one_device(name, rule):
    """Also where devices hold a part of a row each, its scale is that of the whole row."""
    fmt, activation = CASES[name]
    x = rows(4, 256)
    params = compressed(fmt, activation)
    expected, magnitude = fake_quantized(params, x)
    mesh = auto_mesh()
    placed = jc.shard(params, mesh, RULES[rule])
    fast = jax.jit(jc.dispatch(apply, "kernel", sharding=RULES[rule]))
    x = jax.device_put(x, NamedSharding(mesh, P("data")))
    assert_rounding(fast(placed, x), expected, magnitude)
    sent = moved(fast.lower(placed, x).compile().as_text())
    assert all(size < 256 * 192 // 4 for size in sent)  # bytes of a device's part of the weight


def mlp(params, x):
    return jax.nn.silu(x @ params["up"]) @ params["down"]


def on_tpus(mesh, chip, name, rules):
    """A W4A8 multilayer perceptron's program on eight chips or on one."""
    fmt, activation = CASES[name]
    x = jnp.ones((16, 512), jnp.bfloat16)
    params = {"up": jnp.ones((512, 2048), x.dtype), "down": jnp.ones((2048, 512), x.dtype)}
    recipe = Recipe(steps=(RTN(format=fmt, activation=activation),))
    params = jc.compress(mlp, params, recipe, [(x,)], progress=False).params
    rules = [("up", P(None, "model")), ("down", P("model"))] if rules else None
    place = functools.partial(jc.sharding.shardings, params, rules or [("*", P())], mesh)
    placed = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), params, place()
    )
    fast = jc.dispatch(mlp, sharding=rules, mesh=mesh if rules else None)
    spec = NamedSharding(mesh, P("data") if rules else P())
    x = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=spec)
    assert {c.implementation for c in fast.report(placed, x)} == {"kernel"}
    return fast, (placed, x)


@pytest.mark.slow
@pytest.mark.skipif(not aot.available(), reason="the TPU compiler is not installed")
def test_compiles_for_tpus():
    make = "tests.test_dispatch_quantized:on_tpus"
    requests = [
        {"name": "w4a8 in groups", "rules": None},
        {"name": "w4a8, static", "rules": True, "mesh": (2, 4)},
        {"name": "float8", "rules": True, "mesh": (2, 4)},
    ]
    results = aot.compile_cases("v5e", [(make, {"chip": "v5e"} | r) for r in requests])
    for request, result in zip(requests, results, strict=True):
        assert result["error"] is None, (request, result["error"])
        assert len(re.findall("tpu_custom_call", result["hlo"])) >= 2, request
        assert all(size < 512 * 2048 // 8 for size in moved(result["hlo"])), request
