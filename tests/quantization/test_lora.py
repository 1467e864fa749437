"""LoRA, QLoRA, QA-LoRA and LoftQ."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import jaxcomp as jc
from jaxcomp.errors import JaxcompError
from jaxcomp.formats import Affine, Codebook, Dense, Int, LowRankPart
from jaxcomp.models import Llama
from jaxcomp.quantization import RTN, lora
from jaxcomp.step import Activation
from tests.helpers import x64
from tests.models.helpers import TINY, tokens

LLAMA = dataclasses.replace(TINY, num_hidden_layers=2, sliding_windows=(None, 4))
NF4 = Codebook("nf4", group_size=16, double_quantization=True)


def mlp(dtype=np.float32, seed=0):
    """Two layers of different layouts: (in, out) and (out, in)."""
    rng = np.random.default_rng(seed)
    params = {
        "up": {"kernel": rng.standard_normal((32, 48)), "bias": rng.standard_normal(48)},
        "down": {"weight": rng.standard_normal((24, 48)) / 7},
    }
    x = jnp.asarray(rng.standard_normal((5, 32)).astype(dtype))
    return jax.tree.map(lambda a: jnp.asarray(a.astype(dtype)), params), x


def apply_mlp(p, x):
    hidden = jnp.tanh(x @ p["up"]["kernel"] + p["up"]["bias"])
    return hidden @ p["down"]["weight"].T


def trained(adapters, seed=1):
    """Adapters with values everywhere."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda a: jnp.asarray(0.3 * rng.standard_normal(a.shape), a.dtype), adapters
    )


def compressed(apply, params, x, fmt=NF4, **options):
    recipe = jc.Recipe(steps=(RTN(format=fmt, **options),))
    return jc.compress(apply, params, recipe, [(x,)], progress=False).params


@functools.cache
def llama(scan):
    apply, params = jc.functional(Llama(LLAMA, scan=scan, remat=scan, rngs=nnx.Rngs(0)))
    return apply, params, tokens(2, 9)


def test_start_changes_nothing_and_a_is_uniform():
    params, x = mlp()
    graph = jc.trace(apply_mlp, params, x)
    adapters = lora.init(jax.random.key(0), graph, rank=4, alpha=8)
    assert {p: (v.a.shape, v.b.shape) for p, v in adapters.items()} == {
        "up/kernel": ((4, 32), (48, 4)),
        "down/weight": ((4, 48), (24, 4)),
    }
    attached = jc.dispatch(apply_mlp)(lora.attach(params, adapters), x)
    np.testing.assert_allclose(attached, apply_mlp(params, x), rtol=1e-5, atol=1e-5)
    # kaiming_uniform(a=sqrt(5)) of the reference code is uniform within 1/sqrt(in).
    a = np.asarray(lora.init(jax.random.key(0), graph, rank=24)["down/weight"].a)
    bound = 1 / np.sqrt(48)
    assert 0.98 * bound < np.abs(a).max() <= bound
    assert a.std() == pytest.approx(bound / np.sqrt(3), rel=0.05)
    # A weight's start depends on its name, not on its neighbours.
    alone = lora.init(jax.random.key(0), graph, include=("down*",), rank=4)
    assert list(lora.init(jax.random.key(0), graph, include=("up*",), rank=4)) == ["up/kernel"]
    np.testing.assert_array_equal(alone["down/weight"].a, adapters["down/weight"].a)
    assert list(alone) == ["down/weight"]


@pytest.mark.parametrize("stabilized, scaling", [(False, 16 / 4), (True, 16 / 2)])
def test_scaling(stabilized, scaling):
    params, x = mlp()
    graph = jc.trace(apply_mlp, params, x)
    adapters = lora.init(jax.random.key(0), graph, rank=4, alpha=16, rank_stabilized=stabilized)
    adapter = trained(adapters)["up/kernel"]
    merged = lora.merge(params, {"up/kernel": adapter})["up"]["kernel"]
    product = scaling * np.asarray(adapter.b, np.float64) @ np.asarray(adapter.a, np.float64)
    np.testing.assert_allclose(merged - params["up"]["kernel"], product.T, rtol=1e-4, atol=1e-5)


