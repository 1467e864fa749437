"""compress: the sequential pass against what the same algorithms give when called by hand."""

import pathlib
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxcomp as jc
from jaxcomp import calibration, host
from jaxcomp.compress import _Run
from jaxcomp.dispatch import Dispatcher
from jaxcomp.formats import CompressedArray, InputScale, Int, to_matrix
from jaxcomp.graph import Plain, interpret, trace
from jaxcomp.graph.sequential import Many, Sequential, _Leaf
from jaxcomp.graph.sites import to_tokens
from jaxcomp.graph.trace import leaf_paths
from jaxcomp.plan import make_plan
from jaxcomp.pruning import Magnitude, SparseGPT, Wanda
from jaxcomp.quantization import AWQ, GPTQ, RTN, LLMInt8, SmoothQuant, gptq
from jaxcomp.recipe import Recipe
from jaxcomp.step import Activation

INT4 = Int(4, group_size=8)


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def inputs(count=3, rows=32, size=16):
    """Correlated calibration batches."""
    mix = normal(size, size, seed=99)
    return [(normal(rows, size, seed=i) @ mix,) for i in range(count)]


def mlp(p, x):
    return jnp.tanh(x @ p["a"]) @ p["b"]


MLP = {"a": normal(16, 24, seed=1) / 4, "b": normal(24, 8, seed=2) / 5}


def block(x, p):
    h = x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * p["gain"]
    return x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"]


def blocks(layers=3, size=16, inner=32):
    return {
        "gain": 1 + 0.1 * normal(layers, size, seed=3),
        "gate": normal(layers, size, inner, seed=4) / 4,
        "up": normal(layers, size, inner, seed=5) / 4,
        "down": normal(layers, inner, size, seed=6) / 6,
    }


def scanned(p, x):
    return jax.lax.scan(lambda x, q: (block(x, q), None), x, p)[0]


def scanned_remat(p, x):
    return jax.lax.scan(jax.checkpoint(lambda x, q: (block(x, q), None)), x, p)[0]


def unrolled(p, x):
    for q in p:
        x = block(x, q)
    return x


def unstack(p, layers=3):
    return [jax.tree.map(lambda a: a[i], p) for i in range(layers)]  # noqa: B023


def matrix(w):
    return jnp.asarray(w).T


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_each_weight_sees_the_input_from_compressed_predecessors():
    data = inputs()
    result = jc.compress(mlp, MLP, Recipe(steps=(GPTQ(format=INT4),)), data)
    x = jnp.concatenate([b[0] for b in data])
    first = gptq(matrix(MLP["a"]), x.T @ x, INT4)
    np.testing.assert_allclose(
        result.params["a"].materialize(), first.materialize().T, rtol=1e-5, atol=1e-6
    )
    hidden = jnp.tanh(x @ result.params["a"].materialize())
    second = gptq(matrix(MLP["b"]), hidden.T @ hidden, INT4)
    np.testing.assert_allclose(
        result.params["b"].materialize(), second.materialize().T, rtol=1e-5, atol=1e-6
    )
    # With inputs of the dense predecessor the result would be another.
    dense = jnp.tanh(x @ MLP["a"])
    other = gptq(matrix(MLP["b"]), dense.T @ dense, INT4)
    assert jnp.abs(other.materialize().T - result.params["b"].materialize()).max() > 1e-3


