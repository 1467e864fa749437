"""Quantization-aware training of whole models: one function for every model and transform."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

import jaxcomp as jc
from jaxcomp import models
from jaxcomp.formats import Codebook, Float, Int
from jaxcomp.quantization import GPTQ, RTN, Binary, FakeQuant, FakeQuantValues, Ternary
from jaxcomp.quantization.inputs import InputQuantizer
from jaxcomp.quantization.trainable import Dynamic
from jaxcomp.step import Activation
from tests.helpers import counted, x64

X = jax.random.normal(jax.random.key(9), (3, 16))
PARAMS = {
    "layers": 0.4 * jax.random.normal(jax.random.key(0), (3, 16, 16)),
    "head": jax.random.normal(jax.random.key(1), (16, 8)),
}
DYNAMIC = Activation()
STATIC = Activation(granularity="tensor", dynamic=False)
W4 = FakeQuant(format=Int(4, 8, full_range=False))


def unrolled(params, x):
    for i in range(3):
        x = jnp.tanh(x @ params["layers"][i])
    return x @ params["head"]


def scanned(params, x, wrap=lambda f: f):
    step = wrap(lambda h, w: (jnp.tanh(h @ w), None))
    return jax.lax.scan(step, x, params["layers"])[0] @ params["head"]


def rematted(params, x):
    return scanned(params, x, jax.checkpoint)


def steps(*steps):
    return jc.Recipe(steps=steps)


def llama(scan=False, **changes):
    config = models.llama.LlamaConfig(32, 16, 32, 2, 4, 2, head_dim=4, **changes)
    return jc.functional(models.llama.Llama(config, scan=scan, rngs=nnx.Rngs(0)))


TOKENS = jax.random.randint(jax.random.key(5), (2, 8), 0, 32, jnp.int32)

RECIPES = {
    "w4": steps(W4),
    "w3 asymmetric": steps(FakeQuant(format=Int(3, None, symmetric=False), clipping="mse")),
    "w2 learned": steps(FakeQuant(format=Int(2, 8), scale="learned")),
    "w4 learned offset": steps(FakeQuant(format=Int(4, symmetric=False), scale="learned")),
    "nf4": steps(FakeQuant(format=Codebook("nf4", group_size=8))),
    "fp8": steps(FakeQuant(format=Float("e4m3"), activation=Activation(format="e4m3"))),
    "w4a8": steps(FakeQuant(format=Int(4, 8, full_range=False), activation=DYNAMIC)),
    "w8a8 ema": steps(FakeQuant(format=Int(8, full_range=False), activation=STATIC)),
    "w8a8 learned": steps(
        FakeQuant(format=Int(8, full_range=False), activation=STATIC, observer="learned")
    ),
    "w8a8 pact": steps(
        FakeQuant(format=Int(8, full_range=False), activation=STATIC, observer="pact")
    ),
    "a8 asymmetric percentile": steps(
        FakeQuant(
            activation=Activation(granularity="tensor", dynamic=False, symmetric=False),
            observer="percentile",
        )
    ),
    "rtn": steps(RTN(format=Int(4, 8))),
    "ternary": steps(Ternary(activation=DYNAMIC)),
    "binary": steps(Binary(group_size=8, center=True)),
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_what_is_trained_is_what_dispatch_computes(recipe):
    qat = jc.qat(scanned, recipe)
    state = qat.init(PARAMS, X)
    out, _ = jax.jit(qat.apply)(PARAMS, state, X)
    assert float(jnp.abs(out - scanned(PARAMS, X)).max()) > 1e-4
    compressed = qat.convert(PARAMS, state)
    np.testing.assert_allclose(jc.dispatch(scanned)(compressed, X), out, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    "name", ["w4", "w3 asymmetric", "w4a8", "nf4", "fp8", "rtn", "ternary", "binary"]
)
def test_convert_gives_the_arrays_of_post_training_quantization(name):
    qat = jc.qat(scanned, RECIPES[name])
    trained = qat.convert(PARAMS, qat.init(PARAMS, X))
    ptq = jc.compress(scanned, PARAMS, RECIPES[name], [(X,)], progress=False).params
    assert jax.tree.structure(trained) == jax.tree.structure(ptq)
    jax.tree.map(np.testing.assert_array_equal, trained, ptq)


@pytest.mark.parametrize("name", ["w2 learned", "w8a8 ema", "w8a8 learned"])
@pytest.mark.parametrize("apply", [scanned, rematted], ids=["scan", "remat"])
def test_scan_and_remat_train_like_the_unrolled_model(apply, name):
    def gradients(apply):
        qat = jc.qat(apply, RECIPES[name])
        state = qat.init(PARAMS, X)

        def loss(trained):
            params, learned = trained
            out, after = qat.apply(params, state.replace(learned=learned), X)
            return (out**2).mean(), after

        (value, after), g = jax.jit(jax.value_and_grad(loss, has_aux=True))((PARAMS, state.learned))
        return value, g, after.ranges

    # Unrolled, the three uses of the stacked weight are matmuls of their own.
    if name != "w2 learned":
        with pytest.raises(jc.RecipeError, match="one static range cannot serve"):
            gradients(unrolled)
        reference = gradients(scanned)
    else:
        reference = gradients(unrolled)
    got = gradients(apply)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6), got, reference
    )


def test_the_gradient_is_that_of_the_quantized_model_passed_straight_through():
    qat = jc.qat(unrolled, steps(W4))
    state = qat.init(PARAMS, X)
    got = jax.grad(lambda p: (qat.apply(p, state, X)[0] ** 2).sum())(PARAMS)
    rounded = jc.materialize(qat.convert(PARAMS, state))
    expected = jax.grad(lambda p: (unrolled(p, X) ** 2).sum())(rounded)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, expected)


def test_moving_averages_follow_the_formula():
    recipe = steps(FakeQuant(activation=STATIC, momentum=0.9, include=("head",)))
    apply = lambda p, x: x @ p["head"]  # noqa: E731
    qat = jc.qat(apply, recipe)
    shapes = jax.eval_shape(lambda: (PARAMS, X))
    state = qat.init(*shapes)
    low = high = None
    for k in range(4):
        x = X * (k + 1)
        a, b = float(x.min()), float(x.max())
        seen = (a, b) if low is None else (low, high)
        out, state = qat.apply(PARAMS, state, x)
        scale = max(-seen[0], seen[1]) / 127
        rounded = np.clip(np.round(np.asarray(x, np.float64) / scale), -127, 127) * scale
        np.testing.assert_allclose(out, rounded @ np.asarray(PARAMS["head"]), rtol=1e-4, atol=1e-4)
        low, high = (a, b) if low is None else (0.9 * low + 0.1 * a, 0.9 * high + 0.1 * b)
        ranges = state.ranges["head"]
        np.testing.assert_allclose((ranges["low"], ranges["high"]), (low, high), rtol=1e-5)
    assert int(state.step) == 4


def test_a_delayed_start_a_falling_width_and_frozen_ranges_are_schedules():
    head = steps(FakeQuant(format=Int(2, 8, full_range=False), include=("head",)))
    apply = lambda p, x: x @ p["head"]  # noqa: E731
    dense = apply(PARAMS, X)
    at = lambda w: X @ w  # noqa: E731

    def rounded(bits):
        fmt = Int(bits, 8, full_range=False)
        w = PARAMS["head"].T
        return jc.quantization.fake_quantize(w, fmt).T

    enabled = optax.join_schedules([optax.constant_schedule(0), optax.constant_schedule(1)], [2])
    bits = optax.join_schedules([optax.constant_schedule(8), optax.constant_schedule(2)], [3])
    qat = jc.qat(apply, head, enabled=enabled, bits=bits)
    state, outs = qat.init(PARAMS, X), []
    run = counted(qat.apply)
    for _ in range(4):
        out, state = run(PARAMS, state, X)
        outs.append(out)
    assert run.traces == 1
    expected = [dense, dense, at(rounded(8)), at(rounded(2))]
    for out, want in zip(outs, expected, strict=True):
        np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)

    half = jc.qat(apply, head, enabled=lambda step: 0.5)
    out, _ = half.apply(PARAMS, half.init(PARAMS, X), X)
    np.testing.assert_allclose(out, (dense + at(rounded(2))) / 2, rtol=1e-5, atol=1e-5)

    frozen = steps(FakeQuant(activation=STATIC, include=("head",)))
    qat = jc.qat(apply, frozen, observe=lambda step: step < 1)
    state = qat.init(PARAMS, X)
    _, first = qat.apply(PARAMS, state, 2 * X)
    _, second = qat.apply(PARAMS, first, 9 * X)
    assert float(first.ranges["head"]["high"]) > float(state.ranges["head"]["high"])
    jax.tree.map(np.testing.assert_array_equal, first.ranges, second.ranges)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    "options", [{}, {"full_range": False}, {"symmetric": False}, {"out_group_size": None}], ids=str
)
def test_a_width_that_a_schedule_gives_is_the_grid_of_that_width(bits, options):
    w = jax.random.normal(jax.random.key(0), (2, 4, 32))
    fmt = lambda bits: Int(bits, 16, **options)  # noqa: E731
    got = jax.jit(Dynamic(fmt(8)).apply)(w, {}, jnp.asarray(bits))
    np.testing.assert_allclose(got, jc.quantization.fake_quantize(w, fmt(bits)), rtol=1e-6)


@pytest.mark.parametrize("scan", [False, True])
def test_a_llama_with_embedding_and_cache_quantized(scan):
    apply, params = llama(scan, tie_word_embeddings=True)
    recipe = steps(
        FakeQuant(format=Int(4, 16, full_range=False), activation=DYNAMIC),
        FakeQuant(format=Int(8, full_range=False), include=("*embed*",)),
        FakeQuantValues(include=("key", "value"), activation=Activation(format="int4")),
    )
    qat = jc.qat(apply, recipe)
    state = qat.init(params, TOKENS)
    whole, _ = qat.apply(params, state, TOKENS)
    plain, _ = jc.qat(apply, steps(*recipe.steps[:2])).apply(params, state, TOKENS)
    assert float(jnp.abs(whole - plain).max()) > 1e-3
    compressed = qat.convert(params, state)
    np.testing.assert_allclose(jc.dispatch(apply)(compressed, TOKENS), plain, rtol=1e-3, atol=1e-4)
    # Token by token through a cache, each key and value is quantized once, as it enters.
    shape = (2, 2, 8, 2, 4)
    cache = {"k": jnp.zeros(shape), "v": jnp.zeros(shape), "length": jnp.zeros((), jnp.int32)}
    step = jax.jit(lambda t, cache: qat.apply(params, state, t, None, cache)[0])
    for t in range(8):
        logits, cache = step(TOKENS[:, t : t + 1], cache)
        np.testing.assert_allclose(logits[:, 0], whole[:, t], rtol=1e-3, atol=1e-4)


def test_it_trains_with_accumulated_gradients_and_resumes_to_the_same_bits(tmp_path):
    apply, params = llama(scan=True)
    recipe = steps(
        FakeQuant(
            format=Int(3, 16, full_range=False),
            scale="learned",
            activation=STATIC,
            exclude=("*lm_head*",),
        )
    )
    qat = jc.qat(apply, recipe)
    tx = optax.MultiSteps(optax.adamw(3e-3), every_k_schedule=2)

    def loss(trained, state, tokens):
        logits, state = qat.apply(trained[0], state.replace(learned=trained[1]), tokens)
        ce = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
        return ce.mean(), state

    @counted
    def update(carry, tokens):
        trained, state, opt = carry
        (value, state), g = jax.value_and_grad(loss, has_aux=True)(trained, state, tokens)
        updates, opt = tx.update(g, opt, trained)
        return (optax.apply_updates(trained, updates), state, opt), value

    state = qat.init(params, TOKENS)
    trained = (params, state.learned)
    carry, losses = (trained, state, tx.init(trained)), []
    for k in range(30):
        if k == 10:
            saved = carry
        carry, value = update(carry, TOKENS)
        losses.append(float(value))
    assert losses[-1] < losses[0] - 0.2
    assert update.traces == 1
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "ten", saved)
        checkpointer.wait_until_finished()
        again = checkpointer.restore(tmp_path / "ten", jax.eval_shape(lambda: saved))
    for _ in range(20):
        again, _ = update(again, TOKENS)
    jax.tree.map(np.testing.assert_array_equal, again, carry)


def test_compressed_leaves_run_as_they_are():
    frozen = jc.compress(
        unrolled, PARAMS, steps(RTN(format=Int(4, 8), include=("layers",))), [(X,)], progress=False
    ).params
    qat = jc.qat(unrolled, steps(FakeQuant(format=Int(8), include=("head",))))
    out, _ = qat.apply(frozen, qat.init(frozen, X), X)
    both = qat.convert(frozen, qat.init(frozen, X))
    np.testing.assert_allclose(jc.dispatch(unrolled)(both, X), out, rtol=1e-5, atol=1e-5)


def test_state_has_the_stack_of_its_weight_and_shapes_are_enough():
    qat = jc.qat(scanned, RECIPES["w2 learned"])
    shapes = jax.eval_shape(qat.init, PARAMS, X)
    assert shapes.learned["weights"]["layers"]["scale"].shape == (3, 16, 2)
    assert shapes.learned["weights"]["head"]["scale"].shape == (8, 2)


class TestWrongUse:
    def test_a_step_that_cannot_be_trained(self):
        with pytest.raises(jc.RecipeError, match=r"gptq is no step.*fake_quant.*rtn"):
            jc.qat(unrolled, steps(GPTQ(format=Int(4))))

    def test_two_steps_on_one_weight(self):
        qat = jc.qat(unrolled, steps(W4, FakeQuant(format=Int(8), include=("head",))))
        with pytest.raises(jc.RecipeError, match=r"head \(16, 8\): 2 steps quantize the weight"):
            qat.init(PARAMS, X)

    def test_rules_that_match_nothing(self):
        qat = jc.qat(unrolled, steps(FakeQuant(format=Int(4), include=("hed",))))
        with pytest.raises(jc.RecipeError, match=r"'hed' matches none.*head"):
            qat.init(PARAMS, X)
        named = lambda p, x: checkpoint_name(x @ p["head"], "logits")  # noqa: E731
        qat = jc.qat(named, steps(FakeQuantValues(include=("logit",))))
        with pytest.raises(jc.JaxcompError, match=r"'logit' matches no value.*logits"):
            qat.init(PARAMS, X)

    def test_formats_that_do_not_fit(self):
        qat = jc.qat(unrolled, steps(FakeQuant(format=Int(4, 5))))
        with pytest.raises(jc.JaxcompError, match=r"layers \(3, 16, 16\).*5 does not divide"):
            qat.init(PARAMS, X)
        qat = jc.qat(unrolled, steps(FakeQuant(format=Float("mxfp4"), scale="learned")))
        with pytest.raises(jc.JaxcompError, match="layers"):
            qat.init(PARAMS, X)

    def test_learned_ranges_without_data(self):
        qat = jc.qat(scanned, RECIPES["w8a8 pact"])
        with pytest.raises(jc.JaxcompError, match="needs data to start from"):
            qat.init(PARAMS, jax.ShapeDtypeStruct(X.shape, X.dtype))

    def test_a_width_schedule_for_formats_without_a_width(self):
        qat = jc.qat(unrolled, RECIPES["nf4"], bits=lambda step: 4)
        with pytest.raises(jc.RecipeError, match="for Int weights"):
            qat.init(PARAMS, X)
        qat = jc.qat(unrolled, RECIPES["w2 learned"], bits=lambda step: 4)
        with pytest.raises(jc.RecipeError, match='scale="dynamic"'):
            qat.init(PARAMS, X)

    def test_the_input_of_a_look_up(self):
        apply, params = llama()
        qat = jc.qat(apply, steps(FakeQuant(activation=DYNAMIC, include=("*embed*",))))
        with pytest.raises(jc.RecipeError, match="is only looked up"):
            qat.init(params, TOKENS)

    def test_post_training_compression_of_learned_scales(self):
        with pytest.raises(jc.RecipeError, match=r"use rtn here, or jc\.qat"):
            jc.compress(unrolled, PARAMS, RECIPES["w2 learned"], [(X,)], progress=False)


class TestOddModels:
    def test_what_a_recipe_leaves_alone_keeps_its_own_derivative(self):
        @jax.custom_vjp
        def linear(x, w):
            return x @ w

        linear.defvjp(
            lambda x, w: (x @ w, (x, w)), lambda r, g: (jnp.zeros_like(r[0]), 10 * r[0].T @ g)
        )
        apply = lambda p, x: linear(x, p["w"]) @ p["head"]  # noqa: E731
        params = {"w": PARAMS["layers"][0], "head": PARAMS["head"]}
        qat = jc.qat(apply, steps(FakeQuant(format=Int(8), include=("head",))))
        state = qat.init(params, X)
        rounded = jc.materialize(qat.convert(params, state))
        expected = jax.grad(lambda p: apply(p, X).sum())(rounded)["w"]
        for f in (
            lambda p, x: qat.apply(p, state, x)[0],
            lambda p, x: jc.tap(apply, "head")(p, x)[0],
        ):
            got = jax.grad(lambda p, f=f: f(p, X).sum())(params)["w"]
            assert float(jnp.linalg.norm(got - expected) / jnp.linalg.norm(expected)) < 0.05
            assert float(jnp.abs(got).max()) > 10

    def test_codes_are_not_multiplied_where_the_weight_is_transposed_or_ragged(self):
        fast = FakeQuant(format=Int(8, full_range=False), activation=DYNAMIC, matmul="int8")
        tied = lambda p, x: jax.nn.relu(x @ p["w"]) @ p["w"].T  # noqa: E731
        with pytest.raises(jc.RecipeError, match="is used transposed"):
            jc.qat(tied, steps(fast)).init({"w": PARAMS["layers"][0]}, X)
        ragged = lambda p, x: jax.lax.ragged_dot(x, p["w"], jnp.array([2, 1], jnp.int32))  # noqa: E731
        params = {"w": PARAMS["layers"][:2]}
        with pytest.raises(jc.RecipeError, match="by a ragged_dot"):
            jc.qat(ragged, steps(fast)).init(params, X)
        with pytest.raises(jc.RecipeError, match="no static range each"):
            jc.qat(ragged, steps(FakeQuant(activation=STATIC))).init(params, X)

    def test_tokens_of_a_transposed_use_are_its_contracted_axis(self):
        def apply(p, x):
            y = (x @ p["w"]).T * jnp.array([1.0, 50.0, 3.0])
            return jnp.einsum("io,ob->ib", p["w"], y)

        params = {"w": PARAMS["head"]}
        recipe = steps(FakeQuant(format=Int(8, full_range=False), activation=DYNAMIC))
        qat = jc.qat(apply, recipe)
        state = qat.init(params, X)
        out, _ = qat.apply(params, state, X)
        dispatched = jc.dispatch(apply)(qat.convert(params, state), X)
        np.testing.assert_allclose(dispatched, out, rtol=1e-4, atol=1e-3)

    def test_a_weight_and_a_value_of_the_same_name_keep_ranges_of_their_own(self):
        apply = lambda p, x: checkpoint_name(x @ p["query"], "query") @ p["head"]  # noqa: E731
        params = {"query": 100 * PARAMS["layers"][0], "head": PARAMS["head"]}
        recipe = steps(
            FakeQuant(activation=STATIC, include=("query",)),
            FakeQuantValues(activation=STATIC, include=("query",)),
        )
        qat = jc.qat(apply, recipe)
        state = qat.init(params, X)
        assert set(state.ranges) == {"query", "value:query"}
        out, _ = qat.apply(params, state, X)
        dense = apply(params, X)
        assert float(jnp.linalg.norm(out - dense) / jnp.linalg.norm(dense)) < 0.05

    def test_percentiles_see_every_channel(self):
        x = jax.random.normal(jax.random.key(0), (2048, 64)).at[:, 1::2].mul(50.0)
        seen = InputQuantizer(STATIC, "percentile", 99.0).seen(x)
        np.testing.assert_allclose(seen["high"], jnp.quantile(jnp.abs(x), 0.99), rtol=0.05)

    def test_float64_models_have_float64_ranges(self):
        with x64():
            params = {"w": jnp.asarray(PARAMS["head"], jnp.float64)}
            x = jnp.asarray(X, jnp.float64)
            apply = lambda p, x: x @ p["w"]  # noqa: E731
            recipe = steps(FakeQuant(format=Int(8), activation=STATIC, observer="learned"))
            qat = jc.qat(apply, recipe)
            state = qat.init(params, x)
            assert state.learned["inputs"]["w"]["scale"].dtype == jnp.float64
            out, _ = qat.apply(params, state, x)
            dispatched = jc.dispatch(apply)(qat.convert(params, state), x)
            np.testing.assert_allclose(dispatched, out, rtol=1e-12, atol=1e-12)

    def test_a_range_that_no_data_reached(self):
        def apply(p, x, yes):
            return jax.lax.cond(yes, lambda x: x @ p["w"], lambda x: x @ p["v"], x)

        params = {"w": PARAMS["head"], "v": PARAMS["head"]}
        learned = steps(FakeQuant(activation=STATIC, observer="learned"))
        with pytest.raises(jc.JaxcompError, match="v: no data but zeros has reached its input"):
            jc.qat(apply, learned).init(params, X, jnp.array(True))
        qat = jc.qat(apply, steps(FakeQuant(format=Int(8), activation=STATIC)))
        state = qat.init(params, X, jnp.array(True))
        with pytest.raises(jc.JaxcompError, match="when convert is called"):
            qat.convert(params, state)
        negative = steps(
            FakeQuant(
                activation=Activation(granularity="tensor", dynamic=False, symmetric=False),
                observer="pact",
                include=("head",),
            )
        )
        with pytest.raises(jc.JaxcompError, match=r"asymmetric pact|pact clips at 0"):
            jc.qat(lambda p, x: x @ p["head"], negative).init(PARAMS, X)

    @pytest.mark.parametrize(
        ("step", "message"),
        [
            (FakeQuant(activation=STATIC, momentum=2.0), "momentum 2.0"),
            (
                FakeQuant(activation=STATIC, observer="percentile", percentile=150.0),
                "percentile 150",
            ),
            (FakeQuant(format=Int(4), clipping="percentile", percentile=0.0), "percentile 0"),
            (FakeQuant(activation=DYNAMIC, observer="percentile"), "about a static range"),
            (FakeQuant(format=Int(4), quantize_gradients=True), "quantize_gradients"),
            (FakeQuant(format=Int(4), scale="learned", clipping="mse"), "has no clipping"),
        ],
        ids=lambda v: v if isinstance(v, str) else "",
    )
    def test_options_that_would_do_nothing_or_harm(self, step, message):
        with pytest.raises(jc.RecipeError, match=message):
            jc.qat(scanned, steps(step)).init(PARAMS, X)

    def test_value_rules_are_checked_like_those_of_weights(self):
        apply = lambda p, x: checkpoint_name(x @ p["head"], "hidden")  # noqa: E731
        typo = FakeQuantValues(include=("hidden",), exclude=("hiden",))
        with pytest.raises(jc.JaxcompError, match=r"'hiden' matches no value.*hidden"):
            jc.qat(apply, steps(typo)).init(PARAMS, X)
        twice = steps(FakeQuantValues(include=("hidden",)), FakeQuantValues(include=("hid*",)))
        with pytest.raises(jc.RecipeError, match="2 steps quantize it"):
            jc.qat(apply, twice).init(PARAMS, X)
        learned = FakeQuantValues(include=("hidden",), observer="learned")
        with pytest.raises(jc.RecipeError, match="about a static range"):
            jc.qat(apply, steps(learned)).init(PARAMS, X)
