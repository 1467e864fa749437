"""Kernels on meshes of Auto axes: dispatch is told how weights are split."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxcomp.kernels import chips

import jaxcomp as jc
from jaxcomp.errors import JaxcompError
from jaxcomp.formats import Codebook, Int
from jaxcomp.quantization import RTN
from jaxcomp.recipe import Recipe
from tests.kernels import aot

# Column-parallel gate and up, row-parallel down.
TENSOR = [("*gate", P(None, None, "model")), ("*up", P(None, None, "model"))]
TENSOR += [("*down", P(None, "model"))]
BOTH = [
    (rule, P(*(e or "data" if i else e for i, e in enumerate((*spec, None)[:3]))))
    for rule, spec in TENSOR
]


def mlp(x, p):
    return x + (jax.nn.silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"]


def scanned(params, x):
    return jax.lax.scan(lambda x, p: (mlp(x, p), None), x, params)[0]


def unrolled(params, x):
    for i in range(2):
        x = mlp(x, jax.tree.map(lambda w, i=i: w[i], params))
    return x


def weights(dtype=jnp.float32, size=128, inner=256):
    shapes = {"gate": (2, size, inner), "up": (2, size, inner), "down": (2, inner, size)}
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return {
        name: jax.random.normal(key, shape, dtype) * shape[1] ** -0.5
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def rounded(fmt, params, x):
    recipe = Recipe(steps=(RTN(format=fmt),))
    return jc.compress(scanned, params, recipe, [(x,)], progress=False).params


def auto_mesh(shape=(2, 2)):
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return jax.sharding.Mesh(devices, ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def moved(hlo):
    """Elements of every array that a collective carries as it is, not summed."""
    kinds = "all-gather|all-to-all|collective-permute"
    results = re.findall(rf"= ([^=]*?) (?:{kinds})(?:-start)?\(", hlo)
    shapes = [s for result in results for s in re.findall(r"\[([\d,]+)\]", result)]
    return [int(np.prod([int(n) for n in shape.split(",")])) for shape in shapes]


@pytest.fixture(scope="module")
def model():
    x = jax.random.normal(jax.random.key(1), (4, 128), jnp.float32)
    return rounded(Int(4, 32, symmetric=False), weights(), x), x


@pytest.mark.parametrize(
    ("apply", "rules", "told"),
    [(scanned, TENSOR, True), (unrolled, TENSOR, False), (scanned, BOTH, False)],
)
def test_every_device_multiplies_what_it_holds(model, apply, rules, told):
    """Told by the rules, or as ``prepare`` found it."""
    params, x = model
    expected = apply(jc.materialize(params), x)
    mesh = auto_mesh()
    placed = jc.shard(params, mesh, rules)
    fast = jc.dispatch(apply, "kernel", sharding=rules if told else None)
    rows = jax.device_put(x, NamedSharding(mesh, P("data")))
    if not told:
        placed = fast.prepare(placed, rows)
        assert placed["down"].split.spec[2] == "model"
    fast = jax.jit(fast)
    np.testing.assert_allclose(fast(placed, rows), expected, rtol=2e-5, atol=2e-5)
    hlo = fast.lower(placed, rows).compile().as_text()
    assert all(size < 128 * 256 // 8 for size in moved(hlo))  # bytes of a device's part of a weight
    assert "all-reduce" in hlo  # the sums of down


def test_gradients_and_a_tree_of_specs(model):
    params, x = model
    mesh = auto_mesh()
    tree = {"gate": P(None, None, "model"), "up": P(None, None, "model"), "down": P(None, "model")}
    placed = jc.shard(params, mesh, tree)
    fast = jc.dispatch(scanned, "kernel", sharding=tree, mesh=mesh)

    def loss(apply, params):
        return jax.jit(jax.grad(lambda x: jnp.sum(apply(params, x) ** 2)))

    got = loss(fast, placed)(jax.device_put(x, NamedSharding(mesh, P())))
    expected = loss(scanned, jc.materialize(params))(x)
    np.testing.assert_allclose(got, expected, rtol=2e-4, atol=2e-4)


def test_experts_follow_their_mesh_axis():
    """A stack axis that the contraction batches over stays split; one of fixed index is gone."""
    w = jax.random.normal(jax.random.key(0), (3, 4, 32, 64)) * 0.2
    x = jax.random.normal(jax.random.key(1), (4, 6, 32))

    def apply(params, x):
        return jnp.einsum("eti,eio->eto", x, params["w"][1])

    recipe = Recipe(steps=(RTN(format=Int(4, 32)),))
    params = jc.compress(apply, {"w": w}, recipe, [(x,)], progress=False).params
    mesh, rules = auto_mesh(), [("w", P(None, "model"))]
    placed = jc.shard(params, mesh, rules)
    fast = jc.dispatch(apply, "kernel", sharding=rules)
    np.testing.assert_allclose(
        jax.jit(fast)(placed, x), apply(jc.materialize(params), x), rtol=2e-5, atol=2e-5
    )


def test_rules_are_checked(model):
    params, x = model
    placed = jc.shard(params, auto_mesh(), TENSOR)
    with pytest.raises(JaxcompError, match="'v' matches no leaf"):
        jc.dispatch(scanned, sharding=[("v", P("data"))])(placed, x)
    with pytest.raises(JaxcompError, match="names the mesh axis 'tensor'"):
        jc.dispatch(scanned, sharding=[("down", P(None, "tensor"))])(placed, x)
    # One device needs no rules.
    np.testing.assert_array_equal(
        jc.dispatch(scanned, sharding=TENSOR)(params, x), jc.dispatch(scanned)(params, x)
    )


def on_tpus(mesh, name, rules, apply, prepare):
    """The block's program for eight chips, and what dispatch says of it."""
    rules, apply = globals()[rules], globals()[apply]
    x = jnp.ones((16, 1024), jnp.bfloat16)
    fmt = {"int4": Int(4, 128), "nf4": Codebook("nf4", group_size=64)}[name]
    params = rounded(fmt, weights(jnp.bfloat16, 1024, 2048), x)
    if prepare:
        prepared = lambda p: jc.packed.prepared(p, chips.V5E)  # noqa: E731
        params = jax.tree.map(
            lambda leaf: leaf.replace(parts=tuple(prepared(p) for p in leaf.parts)),
            params,
            is_leaf=jc.formats.is_compressed,
        )
    fast = jc.dispatch(apply)
    placed = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
        params,
        jc.sharding.shardings(params, rules, mesh),
    )
    placed = jc.sharding.noted(placed, rules, mesh)
    rows = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P("data")))
    assert {c.implementation for c in fast.report(placed, rows)} == {"kernel"}
    return fast, (placed, rows)


