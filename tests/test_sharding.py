"""Compressed trees over a mesh: every array's shards, the values, the errors."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxcomp as jc
from jaxcomp import formats
from jaxcomp.errors import JaxcompError
from jaxcomp.formats import CompressedArray, Int
from jaxcomp.formats.affine import affine as affine_part
from jaxcomp.packed import Prepared, operand
from tests import conformance_formats as conformance
from tests.formats.test_conformance import CASES

SPLITS = {"none": P(), "stack": P("a"), "out": P(None, "a"), "in": P(None, None, "a")}


def mesh_of(kind=AxisType.Auto, shape=(2,), axes=("a",)):
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return jax.sharding.Mesh(devices, axes, axis_types=(kind,) * len(axes))


def array_of(make, shape=(2, 8, 128)):
    w = conformance.matrices(shape)
    return CompressedArray.from_matrix(make(w), shape, jnp.float32, (0,), (1,), (2,))


def split_of(leaf):
    """Into how many pieces each array of a tree is cut."""
    return [
        a.size // a.addressable_shards[0].data.size if a.size else 1 for a in jax.tree.leaves(leaf)
    ]


# One of each kind of part and of arrays in it.
CHOSEN = (
    "int3",
    "int4_asymmetric_g16",
    "int8_tensor",
    "mxfp8",
    "nvfp4",
    "nf4_double",
    "levels",
    "dense",
    "low_rank",
    "columns",
    "nm_2_4",
    "sparse",
    "input_scale",
    "input_quant",
)


@pytest.mark.parametrize("case", [c for c in CASES if c.name in CHOSEN], ids=lambda c: c.name)
def test_values_of_every_format_stay_what_they_are(case):
    leaf = array_of(case.make)
    expected = np.asarray(leaf.materialize())
    mesh = mesh_of()
    for name, spec in SPLITS.items():
        placed = jc.shard({"w": leaf}, mesh, {"w": spec})["w"]
        assert placed.nbits == leaf.nbits
        got = np.asarray(placed.materialize())
        if case.name == "low_rank":  # A sum of products, whose order is that of the local shapes.
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
        else:
            np.testing.assert_array_equal(got, expected, err_msg=name)
        largest = int(np.argmax([a.nbytes for a in jax.tree.leaves(leaf)]))
        cuts = split_of(placed)
        flat_values = any(isinstance(p, formats.SparsePart) for p in leaf.parts)
        columns = any(isinstance(p, formats.DenseColumns) for p in leaf.parts)
        if name == "none":
            assert set(cuts) == {1}
        elif name == "stack":
            assert set(cuts) == {2}
        elif case.name == "low_rank":
            assert cuts == ([2, 1] if name == "out" else [1, 2])
        elif not flat_values and not (columns and name == "in"):
            assert cuts[largest] == 2, name


def affine(group_size=32, shape=(2, 8, 128), bits=4):
    return array_of(lambda w: formats.quantize(Int(bits, group_size=group_size), w), shape)


def test_groups_follow_their_inputs():
    mesh = AbstractMesh((2,), ("a",))
    found = jc.sharding.specs({"w": affine()}, [("w", SPLITS["in"])], mesh)["w"].parts[0]
    assert (found.values, found.scale) == (P(None, None, "a"), P(None, "a", None))
    found = jc.sharding.specs({"w": affine(None)}, [("w", SPLITS["in"])], mesh)["w"].parts[0]
    assert found.scale == P(None, None, None)


def test_scattered_groups_are_on_every_device():
    w = conformance.matrices((8, 128))
    index = np.random.default_rng(0).permutation(np.repeat(np.arange(4), 32))
    plain = formats.quantize(Int(4, group_size=32), w)
    part = affine_part(plain.codes(), plain.scale, None, jnp.asarray(index), bits=4)
    leaf = CompressedArray.from_matrix(part, (8, 128), jnp.float32)
    placed = jc.shard([leaf], mesh_of(), [("0", P(None, "a"))])[0]
    assert split_of(placed) == [2, 1, 2]
    np.testing.assert_array_equal(np.asarray(placed.materialize()), np.asarray(leaf.materialize()))


def test_prepared_weights():
    leaf = array_of(
        lambda w: Prepared.of(operand(formats.quantize(Int(4, group_size=64), w))), (2, 8, 256)
    )
    for spec in SPLITS.values():
        placed = jc.shard({"w": leaf}, mesh_of(), {"w": spec})["w"]
        expected = np.asarray(leaf.materialize())
        np.testing.assert_array_equal(np.asarray(placed.materialize()), expected)


def test_leaf_axes_in_any_order(rng):
    """Of an (in, heads, width) projection stacked on axis 1, heads may be split."""
    dense = jnp.asarray(rng.standard_normal((64, 3, 4, 8)), jnp.float32)
    matrix = formats.to_matrix(dense, (1,), (2, 3), (0,))
    part = formats.quantize(Int(4, group_size=32), matrix)
    leaf = CompressedArray.from_matrix(part, dense.shape, jnp.float32, (1,), (2, 3), (0,))
    placed = jc.shard({"w": leaf}, mesh_of(), {"w": P(None, None, "a")})["w"]
    assert split_of(placed) == [2, 2]
    np.testing.assert_array_equal(np.asarray(placed.materialize()), np.asarray(leaf.materialize()))
    with pytest.raises(JaxcompError, match="split axis 1 instead"):
        jc.shard({"w": leaf}, mesh_of(), {"w": P(None, None, None, "a")})


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [P("a"), P(None, "a"), P("b", "a")], ids=str)
def test_dispatch_gives_the_result_of_one_device(kind, spec, rng):
    w = jnp.asarray(rng.standard_normal((128, 64)), jnp.float32)
    part = formats.quantize(Int(4, group_size=32), w.T)
    leaf = CompressedArray.from_matrix(part, (128, 64), jnp.float32, (), (1,), (0,))
    x = jnp.asarray(rng.standard_normal((4, 128)), jnp.float32)
    fast = jax.jit(jc.dispatch(lambda params, x: jnp.sin(x) * 2 @ params["w"]))
    if kind == AxisType.Explicit and spec[0] is not None:

        def apply(params, x):
            return jnp.einsum("ti,io->to", jnp.sin(x) * 2, params["w"], out_sharding=P())

        fast = jax.jit(jc.dispatch(apply))
    expected = np.asarray((jnp.sin(x) * 2) @ leaf.materialize())
    mesh = mesh_of(kind, (2, 2), ("a", "b"))
    params = jc.shard({"w": leaf}, mesh, [("w", spec)])
    with jax.set_mesh(mesh):
        got = fast(params, jax.device_put(x, jax.NamedSharding(mesh, P())))
    np.testing.assert_allclose(np.asarray(got), expected, rtol=2e-5, atol=2e-5)


def test_host_arrays_are_read_shard_by_shard(tmp_path):
    path = tmp_path / "w.npy"
    np.save(path, np.arange(32, dtype=np.float32).reshape(8, 4))
    read = []

    class Watched(np.ndarray):
        def __getitem__(self, index):
            read.append(super().__getitem__(index).shape)
            return super().__getitem__(index)

    w = np.load(path, mmap_mode="r").view(Watched)
    placed = jc.shard({"w": w}, mesh_of(), [("*", P("a"))])["w"]
    assert set(read) == {(4, 4)}
    np.testing.assert_array_equal(np.asarray(placed), np.load(path))


def test_specs_of_shapes_serve_jit():
    params = {"w": affine(), "norm": jnp.ones(8)}
    shapes = jax.eval_shape(lambda: params)
    placed = jc.sharding.shardings(shapes, [("w", SPLITS["out"])], mesh_of())
    compiled = jax.jit(lambda p: p, in_shardings=(placed,)).lower(shapes).compile()
    found = jax.tree.leaves(compiled.input_shardings[0][0])
    for array, wanted, got in zip(
        jax.tree.leaves(shapes), jax.tree.leaves(placed), found, strict=True
    ):
        assert got.is_equivalent_to(wanted, array.ndim)


def test_metadata_of_nnx_and_linen():
    init = nnx.with_partitioning(nnx.initializers.ones, (None, "a"))
    with jax.set_mesh(mesh_of()):
        linear = nnx.Linear(8, 16, rngs=nnx.Rngs(0), kernel_init=init)
    state = nnx.state(linear, nnx.Param)
    rules = nnx.get_partition_spec(state)
    placed = jc.shard(nnx.to_pure_dict(state), mesh_of(), rules)
    assert [split_of(placed["kernel"]), split_of(placed["bias"])] == [[2], [1]]
    dense = nn.Dense(16, kernel_init=nn.with_logical_partitioning(nn.initializers.ones, ("x", "y")))
    boxed = dense.init(jax.random.key(0), jnp.ones((1, 8)))
    rules = nn.logical_to_mesh(nn.get_partition_spec(boxed), [("x", None), ("y", "a")])
    placed = jc.shard(nn.unbox(boxed), mesh_of(), rules)
    assert split_of(placed["params"]["kernel"]) == [2]


def test_the_first_rule_that_matches_counts():
    params = {"a": {"w": jnp.ones((4, 4))}, "b": {"w": jnp.ones((4, 4))}}
    rules = [("a/*", P("a")), ("re:.*/w", P(None, "a"))]
    found = jc.sharding.specs(params, rules, AbstractMesh((2,), ("a",)))
    assert [found["a"]["w"], found["b"]["w"]] == [P("a", None), P(None, "a")]


@pytest.mark.parametrize(
    ("leaf", "spec", "message"),
    [
        (lambda: affine(64, (2, 8, 192)), P(None, None, "a"), "'a' of 2 .* groups of 64"),
        (lambda: affine(None, (2, 8, 66), 3), P(None, None, "a"), "packed bytes of 8"),
        (affine, P(None, None, None, "a"), "4 entries for 3 axes"),
        (affine, P("c"), "names the mesh axis 'c'"),
        (affine, P("a", "a"), "'a' twice"),
        (lambda: affine(32, (2, 7, 128)), P(None, "a"), "does not divide axis 1 of 7"),
    ],
)
def test_what_does_not_fit_is_told(leaf, spec, message):
    with pytest.raises(JaxcompError, match=f"^layers/w .*{message}"):
        jc.shard({"layers": {"w": leaf()}}, mesh_of(), [("*", spec)])


def test_rules_that_match_nothing():
    params = {"w": jnp.ones((4, 4))}
    with pytest.raises(JaxcompError, match=r"'v' matches no leaf; the closest paths are w"):
        jc.shard(params, mesh_of(), [("v", P("a"))])
    with pytest.raises(JaxcompError, match="no entry for this leaf"):
        jc.shard(params, mesh_of(), {})


def test_what_are_no_rules_and_no_mesh():
    params = {"w": jnp.ones((4, 4))}
    for rules in (None, P("a"), "w"):
        with pytest.raises(JaxcompError, match=r"give a list of \(path, PartitionSpec\)"):
            jc.shard(params, mesh_of(), rules)
    for spec in ("a", ("a",), NamedSharding(mesh_of(), P("a"))):
        with pytest.raises(JaxcompError, match=r"rule 'w' gives a .*; use a PartitionSpec"):
            jc.shard(params, mesh_of(), [("w", spec)])
    with pytest.raises(JaxcompError, match="leaves axis 0 open"):
        jc.shard(params, mesh_of(), [("w", P(P.UNCONSTRAINED))])
    for mesh in (None, "a", mesh_of().abstract_mesh):
        with pytest.raises(JaxcompError, match=r"give a jax\.sharding\.Mesh of devices"):
            jc.shard(params, mesh, [("w", P("a"))])
