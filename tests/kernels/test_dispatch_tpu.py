"""A model with compressed weights, sent to the kernels on TPUs: compiled ahead of time."""

import dataclasses
import functools
import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from jaxcomp.kernels import chips

import jaxcomp as jc
from jaxcomp import formats, packed
from jaxcomp.formats import Codebook, Float, Int
from jaxcomp.graph import _compat
from jaxcomp.quantization import RTN
from jaxcomp.recipe import Recipe
from tests.kernels import aot

FORMATS = {
    "int4": Int(4, 128, scale_dtype="bfloat16"),
    "int4 with zero points": Int(4, 128, symmetric=False),
    "int2": Int(2, 64),
    "int8": Int(8),
    "e4m3": Float("e4m3"),
    "nf4": Codebook("nf4", group_size=64),
}


def block(params, x):
    """Two scanned layers of a gated MLP."""

    def layer(x, p):
        return x + (jax.nn.silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"], None

    return jax.lax.scan(layer, x, params)[0]


def weights(dtype=jnp.bfloat16, size=512, inner=1024):
    shapes = {"gate": (2, size, inner), "up": (2, size, inner), "down": (2, inner, size)}
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return {
        name: jax.random.normal(key, shape, dtype) * shape[1] ** -0.5
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def rounded(fmt, params, x):
    recipe = Recipe(steps=(RTN(format=fmt),))
    return jc.compress(block, params, recipe, [(x,)], progress=False).params


@pytest.mark.parametrize("name", FORMATS)
def test_prepared_weights_are_the_same_weights(name):
    x = jax.random.normal(jax.random.key(1), (3, 512), jnp.float32)
    params = rounded(FORMATS[name], weights(jnp.float32), x)
    for leaf in params.values():
        ready = on_tpu(leaf)
        assert isinstance(ready.parts[0], packed.Prepared)
        zero_point = getattr(leaf.parts[0], "zero_point", None)  # int8, which becomes bfloat16
        widened = 0 if zero_point is None else 8 * zero_point.size
        # A stack shares the 16 values of NF4.
        assert abs(ready.nbits - leaf.nbits - widened) <= 2 * 16 * 32
        np.testing.assert_array_equal(ready.materialize(), leaf.materialize())
    ready = jax.tree.map(on_tpu, params, is_leaf=formats.is_compressed)
    np.testing.assert_allclose(
        jax.jit(jc.dispatch(block, "kernel"))(ready, x),
        block(jc.materialize(params), x),
        atol=1e-4,
    )


def on_tpu(leaf):
    return leaf.replace(parts=tuple(packed.prepared(p, chips.V5E) for p in leaf.parts))


def test_loops_over_layers_slice_no_codes(monkeypatch):
    """Values and gradients are those of slices; a weight that is read otherwise, too, is right."""

    def apply(params, x):
        y = block(params, x)
        # By a fixed index, and not by a product.
        return (y @ params["gate"][1]) @ params["down"][0] + jnp.sin(params["up"]).sum()

    x = jax.random.normal(jax.random.key(1), (3, 512), jnp.float32)
    params = rounded(FORMATS["int4"], weights(jnp.float32), x)
    ready = jax.tree.map(on_tpu, params, is_leaf=formats.is_compressed)
    fast = jc.dispatch(apply, "kernel")

    def loss(scales, x):
        leaf = ready["up"]
        (part,) = leaf.parts
        part = part.replace(weight=dataclasses.replace(part.weight, scales=scales))
        return jnp.sum(fast({**ready, "up": leaf.replace(parts=(part,))}, x) ** 2)

    arguments = ready["up"].parts[0].weight.scales, x

    def sliced_codes():
        """How many arrays of codes the loop slices."""
        program = jax.make_jaxpr(lambda *a: fast(*a))(ready, x)
        (loop,) = [eqn for eqn in program.eqns if eqn.primitive.name == "scan"]
        parts = _compat.scan_of(loop.params)
        sliced = loop.invars[parts.num_consts + parts.num_carry :]
        return sum(v.aval.dtype == jnp.int4 for v in sliced)

    results = []
    for chip, expected in ((chips.CPU, 3), (chips.V5E, 0)):
        # Of the loop only: the products run on this machine.
        module = importlib.import_module("jaxcomp.dispatch")
        monkeypatch.setattr(module, "chip_of", lambda *_, chip=chip: chip)
        results.append(jax.jit(jax.value_and_grad(lambda *a: loss(*a), (0, 1)))(*arguments))
        assert sliced_codes() == expected
    for ours, theirs in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())


def dispatched(mesh, chip, name):
    """The scanned block on prepared weights of a format, as a chip's program."""
    x = jax.ShapeDtypeStruct((16, 512), jnp.bfloat16)
    params = rounded(FORMATS[name], weights(), jnp.ones(x.shape, x.dtype))
    fast = jc.dispatch(block)

    def place(leaf):
        sharding = NamedSharding(mesh, PartitionSpec())
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    prepare = functools.partial(jax.tree.map, on_tpu, is_leaf=formats.is_compressed)
    params = jax.eval_shape(prepare, params)
    assert {c.implementation for c in fast.report(jax.tree.map(place, params), x)} == {"kernel"}
    return fast, (jax.tree.map(place, params), place(x))


def on_a_mesh(mesh):
    """The same on eight devices with Auto axes: XLA does it, and the report says why."""
    fast, (params, x) = dispatched(
        jax.sharding.Mesh(mesh.devices[:1, :1], ("a", "b")), "v5e", "int4"
    )

    def place(a):
        spec = PartitionSpec(*(None,) * (len(a.shape) - 1), "model")
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec))

    params, x = jax.tree.map(place, params), jax.ShapeDtypeStruct(x.shape, x.dtype)
    choices = fast.report(params, x)
    assert {c.implementation for c in choices} == {"materialize"}
    assert all("a mesh of Auto axes" in c.reason for c in choices)
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    return fast, (params, jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding))


