"""Products on several devices: the same numbers, and no device asks for another's weight."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxcomp.kernels.quantized_matmul import Weight, layer_of, prepare, quantized_matmul

from tests.kernels import aot
from tests.kernels.quantized_matmul import cases

P = PartitionSpec
COLLECTIVES = r"(all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
SPLITS = {
    "outputs": P("model", None),
    "inputs": P(None, "model"),
    "both": P("data", "model"),
    "outputs over two axes": P(("data", "model"), None),
}


def mesh_of(kind: AxisType) -> jax.sharding.Mesh:
    return jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind, kind))


def put(mesh, array, spec):
    return jax.device_put(array, NamedSharding(mesh, spec))


def placed(mesh, x, case, bias, split):
    """Operands where their device needs them; rows over "data" where the weight leaves it."""
    outputs, inputs = split
    rows = None if "data" in str(split) else "data"
    scales = P(inputs, outputs)
    zeros = None if case.zeros is None else put(mesh, case.zeros, scales)
    return (
        put(mesh, x, P(rows, None, inputs)),
        put(mesh, case.codes, split),
        put(mesh, case.scales, scales),
        zeros,
        put(mesh, bias, P(outputs)),
    )


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("split", SPLITS)
def test_same_numbers_and_no_gathered_weight(kind, split, rng):
    mesh, split = mesh_of(kind), SPLITS[split]
    case = cases.make(rng, "int4", (24, 256), 32, zeros=True)
    x = cases.rows(rng, (4, 3, 256), "float32")
    bias = jnp.asarray(rng.normal(size=24), jnp.float32)
    options = case.options | {"activation": "gelu"}
    if kind is AxisType.Auto:
        options["weight_spec"] = split

    def apply(x, codes, scales, zeros, bias):
        return quantized_matmul(x, codes, scales, zeros, bias=bias, **options)

    operands = placed(mesh, x, case, bias, split)
    compiled = jax.jit(apply).lower(*operands).compile()
    expected = cases.product(x.reshape(12, 256), case, bias, "gelu").reshape(4, 3, 24)
    cases.assert_close(compiled(*operands), expected, "float32")
    used = set(re.findall(COLLECTIVES, compiled.as_text()))
    assert used == ({"all-reduce"} if split[1] else set())


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_one_of_several_layers(kind, rng):
    """No device slices or asks for more than its own part of the layer's codes."""
    mesh, (outputs, inputs) = mesh_of(kind), SPLITS["both"]
    case = cases.make(rng, "int4", (24, 256), 32, stack=(3,))
    weight = prepare(*case.arguments(), **case.options, chip="v5e")
    weight = dataclasses.replace(
        weight,
        codes=put(mesh, weight.codes, P(None, outputs, inputs)),
        scales=put(mesh, weight.scales, P(None, inputs, outputs)),
    )
    x = cases.rows(rng, (4, 256), "float32")
    spec = SPLITS["both"] if kind is AxisType.Auto else None

    def apply(x, weight, index):
        return quantized_matmul(x, layer_of(weight, index), weight_spec=spec)

    with jax.set_mesh(mesh):
        operands = put(mesh, x, P(None, inputs)), weight, put(mesh, jnp.int32(2), P())
        step = jax.jit(apply)
        y, text = step(*operands), step.lower(*operands).compile().as_text()
    cases.assert_close(y, np.asarray(x, np.float64) @ case.dense[2].T, "float32")
    assert set(re.findall(COLLECTIVES, text)) == {"all-reduce"}


@pytest.mark.parametrize("split", SPLITS)
def test_gradients_are_those_of_one_device(split, rng):
    mesh, split = mesh_of(AxisType.Explicit), SPLITS[split]
    case = cases.make(rng, "int4", (24, 256), 32, zeros=True)
    # Small sums: the slope of gelu magnifies the rounding of large ones.
    x = jnp.asarray(rng.normal(size=(4, 3, 256)) * 0.01, jnp.float32)
    bias = jnp.asarray(rng.normal(size=24), jnp.float32)
    weights = jnp.asarray(rng.normal(size=(4, 3, 24)), jnp.float32)

    def loss(parts, codes, weights):
        x, scales, zeros, bias = parts
        y = quantized_matmul(x, codes, scales, zeros, bias=bias, activation="gelu", **case.options)
        return jnp.sum(y * weights)

    one = jax.grad(loss)((x, case.scales, case.zeros, bias), case.codes, weights)
    px, codes, scales, zeros, pbias = placed(mesh, x, case, bias, split)
    out = P(*px.sharding.spec[:1], None, split[0])
    several = jax.jit(jax.grad(loss))((px, scales, zeros, pbias), codes, put(mesh, weights, out))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(several), strict=True):
        cases.assert_close(np.ravel(b), np.ravel(np.asarray(a, np.float64)), "float32")


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_rows_quantized_alike_on_all_devices(kind, rng):
    """Given the scale of a whole row, its parts become the codes that one device would make."""
    mesh, split = mesh_of(kind), P(None, "model")
    case = cases.make(rng, "int4", (24, 256), 32)
    x = cases.rows(rng, (4, 3, 256), "float32")
    options = case.options | {"activation_dtype": "int8"}
    if kind is AxisType.Auto:
        options["weight_spec"] = split
    operands = (
        put(mesh, x, P("data", None, "model")),
        put(mesh, case.codes, split),
        put(mesh, case.scales, P("model", None)),
    )

    def apply(x, codes, scales):
        rows = jnp.abs(x).max(-1, keepdims=True) / 127
        return quantized_matmul(x, codes, scales, x_scales=rows, **options)

    expected = cases.product(cases.quantized_rows(x, "int8").reshape(12, 256), case)
    cases.assert_close(jax.jit(apply)(*operands), expected.reshape(4, 3, 24), "float32")


