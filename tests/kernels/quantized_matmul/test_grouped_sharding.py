"""Products with experts' weights on several devices: the same numbers, and no weight is sent."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxcomp.kernels.quantized_matmul import Weight, grouped_quantized_matmul

from tests.kernels import aot
from tests.kernels.quantized_matmul import cases
from tests.kernels.quantized_matmul.test_grouped import product
from tests.kernels.quantized_matmul.test_sharding import COLLECTIVES, mesh_of, put

# Of experts, outputs and inputs. Rows are split over "data" where that is free.
SPLITS = {
    "experts": P("model", None, None),
    "experts over two axes": P(("data", "model"), None, None),
    "experts and outputs": P("model", "data", None),
    "experts and inputs": P("data", None, "model"),
    "inputs": P(None, None, "model"),
}
SIZES = (5, 0, 9, 3)  # of 20 rows


def placed(mesh, split, rng):
    case = cases.make(rng, "int4", (24, 128), 32, zeros=True, stack=(4,))
    x = cases.rows(rng, (20, 128), "float32") / 30
    bias = jnp.asarray(rng.normal(size=(4, 24)), jnp.float32)
    experts, outputs, inputs = split
    rows = None if "data" in str(split) else "data"
    scales = P(experts, inputs, outputs)
    operands = (
        put(mesh, x, P(rows, inputs)),
        put(mesh, jnp.array(SIZES), P(None)),
        put(mesh, case.codes, split),
        put(mesh, case.scales, scales),
        put(mesh, case.zeros, scales),
        put(mesh, bias, P(experts, outputs)),
    )
    return case, x, bias, operands


def call_of(case, kind, split):
    options = case.options | {"activation": "gelu"}
    if kind is AxisType.Auto:
        options["weight_spec"] = split

    def apply(x, sizes, codes, scales, zeros, bias):
        return grouped_quantized_matmul(x, sizes, codes, scales, zeros, bias=bias, **options)

    return apply


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("split", SPLITS)
def test_same_numbers_and_no_gathered_weight(kind, split, rng):
    mesh, split = mesh_of(kind), SPLITS[split]
    case, x, bias, operands = placed(mesh, split, rng)
    compiled = jax.jit(call_of(case, kind, split)).lower(*operands).compile()
    cases.assert_close(compiled(*operands), product(x, SIZES, case, bias, "gelu"), "float32")
    assert set(re.findall(COLLECTIVES, compiled.as_text())) == {"all-reduce"}


def test_gradients_are_those_of_one_device(rng):
    split = SPLITS["experts and inputs"]
    case, x, bias, operands = placed(mesh_of(AxisType.Auto), split, rng)
    factor = jnp.asarray(rng.normal(size=(20, 24)), jnp.float32)

    def loss(apply, parts, sizes, codes):
        x, scales, zeros, bias = parts
        # Small sums: the slope of gelu magnifies the rounding of large ones.
        return jnp.sum(factor * apply(x * 0.01, sizes, codes, scales, zeros, bias))

    one = call_of(case, AxisType.Explicit, split)
    many = call_of(case, AxisType.Auto, split)
    expected = jax.grad(functools.partial(loss, one))(
        (x, case.scales, case.zeros, bias), jnp.array(SIZES), case.codes
    )
    x, sizes, codes, scales, zeros, bias = operands
    actual = jax.jit(jax.grad(functools.partial(loss, many)))(
        (x, scales, zeros, bias), sizes, codes
    )
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(actual), strict=True):
        cases.assert_close(np.ravel(b), np.ravel(np.asarray(a, np.float64)), "float32")


def test_what_the_mesh_does_not_divide(rng):
    mesh = mesh_of(AxisType.Auto)
    case = cases.make(rng, "int4", (24, 128), 32, stack=(3,))
    operands = [put(mesh, a, P()) for a in (jnp.ones((4, 128)), case.codes, case.scales)]
    with pytest.raises(ValueError, match="2 devices do not divide a stack axis = 3"):
        grouped_quantized_matmul(
            operands[0], jnp.array([1, 1, 2]), *operands[1:], **case.options,
            weight_spec=P("model", None, None),
        )  # fmt: skip


def mixtral(mesh, split):
    """An expert layer's up projection of Mixtral on eight devices, for the TPU compiler."""
    split = P(*split)
    experts, outputs, inputs = split
    e, n, k = 8, 14336, 4096

    def struct(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    codes = struct((e, n, k), jnp.int4, split)
    scales = struct((e, k // 128, n), jnp.bfloat16, P(experts, inputs, outputs))
    weight = Weight(codes, scales, None, None, "int4", 128, (n, k), "mosaic_tpu/1")
    x = struct((32, k), jnp.bfloat16, P(None, inputs))
    call = functools.partial(grouped_quantized_matmul, weight_spec=split, x_spec=P(None, inputs))
    return call, (x, struct((e,), jnp.int32, P()), weight)


@pytest.mark.slow
@pytest.mark.skipif(not aot.available(), reason="the TPU compiler is not installed")
@pytest.mark.parametrize("chip", aot.TOPOLOGIES)
def test_compiles_inside_a_sharded_program(chip):
    name = "tests.kernels.quantized_matmul.test_grouped_sharding:mixtral"
    splits = [["model", "data", None], ["model", None, "data"]]
    requests = [(name, {"mesh": [2, 4], "split": split}) for split in splits]
    for result in aot.compile_cases(chip, requests):
        assert result["error"] is None, result["error"]
        assert "tpu_custom_call" in result["hlo"]
        assert set(re.findall(COLLECTIVES, result["hlo"])) == {"all-reduce"}
        # A device holds an eighth of the packed weights, and no copy of it.
        eighth = 8 * 14336 * 4096 // 2 // 8
        assert result["memory"]["arguments"] < 1.2 * eighth
        assert result["memory"]["temporaries"] < eighth / 4
