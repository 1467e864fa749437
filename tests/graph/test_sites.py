"""Every way in which a model may use a weight: what the graph says, and that it computes alike."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcomp.formats import to_matrix
from jaxcomp.graph import Plain, interpret, trace
from jaxcomp.graph.sites import from_tokens, to_tokens
from jaxcomp.graph.trace import leaf_paths


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


class Canonical(Plain):
    """Evaluates every matmul through its canonical matrix, so that axes in a wrong order show."""

    def __init__(self):
        self.seen = 0

    def site(self, op, operands, leaf, state):
        self.seen += 1
        site = op.site
        if site.kind != "dot_general" or site.transposed:
            return super().site(op, operands, leaf, state)
        x = to_tokens(op.eqn, site, operands[1 - site.operand])
        y = jnp.einsum("...ti,...oi->...to", x, sliced_matrix(leaf, site))
        return [from_tokens(op.eqn, site, y)], state


def sliced_matrix(leaf, site):
    """The canonical matrix of a leaf from which the loops are sliced away."""
    layout, leaf = site.layout, jnp.asarray(leaf)
    gone = [f.axis for f in site.view.loops]
    for factor, index in site.view.fixed:
        leaf = leaf.take(index, factor.axis - sum(a < factor.axis for a in gone))
        gone.append(factor.axis)

    def left(axes):
        return tuple(a - sum(g < a for g in gone) for a in axes if a not in gone)

    return to_matrix(leaf, left(layout.stack_axes), left(layout.out_axes), left(layout.in_axes))


def sites_of(apply, params, *inputs):
    """Sites as (path, kind, stack, out, in); asserts that interpreting changes nothing."""
    graph = trace(apply, params, *inputs)
    leaves = [v for _, v in leaf_paths(params)[0]]
    expected = jax.tree.leaves(apply(params, *inputs))

    def run(leaves, inputs):
        handler = Canonical()
        return interpret(graph.program, [*leaves, *jax.tree.leaves(inputs)], handler, {})[0]

    for got in (run(leaves, inputs), jax.jit(run)(leaves, inputs)):
        for a, b in zip(expected, got, strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype
            rough = a.dtype == jnp.bfloat16
            np.testing.assert_allclose(
                np.asarray(a, np.float32), np.asarray(b, np.float32), atol=0.1 if rough else 2e-5
            )
    return [(s.path, s.kind, s.stack, s.out_size, s.in_size) for s in graph.sites]


X = normal(4, 8)
W = {"w": normal(8, 6, seed=1)}
STACK = {"w": normal(3, 8, 8, seed=2) / 3, "b": normal(3, 8, seed=3)}
helper = jax.jit(lambda a, b: a @ b)


@jax.custom_vjp
def with_vjp(x, w):
    return x @ w


with_vjp.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))


@jax.custom_jvp
def with_jvp(x, w):
    return x @ w


with_jvp.defjvp(lambda p, t: (p[0] @ p[1], t[0] @ p[1]))


def layer(c, p):
    return jnp.tanh(c @ p["w"] + p["b"]), c.sum()


DENSE = [("w", "dot_general", (), 6, 8)]
STACKED = [("w", "dot_general", (3,), 8, 8)]

CASES = {
    "matmul": (lambda p, x: x @ p["w"], W, X, DENSE),
    "jit": (jax.jit(lambda p, x: x @ p["w"]), W, X, DENSE),
    "weight on the left": (lambda p, x: jnp.einsum("io,bi->ob", p["w"], x), W, X, DENSE),
    "cast": (lambda p, x: x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16), W, X, DENSE),
    "transposed": (lambda p, x: x @ p["w"].T, {"w": normal(6, 8)}, X, DENSE),
    "reshaped to heads": (
        lambda p, x: jnp.einsum("bi,ihd->bhd", x, p["w"].reshape(8, 2, 3)),
        W,
        X,
        DENSE,
    ),
    "several in axes": (
        lambda p, x: jnp.einsum("bhd,hde->be", x.reshape(4, 2, 4), p["w"]),
        {"w": normal(2, 4, 6)},
        X,
        DENSE,
    ),
    "several in axes in another order": (
        lambda p, x: jnp.einsum("bdh,hde->be", x.reshape(4, 4, 2), p["w"]),
        {"w": normal(2, 4, 6)},
        X,
        DENSE,
    ),
    "several out axes": (
        lambda p, x: jnp.einsum("bi,hid->bhd", x, p["w"]),
        {"w": normal(2, 8, 3)},
        X,
        DENSE,
    ),
    "experts on the same input": (
        lambda p, x: jnp.einsum("bi,eio->ebo", x, p["w"]),
        STACK,
        X,
        [("w", "dot_general", (), 24, 8)],
    ),
    "experts": (
        lambda p, x: jnp.einsum("ebi,eio->ebo", x, p["w"]),
        STACK,
        normal(3, 4, 8),
        STACKED,
    ),
    "experts, batch axis last": (
        lambda p, x: jnp.einsum("ebi,ioe->beo", x, p["w"]),
        {"w": normal(8, 8, 3)},
        normal(3, 4, 8),
        STACKED,
    ),
    "ragged": (
        lambda p, x: jax.lax.ragged_dot(x, p["w"], jnp.array([1, 0, 3])),
        STACK,
        X,
        [("w", "ragged_dot", (3,), 8, 8)],
    ),
    "convolution": (
        lambda p, x: jax.lax.conv_general_dilated(
            x, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
        {"w": normal(3, 3, 2, 5)},
        normal(1, 4, 4, 2),
        [("w", "conv_general_dilated", (), 5, 18)],
    ),
    "look-up": (
        lambda p, i: jnp.take(p["w"], i, axis=0),
        {"w": normal(10, 8)},
        jnp.array([[1, 9]]),
        [("w", "gather", (), 10, 8)],
    ),
    "look-up of columns": (
        lambda p, i: jnp.take(p["w"], i, axis=1),
        {"w": normal(8, 10)},
        jnp.array([[1, 9]]),
        [("w", "gather", (), 10, 8)],
    ),
    "tied embedding and head": (
        lambda p, i: p["w"][i] @ p["w"].T,
        {"w": normal(10, 8)},
        jnp.array([1, 9]),
        [("w", "gather", (), 10, 8), ("w", "dot_general", (), 10, 8)],
    ),
    "user jit helper twice": (
        lambda p, x: helper(helper(x, p["a"]), p["b"]),
        {"a": normal(8, 8), "b": normal(8, 8, seed=1)},
        X,
        [("a", "dot_general", (), 8, 8), ("b", "dot_general", (), 8, 8)],
    ),
    "scan": (lambda p, x: jax.lax.scan(layer, x, p), STACK, X, STACKED),
    "scan, reversed": (lambda p, x: jax.lax.scan(layer, x, p, reverse=True), STACK, X, STACKED),
    "scan with checkpoint": (
        lambda p, x: jax.lax.scan(jax.checkpoint(layer), x, p),
        STACK,
        X,
        STACKED,
    ),
    "scan over the second axis": (
        lambda p, x: jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["w"].swapaxes(0, 1))[
            0
        ],
        {"w": normal(8, 3, 8)},
        X,
        STACKED,
    ),
    "scan in scan": (
        lambda p, x: jax.lax.scan(
            lambda c, q: jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), c, q), x, p["w"]
        )[0],
        {"w": normal(2, 3, 8, 8)},
        X,
        [("w", "dot_general", (2, 3), 8, 8)],
    ),
    "weight shared by a scan": (
        lambda p, x: jax.lax.scan(lambda c, _: (jnp.tanh(c @ p["w"]), None), x, None, length=3)[0],
        {"w": normal(8, 8)},
        X,
        [("w", "dot_general", (), 8, 8)],
    ),
    "unrolled stack": (
        lambda p, x: x @ p["w"][0] @ p["w"][1] @ p["w"][2],
        STACK,
        X,
        STACKED * 3,
    ),
    "checkpoint": (jax.checkpoint(lambda p, x: jnp.sin(x @ p["w"])), W, X, DENSE),
    "vmap over inputs": (lambda p, x: jax.vmap(lambda a: a @ p["w"])(x), W, X, DENSE),
    "vmap over weights": (
        lambda p, x: jax.vmap(lambda a, w: a @ w)(x, p["w"]),
        STACK,
        normal(3, 4, 8),
        STACKED,
    ),
    "grad": (lambda p, x: jax.grad(lambda x: jnp.sin(x @ p["w"]).sum())(x), W, X, DENSE * 2),
    "fori_loop": (
        lambda p, x: jax.lax.fori_loop(0, 3, lambda i, c: jnp.tanh(c @ p["w"]), x),
        {"w": normal(8, 8)},
        X,
        [("w", "dot_general", (), 8, 8)],
    ),
    "while_loop": (
        lambda p, x: jax.lax.while_loop(
            lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(c[1] @ p["w"])), (0, x)
        ),
        {"w": normal(8, 8)},
        X,
        [("w", "dot_general", (), 8, 8)],
    ),
    "while_loop that carries the weight": (
        lambda p, x: jax.lax.while_loop(
            lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(c[1] @ c[2]), c[2]), (0, x, p["w"])
        ),
        {"w": normal(8, 8)},
        X,
        [("w", "dot_general", (), 8, 8)],
    ),
    "cond": (
        lambda p, x: jax.lax.cond(
            x[0, 0] > 0, lambda p, x: x @ p["a"], lambda p, x: x @ p["b"], p, x
        ),
        {"a": normal(8, 8), "b": normal(8, 8, seed=1)},
        X,
        [("b", "dot_general", (), 8, 8), ("a", "dot_general", (), 8, 8)],
    ),
    "switch": (
        lambda p, x: jax.lax.switch(1, [lambda p, x: x, lambda p, x: x @ p["w"]], p, x),
        {"w": normal(8, 8)},
        X,
        [("w", "dot_general", (), 8, 8)],
    ),
    "custom_vjp": (lambda p, x: with_vjp(x, p["w"]), W, X, DENSE),
    "custom_jvp": (lambda p, x: with_jvp(x, p["w"]), W, X, DENSE),
}


@pytest.mark.parametrize("case", CASES)
def test_sites(case):
    apply, params, x, expected = CASES[case]
    assert sites_of(apply, params, x) == expected


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharding_constraint(kind):
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(kind,) * 2)
    place = NamedSharding(mesh, P("a", None))
    move = jax.lax.with_sharding_constraint if kind == AxisType.Auto else jax.reshard

    def apply(p, x):
        return move(x, place) @ move(p["w"], NamedSharding(mesh, P(None, "b")))

    with jax.set_mesh(mesh):
        assert sites_of(apply, W, X) == DENSE


def test_shard_map():
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)

    def apply(p, x):
        def local(x, w):
            return jax.lax.psum(x @ w, "b")

        specs = (P("a", "b"), P("b", None))
        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P("a", None))(x, p["w"])

    assert sites_of(apply, W, X) == DENSE


def test_input_groups():
    p = {k: normal(8, 6) for k in "qkvo"}

    def apply(p, x):
        y = jnp.tanh(x)
        return x @ p["q"], x.astype(jnp.float32) @ p["k"], y @ p["v"], y @ p["o"]

    groups = {s.path: s.input_group for s in trace(apply, p, X).sites}
    assert groups["q"] == groups["k"] != groups["v"] == groups["o"]


def test_uses_and_transposed():
    tied = trace(lambda p, i: p["w"][i] @ p["w"].T, {"w": normal(10, 8)}, jnp.array([1, 9]))
    assert [s.uses for s in tied.sites] == [2, 2]
    back = trace(CASES["grad"][0], W, X)
    assert [s.transposed for s in back.sites] == [False, True]


@pytest.mark.parametrize(
    "apply, names",
    [
        (lambda p, x: x @ (p["w"] * p["s"]), ["s", "w"]),
        (lambda p, x: x @ jax.jit(lambda w: w * 2)(p["w"]), ["w"]),
        (lambda p, x: jax.lax.scan(lambda c, _: (c, c @ (p["w"] + 1)), x, None, length=2), ["w"]),
    ],
)
def test_arithmetic_on_a_weight_is_noted(apply, names):
    graph = trace(apply, {"w": normal(8, 6), "s": normal(6)}, X)
    assert not graph.sites
    assert sorted({u.path for u in graph.other_uses if u.contracted}) == names


def test_norm_gains_are_no_contraction():
    graph = trace(lambda p, x: (x * p["g"]) @ p["w"], {"g": normal(8), **W}, X)
    assert [(u.path, u.contracted) for u in graph.other_uses] == [("g", False)]


def test_opaque_calls_keep_their_derivative():
    @jax.custom_vjp
    def norm(x, g):
        return x * g

    norm.defvjp(lambda x, g: (x * g, (x, g)), lambda r, t: (t * 7.0, r[1] * 0.0))
    params = {"g": normal(8), "w": normal(8, 6, seed=1)}

    def apply(p, x):
        return (norm(x, p["g"]) @ p["w"]).sum()

    graph = trace(apply, params, X)

    def run(x):
        leaves = [params["g"], params["w"], x]
        return interpret(graph.program, leaves, Plain(), {})[0][0]

    np.testing.assert_array_equal(jax.grad(run)(X), jax.grad(lambda x: apply(params, x))(X))


def test_remat_is_kept_around_sites():
    apply = jax.checkpoint(lambda p, x: jnp.sin(jnp.sin(x @ p["w"])).sum())
    graph = trace(apply, W, X)
    run = lambda w: interpret(graph.program, [w, X], Plain(), {})[0][0]  # noqa: E731
    text = str(jax.make_jaxpr(jax.grad(run))(W["w"]))
    assert "remat" in text or "checkpoint" in text


class Count(Plain):
    """State that counts evaluations and adds up inputs."""

    def site(self, op, operands, leaf, state):
        results, _ = super().site(op, operands, leaf, None)
        x = operands[1 - op.site.operand]
        return results, {"n": state["n"] + 1, "sum": state["sum"] + x.sum()}


@pytest.mark.parametrize(
    "case, stack, times",
    [
        ("matmul", (), 1),
        ("scan", (3,), 1),
        ("scan with checkpoint", (3,), 1),
        ("scan in scan", (2, 3), 1),
        ("weight shared by a scan", None, 3),
        ("while_loop", (), 3),
        ("custom_vjp", (), 1),
        ("switch", (), 1),
    ],
)
def test_state_goes_in_and_comes_out(case, stack, times):
    apply, params, x, _ = CASES[case]
    graph = trace(apply, params, x)
    (site,) = graph.sites
    # A weight that a scan shares has one state an iteration: state is stacked along scans.
    shape, each = ((3,), 1) if stack is None else (stack, times)
    state = {site.id: {"n": jnp.zeros(shape, jnp.int32), "sum": jnp.zeros(shape)}}
    leaves = [v for _, v in leaf_paths(params)[0]]
    run = jax.jit(lambda s: interpret(graph.program, [*leaves, x], Count(), s)[1])
    after = run(state)
    np.testing.assert_array_equal(after[site.id]["n"], np.full(shape, each))
    first = np.asarray(after[site.id]["sum"]).reshape(-1)[0]
    if case == "scan":
        np.testing.assert_allclose(first, x.sum(), rtol=1e-5)


def test_state_under_grad_and_vmap():
    apply, params, x, _ = CASES["scan"]
    graph = trace(apply, params, x)
    (site,) = graph.sites
    state = {site.id: {"n": jnp.zeros(3, jnp.int32), "sum": jnp.zeros(3)}}

    def loss(w, x):
        out, after = interpret(graph.program, [params["b"], w, x], Count(), state)
        return out[0].sum(), after

    grad, after = jax.grad(loss, has_aux=True)(params["w"], x)
    expected = jax.grad(lambda w: apply({**params, "w": w}, x)[0].sum())(params["w"])
    np.testing.assert_allclose(grad, expected, rtol=1e-5, atol=1e-5)
    mapped = jax.vmap(lambda x: loss(params["w"], x)[1])(jnp.stack([x, 2 * x]))
    assert mapped[site.id]["n"].shape == (2, 3)
    np.testing.assert_array_equal(after[site.id]["n"], np.ones(3))


def test_tracing_needs_no_memory_and_little_time():
    def block(x, p):
        h = x * p["n"]
        y = (h @ p["q"]) + jnp.concatenate([h @ p["k"], h @ p["v"]] * 4, -1)
        x = x + y @ p["o"]
        return x + (jax.nn.silu(x @ p["g"]) * (x @ p["u"])) @ p["d"]

    def shape(*s):
        return jax.ShapeDtypeStruct(s, jnp.bfloat16)

    one = dict(n=shape(8192), q=shape(8192, 8192), k=shape(8192, 1024), v=shape(8192, 1024))
    one |= dict(
        o=shape(8192, 8192), g=shape(8192, 28672), u=shape(8192, 28672), d=shape(28672, 8192)
    )

    def apply(p, x):
        for q in p:
            x = block(x, q)
        return x

    graph = trace(apply, [one] * 80, shape(1, 16, 8192))
    assert len(graph.sites) == 80 * 7
