"""``compress(mesh=..)`` gives what one device gives, however the mesh splits the work."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxcomp as jc
from jaxcomp import placing
from jaxcomp.formats.spec import Int
from jaxcomp.quantization.gptq import _gptq

LAYERS, WIDTH, HIDDEN = 16, 16, 32


def make_mesh(shape, kind=AxisType.Auto):
    return jax.make_mesh(
        shape,
        ("data", "model")[: len(shape)],
        devices=jax.devices()[: np.prod(shape)],
        axis_types=(kind,) * len(shape),
    )


MESHES = {
    "2x2": lambda: make_mesh((2, 2)),
    "4x1 explicit": lambda: make_mesh((4, 1), AxisType.Explicit),
}


def block(x, p):
    y = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * p["gain"]
    return x + jax.nn.relu(y @ p["up"]) @ p["down"], None


def scanned(params, x):
    return jax.lax.scan(block, x @ params["in"], params["blocks"])[0]


def unrolled(params, x):
    x = x @ params["in"]
    for p in params["blocks"]:
        x, _ = block(x, p)
    return x


def stacked_params(rng, layers):
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    blocks = {
        "gain": 1 + 0.1 * normal(layers, WIDTH),
        "up": 0.3 * normal(layers, WIDTH, HIDDEN),
        "down": 0.1 * normal(layers, HIDDEN, WIDTH),
    }
    return {"in": normal(WIDTH, WIDTH), "blocks": blocks}


def batches(rng, shape=(8, 5, WIDTH), count=3):
    return [(rng.standard_normal(shape).astype(np.float32),) for _ in range(count)]


def assert_same(result, expected, ties=0.01, rtol=2e-5):
    """Floats to a tolerance; codes equal but for a few at ties."""
    assert jax.tree.structure(result) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype and a.shape == b.shape
        if np.issubdtype(a.dtype, np.floating):
            np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max())
        else:
            assert np.mean(a != b) <= ties, np.mean(a != b)


RECIPES = {
    "rtn": jc.presets.w4a16_rtn(group_size=16),
    "gptq": jc.presets.w4a16_gptq(group_size=16),
    "awq": jc.presets.w4a16_awq(group_size=16),
}
compress = functools.partial(jc.compress, progress=False)


@functools.cache
def model(layers):
    rng = np.random.default_rng(0)
    return stacked_params(rng, layers), batches(rng)


@pytest.mark.parametrize("mesh", ["2x2", "4x1 explicit"])  # Others: tests/test_mesh_layers.py.
def test_sixteen_scanned_layers_by_gptq(mesh):
    params, data = model(LAYERS)
    result = compress(scanned, params, RECIPES["gptq"], data, mesh=MESHES[mesh]())
    assert all(isinstance(a, np.ndarray) for a in jax.tree.leaves(result.params))
    assert_same(result.params, expected("gptq", LAYERS).params)
    # And as sixteen layers that are sixteen leaves each.
    if mesh == "2x2":
        split = [jax.tree.map(lambda a, t=t: a[t], params["blocks"]) for t in range(LAYERS)]
        loose = compress(
            unrolled, params | {"blocks": split}, RECIPES["gptq"], data, mesh=MESHES[mesh]()
        )
        for name in ("up", "down"):
            dense = np.stack([p[name].materialize() for p in loose.params["blocks"]])
            whole = result.params["blocks"][name].materialize()
            assert np.mean(np.abs(dense - whole) > 1e-4) < 0.01


@functools.cache
def expected(name, layers):
    params, data = model(layers)
    return compress(scanned, params, RECIPES[name], data)


@pytest.mark.parametrize("name", ["rtn", "awq"])  # Others: tests/test_mesh_layers.py.
def test_recipes_on_two_axes(name):
    params, data = model(2)
    result = compress(scanned, params, RECIPES[name], data, mesh=MESHES["2x2"]())
    one = expected(name, 2)
    assert_same(result.params, one.params)
    for row, other in zip(result.report.rows, one.report.rows, strict=True):
        assert (row.path, row.format, row.nbits) == (other.path, other.format, other.nbits)
        assert row.error == pytest.approx(other.error, rel=1e-3)
    if name == "rtn":
        jax.tree.map(np.testing.assert_array_equal, result.params, one.params)


@pytest.mark.parametrize("kind", ["batched", "ragged"])
def test_experts(kind, rng):
    w = rng.standard_normal((4, WIDTH, HIDDEN)).astype(np.float32)
    if kind == "batched":
        apply = lambda p, x: jnp.einsum("etd,edf->etf", x, p["experts"])  # noqa: E731
        data = batches(rng, (4, 24, WIDTH), 2)
    else:
        sizes = np.array([10, 0, 20, 2], np.int32)
        apply = lambda p, x, sizes: jax.lax.ragged_dot(x, p["experts"], sizes)  # noqa: E731
        data = [(x, sizes) for (x,) in batches(rng, (32, WIDTH), 2)]
    params = {"experts": w}
    one = compress(apply, params, RECIPES["gptq"], data)
    result = compress(apply, params, RECIPES["gptq"], data, mesh=MESHES["2x2"]())
    assert_same(result.params, one.params)
    assert result.report.rows[0].notes == one.report.rows[0].notes


def test_sizes_that_the_mesh_does_not_divide(rng):
    params = {"w": rng.standard_normal((WIDTH, 6)).astype(np.float32)}  # 2 of the 2x2 devices
    apply = lambda p, x: x @ p["w"]  # noqa: E731
    data = batches(rng, (3, 7, WIDTH), 2)  # on every device
    one = compress(apply, params, RECIPES["gptq"], data)
    result = compress(apply, params, RECIPES["gptq"], data, mesh=MESHES["2x2"]())
    assert_same(result.params, one.params)


def test_parameters_that_lie_on_an_explicit_mesh_and_a_journal(rng, tmp_path):
    mesh = make_mesh((2, 2), AxisType.Explicit)
    params = {"w": rng.standard_normal((WIDTH, HIDDEN)).astype(np.float32)}
    there = {"w": jax.device_put(params["w"], NamedSharding(mesh, P("data", "model")))}
    apply = lambda p, x: jnp.tanh(x) @ p["w"]  # noqa: E731
    data = batches(rng, (8, 5, WIDTH), 2)
    on_mesh = [(jax.device_put(x, NamedSharding(mesh, P("data"))),) for (x,) in data]
    first = compress(apply, there, RECIPES["gptq"], on_mesh, mesh=mesh, journal=str(tmp_path))
    assert_same(first.params, compress(apply, params, RECIPES["gptq"], data).params)
    again = compress(apply, there, RECIPES["gptq"], on_mesh, mesh=mesh, journal=str(tmp_path))
    jax.tree.map(np.testing.assert_array_equal, again.params, first.params)


def test_gptq_needs_nothing_from_other_devices(rng):
    place = placing.place(MESHES["2x2"]())
    w = place.matrix(rng.standard_normal((HIDDEN, WIDTH)), ((), (0,), (1,)))
    assert w.sharding.shard_shape(w.shape) == (HIDDEN // 4, WIDTH)
    h = place.shared(np.eye(WIDTH, dtype=np.float32))
    options = dict(fmt=Int(4, group_size=8), block_size=8, static=False, clipping="mse")
    options |= dict(percentile=99.9, report=True)
    for order in ("natural", "activation"):
        program = _gptq.lower(w, h, None, 0.01, order=order, **options).compile().as_text()
        for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
            assert collective not in program, (order, collective)
        assert f"f32[{WIDTH},{HIDDEN}]" not in program  # nor does a device hold all rows
        options["static"] = True


def test_a_weight_stays_split_while_it_is_evaluated(rng):
    """Each device holds its outputs only, and small batches travel instead of the weight."""
    place = placing.place(MESHES["2x2"]())
    w = rng.standard_normal((WIDTH, HIDDEN)).astype(np.float32)
    part = jc.formats.quantize(Int(4, group_size=8), w.T)
    array = jc.CompressedArray.from_matrix(part, w.shape, w.dtype, (), (1,), (0,))
    dense = place.weight(jax.tree.map(np.asarray, array))
    assert dense.sharding.shard_shape(dense.shape) == (WIDTH, HIDDEN // 4)
    np.testing.assert_array_equal(dense, array.materialize())
    x = place.load(np.ones((4, 2, WIDTH), np.float32))
    program = jax.jit(jnp.matmul).lower(x, dense).compile().as_text()
    gathered = re.findall(r"= f32\[([\d,]+)\]\S* all-gather", program)
    assert gathered == [f"4,2,{WIDTH}"]
    stack = jc.CompressedArray.from_matrix(
        jc.formats.quantize(Int(4, group_size=8), np.stack([w.T[:6]] * 8)),
        (WIDTH, 8, 6), w.dtype, (1,), (2,), (0,),
    )  # fmt: skip
    dense = place.weight(jax.tree.map(np.asarray, stack))
    assert dense.sharding.shard_shape(dense.shape) == (WIDTH, 2, 6)
    np.testing.assert_array_equal(dense, stack.materialize())
    row = jc.formats.quantize(Int(4, group_size=8), w.T[:1])  # Without outputs there is no choice.
    row = jc.CompressedArray.from_matrix(row, (WIDTH,), w.dtype, (), (), (0,))
    dense = place.weight(jax.tree.map(np.asarray, row))
    assert dense.sharding.is_fully_replicated
    np.testing.assert_array_equal(dense, row.materialize())


@pytest.mark.parametrize("mesh", ["data", jax.sharding.AbstractMesh((2,), ("data",))])
def test_what_is_no_mesh_of_devices_is_an_error(mesh):
    with pytest.raises(jc.JaxcompError, match=r"give a jax.sharding.Mesh of devices"):
        compress(lambda p, x: x @ p, jnp.eye(4), RECIPES["rtn"], [(jnp.eye(4),)], mesh=mesh)
