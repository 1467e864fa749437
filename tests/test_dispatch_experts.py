"""dispatch: the packed weights of experts that a ragged_dot reads."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxcomp as jc
from jaxcomp.formats import Codebook, Float, InputScale, Int
from jaxcomp.models.mixtral import Mixtral
from jaxcomp.quantization import RTN
from jaxcomp.recipe import Recipe
from jaxcomp.step import Activation
from tests.kernels import aot
from tests.models.test_mixtral import TINY
from tests.test_dispatch_sharded import moved

SIZES = (3, 0, 5, 1)  # of ten rows: the last is no expert's
FORMATS = {
    "int4": Int(4, 32, symmetric=False),
    "int8": Int(8),
    "e4m3": Float("e4m3"),
    "nf4": Codebook("nf4", group_size=32),
}


def experts(params, x):
    return jax.lax.ragged_dot(x, params["w"], jnp.array(SIZES, jnp.int32))


def layers(params, x):
    """Two scanned layers of experts."""
    return jax.lax.scan(lambda x, p: (jnp.tanh(experts(p, x)), None), x, params)[0]


def make(fmt, apply=experts, shape=(4, 64, 64), activation=None):
    w = jax.random.normal(jax.random.key(0), shape) * shape[-2] ** -0.5
    x = jax.random.normal(jax.random.key(1), (10, shape[-2]))
    recipe = Recipe(steps=(RTN(format=fmt, activation=activation, include=("*",)),))
    return jc.compress(apply, {"w": w}, recipe, [(x,)], progress=False).params, x


def close(actual, expected, terms):
    """Within the rounding of sums of that many terms near one."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=terms * 2**-23)


@pytest.mark.parametrize("name", FORMATS)
def test_each_expert_reads_its_packed_weight(name):
    params, x = make(FORMATS[name])
    fast = jc.dispatch(experts)
    (choice,) = fast.report(params, x)
    assert (choice.kind, choice.implementation) == ("ragged_dot", "kernel")
    y = jax.jit(fast)(params, x)
    close(y, experts(jc.materialize(params), x), 64)
    assert not np.any(y[-1])


@pytest.mark.parametrize("fmt", [Int(8), Int(4, 32)])
def test_quantized_rows_meet_packed_weights(fmt):
    """W8A8 and W4A8: each row by its own scale, then products of codes, as float64 has them."""
    params, x = make(fmt, activation=Activation())
    fast = jc.dispatch(experts)
    (choice,) = fast.report(params, x)
    assert choice.implementation == "kernel"
    rows, w = (np.asarray(a, np.float64) for a in (x, params["w"].parts[0].part.materialize()))
    scale = np.float32(np.abs(x).max(1, keepdims=True)) / np.float32(127)
    codes = np.rint(rows / scale)
    assert np.abs(np.abs(rows / scale - codes) - 0.5).min() > 1e-4  # no code hangs on rounding
    owner = np.repeat(np.arange(4), SIZES)
    expected = np.einsum("mk,mnk->mn", codes[:9], w[owner]) * scale[:9]
    close(jax.jit(fast)(params, x)[:9], expected, 64)


def test_scanned_layers_and_gradients():
    params, x = make(FORMATS["int4"], layers, (2, 4, 64, 64))
    fast, dense = jc.dispatch(layers), jc.materialize(params)
    (choice,) = fast.report(params, x)
    assert choice.implementation == "kernel"
    close(jax.jit(fast)(params, x), layers(dense, x), 2 * 64)
    got, expected = (
        jax.grad(lambda x, f=f, p=p: jnp.sum(jnp.sin(f(p, x))))(x)
        for f, p in ((jax.jit(fast), params), (layers, dense))
    )
    close(got, expected, 4 * 64)


def test_scales_of_input_channels():
    """Each expert's rows are multiplied by its own scales."""
    params, x = make(FORMATS["int8"])
    scale = jnp.exp(jax.random.normal(jax.random.key(2), (4, 64)))
    leaf = params["w"]
    leaf = leaf.replace(parts=(InputScale(leaf.parts[0], scale), leaf.parts[0]))
    params = {"w": leaf}
    assert jc.dispatch(experts).report(params, x)[0].implementation == "kernel"
    close(jc.dispatch(experts)(params, x), experts(jc.materialize(params), x), 64 * 64)


def test_what_has_no_kernel_says_so():
    params, x = make(Int(3))
    with pytest.raises(jc.JaxcompError, match=r"'kernel' does not fit .*3 bits"):
        jc.dispatch(experts, "kernel")(params, x)
    (choice,) = jc.dispatch(experts).report(params, x)
    assert choice.implementation == "materialize" and "3 bits" in choice.reason
    params, x = make(Int(8), activation=Activation(format="int8", granularity="tensor"))
    (choice,) = jc.dispatch(experts).report(params, x)
    assert choice.implementation == "materialize" and "other scales than its own" in choice.reason

    def merged(params, x):
        w = params["w"].reshape(4, 64, 64)
        return jax.lax.ragged_dot(x, w, jnp.array(SIZES, jnp.int32))

    params, x = make(Int(8), merged, (2, 2, 64, 64))
    (choice,) = jc.dispatch(merged).report(params, x)
    assert choice.implementation == "materialize" and "merged" in choice.reason
    close(jc.dispatch(merged)(params, x), merged(jc.materialize(params), x), 64)