def test_one_group_a_row_split_over_inputs(rng):
    mesh = mesh_of(AxisType.Explicit)
    case = cases.make(rng, "int8", (24, 256), 256)
    x = cases.rows(rng, (4, 256), "float32")
    operands = (
        put(mesh, x, P("data", "model")),
        put(mesh, case.codes, P(None, "model")),
        put(mesh, case.scales, P(None, None)),
    )
    y = jax.jit(functools.partial(quantized_matmul, **case.options))(*operands)
    cases.assert_close(y, cases.product(x, case), "float32")


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_experts_on_different_devices(kind, rng):
    mesh, split = mesh_of(kind), P("model", None, None)
    case = cases.make(rng, "int4", (24, 64), 32, stack=(4,))
    x = cases.rows(rng, (4, 6, 64), "float32")
    operands = (
        put(mesh, x, P("model", "data", None)),
        put(mesh, case.codes, split),
        put(mesh, case.scales, split),
    )
    options = case.options | ({"weight_spec": split} if kind is AxisType.Auto else {})
    compiled = jax.jit(functools.partial(quantized_matmul, **options)).lower(*operands).compile()
    cases.assert_close(compiled(*operands), cases.product(x, case), "float32")
    assert not re.findall(COLLECTIVES, compiled.as_text())


def test_what_the_mesh_does_not_divide(rng):
    mesh = mesh_of(AxisType.Auto)
    case = cases.make(rng, "int4", (25, 192), 64)
    x = jnp.ones((4, 192))
    call = functools.partial(quantized_matmul, **case.options)
    operands = [put(mesh, a, P()) for a in (x, case.codes, case.scales)]
    with pytest.raises(ValueError, match=r"2 devices do not divide N = 25"):
        call(*operands, weight_spec=P("model", None))
    with pytest.raises(ValueError, match=r"96 of the K = 192 inputs, .* splits groups of 64"):
        call(*operands, weight_spec=P(None, "model"))
    with pytest.raises(ValueError, match=r"split as .* and the weight"):
        call(*operands, weight_spec=P(None, "model"), x_spec=P("model", None))


def test_a_mesh_on_which_the_sharding_is_not_known(rng):
    """XLA splits the product then; the kernel says why it does not run."""
    mesh = mesh_of(AxisType.Auto)
    case = cases.make(rng, "int4", (24, 256), 128)
    x = cases.rows(rng, (4, 256), "float32")
    operands = (put(mesh, x, P()), put(mesh, case.codes, P("model")), put(mesh, case.scales, P()))
    call = jax.jit(functools.partial(quantized_matmul, **case.options))
    cases.assert_close(call(*operands), cases.product(x, case), "float32")


def llama(mesh, split):
    """A product of Llama 3 8B's shape on eight devices, weight prepared, for the TPU compiler."""
    split = P(*split)
    outputs, inputs = split
    n, k = 4096, 14336

    def struct(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    codes = struct((n, k), jnp.int4, split)
    scales = struct((k // 128, n), jnp.bfloat16, P(inputs, outputs))
    weight = Weight(codes, scales, None, None, "int4", 128, (n, k), "mosaic_tpu/1")
    x = struct((16, k), jnp.bfloat16, P("data", inputs))
    return functools.partial(quantized_matmul, weight_spec=split), (x, weight)


@pytest.mark.slow
@pytest.mark.skipif(not aot.available(), reason="the TPU compiler is not installed")
@pytest.mark.parametrize("chip", aot.TOPOLOGIES)
def test_compiles_inside_a_sharded_program(chip):
    name = "tests.kernels.quantized_matmul.test_sharding:llama"
    splits = [["model", None], [None, "model"]]
    requests = [(name, {"mesh": [2, 4], "split": split}) for split in splits]
    for split, result in zip(splits, aot.compile_cases(chip, requests), strict=True):
        assert result["error"] is None, result["error"]
        assert "tpu_custom_call" in result["hlo"]
        used = set(re.findall(COLLECTIVES, result["hlo"]))
        assert used == ({"all-reduce"} if split[1] else set())
        # A device holds a quarter of the packed weight, its scales and rows, and no copy of it.
        quarter = 4096 * 14336 // 2 // 4
        assert result["memory"]["arguments"] < 1.2 * quarter
        assert result["memory"]["temporaries"] < quarter
