"""Values from inside a model: from matmuls and from names, under every transform of JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

import jaxcomp as jc
from jaxcomp import models

PARAMS = {
    "layers": jax.random.normal(jax.random.key(0), (3, 4, 4)),
    "head": jax.random.normal(jax.random.key(1), (4, 2)),
}
X = jax.random.normal(jax.random.key(2), (5, 4))


def block(h, w):
    return checkpoint_name(jnp.tanh(h @ w), "hidden")


def unrolled(params, x):
    for i in range(3):
        x = block(x, params["layers"][i])
    return x @ params["head"]


def scanned(params, x, wrap=lambda f: f):
    step = wrap(lambda h, w: (block(h, w), None))
    return jax.lax.scan(step, x, params["layers"])[0] @ params["head"]


def by_hand():
    values, x = [], np.asarray(X)
    for w in np.asarray(PARAMS["layers"]):
        x = np.tanh(x @ w)
        values.append(x)
    return np.stack(values)


@pytest.mark.parametrize(
    "apply",
    [
        unrolled,
        scanned,
        lambda p, x: scanned(p, x, jax.checkpoint),
        jax.jit(scanned),
        jax.checkpoint(unrolled),
        lambda p, x: jax.vmap(lambda row: scanned(p, row))(x),
    ],
    ids=["unrolled", "scan", "remat", "jit", "remat around", "vmap"],
)
def test_a_named_value_is_the_same_however_the_layers_are_run(apply):
    out, taps = jc.tap(apply, ["hidden"])(PARAMS, X)
    np.testing.assert_allclose(out, apply(PARAMS, X), rtol=1e-6)
    value = taps["hidden"]
    if value.shape == (5, 3, 4):  # vmap puts its axis where the result has it
        value = value.swapaxes(0, 1)
    np.testing.assert_allclose(value, by_hand(), rtol=1e-5, atol=1e-6)


def test_results_and_inputs_of_a_matmul_by_the_path_of_its_weight():
    out, taps = jc.tap(scanned, ["layers", "layers:input", "head*"])(PARAMS, X)
    assert set(taps) == {"layers", "layers:input", "head"}
    hidden = by_hand()
    np.testing.assert_allclose(np.tanh(taps["layers"]), hidden, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(taps["layers:input"][0], X)
    np.testing.assert_allclose(taps["layers:input"][1:], hidden[:2], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(taps["head"], out)


def test_gradients_flow_through_taps():
    def of_tap(params):
        return (jc.tap(scanned, ["hidden"])(params, X)[1]["hidden"] ** 2).sum()

    def direct(params):
        h, total = X, 0.0
        for i in range(3):
            h = jnp.tanh(h @ params["layers"][i])
            total += (h**2).sum()
        return total

    expected, got = jax.grad(direct)(PARAMS), jax.jit(jax.grad(of_tap))(PARAMS)
    np.testing.assert_allclose(got["layers"], expected["layers"], rtol=1e-5, atol=1e-5)


def test_a_value_inside_a_custom_derivative_is_left_to_it():
    @jax.custom_jvp
    def odd(x):
        return checkpoint_name(x, "inner") * 2

    odd.defjvp(lambda primals, tangents: (odd(*primals), 7.0 * tangents[0]))
    apply = lambda p, x: checkpoint_name(odd(x @ p["head"]), "outer")  # noqa: E731
    tapped = jc.tap(apply, ["outer"])
    gradient = jax.grad(lambda p: tapped(p, X)[1]["outer"].sum())(PARAMS)["head"]
    np.testing.assert_allclose(gradient, 7.0 * X.sum(0)[:, None].repeat(2, 1), rtol=1e-5)
    with pytest.raises(jc.JaxcompError, match="'inner' matches no value"):
        jc.tap(apply, ["inner"])(PARAMS, X)


def test_a_value_beside_a_weight_inside_a_custom_derivative_is_no_value_either():
    @jax.custom_jvp
    def linear(x, w):
        return checkpoint_name(x @ w, "inner")

    linear.defjvp(lambda primals, tangents: (linear(*primals), tangents[0] @ primals[1]))
    apply = lambda p, x: linear(x, p["head"])  # noqa: E731
    recipe = jc.Recipe(steps=(jc.quantization.FakeQuantValues(include=("inner",)),))
    for use in (
        lambda: jc.tap(apply, ["inner"])(PARAMS, X),
        lambda: jc.qat(apply, recipe).init(PARAMS, X),
    ):
        with pytest.raises(jc.JaxcompError, match="'inner' matches no value"):
            use()


def test_a_branch_that_is_not_taken_gives_zeros_and_a_loop_its_last_value():
    def apply(p, x, yes):
        h = jax.lax.cond(yes, lambda x: checkpoint_name(x + 1, "branch"), lambda x: x, x)
        more = lambda loop: loop[0] < 3  # noqa: E731
        double = lambda loop: (loop[0] + 1, checkpoint_name(2 * loop[1], "loop"))  # noqa: E731
        _, h = jax.lax.while_loop(more, double, (0, h))
        return h @ p["head"]

    tapped = jax.jit(jc.tap(apply, ["branch", "loop"]))
    for yes in (True, False):
        _, taps = tapped(PARAMS, X, jnp.asarray(yes))
        np.testing.assert_allclose(taps["branch"], (X + 1) * yes, rtol=1e-6)
        np.testing.assert_allclose(taps["loop"], 8 * (X + yes), rtol=1e-6)


def test_compressed_weights_are_run_by_their_kernels():
    recipe = jc.presets.w8a8_dynamic(include=("head",))
    compressed = jc.compress(unrolled, PARAMS, recipe, [(X,)], progress=False).params
    out, taps = jc.tap(unrolled, ["head"])(compressed, X)
    np.testing.assert_array_equal(out, jc.dispatch(unrolled)(compressed, X))
    np.testing.assert_array_equal(taps["head"], out)


def test_unlike_values_of_one_name_come_as_a_tuple():
    def apply(p, x):
        return checkpoint_name(checkpoint_name(x, "v") @ p["head"], "v")

    _, taps = jc.tap(apply, "v")(PARAMS, X)
    assert [v.shape for v in taps["v"]] == [(5, 4), (5, 2)]


def test_a_name_that_matches_nothing_lists_close_ones():
    with pytest.raises(jc.JaxcompError, match=r"'hiden' matches no value.*closest are hidden"):
        jc.tap(unrolled, ["hiden"])(PARAMS, X)
    with pytest.raises(jc.JaxcompError, match=r"heads:input.*head:input"):
        jc.tap(unrolled, ["heads:input"])(PARAMS, X)


@pytest.mark.parametrize("scan", [False, True])
def test_the_reference_models_name_their_states(scan):
    config = models.llama.LlamaConfig(16, 8, 12, 2, 2, 1, head_dim=4)
    apply, params = jc.functional(models.llama.Llama(config, scan=scan, rngs=nnx.Rngs(0)))
    tokens = jnp.arange(6, dtype=jnp.int32)[None]
    _, taps = jc.tap(apply, ["hidden", "query", "key", "value"])(params, tokens)
    shapes = {name: value.shape for name, value in taps.items()}
    assert shapes == {
        "hidden": (2, 1, 6, 8),
        "query": (2, 1, 6, 2, 4),
        "key": (2, 1, 6, 1, 4),
        "value": (2, 1, 6, 1, 4),
    }
