"""Units of models: scores, selection, and that masked and removed models agree."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcomp.errors import JaxcompError
from jaxcomp.functional import functional
from jaxcomp.graph.units import UnitGroup
from jaxcomp.models import Llama, LlamaConfig
from jaxcomp.models.bert import Bert, BertConfig
from jaxcomp.models.gpt2 import GPT2, GPT2Config
from jaxcomp.pruning.removal import remove, unstack
from jaxcomp.pruning.structured import (
    apply_gates,
    apply_masks,
    parameter_counts,
    select_units,
    unit_scores,
    units,
)

TOKENS = jax.random.randint(jax.random.key(1), (2, 6), 0, 16)
MODELS = {
    "llama": (
        Llama,
        LlamaConfig(16, 8, 12, 2, 6, 3, 4, qkv_bias=True, qk_norm=True, mlp_bias=True),
        ("*o_proj/kernel", "*down_proj/kernel"),
        8,
        "layers",
    ),
    "bert": (
        Bert,
        BertConfig(16, 12, 10, 2, 3),
        ("*attention_output/kernel", "*/output/kernel"),
        4,
        "layers",
    ),
    "gpt2": (
        GPT2,
        GPT2Config(16, 16, 12, 2, 3, 10),
        ("*attn/c_proj/kernel", "*mlp/c_proj/kernel"),
        4,
        "h",
    ),
}


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def filled(shapes):
    """Weights large enough, and biases and gains, that every unit matters."""
    rng = np.random.default_rng(5)
    return jax.tree.map(lambda a: np.float32(0.5 * rng.normal(size=a.shape)), shapes)


@functools.cache
def model(name, scan):
    cls, config, (heads, neurons), size, _ = MODELS[name]
    apply, shapes = functional(nnx.eval_shape(lambda: cls(config, scan=scan, rngs=nnx.Rngs(0))))
    params = filled(shapes)
    groups = units(apply, params, TOKENS, include=heads, kind="head", size=size)
    groups += units(apply, params, TOKENS, include=neurons)
    return apply, params, groups


@functools.cache
def masked_model(name, scan):
    apply, _, groups = model(name, scan)
    return jax.jit(lambda params, masks: apply(apply_masks(params, groups, masks), TOKENS))


def close(a, b):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_removed_models_are_the_masked_ones(name, scan):
    apply, params, groups = model(name, scan)
    assert len(groups) == (2 if scan else 4)
    # In unrolled layers different numbers may go; stacked ones lose the same.
    scope = "layer" if scan else "global"
    masks = jax.jit(lambda params: select_units(groups, unit_scores(params, groups), 0.4, scope))(
        params
    )
    dropped = {kind: 0 for kind in ("head", "neuron")}
    for group in groups:
        dropped[group.kind] += int((~masks[group.name]).sum())
    assert dropped == {"head": 2, "neuron": 8 if name == "bert" or name == "gpt2" else 10}
    small = remove(params, groups, masks)
    masked = masked_model(name, scan)(params, masks)
    everything = {g.name: np.ones(g.shape, bool) for g in groups}
    assert not np.allclose(masked, masked_model(name, scan)(params, everything), atol=1e-2)
    close(jax.jit(apply)(small, TOKENS), masked)
    sizes = [sum(v.size for v in jax.tree.leaves(p)) for p in (params, small)]
    counts = parameter_counts(groups)
    gone = sum(int(counts[k][~np.asarray(m)].sum()) for k, m in masks.items())
    assert sizes[0] - sizes[1] == gone > 0
    if not scan:  # the units of the smaller model are found again, and can go in turn
        _, _, (heads, neurons), size, _ = MODELS[name]
        again = units(apply, small, TOKENS, include=heads, kind="head", size=size)
        again += units(apply, small, TOKENS, include=neurons)
        left = {g.name: int(masks[g.name].sum()) for g in groups}
        assert {g.name: g.count for g in again} == left


def test_unstacked_layers_may_differ():
    scanned, params, groups = model("llama", True)
    masks = {
        groups[0].name: np.array([[True, False, True], [False, True, False]]),
        groups[1].name: np.random.default_rng(0).random((2, 12)) < 0.5,
    }
    with pytest.raises(JaxcompError, match=r"keep \[2, 1\] units.*scope='layer'.*unroll"):
        remove(params, groups, masks)
    masked = masked_model("llama", True)(params, masks)
    padded = remove(params, groups, masks, pad=True)
    assert padded["layers"]["self_attn"]["o_proj"]["kernel"].shape == (2, 16, 8)
    close(jax.jit(scanned)(padded, TOKENS), masked)
    # Unrolled, each layer has its own size.
    unrolled, _, _ = model("llama", False)
    flat = unstack(params, "layers")
    mine = units(unrolled, flat, TOKENS, include="*o_proj/kernel", kind="head", size=8)
    mine += units(unrolled, flat, TOKENS, include="*down_proj/kernel")
    small = remove(flat, mine, unstack(masks, "layers"))
    shapes = [small["layers"][i]["self_attn"]["k_proj"]["kernel"].shape for i in "01"]
    assert shapes == [(8, 8), (8, 4)]
    close(jax.jit(unrolled)(small, TOKENS), masked)


def test_linen_attention_and_a_plain_function_of_it():
    module = linen.MultiHeadDotProductAttention(num_heads=3, qkv_features=6)
    x = normal(2, 5, 4)
    apply, shapes = functional((module, jax.eval_shape(module.init, jax.random.key(0), x)))
    params = filled(shapes)
    groups = units(apply, params, x, include="out/kernel", kind="head", size=2)
    masks = {groups[0].name: jnp.array([True, False, True])}
    small = remove(params, groups, masks)
    assert small["query"]["kernel"].shape == (4, 2, 2) and small["out"]["kernel"].shape == (2, 2, 4)

    def plain(p, x):
        q, k, v = (
            jnp.einsum("btd,dhe->bthe", x, p[n]["kernel"]) + p[n]["bias"]
            for n in ("query", "key", "value")
        )
        y = jnp.einsum(
            "bhts,bshe->bthe", jax.nn.softmax(jnp.einsum("bthe,bshe->bhts", q, k) / 2**0.5), v
        )
        return jnp.einsum("bthe,hed->btd", y, p["out"]["kernel"]) + p["out"]["bias"]

    apply, plain = jax.jit(apply), jax.jit(plain)
    close(plain(params, x), apply(params, x))
    close(plain(small, x), apply(apply_masks(params, groups, masks), x))


MLP = {"up": normal(4, 6), "bias": normal(6, seed=1), "down": normal(6, 4, seed=2)}
X = normal(3, 4, seed=3)


def mlp(p, x):
    return jax.nn.relu(x @ p["up"] + p["bias"]) @ p["down"]


GROUPS = units(mlp, MLP, X, include="down")
NAME = "down:neuron"


def test_removing_a_zero_unit_changes_nothing():
    params = {**MLP, "down": MLP["down"].at[2].set(0)}
    masks = {NAME: jnp.arange(6) != 2}
    small = remove(params, GROUPS, masks)
    assert small["up"].shape == (4, 5) and small["bias"].shape == (5,)
    np.testing.assert_array_equal(small["up"], np.delete(params["up"], 2, 1))
    close(mlp(small, X), mlp(params, X))


def test_closing_a_unit_is_closing_its_activation():
    gates = jnp.array([1.0, 0.5, 0.0, 2.0, 1.0, -1.0])
    h = jax.nn.relu(X @ MLP["up"] + MLP["bias"]) * gates
    close(mlp(apply_gates(MLP, GROUPS, {NAME: gates}), X), h @ MLP["down"])
    low = jax.tree.map(lambda a: a.astype(jnp.bfloat16), MLP)
    assert {a.dtype for a in jax.tree.leaves(apply_gates(low, GROUPS, {NAME: gates}))} == {
        jnp.dtype(jnp.bfloat16)
    }


@pytest.mark.parametrize("scan", [False, True])
def test_scores_are_those_of_numpy(scan):
    _, params, groups = model("gpt2", scan)
    grads = jax.tree.map(lambda a: np.sin(3 * a), params)
    for method in ("magnitude", "taylor"):
        taylor = method == "taylor"
        got = jax.jit(lambda p, g, method=method: unit_scores(p, groups, method, g))(
            params, grads if taylor else None
        )
        layers = [params["h"], grads["h"]]
        if not scan:
            layers = [jax.tree.map(lambda *a: np.stack(a), *t.values()) for t in layers]
        w, g = (jax.tree.map(lambda a: np.asarray(a, np.float64), t) for t in layers)
        total = np.zeros((2, 3))
        product = jax.tree.map(np.multiply, w, g if taylor else w)
        for layer in range(2):
            for head in range(3):
                own = slice(4 * head, 4 * head + 4)
                attn = product["attn"]
                total[layer, head] += attn["c_proj"]["kernel"][layer][own].sum()
                for part in range(3):  # q, k and v side by side
                    at = slice(12 * part + own.start, 12 * part + own.stop)
                    total[layer, head] += attn["c_attn"]["kernel"][layer][:, at].sum()
                    total[layer, head] += attn["c_attn"]["bias"][layer][at].sum()
        expected = np.sqrt(total) if method == "magnitude" else np.abs(total)
        mine = [got[x.name] for x in groups if x.kind == "head"]
        np.testing.assert_allclose(np.asarray(mine).reshape(2, 3), expected, rtol=1e-5)


def test_taylor_is_the_change_of_a_linear_loss():
    c = normal(6, 4, seed=4)
    grads = {"up": jnp.zeros((4, 6)), "bias": jnp.zeros(6), "down": c}
    change = [float(jnp.sum(c * (MLP["down"] - MLP["down"].at[i].set(0)))) for i in range(6)]
    close(unit_scores(MLP, GROUPS, "taylor", grads)[NAME], np.abs(change))


def test_exact_counts_and_ties():
    a, b = UnitGroup("a", "head", 4, (2,), ()), UnitGroup("b", "head", 3, (), ())
    c = UnitGroup("c", "neuron", 10, (), ())
    flat = {"a": jnp.ones((2, 4)), "b": jnp.ones(3), "c": jnp.arange(10.0)}
    keep = select_units([a, b, c], flat, 0.5)
    assert sum(int((~keep[n]).sum()) for n in "ab") == round(0.5 * 11)
    assert int((~keep["c"]).sum()) == 5
    # Of equal scores the first go, one in each layer being kept.
    assert keep["a"].tolist() == [[False, False, False, True], [False, False, False, True]]
    assert keep["b"].all()
    keep = select_units([a, b], {"a": flat["a"], "b": flat["b"]}, 0.5, "layer")
    assert keep["a"].sum(-1).tolist() == [2, 2] and keep["b"].tolist() == [False, False, True]
    keep = select_units([c], {"c": -flat["c"]}, 0.3)  # signed scores
    assert keep["c"].tolist() == [True] * 7 + [False] * 3
    keep = jax.jit(lambda s: select_units([c], s, 0.8, min_units=2))({"c": flat["c"]})
    assert keep["c"].tolist() == [False] * 8 + [True] * 2
    with pytest.raises(JaxcompError, match=r"dropping 9 of 11.*min_units=1.*at most 8"):
        select_units([a, b], {"a": flat["a"], "b": flat["b"]}, 0.82)


def test_a_layer_that_loses_all_keeps_one_closed_unit():
    small = remove(MLP, GROUPS, {NAME: jnp.zeros(6, bool)})
    assert small["down"].shape == (1, 4)
    np.testing.assert_array_equal(mlp(small, X), np.zeros((3, 4)))


def test_rows_columns_layers_and_weights_are_masked_in_place():
    for kind, expected in (
        ("row", lambda m: MLP["down"] * m),
        ("column", lambda m: MLP["down"] * m[:, None]),
        ("weight", lambda m: MLP["down"] * m.reshape(6, 4)),
        ("layer", lambda m: MLP["down"] * m),
    ):
        groups = units(mlp, MLP, X, include="down", kind=kind)
        (group,) = groups
        mask = jnp.arange(group.count) % 2 == 1
        small = remove(MLP, groups, {group.name: mask})
        np.testing.assert_array_equal(small["down"], expected(mask))
        np.testing.assert_array_equal(small["up"], MLP["up"])


def test_one_projection_of_several_groups():
    # As in PaLM: one matmul to values of an attention and to a parallel MLP.
    params = {"w": normal(4, 14), "o": normal(6, 4, seed=1), "d": normal(8, 4, seed=2)}

    def apply(p, x):
        width = p["o"].shape[0]
        v, h = jnp.split(x @ p["w"], [width], -1)
        return jnp.tanh(v) @ p["o"] + jax.nn.relu(h) @ p["d"]

    groups = units(apply, params, X, include="o", size=2) + units(apply, params, X, include="d")
    masks = {"o:neuron": jnp.array([True, False, True]), "d:neuron": jnp.arange(8) < 5}
    small = remove(params, groups, masks)
    assert jax.tree.map(jnp.shape, small) == {"w": (4, 9), "o": (4, 4), "d": (5, 4)}
    close(apply(small, X), apply(apply_masks(params, groups, masks), X))


def test_experts():
    params = {"up": normal(3, 4, 6), "down": normal(3, 6, 4, seed=1)}

    def apply(p, x):
        h = jax.nn.relu(jnp.einsum("td,edf->etf", x, p["up"]))
        return jnp.einsum("etf,efd->etd", h, p["down"]).sum(0)

    groups = units(apply, params, X, include="down")
    masks = select_units(groups, unit_scores(params, groups), 0.5, "layer")
    assert len(np.unique(masks[NAME], axis=0)) > 1
    small = remove(params, groups, masks)
    assert small["up"].shape == (3, 4, 3)
    close(apply(small, X), apply(apply_masks(params, groups, masks), X))


def test_transforms():
    gates = {NAME: jnp.linspace(0.0, 1.0, 6)}

    def loss(gates, x):
        return (mlp(apply_gates(MLP, GROUPS, gates), x[None]) ** 2).sum()

    each = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(gates, X)[NAME]
    step = 1e-3
    for i in range(6):
        moved = [loss({NAME: gates[NAME].at[i].add(s)}, X[1]) for s in (step, -step)]
        np.testing.assert_allclose(
            each[1, i], (moved[0] - moved[1]) / (2 * step), rtol=2e-2, atol=2e-3
        )


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_parameters(kind):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(kind,))

    def apply(p, x):
        h = jax.nn.relu(jnp.einsum("bd,df->bf", x, p["up"]) + p["bias"])
        return jnp.einsum("bf,fd->bd", h, p["down"], out_sharding=P())

    specs = {"up": P(None, "x"), "bias": P("x"), "down": P("x", None)}
    with jax.set_mesh(mesh):
        params = {k: jax.device_put(MLP[k], NamedSharding(mesh, specs[k])) for k in specs}
        groups = units(apply if kind == AxisType.Explicit else mlp, params, X, include="down")
        masks = select_units(groups, unit_scores(params, groups), 0.5)
        masked = apply_masks(params, groups, masks)
        assert masked["down"].sharding.is_equivalent_to(params["down"].sharding, 2)
        small = remove(params, groups, masks)
    plain = select_units(GROUPS, unit_scores(MLP, GROUPS), 0.5)
    np.testing.assert_array_equal(masks[NAME], plain[NAME])
    jax.tree.map(np.testing.assert_array_equal, small, remove(MLP, GROUPS, plain))


def test_errors():
    with pytest.raises(
        JaxcompError, match=r"'\*dwn\*' matches none of 2 weights.*closest are down"
    ):
        units(mlp, MLP, X, include="*dwn*")
    with pytest.raises(JaxcompError, match="kind 'head' needs size"):
        units(mlp, MLP, X, include="down", kind="head")
    with pytest.raises(JaxcompError, match="takes no size"):
        units(mlp, MLP, X, include="down", kind="row", size=2)
    with pytest.raises(JaxcompError, match="kind 'heads' must be one of"):
        units(mlp, MLP, X, include="down", kind="heads")
    with pytest.raises(JaxcompError, match="does not divide the 6 inputs; use size 2 or 3"):
        units(mlp, MLP, X, include="down", size=4)
    with pytest.raises(JaxcompError, match=r"'dwn:neuron', which is no group.*down:neuron"):
        apply_masks(MLP, GROUPS, {"dwn:neuron": jnp.ones(6, bool)})
    with pytest.raises(JaxcompError, match=r"shape \(5,\); one value a unit is \(6,\)"):
        apply_masks(MLP, GROUPS, {NAME: jnp.ones(5, bool)})
    with pytest.raises(JaxcompError, match=r"up \(4, 5\) was \(4, 6\) when its units were found"):
        unit_scores({**MLP, "up": MLP["up"][:, 1:]}, GROUPS)
    with pytest.raises(JaxcompError, match=r"no 'up'; the closest are"):
        unit_scores({"upp": MLP["up"], "bias": MLP["bias"], "down": MLP["down"]}, GROUPS)
    with pytest.raises(JaxcompError, match="gradients"):
        unit_scores(MLP, GROUPS, "taylor")
    with pytest.raises(JaxcompError, match="no scores for down:neuron"):
        select_units(GROUPS, {}, 0.5)
    with pytest.raises(JaxcompError, match=r"nothing at 'blocks'.*layers"):
        unstack({"layers": {"w": X}}, "blocks")
