"""Sparse weights on the kernels that read them so: 2:4 values and listed blocks."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxcomp.kernels import chips, sparse_matmul

import jaxcomp as jc
from jaxcomp import packed, packed_sparse
from jaxcomp.errors import JaxcompError
from jaxcomp.formats import NM, CompressedArray, InputQuant, Int, Sparse, sparse
from jaxcomp.step import Activation
from tests.kernels import aot
from tests.test_dispatch_quantized import apply, assert_rounding
from tests.test_dispatch_sharded import auto_mesh, moved


def scanned(params, x):
    return jax.lax.scan(lambda _, a: (None, a[1] @ a[0]), None, (params["w"], x))[1]


def experts(params, x):
    return jnp.einsum("eti,eio->eto", x, params["w"])


def leaf(part):
    """A part ``(*stack, out, in)`` as the leaf ``(*stack, in, out)``."""
    *stack, out, size = part.shape
    depth = len(stack)
    return CompressedArray.from_matrix(
        part, (*stack, size, out), jnp.float32, tuple(range(depth)), (depth + 1,), (depth,)
    )


def normal(*shape, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def nm(shape, n=2, m=4, values=None, dtype=jnp.float32):
    w = normal(*shape, dtype=dtype)
    groups = jnp.abs(w).reshape(*shape[:-1], -1, m)
    mask = jnp.argsort(jnp.argsort(groups, -1), -1) >= m - n
    return sparse.quantize(NM(n, m, values), w, mask.reshape(shape))


def blocks(shape, side, density, seed=3, dtype=jnp.float32):
    """Values in some blocks only, ragged within them; a stack's matrices have fewer and fewer."""
    *stack, out, size = shape
    rng = np.random.default_rng(seed)
    grid = -(-out // side), -(-size // side)
    count = int(density * grid[0] * grid[1])
    masks = []
    for i in range(int(np.prod(stack))):
        used = np.zeros(grid, bool)
        used.flat[rng.permutation(used.size)[: max(count - i, 1)]] = True
        masks.append(np.kron(used, np.ones((side, side), bool))[:out, :size])
    mask = np.array(masks).reshape(shape) & (rng.random(shape) < 0.9)
    return sparse.build(Sparse(), jnp.asarray(mask), normal(*shape, dtype=dtype))


def product(apply, params, x):
    """The product in float64, and sums of its terms' magnitudes."""
    w = np.asarray(params["w"].materialize(), np.float64)
    x = np.asarray(x, np.float64)
    return x @ w, np.abs(x) @ np.abs(w)


@pytest.fixture
def on_tpu(monkeypatch):
    """Makes this machine count as a v5e whose kernels are interpreted; counts their calls."""
    calls = []

    def interpreted(name):
        run = getattr(sparse_matmul, name)

        def call(*operands, **options):
            calls.append(name)
            options |= {"implementation": "mosaic_tpu", "interpret": pltpu.InterpretParams()}
            return run(*operands, **options)

        monkeypatch.setattr(sparse_matmul, name, call)

    monkeypatch.setattr(chips, "chip_of", lambda *_: chips.V5E)
    interpreted("nm_matmul")
    interpreted("block_sparse_matmul")
    return calls


CASES = {
    "2:4": (apply, nm, {"shape": (128, 512)}),
    "2:4 of int4": (scanned, nm, {"shape": (2, 128, 512), "values": Int(4, 64)}),
    "blocks": (apply, blocks, {"shape": (300, 500), "side": 128, "density": 0.3}),
    "blocks of scanned layers": (
        scanned, blocks, {"shape": (2, 512, 1024), "side": 256, "density": 0.5}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_on_the_kernel(name, on_tpu):
    function, make, options = CASES[name]
    params = {"w": leaf(make(**options))}
    size, stack = options["shape"][-1], options["shape"][:-2]
    x = normal(*stack, 3, size, seed=1)
    fast = jc.dispatch(function)
    ready = fast.prepare(params, x)
    ((part,), kind) = ready["w"].parts, packed_sparse.BlockPart
    assert isinstance(part, kind if make is blocks else packed_sparse.PreparedNM)
    np.testing.assert_array_equal(ready["w"].materialize(), params["w"].materialize())
    (choice,) = fast.report(ready, x)
    assert choice.implementation == "kernel"
    assert_rounding(jax.jit(fast)(ready, x), *product(function, params, x), size)
    assert on_tpu == ["block_sparse_matmul" if make is blocks else "nm_matmul"]


@pytest.mark.parametrize("make", [nm, blocks])
def test_loops_over_layers_slice_no_values_for_kernels(make, on_tpu, monkeypatch):
    """Products, and gradients of values too, are those of slices."""
    options = {"side": 128, "density": 0.5} if make is blocks else {}
    fast, params = jc.dispatch(scanned), {"w": leaf(make((2, 128, 512), **options))}
    x = normal(2, 3, 512, seed=1)
    ready = fast.prepare(params, x)

    def loss(values, x):
        (part,) = ready["w"].parts
        return jnp.sum(fast({"w": ready["w"].replace(parts=(part.replace(values=values),))}, x))

    values = ready["w"].parts[0].values
    got = jax.value_and_grad(loss, (0, 1))(values, x)
    monkeypatch.setattr(packed, "looped", lambda leaf: (leaf, None))
    want = jax.value_and_grad(loss, (0, 1))(values, x)
    for ours, theirs in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())
    assert np.abs(got[1][0]).max() > 0


@pytest.mark.parametrize("function", [apply, experts])
@pytest.mark.parametrize("make", [nm, blocks])
def test_asked_for_on_any_machine(function, make):
    stack = (2,) if function is experts else ()
    options = {"side": 128, "density": 0.5} if make is blocks else {"n": 4, "m": 8}
    params = {"w": leaf(make((*stack, 256, 384), **options))}
    x = normal(*stack, 5, 384, seed=1)
    fast = jc.dispatch(function, "kernel")
    ready = fast.prepare(params, x)
    got = jax.jit(fast)(ready, x)
    assert_rounding(got, *product(function, params, x), 384)
    got = jax.jit(jax.grad(lambda x: fast(ready, x).sum()))(x)
    w = np.asarray(params["w"].materialize(), np.float64)
    expected = np.broadcast_to(w.sum(-1)[..., None, :], x.shape)
    magnitude = np.broadcast_to(np.abs(w).sum(-1)[..., None, :], x.shape)
    assert_rounding(got, expected, magnitude, 384)


def test_blocks_are_as_large_as_they_can_be():
    whole = packed_sparse.listed(blocks((512, 1024), 512, 0.5))
    assert whole.values.shape == (1, 512, 512)
    assert packed_sparse.listed(blocks((256, 512), 128, 0.5)).values.shape == (4, 128, 128)
    assert packed_sparse.listed(blocks((1, 256, 256), 128, 0)).values.shape == (1, 1, 128, 128)
    scattered = sparse.build(Sparse(), normal(256, 256) > 0, normal(256, 256))
    assert packed_sparse.listed(scattered) is scattered


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        (nm((16, 512), 1, 4), "it takes 2:4 sparsity, not 1:4"),
        (nm((16, 128)), "the 128 inputs are not a multiple of 512"),
        (nm((16, 512), values=Int(8)), "neither plain nor int4"),
        (nm((16, 512), values=Int(4, symmetric=False)), "2:4 values with zero points"),
        (
            InputQuant(nm((16, 512)), spec=Activation()),
            "no kernel multiplies quantized inputs with sparse weights",
        ),
        (sparse.build(Sparse(), normal(16, 512) > 0, normal(16, 512)), "kept by a bit mask"),
    ],
)
def test_what_no_kernel_reads_is_told(part, reason, monkeypatch):
    monkeypatch.setattr(chips, "chip_of", lambda *_: chips.V5E)
    params, x = {"w": leaf(part)}, normal(3, part.shape[-1])
    fast = jc.dispatch(apply)
    ready = fast.prepare(params, x)
    assert ready["w"].parts[0] is part
    assert reason in packed.problem(
        part.part if isinstance(part, InputQuant) else part,
        chips.V5E,
        activation=getattr(part, "spec", None),
    )
    (choice,) = fast.report(ready, x)
    assert choice.implementation != "kernel"
    if choice.implementation == "materialize":
        assert reason in choice.reason