SCANNED = {"name": "int4", "apply": "scanned", "prepare": True}
ON_CHIPS = {
    "v5e": [{"rules": "TENSOR", **SCANNED}, {"rules": "BOTH", **SCANNED}],
    "v5p": [{"rules": "TENSOR", "name": "nf4", "apply": "unrolled", "prepare": False}],
    "v6e": [{"rules": "BOTH", **SCANNED}],
    "7x": [{"rules": "TENSOR", **SCANNED}],
}


@pytest.mark.slow
@pytest.mark.skipif(not aot.available(), reason="the TPU compiler is not installed")
@pytest.mark.parametrize("chip", ON_CHIPS)
def test_kernels_on_eight_tpus(chip):
    make, cases = "tests.test_dispatch_sharded:on_tpus", ON_CHIPS[chip]
    results = aot.compile_cases(chip, [(make, {"mesh": (2, 4), **case}) for case in cases])
    for case, result in zip(cases, results, strict=True):
        assert result["error"] is None, (case, result["error"])
        assert len(re.findall("tpu_custom_call", result["hlo"])) >= 3, case
        assert all(size < 1024 * 2048 // 16 for size in moved(result["hlo"])), case
        assert "all-reduce" in result["hlo"], case


def partitioned(mesh):
    """A product whose parts would be as XLA splits its operands."""
    product = custom_partitioning(lambda x, w: x @ w.T)

    def partition(mesh, arguments, result):
        return mesh, lambda x, w: x @ w.T, result.sharding, [a.sharding for a in arguments]

    product.def_partition(partition, sharding_rule="m k, n k -> m n")
    shapes = {(16, 256): P("data"), (512, 256): P("model")}
    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))
        for shape, spec in shapes.items()
    ]
    return lambda x, w: product(x, w), arguments


@pytest.mark.slow
@pytest.mark.skipif(not aot.available(), reason="the TPU compiler is not installed")
def test_tpus_have_no_custom_partitioning():
    """Why weights on Auto axes have to be told of: once this fails, they need not be."""
    make = "tests.test_dispatch_sharded:partitioned"
    (result,) = aot.compile_cases("v5e", [(make, {"mesh": (2, 4)})])
    assert "emitter for CustomSPMDPartitioning not found" in result["error"]