def test_merged_equals_attached_exactly_in_float64():
    with x64():
        params, x = mlp(np.float64)
        graph = jc.trace(apply_mlp, params, x)
        adapters = trained(lora.init(jax.random.key(0), graph, rank=4, dtype=jnp.float64))
        attached = lora.attach(params, adapters)
        assert [type(p) for p in attached["up"]["kernel"].parts] == [Dense, LowRankPart]
        merged = lora.merge(params, adapters)
        assert merged["up"]["kernel"].dtype == jnp.float64
        np.testing.assert_allclose(
            jc.dispatch(apply_mlp)(attached, x), apply_mlp(merged, x), rtol=1e-13, atol=1e-13
        )
        np.testing.assert_allclose(
            attached["up"]["kernel"].materialize(), merged["up"]["kernel"], rtol=1e-14, atol=1e-14
        )


def test_merging_into_a_compressed_base():
    params, x = mlp()
    base = compressed(apply_mlp, params, x)
    adapters = trained(lora.init(jax.random.key(0), base, rank=4))
    merged = lora.merge(base, adapters)
    got = jc.dispatch(apply_mlp)(lora.attach(base, adapters), x)
    np.testing.assert_allclose(got, apply_mlp(merged, x), rtol=1e-4, atol=1e-4)
    again = lora.merge(base, adapters, requantize=Int(8))
    assert isinstance(again["up"]["kernel"].parts[0], Affine)
    assert again["up"]["kernel"].shape == (32, 48)
    np.testing.assert_allclose(again["up"]["kernel"], merged["up"]["kernel"], atol=0.03)
    with pytest.raises(JaxcompError, match=r"up/kernel.*group_size 64 does not divide"):
        lora.merge(base, {"up/kernel": adapters["up/kernel"]}, requantize=Int(4, 64))


def grams(jaxpr, found=None):
    """Shapes of all products of matrices in a jaxpr, inner ones too."""
    found = [] if found is None else found
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            found.append(eqn.outvars[0].aval.shape[-2:])
        for sub in jax.tree.leaves(
            eqn.params, is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")
        ):
            inner = getattr(sub, "jaxpr", sub)
            if hasattr(inner, "eqns"):
                grams(inner, found)
    return found


@pytest.mark.parametrize("scan", [False, True])
def test_gradients_of_a_quantized_llama(scan):
    """Through dispatch, jit, scan and remat: those of the chain rule, and none of a weight's size.

    With W' = W + s B A the gradient of B is s G Aᵀ and that of A is s Bᵀ G, G that of W'.
    """
    apply, params, x = llama(scan)
    base = compressed(apply, params, x)
    graph = jc.trace(apply, params, x)
    adapters = trained(lora.init(jax.random.key(0), graph, rank=4, alpha=2))
    stack = (2,) if scan else ()
    up = "layers/mlp/up_proj/kernel" if scan else "layers/0/mlp/up_proj/kernel"
    assert adapters[up].a.shape == (*stack, 4, 32)
    assert adapters[up].b.shape == (*stack, 48, 4)
    assert len(adapters) == (8 if scan else 15)

    def loss(adapters, base):
        return (jc.dispatch(apply)(lora.attach(base, adapters), x) ** 2).mean()

    value, gradient = jax.jit(jax.value_and_grad(loss))(adapters, base)
    merged = lora.merge(base, adapters)
    plain = lambda p: (apply(p, x) ** 2).mean()  # noqa: E731
    expected, dense = jax.jit(jax.value_and_grad(plain))(merged)
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    for path, adapter in adapters.items():
        g = functools.reduce(lambda tree, key: tree[key], path.split("/"), dense)
        g = np.swapaxes(np.asarray(g), -1, -2)
        scale = np.abs(g).max()
        a, b = np.asarray(adapter.a), np.asarray(adapter.b)
        want_b = adapter.scaling * g @ np.swapaxes(a, -1, -2)
        want_a = adapter.scaling * np.swapaxes(b, -1, -2) @ g
        np.testing.assert_allclose(gradient[path].b, want_b, atol=2e-4 * scale, rtol=2e-3)
        np.testing.assert_allclose(gradient[path].a, want_a, atol=2e-4 * scale, rtol=2e-3)

    sizes = {adapters[p].layout.matrix_shape[-2:] for p in adapters}
    sizes |= {s[::-1] for s in sizes}
    traced = jax.make_jaxpr(jax.grad(loss))(adapters, base)
    assert sizes.isdisjoint(grams(traced.jaxpr))
    assert not sizes.isdisjoint(grams(jax.make_jaxpr(jax.grad(plain))(merged).jaxpr))


