"""Sparse products on several devices: the same numbers, and no device asks for another's weight."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxcomp.kernels.sparse_matmul import (
    block_sparse_matmul,
    nm_matmul,
    prepare_nm,
    split_blocks,
)

from tests.kernels.sparse_matmul import cases

P = PartitionSpec
COLLECTIVES = r"(all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
SPLITS = {
    "outputs": P("model", None),
    "inputs": P(None, "model"),
    "both": P("data", "model"),
    "inputs over two axes": P(None, ("data", "model")),
}
# Every split once, each kind of mesh column-parallel and row-parallel.
CASES = [
    (AxisType.Auto, "inputs"),
    (AxisType.Auto, "both"),
    (AxisType.Explicit, "outputs"),
    (AxisType.Explicit, "inputs over two axes"),
]
# Each part has another number of blocks, and one of the quarters none.
MASK = [[1, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 1, 1]]


def mesh_of(kind: AxisType) -> jax.sharding.Mesh:
    return jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind, kind))


def put(mesh, array, spec):
    return jax.device_put(array, NamedSharding(mesh, spec))


def parts_of(split) -> tuple[int, int]:
    return tuple(1 if a is None else 4 if isinstance(a, tuple) else 2 for a in split)


def placed_blocks(mesh, weight, split):
    names = [n for axes in split if axes for n in ((axes,) if isinstance(axes, str) else axes)]
    weight = split_blocks(weight, *parts_of(split))
    return jax.tree.map(lambda a: put(mesh, a, P(tuple(names))), weight)


def placed_nm(mesh, weight, split):
    outputs, inputs = split
    stored = weight.layout == "stored"
    scales = weight.scales
    if scales is not None:
        scales = put(mesh, scales, P(inputs, outputs) if stored else P(outputs, inputs))
    return dataclasses.replace(
        weight,
        values=put(mesh, weight.values, split if stored else P(None, *split)),
        positions=put(mesh, weight.positions, split),
        scales=scales,
    )


def check(mesh, product, placed, weight, dense, split, rng):
    """Forward against float64, gradients against one device, collectives by name."""
    rows = None if "data" in str(split) else "data"
    outputs, inputs = split
    x = rng.normal(size=(4, 3, dense.shape[1])) / np.abs(dense).max()  # so that slopes are small
    x = jnp.asarray(x, jnp.float32)
    bias = jnp.asarray(rng.normal(size=dense.shape[0]), jnp.float32)
    told = mesh.axis_types[0] is AxisType.Auto
    spec = {"weight_spec": split, "x_spec": P(rows, None, inputs)} if told else {}

    def loss(x, leaf, bias, weight, **options):
        name = "values" if weight.scales is None else "scales"
        weight = dataclasses.replace(weight, **{name: leaf})
        y = product(x, weight, bias, activation="silu", **options)
        return jnp.sum(jnp.sin(y)), y

    def gradients(x, leaf, bias, weight, **options):
        return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(x, leaf, bias, weight, **options)

    leaf = weight.values if weight.scales is None else weight.scales
    (_, one), (dx, dleaf, dbias) = gradients(x, leaf, bias, weight)
    z = cases.double(x) @ dense.T + cases.double(bias)
    np.testing.assert_allclose(one, z / (1 + np.exp(-z)), atol=1e-4)
    operands = (
        put(mesh, x, P(rows, None, inputs)),
        placed.values if placed.scales is None else placed.scales,
        put(mesh, bias, P(outputs)),
        placed,
    )
    forward = jax.jit(lambda x, leaf, bias, w: loss(x, leaf, bias, w, **spec)[1])
    compiled = forward.lower(*operands).compile()
    np.testing.assert_allclose(compiled(*operands), one, atol=1e-5)
    used = set(re.findall(COLLECTIVES, compiled.as_text()))
    assert used == ({"all-reduce"} if inputs else set())
    several = jax.jit(lambda *a: gradients(*a, **spec)[1])(*operands)
    np.testing.assert_allclose(several[0], dx, atol=1e-4)
    np.testing.assert_allclose(several[2], dbias, atol=1e-4)
    return dleaf, several[1]


def scattered(weight, values) -> np.ndarray:
    """Values of blocks where they are."""
    whole = np.zeros((*weight.grid, *values.shape[1:]))
    whole[np.asarray(weight.rows), np.asarray(weight.columns)] = np.asarray(values)
    return whole


@pytest.mark.parametrize(("kind", "split"), CASES)
def test_blocks(kind, split, rng):
    mesh, split = mesh_of(kind), SPLITS[split]
    dtype = "int8" if kind is AxisType.Explicit else "float32"
    weight, dense = cases.blocks(rng, (16, 32), (4, 8), MASK, dtype)
    placed = placed_blocks(mesh, weight, split)
    want, got = check(mesh, block_sparse_matmul, placed, weight, dense, split, rng)
    listed = scattered(weight, np.ones_like(want)) > 0
    got, want = scattered(placed, got), scattered(weight, want)
    np.testing.assert_allclose(got[listed], want[listed], atol=1e-4)


@pytest.mark.parametrize(("kind", "split"), CASES)
def test_nm(kind, split, rng):
    mesh, split = mesh_of(kind), SPLITS[split]
    coded = kind is AxisType.Explicit
    options = {"dtype": "int4", "group_size": 16} if coded else {}
    weight, dense = cases.nm(rng, (12, 64), **options)
    placed = placed_nm(mesh, weight, split)
    want, got = check(mesh, nm_matmul, placed, weight, dense, split, rng)
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_nm_prepared_and_with_one_group_a_row(rng):
    mesh, split = mesh_of(AxisType.Explicit), P("data", "model")
    weight, dense = cases.nm(rng, (128, 512), dtype="int4", group_size=512)
    x = cases.rows(rng, (4, 512), "float32")
    prepared = prepare_nm(weight, chip="v5e")
    assert prepared.layout != "stored"
    for w in (weight, prepared):
        scales = P(None, "data") if w.layout == "stored" else P("data", None)
        values = split if w.layout == "stored" else P(None, *split)
        placed = dataclasses.replace(
            w,
            values=put(mesh, w.values, values),
            positions=put(mesh, w.positions, split),
            scales=put(mesh, w.scales, scales),
        )
        y = jax.jit(nm_matmul)(put(mesh, x, P(None, "model")), placed)
        np.testing.assert_allclose(y, cases.double(x) @ dense.T, rtol=1e-4, atol=1e-3)


def test_a_divided_list_is_the_same_weight(rng):
    weight, dense = cases.blocks(rng, (16, 32), (4, 8), MASK)
    split = split_blocks(weight, 2, 2)
    whole = scattered(split, split.values).swapaxes(1, 2).reshape(16, 32)
    np.testing.assert_array_equal(whole, dense.astype(np.float32))
    at = list(zip(split.rows.tolist(), split.columns.tolist(), strict=True))
    assert len(set(at)) == len(at) == 4 * 3  # the fullest quarters have 3
    for part in range(4):
        assert at[3 * part : 3 * part + 3] == sorted(at[3 * part : 3 * part + 3])
        assert {(row // 2, column // 2) for row, column in at[3 * part : 3 * part + 3]} == {
            divmod(part, 2)
        }


def test_what_cannot_be_divided_is_an_error(rng):
    weight, _ = cases.blocks(rng, (16, 32), (4, 8), MASK)
    with pytest.raises(ValueError, match=r"3 parts of N = 16 .* whole blocks of 4"):
        split_blocks(weight, 3)
    with pytest.raises(ValueError, match=r"\(2, 1\) parts already"):
        split_blocks(split_blocks(weight, 2), 2)
    mesh = mesh_of(AxisType.Auto)
    x = put(mesh, jnp.ones((4, 32)), P())
    with pytest.raises(ValueError, match=r"has \(1, 1\): use split_blocks\(w, outputs=2, inputs=1"):
        block_sparse_matmul(
            x, jax.tree.map(lambda a: put(mesh, a, P()), weight), weight_spec=P("model")
        )
    for spec, x_spec, message in [
        (P("model"), P("model"), "by none of .*model"),
        (P(None, ("data", "model")), None, "8 of the K = 32 inputs, which splits groups of 16"),
        (P(("data", "model")), None, "4 devices do not divide N = 6"),
    ]:
        coded, _ = cases.nm(rng, (6, 32), dtype="int4", group_size=16)
        coded = jax.tree.map(lambda a: put(mesh, a, P()), coded)
        with pytest.raises(ValueError, match=message):
            nm_matmul(x, coded, weight_spec=spec, x_spec=x_spec)