def test_forced_where_nothing_fits_all_reasons_are_told():
    params = {"w": leaf(nm((16, 512), values=Int(8)))}
    with pytest.raises(JaxcompError, match=r"int8: .*fp8: .*kernel: no kernel reads 2:4 values"):
        jc.dispatch(apply, "kernel")(params, normal(3, 512))


@pytest.mark.parametrize("spec", [P(None, "model"), P("model")])
@pytest.mark.parametrize("values", [None, Int(4, 128)])
def test_two_of_four_on_a_mesh(spec, values):
    params, x = {"w": leaf(nm((128, 1024), values=values))}, normal(4, 1024, seed=1)
    mesh, rules = auto_mesh(), [("w", spec)]
    placed = jc.shard(params, mesh, rules)
    fast = jax.jit(jc.dispatch(apply, "kernel", sharding=rules))
    rows = jax.device_put(x, NamedSharding(mesh, P("data")))
    assert_rounding(fast(placed, rows), *product(apply, params, x), 1024)
    sent = moved(fast.lower(placed, rows).compile().as_text())
    assert all(size < 128 * 1024 // 4 // 2 for size in sent)  # bytes of a device's positions


@pytest.mark.parametrize("spec", [P(None, "model"), P("model"), P("data", "model")])
def test_blocks_on_a_mesh(spec):
    """Each device lists its own, and nothing is sent but sums."""
    params, x = {"w": leaf(blocks((256, 1024), 128, 0.25))}, normal(4, 1024, seed=1)
    mesh, rules = auto_mesh(), [("w", spec)]
    fast = jc.dispatch(apply, "kernel")
    ready = fast.prepare(jc.shard(params, mesh, rules), x)
    (part,) = ready["w"].parts
    sizes = tuple(1 if e is None else 2 for e in (*spec, None)[1::-1])
    assert part.parts == sizes
    held = part.values.sharding.shard_shape(part.values.shape)
    assert held[0] == part.values.shape[0] // (sizes[0] * sizes[1])
    np.testing.assert_array_equal(ready["w"].materialize(), params["w"].materialize())
    rows = jax.device_put(x, NamedSharding(mesh, P("data") if "data" not in spec else P()))
    run = jax.jit(fast)
    assert_rounding(run(ready, rows), *product(apply, params, x), 1024)
    hlo = run.lower(ready, rows).compile().as_text()
    assert not moved(hlo)
    assert ("all-reduce" in hlo) == (spec[0] is not None)  # the sums over inputs


def test_lists_of_blocks_have_the_parts_of_the_mesh():
    params, x = {"w": leaf(blocks((256, 384), 128, 0.5))}, normal(4, 384, seed=1)
    mesh, split = auto_mesh(), [("w", P(None, "model"))]
    ready = jc.dispatch(apply, "kernel").prepare(params, x)
    with pytest.raises(JaxcompError, match=r"has \(1, 1\) parts .* and the mesh \(2, 1\)"):
        jc.shard(ready, mesh, split)
    placed = jc.shard(ready, mesh, [("w", P())])
    fast = jax.jit(jc.dispatch(apply, "kernel", sharding=[("w", P())]))
    rows = jax.device_put(x, NamedSharding(mesh, P("data")))
    assert_rounding(fast(placed, rows), *product(apply, params, x), 384)
    assert not moved(fast.lower(placed, rows).compile().as_text())
    # Three blocks of inputs on two devices: the mask stays.
    inputs = [("w", P("model"))]
    ready = jc.dispatch(apply, sharding=inputs, mesh=mesh).prepare(placed := params, x)
    assert ready["w"].parts[0] is placed["w"].parts[0]


@pytest.mark.parametrize(
    ("make", "options", "spec"),
    [
        (nm, {"n": 4, "m": 8}, P("model")),
        (blocks, {"side": 128, "density": 0.5}, P("data", "model")),
    ],
)
def test_experts_on_a_mesh(make, options, spec):
    """Over devices whole, or each split along its inputs as well."""
    params, x = {"w": leaf(make((2, 256, 512), **options))}, normal(2, 3, 512, seed=1)
    mesh = auto_mesh()
    fast = jc.dispatch(experts, "kernel")
    ready = fast.prepare(jc.shard(params, mesh, [("w", spec)]), x)
    rows = jax.device_put(x, NamedSharding(mesh, P(spec[0])))
    run = jax.jit(fast)
    assert_rounding(run(ready, rows), *product(experts, params, x), 512)
    assert not moved(run.lower(ready, rows).compile().as_text())


def on_tpus(mesh, kind, rules):
    """The program of one sparse layer for eight chips or one."""
    make = {
        "nm": lambda: nm((2, 512, 2048), dtype=jnp.bfloat16),
        "int4": lambda: nm((2, 512, 2048), values=Int(4, 128)),
        "blocks": lambda: blocks((2, 512, 2048), 256, 0.25, dtype=jnp.bfloat16),
    }[kind]
    part = make()
    part = packed_sparse.listed(packed.prepared(part, chips.V5E))
    params = {"w": leaf(part).replace(dtype=jnp.dtype(jnp.bfloat16))}
    rules = None if rules is None else [("w", P(*rules))]
    shardings = jc.sharding.shardings(params, rules or [("w", P())], mesh)
    placed = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), params, shardings
    )
    fast = jc.dispatch(scanned, sharding=rules, mesh=mesh if rules else None)
    spec = NamedSharding(mesh, P(None, "data"))
    x = jax.ShapeDtypeStruct((2, 16, 2048), jnp.bfloat16, sharding=spec)
    (choice,) = fast.report(placed, x)
    assert choice.implementation == "kernel", choice.reason
    return fast, (placed, x)


@pytest.mark.slow
@pytest.mark.skipif(not aot.available(), reason="the TPU compiler is not installed")
def test_compiles_for_tpus():
    make = "tests.test_dispatch_sparse:on_tpus"
    requests = [
        {"kind": "blocks", "rules": None},
        {"kind": "int4", "rules": None},
        {"kind": "nm", "rules": [None, "model"], "mesh": (2, 4)},
        {"kind": "int4", "rules": [None, None, "model"], "mesh": (2, 4)},
    ]
    results = aot.compile_cases("v5e", [(make, r) for r in requests])
    for request, result in zip(requests, results, strict=True):
        assert result["error"] is None, (request, result["error"])
        # The kernel has the values of both layers, and a number before them; they are not copied.
        (operands,) = re.findall(r'tpu_custom_call", operand_layout_constraints=.*', result["hlo"])
        whole = {"blocks": r"bf16\[2,4,", "nm": r"bf16\[2,2,", "int4": r"s4\[2,2,"}
        assert re.search(rf"s32\[1\].*{whole[request['kind']]}", operands), (request, operands)
        assert all(size < 512 * 2048 // 8 // 4 for size in moved(result["hlo"])), request