def test_a_mixture_of_experts():
    """The experts of a compressed Mixtral, and only they, meet their packed weights."""
    apply, params = jc.functional(Mixtral(TINY, rngs=nnx.Rngs(0)))
    tokens = jnp.arange(12).reshape(2, 6) % TINY.vocab_size
    step = RTN(format=Int(4, 8), include=("*experts*",))
    params = jc.compress(apply, params, Recipe(steps=(step,)), [(tokens,)], progress=False).params
    fast = jc.dispatch(apply)
    choices = [c for c in fast.report(params, tokens) if c.kind != "attention"]
    assert len(choices) == 3 * TINY.num_hidden_layers
    assert {(c.kind, c.implementation) for c in choices} == {("ragged_dot", "kernel")}
    # Both sum the same products of the same numbers in another order, through every layer.
    close(fast(params, tokens), apply(jc.materialize(params), tokens), 64 * TINY.hidden_size)


@pytest.mark.parametrize("spec", [("model",), ("data", "model"), (None, None, "model")])
def test_experts_on_a_mesh_of_explicit_axes(spec):
    """Rows and results split otherwise are brought there; of weights nothing is."""
    params, x = make(FORMATS["int4"])
    mesh = make_mesh(AxisType.Explicit)
    placed = jc.shard(params, mesh, [("w", PartitionSpec(*spec))])
    rows = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))

    def told(params, x):
        sizes = jnp.array(SIZES, jnp.int32)
        return jax.lax.ragged_dot(x, params["w"], sizes, out_sharding=rows.sharding)

    fast = jc.dispatch(told)
    (choice,) = fast.report(placed, rows)
    assert choice.implementation == "kernel"
    program = jax.jit(fast).lower(placed, rows).compile()
    y = program(placed, rows)
    assert y.sharding.is_equivalent_to(rows.sharding, 2)
    close(y, experts(jc.materialize(params), x), 64)
    assert all(size <= x.size for size in moved(program.as_text()))  # a weight's part: 2048 bytes


def make_mesh(kind):
    devices = np.array(jax.devices()[:4]).reshape(2, 2)
    return jax.sharding.Mesh(devices, ("data", "model"), axis_types=(kind,) * 2)


@pytest.mark.parametrize("spec", [("model",), ("data", "model"), (None, None, "model")])
def test_experts_on_a_mesh(spec):
    """Split by expert, by expert and input, by output: no device asks for another's weight."""
    params, x = make(FORMATS["int4"])
    mesh = make_mesh(AxisType.Auto)
    rules = [("w", PartitionSpec(*spec))]
    placed = jc.shard(params, mesh, rules)
    rows = jax.device_put(x, NamedSharding(mesh, PartitionSpec()))
    (choice,) = jc.dispatch(experts).report(placed, rows)
    assert choice.implementation == "materialize" and "sharding rules" in choice.reason
    fast = jc.dispatch(experts, sharding=rules)
    (choice,) = fast.report(placed, rows)
    assert choice.implementation == "kernel"
    program = jax.jit(fast).lower(placed, rows).compile()
    close(program(placed, rows), experts(jc.materialize(params), x), 64)
    assert not re.findall("all-gather|all-to-all|collective-permute", program.as_text())


def compiled(mesh, bits=4, quantized=False):
    """Experts of Mixtral's kind, split over devices, as a program of v5e."""
    config = dataclasses.replace(
        TINY, hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_experts=4
    )
    apply, params = jc.functional(Mixtral(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    tokens = jnp.zeros((2, 4), jnp.int32)
    activation = Activation() if quantized else None
    step = RTN(format=Int(bits, 64), activation=activation, include=("*experts*",))
    params = jc.compress(apply, params, Recipe(steps=(step,)), [(tokens,)], progress=False).params
    rules = [("*experts*", PartitionSpec("model"))]
    fast = jc.dispatch(apply, sharding=rules, mesh=mesh)

    def place(a, sharding):
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)

    tokens = place(tokens, NamedSharding(mesh, PartitionSpec()))
    params = jax.tree.map(place, params, jc.sharding.shardings(params, rules, mesh))
    of_weights = [c for c in fast.report(params, tokens) if c.kind != "attention"]
    assert {c.implementation for c in of_weights} == {"kernel"}
    return fast, (params, tokens)


@pytest.mark.slow
@pytest.mark.skipif(not aot.available(), reason="the TPU compiler is not installed")
def test_compiles_with_the_kernels_inside():
    cases = [{"quantized": True, "mesh": [1, 2]}]
    made = [("tests.test_dispatch_experts:compiled", case) for case in cases]
    for result in aot.compile_cases("v5e", made):
        assert result["error"] is None, result["error"]
        assert len(re.findall("tpu_custom_call", result["hlo"])) >= 3
        # Of a weight's part: two experts' 128 x 256 codes, or half of their bytes.
        assert all(size < 2 * 128 * 256 // 2 for size in moved(result["hlo"]))