def test_the_base_gets_no_gradient():
    params, x = mlp()
    adapters = trained(lora.init(jax.random.key(0), jc.trace(apply_mlp, params, x), rank=2))
    loss = lambda p, a: (jc.dispatch(apply_mlp)(lora.attach(p, a), x) ** 2).sum()  # noqa: E731
    frozen, moving = jax.grad(loss, argnums=(0, 1))(params, adapters)
    assert not np.asarray(frozen["up"]["kernel"]).any()
    assert not np.asarray(frozen["down"]["weight"]).any()
    assert np.asarray(frozen["up"]["bias"]).any()
    assert all(np.asarray(leaf).any() for leaf in jax.tree.leaves(moving))


def test_stacked_adapters_are_those_of_the_layers():
    scanned, stacked, x = llama(True)
    apply, _, _ = llama(False)
    adapters = trained(lora.init(jax.random.key(0), jc.trace(scanned, stacked, x), rank=2))
    layers = {
        str(i): jax.tree.map(lambda a, i=i: a[i], stacked["layers"])
        for i in range(LLAMA.num_hidden_layers)
    }
    unrolled = {**stacked, "layers": layers}
    graph = jc.trace(apply, unrolled, x)
    own = lora.init(jax.random.key(0), graph, rank=2)
    for path, adapter in own.items():
        parts = path.split("/")
        if parts[0] != "layers":
            own[path] = adapters[path]
            continue
        whole = adapters["/".join([parts[0], *parts[2:]])]
        i = int(parts[1])
        own[path] = dataclasses.replace(adapter, a=whole.a[i], b=whole.b[i])
    want = jax.jit(jc.dispatch(apply))(lora.attach(unrolled, own), x)
    got = jax.jit(jc.dispatch(scanned))(lora.attach(stacked, adapters), x)
    merged = scanned(lora.merge(stacked, adapters), x)
    # float32 through a whole model, its products in another order each time: against the largest
    # logit, because a small one is a sum of terms as large.
    for logits in (got, merged):
        assert np.abs(logits - want).max() <= 1e-5 * np.abs(want).max()