@pytest.mark.parametrize("apply", [scanned, scanned_remat])
@pytest.mark.parametrize(
    "steps",
    [
        (GPTQ(format=INT4),),
        (SmoothQuant(), RTN(format=Int(8, full_range=False), activation=Activation())),
        (SparseGPT(n=2, m=4), RTN(format=INT4)),
    ],
)
def test_scanned_layers_equal_unrolled_ones(apply, steps):
    params, data = blocks(), inputs()
    recipe = Recipe(steps=steps)
    stacked = jc.compress(apply, params, recipe, data).params
    single = jc.compress(unrolled, unstack(params), recipe, data).params
    assert isinstance(stacked["down"], CompressedArray) and stacked["down"].shape == (3, 32, 16)
    for i in range(3):
        for name in ("gate", "up", "down"):
            same(jax.tree.map(lambda a: a[i], stacked[name].parts), single[i][name].parts)  # noqa: B023
        np.testing.assert_array_equal(stacked["gain"][i], single[i]["gain"])
    x = data[0][0]
    np.testing.assert_allclose(
        jc.dispatch(apply)(stacked, x), jc.dispatch(unrolled)(single, x), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("apply, params", [(unrolled, unstack(blocks())), (scanned, blocks())])
def test_one_forward_pass(apply, params):
    """Contractions executed: one for each site, position and batch, and none besides."""
    data = inputs(count=2)
    graph = trace(apply, params, *data[0])
    recipe = Recipe(steps=(GPTQ(format=INT4, include=("*gate*", "*up*")),))
    named, _ = leaf_paths(params)
    run = _Run(graph, recipe, make_plan(graph, recipe), dict(named), False)
    run.calibrated(named, data)
    # gate and up run site by site; down is left dense and counted once when its segment is built.
    # Nothing reads the last layer's outputs; a loop runs them all the same.
    skipped = 0 if apply is scanned else 1
    compressed_sites = (3 - skipped) * 2 * len(data)
    seen = Counting()
    leaves = [v for _, v in named]
    for batch in data:
        interpret(graph.program, [*leaves, *batch], seen, {})
    assert seen.count * (3 if apply is scanned else 1) == 3 * 3 * len(data)
    assert run.contractions == compressed_sites + 3 - skipped


class Counting(Plain):
    def __init__(self):
        self.count = 0

    def site(self, op, operands, leaf, state):
        self.count += 1
        return super().site(op, operands, leaf, state)


def test_statistics_of_every_kind_of_site_give_the_output():
    """y = x Wᵀ in the canonical form, so tr(W H Wᵀ) is the energy of the output."""
    cases = {
        "heads": (
            lambda p, x: jnp.einsum("tdh,hde->te", x, p["w"]),
            normal(2, 4, 6),
            normal(5, 4, 2),
        ),
        "experts": (
            lambda p, x: jnp.einsum("eti,eio->teo", x, p["w"]),
            normal(3, 8, 6),
            normal(3, 5, 8),
        ),
        "convolution": (
            lambda p, x: jax.lax.conv_general_dilated(
                x,
                p["w"],
                (2, 1),
                [(1, 0), (0, 2)],
                rhs_dilation=(1, 2),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            ),
            normal(3, 2, 4, 6),
            normal(2, 7, 6, 4),
        ),
        "convolution, channels first": (
            lambda p, x: jax.lax.conv_general_dilated(x, p["w"], (1, 1), "SAME"),
            normal(6, 4, 3, 2),
            normal(2, 4, 5, 6),
        ),
        "ragged": (
            lambda p, x: jax.lax.ragged_dot(x, p["w"], jnp.array([2, 0, 3])),
            normal(3, 8, 6),
            normal(5, 8),
        ),
    }
    for name, (apply, w, x) in cases.items():
        graph = trace(apply, {"w": w}, x)
        (op,) = [op for op in graph.program.ops if op.kind == "site"]
        passes = Sequential(_Always(), Dispatcher(), 1)
        env = dict(graph.program.constants)
        env.update(zip(graph.program.inputs, [_Leaf(w), Many([x])], strict=True))
        for other in graph.program.ops:
            if other is op:
                break
            passes.segment(graph.program, [other], env, {i: 10**9 for i in other.outputs}, 0, 1)
        state = passes.statistics(graph.program, op, env, 1, frozenset({"hessian", "sumsq"}))
        layout = op.site.layout
        m = to_matrix(w, layout.stack_axes, layout.out_axes, layout.in_axes)
        energy = jnp.einsum("...oi,...ij,...oj->", m, state.hessian, m)
        np.testing.assert_allclose(energy, (apply({"w": w}, x) ** 2).sum(), rtol=1e-4, err_msg=name)
        diagonal = jnp.diagonal(state.hessian, axis1=-2, axis2=-1)
        np.testing.assert_allclose(diagonal, state.sumsq, rtol=1e-5)


class _Always:
    def needs(self, site):
        return frozenset({"hessian"})


def test_statistics_go_before_what_weights_are_evaluated_with_is_made(monkeypatch):
    hessians, seen = [], []
    reserved, for_evaluation = host.reserved, _Run.for_evaluation

    def remembered(*args):
        array = reserved(*args)
        hessians.append(weakref.ref(array))
        return array

    def looked_at(run, group, records):
        seen.append([hessian() is None for hessian in hessians])
        return for_evaluation(run, group, records)

    monkeypatch.setattr(host, "reserved", remembered)
    monkeypatch.setattr(_Run, "for_evaluation", looked_at)
    recipe = Recipe(steps=(GPTQ(format=INT4),))
    jc.compress(mlp, jax.tree.map(np.asarray, MLP), recipe, inputs(), progress=False)
    assert seen == [[True], [True, True]]


def test_convolution_patches_have_the_order_of_the_matrix():
    w, x = normal(3, 2, 4, 6), normal(2, 7, 6, 4)
    apply = lambda p, x: jax.lax.conv_general_dilated(  # noqa: E731
        x, p["w"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    graph = trace(apply, {"w": w}, x)
    (op,) = [op for op in graph.program.ops if op.kind == "site"]
    layout = op.site.layout
    m = to_matrix(w, layout.stack_axes, layout.out_axes, layout.in_axes)
    y = to_tokens(op.eqn, op.site, x) @ m.T
    np.testing.assert_allclose(y.reshape(2, 5, 5, 6), apply({"w": w}, x), rtol=1e-4, atol=1e-4)


def test_data_free_recipes_evaluate_nothing():
    def apply(p, x):
        jax.debug.callback(lambda: pytest.fail("the model was evaluated"))
        return mlp(p, x)

    result = jc.compress(apply, MLP, Recipe(steps=(RTN(format=INT4),)), inputs(1))
    assert [r.format for r in result.report.rows] == ["int4 g8", "int4 g8"]


def test_experts_without_tokens_are_said():
    params = {"w": normal(3, 16, 8)}
    apply = lambda p, x: jax.lax.ragged_dot(x, p["w"], jnp.array([20, 0, 12]))  # noqa: E731
    result = jc.compress(apply, params, Recipe(steps=(GPTQ(format=INT4),)), inputs(1))
    assert "no calibration tokens" in result.report.rows[0].notes
    # The expert that saw nothing is rounded to nearest rather than zeroed.
    error = jnp.linalg.norm(params["w"][1] - result.params["w"].materialize()[1])
    assert error < 0.2 * jnp.linalg.norm(params["w"][1])


def test_branches_loops_and_shared_weights():
    params = {"w": normal(16, 16) / 4, "v": normal(16, 16, seed=1) / 4}

    def apply(p, x):
        x = jax.lax.cond(x.sum() > 0, lambda x: x @ p["w"], lambda x: x @ p["v"], x)
        x = jax.lax.fori_loop(0, 2, lambda i, x: jnp.tanh(x @ p["w"]), x)
        return jax.lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, s[1] @ p["v"]), (0, x))[
            1
        ]

    data = [(jnp.abs(x),) for (x,) in inputs(1)] + [(-jnp.abs(x),) for (x,) in inputs(1)]
    result = jc.compress(apply, params, Recipe(steps=(GPTQ(format=INT4),)), data)
    assert all(isinstance(v, CompressedArray) for v in result.params.values())
    # Each weight was calibrated where it was first used: on the batches that took its branch.
    x = data[0][0]
    expected = gptq(matrix(params["w"]), x.T @ x, INT4).materialize().T
    np.testing.assert_allclose(result.params["w"].materialize(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "specs", [(P("a", "b"), P("b", None)), (P("a"), P(None, "b")), (P("a"), P())]
)
def test_inside_shard_map(specs):
    """Statistics are summed over the devices: the same result as without the shard_map."""
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    params, data = {"w": normal(16, 24, seed=1)}, inputs()

    def local(x, w):
        y = x @ w
        return jax.lax.psum(y, "b") if specs[1] == P("b", None) else y

    def apply(p, x):
        out = P("a", "b") if specs[1] == P(None, "b") else P("a")
        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=out)(x, p["w"])

    recipe = Recipe(steps=(GPTQ(format=INT4),))
    got = jc.compress(apply, params, recipe, data).params["w"].materialize()
    expected = jc.compress(lambda p, x: x @ p["w"], params, recipe, data).params["w"].materialize()
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_a_branch_that_the_data_never_takes():
    params = {"w": normal(16, 16), "v": normal(16, 16)}

    def apply(p, x):
        return jax.lax.cond(x.sum() > -1e9, lambda x: x @ p["w"], lambda x: x @ p["v"], x)

    with pytest.raises(jc.DataError, match=r"v \(16, 16\): the calibration data never reached it"):
        jc.compress(apply, params, Recipe(steps=(GPTQ(format=INT4),)), inputs(1))


def test_smoothing_folds_into_gain_and_rows_and_changes_nothing():
    """SmoothQuant without a quantizer is the identity, with no transform left at run time."""
    params, data = blocks(), inputs()
    params["up"] = params["up"].at[:, :, 3].multiply(50.0)
    result = jc.compress(scanned, params, Recipe(steps=(SmoothQuant(),)), data)
    x = data[0][0]
    np.testing.assert_allclose(
        jc.dispatch(scanned)(result.params, x), scanned(params, x), rtol=1e-4, atol=1e-4
    )
    assert jnp.abs(result.params["gain"] - params["gain"]).max() > 0.1
    for name in ("gate", "up", "down"):
        (part,) = result.params[name].parts
        assert not isinstance(part, InputScale)
    notes = {r.path: r.notes for r in result.report.rows}
    assert "gain" in notes["gate"] and "up" in notes["down"]


def unit(x):
    return x / jnp.sqrt((x * x).mean(-1, keepdims=True))


def gain(*shape, seed=1):
    return 1 + 0.3 * normal(*shape, seed=seed)


def over_second_axis(p, x):
    layers = (p["g"].T, jnp.moveaxis(p["w"], 1, 0))
    return jax.lax.scan(lambda c, q: ((unit(c) * q[0]) @ q[1], None), x, layers)[0]


TRICKY = {
    "the weight has another use": (
        lambda p, x: unit((unit(x) * p["g"]) @ p["w"] + x) * p["h"] @ p["w"],
        dict(g=gain(8), h=gain(8, seed=2), w=normal(8, 8)),
        "*",
    ),
    "the weight is a tied embedding": (
        lambda p, x: (unit(p["w"][jnp.arange(8)]) * p["g"]) @ p["w"].T,
        dict(g=gain(8), w=normal(10, 8)),
        "w",
    ),
    "the producer is squared": (
        lambda p, x: (lambda h: (h * h) @ p["w"])(x @ p["a"]),
        dict(a=normal(8, 8, seed=1), w=normal(8, 8)),
        "w",
    ),
    "the producer is added to itself": (
        lambda p, x: (lambda h: (h + h) @ p["w"])(x @ p["a"]),
        dict(a=normal(8, 8, seed=1), w=normal(8, 8)),
        "w",
    ),
    "a scan shares the producer": (
        lambda p, x: jax.lax.scan(lambda c, w: (jnp.tanh((unit(c) @ p["a"]) @ w), None), x, p["w"])[
            0
        ],
        dict(a=normal(8, 8, seed=1), w=normal(3, 8, 8)),
        "*",
    ),
    "gains stacked on their second axis": (
        over_second_axis,
        dict(g=gain(8, 3), w=normal(8, 3, 8)),
        "*",
    ),
    "gains stacked on their second axis, of equal size": (
        over_second_axis,
        dict(g=gain(8, 8), w=normal(8, 8, 8)),
        "*",
    ),
    "layers picked from a stack": (
        lambda p, x: unit((unit(x) * p["g"][0]) @ p["w"][0]) * p["g"][1] @ p["w"][1],
        dict(g=gain(2, 8), w=normal(2, 8, 8)),
        "*",
    ),
    "layers picked from a stack, gains apart": (
        lambda p, x: unit((unit(x) * p["g"]) @ p["w"][0]) * p["h"] @ p["w"][1],
        dict(g=gain(8), h=gain(8, seed=2), w=normal(2, 8, 8)),
        "*",
    ),
    "the weight's inputs are in another order": (
        lambda p, x: (unit(x) * p["g"]) @ p["w"].transpose(1, 0, 2).reshape(8, 5),
        dict(g=gain(8), w=normal(4, 2, 5)),
        "*",
    ),
    "rounding stands between": (
        lambda p, x: jnp.float32(jnp.int32(unit(x) * p["g"] * 5)) @ p["w"],
        dict(g=gain(8), w=normal(8, 8)),
        "*",
    ),
    "the gain is also a result": (
        lambda p, x: ((unit(x) * p["g"]) @ p["w"], p["g"]),
        dict(g=gain(8), w=normal(8, 8)),
        "*",
    ),
}


@pytest.mark.parametrize("case", TRICKY)
def test_smoothing_never_changes_the_function(case):
    """Where a scale cannot move without being seen elsewhere, it stays with the weight."""
    apply, params, include = TRICKY[case]
    x = normal(32, 8, seed=7)
    result = jc.compress(apply, params, Recipe(steps=(SmoothQuant(include=(include,)),)), [(x,)])
    got = jax.tree.leaves(jc.dispatch(apply)(result.params, x))
    for a, b in zip(jax.tree.leaves(apply(params, x)), got, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_slices_picked_in_any_order():
    def apply(p, x):
        w = p["w"]
        return x @ w[0][0] @ w[0][1] @ w[:, 0][1] @ w[:, 1][1]

    params, x = {"w": normal(2, 2, 8, 8) / 3}, normal(32, 8, seed=7)
    result = jc.compress(apply, params, Recipe(steps=(GPTQ(format=Int(8)),)), [(x,)])
    for i in range(2):
        for j in range(2):  # no slice lies at another's place
            error = jnp.abs(result.params["w"].materialize()[i, j] - params["w"][i, j]).max()
            assert error < 0.1 * jnp.abs(params["w"][i, j]).max()
    exact = apply(params, x)
    got = jc.dispatch(apply)(result.params, x)
    assert jnp.linalg.norm(got - exact) < 0.02 * jnp.linalg.norm(exact)


@pytest.mark.parametrize("looped", [False, True])
def test_a_static_scale_needs_one_input(looped):
    act = Activation(dynamic=False, granularity="tensor")
    recipe = Recipe(steps=(RTN(format=Int(8, full_range=False), activation=act),))

    def apply(p, x):
        if looped:
            return jax.lax.scan(lambda c, _: (c @ p["w"], None), x, None, length=2)[0]
        return x @ p["w"], (50 * x) @ p["w"]

    with pytest.raises(jc.JaxcompError, match=r"w \(8, 8\): used on several inputs"):
        jc.compress(apply, {"w": normal(8, 8)}, recipe, [(normal(4, 8),)])


def test_convolutions_that_see_different_patches_are_not_one_group():
    def apply(p, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        conv = lambda w, d: jax.lax.conv_general_dilated(  # noqa: E731
            x, w, (1, 1), "SAME", rhs_dilation=(d, d), dimension_numbers=numbers
        )
        return conv(p["a"], 1), conv(p["b"], 2)

    params = {"a": normal(3, 3, 2, 4), "b": normal(3, 3, 2, 4, seed=1)}
    groups = {s.input_group for s in trace(apply, params, normal(1, 9, 9, 2)).sites}
    assert len(groups) == 2


def test_outlier_columns_stack_whatever_their_count():
    def apply(p, x):
        return jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["w"])[0]

    x = normal(32, 8).at[:, 2].multiply(30.0)  # outliers at the first layer alone
    params = {"w": normal(3, 8, 8).astype(jnp.bfloat16)}
    result = jc.compress(apply, params, Recipe(steps=(LLMInt8(),)), [(x,)])
    assert "1 columns of bfloat16" in result.report.rows[0].format
    exact, got = apply(params, x), jc.dispatch(apply)(result.params, x)
    assert jnp.linalg.norm(got - exact) < 0.03 * jnp.linalg.norm(exact)


def test_weights_that_cannot_be_reached_are_named():
    stack = {"w": normal(3, 8, 8)}
    x = normal(4, 8)
    recipe = Recipe(steps=(GPTQ(format=Int(4)),))

    def picked(p, x):
        return jax.lax.fori_loop(0, 3, lambda i, c: jnp.tanh(c @ p["w"][i]), x)

    with pytest.raises(jc.RecipeError, match=r"w \(3, 8, 8\): reached through 'dynamic_slice'"):
        jc.compress(picked, stack, recipe, [(x,)])

    def mixed(p, x):
        return jnp.einsum("bi,bio->bo", x[:3], p["w"]) @ p["w"][0]

    with pytest.raises(
        jc.JaxcompError, match=r"w \(3, 8, 8\): its stack is looped over or indexed"
    ):
        jc.compress(mixed, stack, recipe, [(x,)])
    with pytest.raises(jc.RecipeError, match=r"w \(8, 8\).*convert_element_type"):
        jc.compress(
            lambda p, x: x @ jnp.float32(p["w"]), {"w": jnp.ones((8, 8), jnp.int8)}, recipe, [(x,)]
        )


def test_random_keys_among_the_parameters():
    params = {"w": normal(16, 8), "key": jax.random.key(3)}
    apply = lambda p, x: x @ p["w"] + jax.random.normal(p["key"], (8,))  # noqa: E731
    result = jc.compress(apply, params, Recipe(steps=(GPTQ(format=INT4),)), inputs(1))
    assert isinstance(result.params["w"], CompressedArray)


def test_smoothing_stays_where_it_cannot_be_folded():
    """Another reader of the norm's output would see the scale: it must stay with the weights."""

    def apply(p, x):
        h = x * p["gain"]
        return h @ p["w"] + h.sum(-1, keepdims=True)

    params = {"gain": 1 + 0.1 * normal(16), "w": normal(16, 8)}
    data = inputs()
    result = jc.compress(apply, params, Recipe(steps=(SmoothQuant(),)), data)
    same(result.params["gain"], params["gain"])
    assert isinstance(result.params["w"].parts[0], InputScale)
    x = data[0][0]
    np.testing.assert_allclose(
        jc.dispatch(apply)(result.params, x), apply(params, x), rtol=1e-4, atol=1e-4
    )


def test_smoothing_a_part_of_a_group_is_not_folded():
    params, data = blocks(), inputs()
    result = jc.compress(scanned, params, Recipe(steps=(SmoothQuant(include=("up",)),)), data)
    same(result.params["gain"], params["gain"])
    x = data[0][0]
    np.testing.assert_allclose(
        jc.dispatch(scanned)(result.params, x), scanned(params, x), rtol=1e-4, atol=1e-4
    )


def test_layer_norm_with_bias_folds_both():
    def apply(p, x):
        c = x - x.mean(-1, keepdims=True)
        h = c * (jax.lax.rsqrt((c * c).mean(-1, keepdims=True)) * p["gain"]) + p["bias"]
        return h @ p["w"]

    params = {"gain": 1 + 0.1 * normal(16), "bias": normal(16, seed=1), "w": normal(16, 8)}
    data = inputs()
    result = jc.compress(apply, params, Recipe(steps=(SmoothQuant(),)), data)
    assert not isinstance(result.params["w"].parts[0], InputScale)
    ratio = result.params["gain"] / params["gain"]
    np.testing.assert_allclose(result.params["bias"] / params["bias"], ratio, rtol=1e-5)
    x = data[0][0]
    np.testing.assert_allclose(
        jc.dispatch(apply)(result.params, x), apply(params, x), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    "steps",
    [
        (SmoothQuant(), GPTQ(format=Int(8, full_range=False), activation=Activation())),
        (SparseGPT(n=2, m=4), GPTQ(format=INT4)),
        (Wanda(sparsity=0.5), GPTQ(format=INT4)),
        (Magnitude(sparsity=0.5), RTN(format=INT4)),
        (AWQ(format=INT4),),
    ],
)
def test_steps_compose(steps):
    data = inputs()
    result = jc.compress(mlp, MLP, Recipe(steps=steps), data)
    x = data[0][0]
    exact = mlp(MLP, x)
    got = jc.dispatch(mlp)(result.params, x)
    assert jnp.linalg.norm(got - exact) < 0.75 * jnp.linalg.norm(exact)
    first = steps[0]
    if hasattr(first, "sparsity"):
        for w in jc.materialize(result.params).values():
            zeros = float((w == 0).mean())
            assert zeros >= 0.5  # the quantizer kept every zero
        if isinstance(first, SparseGPT):
            kept = (matrix(jc.materialize(result.params)["a"]) != 0).reshape(24, 4, 4).sum(-1)
            assert int(kept.max()) <= 2


def test_report_counts_every_bit():
    result = jc.compress(mlp, MLP, Recipe(steps=(RTN(format=INT4, include=("a",)),)), inputs(1))
    report = result.report
    assert report.rows[0].nbits == 16 * 24 * 4 + 16 * 24 // 8 * 32
    assert report.other_nbits == 24 * 8 * 32
    assert report.original_nbits == (16 * 24 + 24 * 8) * 32
    assert report.nbits == jc.nbits(result.params)


# Input that cannot be used.


@pytest.mark.parametrize(
    "steps, message",
    [
        ((RTN(format=Int(4, group_size=7)),), r"a \(24, 16\): group_size 7 does not divide .*16"),
        ((SparseGPT(n=2, m=5),), r"a \(24, 16\).*5"),
        ((GPTQ(format=INT4, include=("*nothing*",)),), "nothing"),
    ],
)
def test_recipes_that_do_not_fit_are_refused_before_any_work(steps, message):
    def apply(p, x):
        jax.debug.callback(lambda: pytest.fail("the model was evaluated"))
        return mlp(p, x)

    with pytest.raises(jc.JaxcompError, match=message):
        jc.compress(apply, MLP, Recipe(steps=steps), inputs())


def test_no_batches_and_uneven_batches():
    recipe = Recipe(steps=(RTN(format=INT4),))
    with pytest.raises(jc.DataError, match="no calibration batches"):
        jc.compress(mlp, MLP, recipe, [])
    with pytest.raises(jc.DataError, match="batch 1 has the structure"):
        jc.compress(mlp, MLP, recipe, [(normal(2, 16),), (normal(2, 16), normal(2, 16))])
    with pytest.raises(jc.DataError, match=r"batch 1 is float32 \(3, 16\).*drop or pad"):
        jc.compress(mlp, MLP, recipe, [(normal(2, 16),), (normal(3, 16),)])
    scaled = lambda p, x, s: mlp(p, x) * s  # noqa: E731
    with pytest.raises(jc.DataError, match=r"batch 1 is 2\.0, of batch 0 1\.0"):
        jc.compress(scaled, MLP, recipe, [(normal(2, 16), 1.0), (normal(2, 16), 2.0)])


def test_nan_in_weights_and_activations():
    bad = {**MLP, "b": MLP["b"].at[0, 0].set(jnp.nan)}
    with pytest.raises(jc.JaxcompError, match=r"b.*NaN or infinite"):
        jc.compress(mlp, bad, Recipe(steps=(RTN(format=INT4),)), inputs(1))
    data = [(normal(4, 16).at[1, 2].set(jnp.nan),)]
    with pytest.raises(jc.JaxcompError, match=r"^a.*NaN"):
        jc.compress(mlp, MLP, Recipe(steps=(GPTQ(format=INT4),)), data)


def test_a_vector_named_outright():
    params = {**MLP, "gain": jnp.ones(16)}
    apply = lambda p, x: mlp(p, x * p["gain"])  # noqa: E731
    with pytest.raises(jc.RecipeError, match=r"gain \(16,\): named by the recipe"):
        jc.compress(
            apply, params, Recipe(steps=(RTN(format=INT4, include=("gain", "a")),)), inputs(1)
        )


def test_grouped_convolution_needs_a_data_free_algorithm():
    params = {"w": normal(3, 3, 1, 4)}
    apply = lambda p, x: jax.lax.conv_general_dilated(  # noqa: E731
        x, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=4
    )
    data = [(normal(1, 5, 5, 4),)]
    jc.compress(apply, params, Recipe(steps=(RTN(format=Int(8)),)), data)
    with pytest.raises(jc.JaxcompError, match="grouped convolution"):
        jc.compress(apply, params, Recipe(steps=(GPTQ(format=Int(8)),)), data)


# The journal.


def recorded(path: pathlib.Path):
    return {f.name: f.read_bytes() for f in sorted((path / "records").iterdir())}


def test_a_run_resumes_from_its_journal_to_the_same_bytes(tmp_path, monkeypatch):
    params, data = unstack(blocks()), inputs()
    recipe = Recipe(steps=(SmoothQuant(), GPTQ(format=INT4)))
    whole = jc.compress(unrolled, params, recipe, data, journal=str(tmp_path / "whole"))
    calls, run_step = [], jc.compress.__globals__["run"]

    def stop_after(count):
        def step(*args):
            calls.append(1)
            if len(calls) > count:
                raise KeyboardInterrupt
            return run_step(*args)

        return step

    monkeypatch.setitem(jc.compress.__globals__, "run", stop_after(5))
    with pytest.raises(KeyboardInterrupt):
        jc.compress(unrolled, params, recipe, data, journal=str(tmp_path / "cut"))
    done = len(recorded(tmp_path / "cut"))
    assert 0 < done < 9
    calls.clear()
    monkeypatch.setitem(jc.compress.__globals__, "run", stop_after(10**9))
    again = jc.compress(unrolled, params, recipe, data, journal=str(tmp_path / "cut"))
    assert 0 < len(calls) < 2 * 6  # six groups of two steps each; some were not done again
    same(jax.tree.leaves(again.params), jax.tree.leaves(whole.params))


def test_a_scanned_models_stacks_are_files_of_the_journal(tmp_path):
    params, data = blocks(), inputs()
    recipe = Recipe(steps=(GPTQ(format=INT4),))
    plain = jc.compress(scanned, params, recipe, data)
    first = jc.compress(scanned, params, recipe, data, journal=str(tmp_path / "j"))
    names = sorted(recorded(tmp_path / "j"))
    again = jc.compress(scanned, params, recipe, data, journal=str(tmp_path / "j"))
    assert sorted(recorded(tmp_path / "j")) == names
    for found in (first, again):
        same(jax.tree.leaves(found.params), jax.tree.leaves(plain.params))
        for row in found.report.rows:
            leaf = found.params
            for key in row.path.split("/"):
                leaf = leaf[key]
            for array in jax.tree.leaves(leaf):
                assert isinstance(array, np.ndarray) and not array.flags.owndata
                assert not array.flags.writeable


def test_a_journal_of_another_run_is_refused(tmp_path):
    data, recipe = inputs(), Recipe(steps=(GPTQ(format=INT4),))
    jc.compress(mlp, MLP, recipe, data, journal=str(tmp_path / "j"))
    other = Recipe(steps=(GPTQ(format=Int(3, group_size=8)),))
    changed = {**MLP, "a": MLP["a"].at[3, 7].add(1.0)}
    renamed = lambda p, x: jnp.sin(x @ p["a"]) @ p["b"]  # noqa: E731
    for arguments, what in [
        ((mlp, MLP, other, data), "recipe"),
        ((mlp, MLP, recipe, data[:2]), "data"),
        ((mlp, changed, recipe, data), "model"),
        ((renamed, MLP, recipe, data), "model"),
    ]:
        with pytest.raises(jc.JaxcompError, match=what):
            jc.compress(*arguments, journal=str(tmp_path / "j"))


def test_memory_mapped_weights_and_results(tmp_path):
    files = {}
    for name, value in MLP.items():
        np.save(tmp_path / f"{name}.npy", value)
        files[name] = np.load(tmp_path / f"{name}.npy", mmap_mode="r")
    recipe, data = Recipe(steps=(GPTQ(format=INT4),)), inputs()
    got = jc.compress(mlp, files, recipe, data, journal=str(tmp_path / "j")).params
    same(jax.tree.leaves(got), jax.tree.leaves(jc.compress(mlp, MLP, recipe, data).params))
    for leaf in jax.tree.leaves(got):
        assert isinstance(leaf, np.ndarray) and not leaf.flags.owndata and not leaf.flags.writeable


def test_float64_models_stay_float64():
    from tests.helpers import x64

    with x64():
        params = {k: jnp.asarray(v, jnp.float64) for k, v in MLP.items()}
        data = [(jnp.asarray(x, jnp.float64),) for (x,) in inputs()]
        result = jc.compress(mlp, params, Recipe(steps=(RTN(format=Int(16)),)), data)
        assert result.params["a"].dtype == jnp.float64
        got = jc.dispatch(mlp)(result.params, data[0][0])
        np.testing.assert_allclose(got, mlp(params, data[0][0]), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
def test_hessian_is_exact_and_streams(array):
    x = normal(40, 16)
    state = calibration.init(16, frozenset({"hessian", "range", "absmean"}))
    for part in jnp.split(x, 4):
        state = calibration.update(state, array(part))
    wide = np.asarray(x, np.float64)
    np.testing.assert_allclose(state.hessian, wide.T @ wide, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(state.abssum, np.abs(wide).sum(0), rtol=1e-5)
    np.testing.assert_array_equal(state.minimum, x.min(0))
    assert float(state.count) == 40


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
def test_statistics_leave_out_tokens_of_weight_zero(array):
    x = np.asarray(normal(2, 10, 16))
    keep = np.arange(10) < np.array([[4], [0]])
    needs = frozenset({"hessian", "range", "absmax", "absmean", "sumsq"})
    start = calibration.init(16, needs, (2,))
    state = calibration.update(start, array(x), array(keep))
    alone = calibration.update(calibration.init(16, needs), array(x[0, :4]))
    for found, expected, empty in zip(state, alone, start, strict=True):
        np.testing.assert_allclose(found[0], expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(found[1], empty[1])


def test_what_a_site_does_not_read_is_compiled_with_what_follows(monkeypatch):
    """silu(gate) waits for up, so that one program multiplies them."""
    seen = []
    original = Sequential.segment

    def segment(self, program, ops, *rest):
        seen.append([op.eqn.primitive.name for op in ops])
        return original(self, program, ops, *rest)

    monkeypatch.setattr(Sequential, "segment", segment)
    params = jax.tree.map(lambda a: a[0], blocks(1))
    jc.compress(lambda p, x: block(x, p), params, Recipe(steps=(GPTQ(format=INT4),)), inputs())
    assert len(seen) == 2 and len(seen[1]) > 1 and seen[1][-1] == "mul"


@pytest.mark.parametrize("step", [Magnitude, SparseGPT, Wanda])
@pytest.mark.parametrize("how", [{"sparsity": 0.5}, {"n": 2, "m": 4}])
def test_pruned_weights_keep_their_own_dtype(step, how):
    """Half of 16 bits, and a mask bit a weight or two position bits a kept one: 9 bits a weight."""
    params = {k: v.astype(jnp.bfloat16) for k, v in MLP.items()}
    report = jc.compress(mlp, params, Recipe(steps=(step(**how),)), inputs(1)).report
    assert report.bits_per_weight == 9
    assert ("n" in how) == report.rows[0].format.startswith("2:4 of dense bfloat16")


@pytest.mark.parametrize("stacked", [False, True])
def test_a_second_run_sees_the_first_ones_quantized_inputs(stacked):
    """Weights that came compressed keep quantizing their inputs while others are calibrated."""
    act = Activation(format="int4")
    first = Recipe(steps=(RTN(format=Int(8, full_range=False), activation=act, include=("a",)),))
    second = Recipe(steps=(GPTQ(format=INT4, include=("b",)),))
    both = Recipe(steps=first.steps + second.steps)
    params, data = {"a": normal(16, 16) / 4, "b": normal(16, 8, seed=1)}, inputs(1)
    apply = mlp
    if stacked:
        params["a"] = normal(2, 16, 16) / 4

        def apply(p, x):
            return jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["a"])[0] @ p["b"]

    once = jc.compress(apply, params, both, data).params
    halfway = jc.compress(apply, params, first, data).params
    twice = jc.compress(apply, halfway, second, data).params
    np.testing.assert_allclose(once["b"].materialize(), twice["b"].materialize(), atol=1e-6)
