"""Which slices of which parameters make a unit: against closures written by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from jaxcomp.errors import JaxcompError
from jaxcomp.functional import functional
from jaxcomp.graph import trace
from jaxcomp.graph.labels import join, split
from jaxcomp.graph.units import coupled_units, layer_unit, leaf_units
from jaxcomp.models import Llama, LlamaConfig
from jaxcomp.models.bert import Bert, BertConfig

LLAMA = LlamaConfig(16, 8, 12, 2, 4, 2, 4, qkv_bias=True, qk_norm=True, tie_word_embeddings=True)
BERT = BertConfig(16, 8, 12, 2, 2)
TOKENS = jnp.zeros((2, 5), jnp.int32)


def ones(**shapes):
    return {name: jnp.ones(shape) for name, shape in shapes.items()}


def model(cls, config, **options):
    """Its function, and the shapes of its parameters."""
    return functional(nnx.eval_shape(lambda: cls(config, **options, rngs=nnx.Rngs(0))))


def members(group):
    """path -> (role, stack axes, axes, block, repeats), offsets zero."""
    assert all(m.offset == 0 for m in group.members)
    assert len({m.path for m in group.members}) == len(group.members)
    return {m.path: (m.role, m.stack_axes, m.axes, m.block, m.repeats) for m in group.members}


def found(apply, params, *inputs, path="down", size=1):
    return coupled_units(trace(apply, params, *inputs), path, size)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("remat", [False, True])
def test_llama_head_is_one_key_value_head(scan, remat):
    apply, params = model(Llama, LLAMA, scan=scan, remat=remat)
    graph = trace(apply, params, TOKENS)
    at, s, k = ("layers/self_attn", (0,), 1) if scan else ("layers/1/self_attn", (), 0)
    group = coupled_units(graph, f"{at}/o_proj/kernel", 8, "head")
    assert (group.kind, group.count, group.stack) == ("head", 2, (2,) if scan else ())
    # Two query heads of 4 to each of two key-value heads; norms on the head are shared by all.
    assert members(group) == {
        f"{at}/o_proj/kernel": ("consumer", s, (k,), 8, 1),
        f"{at}/q_proj/kernel": ("producer", s, (k + 1,), 8, 1),
        f"{at}/k_proj/kernel": ("producer", s, (k + 1,), 4, 1),
        f"{at}/v_proj/kernel": ("producer", s, (k + 1,), 4, 1),
        f"{at}/q_proj/bias": ("producer", s, (k,), 8, 1),
        f"{at}/k_proj/bias": ("producer", s, (k,), 4, 1),
        f"{at}/v_proj/bias": ("producer", s, (k,), 4, 1),
    }
    assert group.unit_size == 8 * 8 * 2 + 8 * 4 * 2 + 8 + 4 + 4


@pytest.mark.parametrize("scan", [False, True])
def test_llama_neuron(scan):
    apply, params = model(Llama, LLAMA, scan=scan)
    at, s, k = ("layers/mlp", (0,), 1) if scan else ("layers/1/mlp", (), 0)
    group = coupled_units(trace(apply, params, TOKENS), f"{at}/down_proj/kernel", 1)
    assert group.shape == ((2, 12) if scan else (12,))
    assert members(group) == {
        f"{at}/down_proj/kernel": ("consumer", s, (k,), 1, 1),
        f"{at}/gate_proj/kernel": ("producer", s, (k + 1,), 1, 1),
        f"{at}/up_proj/kernel": ("producer", s, (k + 1,), 1, 1),
    }


@pytest.mark.parametrize("scan", [False, True])
def test_bert(scan):
    apply, params = model(Bert, BERT, scan=scan)
    graph = trace(apply, params, TOKENS, jnp.ones((2, 5), jnp.int32))
    at, s, k = ("layers", (0,), 1) if scan else ("layers/0", (), 0)
    heads = coupled_units(graph, f"{at}/attention_output/kernel", 4, "head")
    expected = {f"{at}/attention_output/kernel": ("consumer", s, (k,), 4, 1)}
    for name in ("query", "key", "value"):
        expected[f"{at}/{name}/kernel"] = ("producer", s, (k + 1,), 4, 1)
        expected[f"{at}/{name}/bias"] = ("producer", s, (k,), 4, 1)
    assert members(heads) == expected
    assert members(coupled_units(graph, f"{at}/output/kernel", 1)) == {
        f"{at}/output/kernel": ("consumer", s, (k,), 1, 1),
        f"{at}/intermediate/kernel": ("producer", s, (k + 1,), 1, 1),
        f"{at}/intermediate/bias": ("producer", s, (k,), 1, 1),
    }


def test_layer_owns_its_branch():
    apply, params = model(Bert, BERT)
    graph = trace(apply, params, TOKENS)
    group = layer_unit(graph, "layers/0/output/kernel")
    assert (group.count, group.stack) == (1, ())
    assert {m.path: m.role for m in group.members} == {
        "layers/0/output/kernel": "consumer",
        "layers/0/output/bias": "consumer",
        "layers/0/intermediate/kernel": "producer",
        "layers/0/intermediate/bias": "producer",
    }
    assert group.unit_size == 2 * 8 * 12 + 8 + 12
    apply, params = model(Llama, LLAMA, scan=True)
    group = layer_unit(trace(apply, params, TOKENS), "layers/mlp/down_proj/kernel")
    assert group.stack == (2,) and {m.path for m in group.producers} == {
        "layers/mlp/gate_proj/kernel",
        "layers/mlp/up_proj/kernel",
        "layers/post_attention_layernorm/scale",
    }


def test_rows_columns_and_weights():
    graph = trace(lambda p, x: x @ p["w"], ones(w=(3, 5)), jnp.ones((2, 3)))
    counts = {kind: leaf_units(graph, "w", kind).count for kind in ("row", "column", "weight")}
    assert counts == {"row": 5, "column": 3, "weight": 15}


def test_fused_gate_and_up_in_halves_and_interleaved():
    params = ones(w=(4, 12), b=(12,), down=(6, 4))

    def halves(p, x):
        a, b = jnp.split(x @ p["w"] + p["b"], 2, -1)
        return (jax.nn.gelu(a) * b) @ p["down"]

    def interleaved(p, x):
        h = (x @ p["w"] + p["b"]).reshape(2, 6, 2)
        return (jax.nn.gelu(h[..., 0]) * h[..., 1]) @ p["down"]

    def strided(p, x):
        h = x @ p["w"] + p["b"]
        return (jax.nn.gelu(h[:, ::2]) * h[:, 1::2]) @ p["down"]

    x = jnp.ones((2, 4))
    assert members(found(halves, params, x))["w"] == ("producer", (), (1,), 1, 2)
    for apply in (interleaved, strided):
        got = members(found(apply, params, x))
        assert got["w"] == ("producer", (), (1,), 2, 1) and got["b"] == ("producer", (), (0,), 2, 1)


def test_one_projection_to_queries_and_shared_keys_and_values():
    # Four query heads of 3 to two key-value heads, repeated as older models do.
    params = ones(qkv=(5, 24), down=(12, 5))

    def apply(p, x):
        q, k, v = jnp.split(x @ p["qkv"], [12, 18], -1)
        q = q.reshape(2, 7, 4, 3)
        k, v = (jnp.repeat(a.reshape(2, 7, 2, 3), 2, axis=2) for a in (k, v))
        s = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
        return jnp.einsum("bhqk,bkhd->bqhd", s, v).reshape(2, 7, 12) @ p["down"]

    group = found(apply, params, jnp.ones((2, 7, 5)), size=6)
    got = [(m.offset, m.block, m.repeats) for m in group.members if m.path == "qkv"]
    assert got == [(0, 6, 1), (12, 3, 2)]
    with pytest.raises(JaxcompError, match=r"only 2 of the units apart in qkv.* size of 6"):
        found(apply, params, jnp.ones((2, 7, 5)), size=3)


def test_linen_attention_has_heads_as_axes():
    module = linen.MultiHeadDotProductAttention(num_heads=3, qkv_features=6)
    x = jnp.ones((2, 5, 4))
    apply, params = functional((module, jax.eval_shape(module.init, jax.random.key(0), x)))
    got = members(found(apply, params, x, path="out/kernel", size=2))
    expected = {"out/kernel": ("consumer", (), (0,), 1, 1)}
    for name in ("query", "key", "value"):
        expected[f"{name}/kernel"] = ("producer", (), (1,), 1, 1)
        expected[f"{name}/bias"] = ("producer", (), (0,), 1, 1)
    assert got == expected


def test_experts_have_units_each():
    params = ones(up=(3, 4, 6), b=(3, 6), down=(3, 6, 4), router=(4, 3))

    def apply(p, x):
        h = jnp.einsum("td,edf->etf", x, p["up"]) + p["b"][:, None]
        y = jnp.einsum("etf,efd->etd", jax.nn.relu(h), p["down"])
        return jnp.einsum("etd,te->td", y, jax.nn.softmax(x @ p["router"]))

    group = found(apply, params, jnp.ones((2, 4)))
    assert group.shape == (3, 6)
    assert members(group) == {
        "down": ("consumer", (0,), (1,), 1, 1),
        "up": ("producer", (0,), (2,), 1, 1),
        "b": ("producer", (0,), (1,), 1, 1),
    }


def test_ragged_experts():
    params = ones(up=(3, 4, 6), down=(3, 6, 4))

    def apply(p, x, sizes):
        return jax.lax.ragged_dot(jax.lax.ragged_dot(x, p["up"], sizes), p["down"], sizes)

    group = found(apply, params, jnp.ones((6, 4)), jnp.array([1, 2, 3], jnp.int32))
    assert group.shape == (3, 6)
    assert members(group) == {
        "down": ("consumer", (0,), (1,), 1, 1),
        "up": ("producer", (0,), (2,), 1, 1),
    }


def test_stacked_layers_taken_by_index():
    params = ones(up=(3, 4, 6), down=(3, 6, 4))

    def apply(p, x, order=(0, 1, 2)):
        for i in order:
            x = x + jax.nn.relu(x @ p["up"][i]) @ p["down"][i]
        return x

    group = found(apply, params, jnp.ones((2, 4)))
    assert group.shape == (3, 6)
    assert members(group)["up"] == ("producer", (0,), (2,), 1, 1)


def test_convolution_channels():
    params = ones(up=(3, 4, 6), b=(6,), down=(3, 6, 4))

    def conv(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )

    got = members(
        found(lambda p, x: conv(conv(x, p["up"]) + p["b"], p["down"]), params, jnp.ones((2, 8, 4)))
    )
    assert got == {
        "down": ("consumer", (), (1,), 1, 1),
        "up": ("producer", (), (2,), 1, 1),
        "b": ("producer", (), (0,), 1, 1),
    }


def test_two_readers_are_both_consumers():
    params = ones(up=(4, 6), down=(6, 4), side=(6, 3))

    def apply(p, x):
        h = jax.nn.relu(x @ p["up"])
        return h @ p["down"], h @ p["side"]

    got = members(found(apply, params, jnp.ones((2, 4))))
    assert got["side"] == got["down"] == ("consumer", (), (0,), 1, 1)


def test_weights_through_arithmetic_and_inner_loops():
    params = ones(v=(4, 6), g=(6,), decay=(6,), down=(6, 4))

    def apply(p, x):
        w = p["g"] * p["v"] / jnp.linalg.norm(p["v"], axis=0)

        def step(h, x):
            h = h * jax.nn.sigmoid(p["decay"]) + x
            return h, h

        _, h = jax.lax.scan(step, jnp.zeros((2, 6)), x @ w)
        return h @ p["down"]

    got = members(found(apply, params, jnp.ones((5, 2, 4))))
    assert got == {
        "down": ("consumer", (), (0,), 1, 1),
        "v": ("producer", (), (1,), 1, 1),
        "g": ("producer", (), (0,), 1, 1),
        "decay": ("producer", (), (0,), 1, 1),
    }


@jax.custom_vjp
def scaled(h, s):
    return h * s


scaled.defvjp(lambda h, s: (h * s, (h, s)), lambda r, g: (g * r[1], (g * r[0]).sum(0)))


def test_custom_derivatives_conditionals_and_lookups():
    params = ones(table=(9, 6), s=(6,), b=(6,), down=(6, 4))

    def apply(p, ids, flag):
        h = scaled(jnp.take(p["table"], ids, axis=0), p["s"])
        h = jax.lax.cond(flag, lambda h: h + p["b"], lambda h: h, h)
        return jnp.sort(h, 0) @ p["down"]

    got = members(found(apply, params, jnp.zeros(5, jnp.int32), True))
    assert got == {
        "down": ("consumer", (), (0,), 1, 1),
        "table": ("producer", (), (1,), 1, 1),
        "s": ("producer", (), (0,), 1, 1),
        "b": ("producer", (), (0,), 1, 1),
    }


def test_lone_unit_owns_its_branch():
    params = ones(up=(4, 6), down=(6, 4))
    group = found(
        lambda p, x: x + jnp.tanh(x @ p["up"]) @ p["down"], params, jnp.ones((2, 4)), size=6
    )
    assert group.count == 1 and members(group) == {
        "down": ("consumer", (), (), 1, 1),
        "up": ("producer", (), (), 1, 1),
    }


X = jnp.ones((2, 4))
P = ones(up=(4, 6), down=(6, 4), square=(4, 4), each=(6, 4))
BIAS = np.arange(6.0)


def cached(p, x, cache):
    h = jax.lax.dynamic_update_slice(cache, (x @ p["up"])[None], (1, 0, 0))
    return h.sum(0) @ p["down"]


def stacked(p, x):
    return jax.lax.scan(lambda x, w: (x + x @ w, None), x, p["w"])[0]


def shared_in_loop(p, x):
    def step(x, w):
        return x + (x @ p["up"]) @ w, None

    return jax.lax.scan(step, x, p["down"])[0]


@pytest.mark.parametrize(
    ("apply", "inputs", "path", "message"),
    [
        (
            lambda p, x: x @ p["down"],
            (jnp.ones((2, 6)),),
            "down",
            "`dot_general` with down.*an input of the function",
        ),
        (
            lambda p, x: (x @ p["up"] + BIAS) @ p["down"],
            (X,),
            "down",
            "reads a constant of the function",
        ),
        (
            cached,
            (X, jnp.ones((3, 2, 6))),
            "down",
            "`dynamic_update_slice`.*an input of the function",
        ),
        (
            lambda p, x: (lambda h: (h @ p["down"], h))(x @ p["up"]),
            (X,),
            "down",
            "`dot_general` with up .*returned by the function",
        ),
        (
            lambda p, x: (lambda h: (h - h.mean(-1, keepdims=True)) @ p["down"])(x @ p["up"]),
            (X,),
            "down",
            "`reduce_sum`.* also reads the units",
        ),
        (
            lambda p, x: (lambda h: (h @ p["down"], jnp.einsum("bu,ue->bue", h, p["each"])))(
                x @ p["up"]
            ),
            (X,),
            "down",
            "also reads the units",
        ),
        (
            lambda p, x: jnp.tanh((x @ p["up"]) @ p["down"]) @ p["down"].T,
            (X,),
            "down",
            "inputs and outputs exchanged",
        ),
        (
            lambda p, x: jnp.cumsum(x @ p["up"], -1) @ p["down"],
            (X,),
            "down",
            "`cumsum` of shape .*works along the axis",
        ),
        (
            lambda p, x: (x @ p["up"]) @ p["down"] + (p["up"] * 2).sum(),
            (X,),
            "down",
            "`mul` of shape .*also uses up",
        ),
        (
            lambda p, x: jax.scipy.linalg.expm(x[:, :2] @ p["up"][:2, :2]) @ p["down"][:2],
            (X,),
            "down",
            "no contraction uses",
        ),
        (
            lambda p, x: (
                jax.lax.while_loop(lambda h: (h < 9).all(), lambda h: h * 2, x @ p["up"])
                @ p["down"]
            ),
            (X,),
            "down",
            "`while` of shape .*not known to keep",
        ),
        (
            lambda p, x: jnp.tanh(jnp.tanh(x @ p["square"]) @ p["square"]) @ p["square"],
            (X,),
            "square",
            "input of the function",
        ),
        (
            lambda p, x: (
                jnp.concatenate([x @ p["up"][:, :3], x @ p["square"][:, 1:]], -1) @ p["down"]
            ),
            (X,),
            "down",
            "`dot_general` of shape|only 3 of the units",
        ),
    ],
)
def test_where_units_cannot_be_told_apart(apply, inputs, path, message):
    with pytest.raises(JaxcompError, match=message):
        coupled_units(trace(apply, P, *inputs), path, 1)


def test_residual_streams_and_shared_weights_of_loops():
    with pytest.raises(JaxcompError, match=r"w \(3, 4, 4\).*carried from layer to layer"):
        coupled_units(trace(stacked, ones(w=(3, 4, 4)), X), "w", 1)
    with pytest.raises(JaxcompError, match="up, which is shared by all iterations of the loop"):
        coupled_units(trace(shared_in_loop, ones(up=(4, 6), down=(3, 6, 4)), X), "down", 1)


def test_size_must_divide():
    with pytest.raises(JaxcompError, match=r"down \(6, 4\).*5 input channels.*use size 3 or 6"):
        found(lambda p, x: x @ p["up"] @ p["down"], P, X, size=5)
    with pytest.raises(JaxcompError, match="up2: no contraction"):
        found(lambda p, x: x @ p["up"] @ p["down"], P, X, path="up2")


def test_split_undoes_join():
    rng = np.random.default_rng(0)
    for _ in range(20):
        sizes = rng.integers(1, 5, 3)
        parts = [np.cumsum(rng.integers(0, 3, n)) for n in sizes]
        parts = [p - p.min() for p in parts]
        base, again = split(join(parts), sizes)
        assert base == 0 and all(map(np.array_equal, again, parts))
    assert split(np.array([0, 1, 1, 0]), (2, 2)) is None