def test_training_recovers_a_low_rank_change_and_resumes(tmp_path):
    """QLoRA with optax: the loss falls, the base keeps its bits, a checkpoint goes on bitwise."""
    params, x = mlp()
    x = jax.random.normal(jax.random.key(3), (64, 32))
    base = compressed(apply_mlp, params, x)
    rng = np.random.default_rng(5)
    change = 0.3 * rng.standard_normal((32, 2)) @ rng.standard_normal((2, 48))
    target = jax.tree.map(lambda a: a, params)
    target["up"]["kernel"] = target["up"]["kernel"] + change.astype(np.float32)
    y = apply_mlp(target, x)
    adapters = lora.init(jax.random.key(0), base, rank=4)
    tx = optax.adam(1e-2)

    def loss(adapters):
        return ((jc.dispatch(apply_mlp)(lora.attach(base, adapters), x) - y) ** 2).mean()

    @jax.jit
    def step(adapters, state):
        gradient = jax.grad(loss)(adapters)
        updates, state = tx.update(gradient, state, adapters)
        return optax.apply_updates(adapters, updates), state

    start, state = float(loss(adapters)), tx.init(adapters)
    before = [np.asarray(v) for v in jax.tree.leaves(base)]
    for _ in range(100):
        adapters, state = step(adapters, state)
    assert float(loss(adapters)) < 0.2 * start
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "state", (adapters, state))
        saver.wait_until_finished()
        template = jax.tree.map(jnp.zeros_like, (adapters, state))
        restored = saver.restore(tmp_path / "state", template)
    for a, b in zip(
        jax.tree.leaves(step(adapters, state)), jax.tree.leaves(step(*restored)), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(before, jax.tree.leaves(base), strict=True):
        np.testing.assert_array_equal(a, b)


def test_on_quantized_inputs():
    """The adapter sees the input as it is, the integers see it quantized."""
    params, x = mlp()
    base = compressed(apply_mlp, params, x, fmt=Int(8, full_range=False), activation=Activation())
    adapters = trained(lora.init(jax.random.key(0), base, rank=4))
    attached = lora.attach(base, adapters)
    report = jc.dispatch(apply_mlp).report(attached, x)
    assert {choice.implementation for choice in report} == {"int8"}
    got = jc.dispatch(apply_mlp)(attached, x)
    want = apply_mlp(lora.merge(params, adapters), x)
    np.testing.assert_allclose(got, want, atol=0.03 * float(jnp.abs(want).max()))


@pytest.mark.parametrize("symmetric", [True, False])
def test_qa_lora_merges_into_zero_points(symmetric):
    """W = S (q - Z) + s B A with A on sums over groups is S (q - (Z - s B A / S))."""
    with x64():
        params, x = mlp(np.float64)
        base = compressed(apply_mlp, params, x, fmt=Int(4, 16, symmetric=symmetric))
        adapters = lora.init(jax.random.key(0), base, rank=4, group_size=16, dtype=jnp.float64)
        assert adapters["up/kernel"].a.shape == (4, 2)
        adapters = trained(adapters)
        attached = lora.attach(base, adapters)
        merged = lora.merge(base, adapters)
        for path in (("up", "kernel"), ("down", "weight")):
            before, after = base[path[0]][path[1]].parts[0], merged[path[0]][path[1]].parts[0]
            np.testing.assert_array_equal(before.values, after.values)
            np.testing.assert_array_equal(before.scale, after.scale)
        want = jc.dispatch(apply_mlp)(attached, x)
        np.testing.assert_allclose(jc.dispatch(apply_mlp)(merged, x), want, rtol=1e-12, atol=1e-12)
        # A sees sums over groups: the product by hand.
        adapter = adapters["up/kernel"]
        pooled = np.asarray(x).reshape(5, 2, 16).sum(-1)
        by_hand = adapter.scaling * pooled @ np.asarray(adapter.a).T @ np.asarray(adapter.b).T
        product = np.asarray(x) @ np.asarray(adapter.product().materialize(jnp.float64)).T
        np.testing.assert_allclose(product, by_hand, rtol=1e-12, atol=1e-12)


def reference_loftq(w, quantize, rank, iterations):
    """The paper's algorithm; errors after 0, 1, .. rounds."""
    errors, product = [np.linalg.norm(w - quantize(w))], 0
    for _ in range(iterations):
        q = quantize(w - product)
        u, s, vt = np.linalg.svd(w - q)
        product = (u[:, :rank] * s[:rank]) @ vt[:rank]
        errors.append(np.linalg.norm(w - q - product))
    return errors


@pytest.mark.parametrize(
    "fmt", [Codebook("nf4", group_size=16), Int(2, 16, symmetric=False)], ids=["nf4", "int2"]
)
def test_loftq_is_the_papers_and_keeps_the_best_round(fmt, rng):
    w = rng.standard_normal((2, 40, 48))
    w[0] += 2 * rng.standard_normal((40, 3)) @ rng.standard_normal((3, 48))
    with x64():
        quantize = lambda m: np.asarray(jc.formats.quantize(fmt, jnp.asarray(m)).materialize("f8"))  # noqa: E731
        for n in (0, 1, 5):
            base, a, b = lora.loftq(jnp.asarray(w), fmt, 4, n)
            rest = np.asarray(w - base.matrix(jnp.float64) - b @ a)
            for i in range(2):
                errors = reference_loftq(w[i], quantize, 4, n)
                assert np.linalg.norm(rest[i]) == pytest.approx(min(errors), rel=1e-9)
                if n == 1:
                    assert errors[1] < errors[0]


def test_loftq_of_a_model():
    params, x = mlp()
    graph = jc.trace(apply_mlp, params, x)
    with_start = [
        lora.init_loftq(jax.random.key(0), graph, params, Int(2, 16), rank=4, iterations=n)
        for n in (0, 3)
    ]
    want = apply_mlp(params, x)
    errors = []
    for base, adapters in with_start:
        got = jc.dispatch(apply_mlp)(lora.attach(base, adapters), x)
        errors.append(float(jnp.square(got - want).mean()))
    assert errors[1] < 0.9 * errors[0]
    base, adapters = with_start[0]
    assert not np.asarray(adapters["up/kernel"].b).any()
    assert np.asarray(adapters["up/kernel"].a).any()
    for path, leaf in (
        ("up/kernel", base["up"]["kernel"]),
        ("down/weight", base["down"]["weight"]),
    ):
        assert leaf.nbits == 2 * leaf.size + 32 * leaf.size // 16, path
    # A weight that the grid holds exactly keeps a start that can move.
    exact = {"w": jnp.full((16, 8), 0.5)}
    graph = jc.trace(lambda p, x: x @ p["w"], exact, jnp.ones((2, 16)))
    _, adapters = lora.init_loftq(jax.random.key(0), graph, exact, Int(4), rank=2)
    assert np.asarray(adapters["w"].a).any()


def test_errors():
    params, x = mlp()
    graph = jc.trace(apply_mlp, params, x)
    key = jax.random.key(0)
    with pytest.raises(JaxcompError, match=r"include rule 'up/kernl' matches none.*up/kernel"):
        lora.init(key, graph, include=("up/kernl",))
    with pytest.raises(JaxcompError, match=r"exclude rule '\*head\*' matches none"):
        lora.init(key, graph, exclude=("*head*",))
    with pytest.raises(JaxcompError, match=r"down/weight.*rank 25 .* use rank 24 or less"):
        lora.init(key, graph, rank=25)
    with pytest.raises(JaxcompError, match="rank 0 must be 1 or more"):
        lora.init(key, graph, rank=0)
    with pytest.raises(JaxcompError, match=r"'\*bias' matches up/bias \(48,\), but no contraction"):
        lora.init(key, graph, include=("*bias",))
    with pytest.raises(JaxcompError, match="leave no weight"):
        lora.init(key, graph, include=("up*kernel",), exclude=("up*",))
    with pytest.raises(JaxcompError, match="put the glob into a tuple"):
        lora.init(key, graph, include="*")
    with pytest.raises(JaxcompError, match="not a regular expression"):
        lora.init(key, graph, include=("re:(",))
    with pytest.raises(
        JaxcompError,
        match=r"down/weight \(24, 48\), but a dense array .*pass the graph that jc.trace gives",
    ):
        lora.init(key, params)
    with pytest.raises(JaxcompError, match=r"up/kernel .*pass the graph that jc.trace gives"):
        lora.init(key, params, include=("up/kernel",))
    with pytest.raises(JaxcompError, match=r"up/kernel .*group_size 5 does not divide"):
        lora.init(key, graph, include=("up/kernel",), group_size=5)
    integers = {"w": jnp.ones((4, 8), jnp.int8)}
    whole = jc.trace(lambda p, x: x @ p["w"], integers, jnp.ones((2, 4), jnp.int8))
    with pytest.raises(JaxcompError, match=r"w \(4, 8\): int8 weights have no low-rank update"):
        lora.init(key, whole, rank=2)
    adapters = lora.init(key, graph, rank=2)
    with pytest.raises(JaxcompError, match=r"named 'up/kernel', .*closest are up/kernal"):
        lora.attach({**params, "up": {"kernal": params["up"]["kernel"]}}, adapters)
    wrong = {**params, "up": {**params["up"], "kernel": jnp.ones((32, 40))}}
    with pytest.raises(JaxcompError, match=r"up/kernel \(32, 40\): its adapter is for \(32, 48\)"):
        lora.attach(wrong, adapters)
    base = compressed(apply_mlp, params, x)
    compressed_graph = jc.trace(apply_mlp, base, x)
    with pytest.raises(JaxcompError, match=r"LoftQ quantizes the weight itself"):
        lora.init_loftq(key, compressed_graph, base, Int(4), rank=2)