@pytest.mark.slow
@pytest.mark.skipif(not aot.available(), reason="the TPU compiler is not installed")
def test_on_a_mesh_of_auto_axes_xla_does_it():
    request = ("tests.kernels.test_dispatch_tpu:on_a_mesh", {"mesh": (2, 4)})
    (result,) = aot.compile_cases("v5e", [request])
    assert result["error"] is None, result["error"]
    assert "tpu_custom_call" not in result["hlo"]


@pytest.mark.slow
@pytest.mark.skipif(not aot.available(), reason="the TPU compiler is not installed")
# Every kernel by itself is compiled for every chip: here every format for one, two for another.
@pytest.mark.parametrize("chip", ["v5e", "7x"])
def test_compiles_with_the_kernels_inside(chip):
    make = "tests.kernels.test_dispatch_tpu:dispatched"
    formats = list(FORMATS) if chip == "v5e" else ["int4 with zero points", "e4m3"]
    requests = [(make, {"chip": chip, "name": name}) for name in formats]
    for name, result in zip(formats, aot.compile_cases(chip, requests), strict=True):
        assert result["error"] is None, (name, result["error"])
        # Each has the codes of both layers, and the number of its own.
        operands = r"tpu_custom_call\", operand_layout_constraints=\{s32\[1\]\{0\}, \w+\[2,"
        assert len(re.findall(operands, result["hlo"])) == 3, name


def test_what_a_chip_does_not_take_is_told():
    """The report says what the operation will do, not only what the format allows."""
    x = jnp.ones((3, 512))
    (leaf, *_) = rounded(FORMATS["nf4"], weights(jnp.float32), x).values()
    (part,) = leaf.parts
    assert packed.problem(part, chips.V5E, jnp.bfloat16) is None
    assert "float32 rows" in packed.problem(part, chips.V5E, jnp.float32)
    assert "a TPU or GPU" in packed.problem(part, chips.CPU)


def test_on_a_cpu_nothing_is_prepared():
    x = jnp.ones((3, 512), jnp.bfloat16)
    params = rounded(FORMATS["int4"], weights(), x)
    ready = jc.dispatch(block).prepare(params, x)
    assert jax.tree.structure(ready) == jax.tree.structure(params)
