"""Cases in which other libraries are wrong or fail, silently or late: here each must be right.

Process-wide interception of matmuls is defeated by JAX's own cache of jitted helpers (``x @ w`` is
one); tracer types fall back silently under remat and sharding. A jaxpr knows better.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxcomp as jc
from jaxcomp.formats import CompressedArray, Int
from jaxcomp.quantization import RTN
from jaxcomp.recipe import Recipe


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def recipe(fmt=None, **rules):
    return Recipe(steps=(RTN(format=fmt or Int(4), **rules),))


def error(apply, params, compressed, x):
    return float(jnp.abs(apply(params, x) - jc.dispatch(apply)(compressed, x)).max())


@pytest.mark.parametrize("outer", [lambda f: f, jax.jit])
@pytest.mark.parametrize("kind", ["plain", "nnx", "linen"])
def test_traced_in_full_precision_first(kind, outer):
    """A model that ran dense before is compressed all the same."""
    apply, params = _at_model(kind)
    x = normal(4, 16)
    dense = outer(apply)(params, x)
    compressed = jc.compress(apply, params, recipe(), [(x,)]).params
    fast = outer(jc.dispatch(apply))
    assert float(jnp.abs(dense - fast(compressed, x)).max()) > 1e-3
    np.testing.assert_allclose(
        fast(compressed, x), apply(jc.materialize(compressed), x), rtol=1e-5, atol=1e-5
    )


def _at_model(kind):
    """A model that multiplies by ``@``, as a function, an NNX module and a Linen module."""
    w = normal(16, 8)
    if kind == "plain":
        return (lambda p, x: x @ p["w"]), {"w": w}
    if kind == "nnx":

        class Model(nnx.Module):
            def __init__(self):
                self.w = nnx.Param(w)

            def __call__(self, x):
                return x @ self.w[...]

        return jc.functional(Model())

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x @ self.param("w", lambda key: w)

    module = Linen()
    return jc.functional((module, module.init(jax.random.key(0), normal(4, 16))))


def test_nothing_leaks_into_code_outside_the_model():
    x, w = normal(4, 16), normal(16, 8)
    expected = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    apply, params = _at_model("plain")
    compressed = jc.compress(apply, params, recipe(), [(x,)]).params
    jax.jit(jc.dispatch(apply))(compressed, x)
    np.testing.assert_allclose(x @ w, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(jax.jit(lambda x, w: x @ w)(x, w), expected, rtol=1e-5, atol=1e-5)


helper = jax.jit(lambda x, w: x @ w)


@pytest.mark.parametrize("multiply", [lambda x, w: x @ w, helper])
def test_two_layers_of_one_shape_under_two_rules(multiply):
    def apply(p, x):
        return multiply(multiply(multiply(x, p["a"]), p["b"]), p["c"])

    params = {k: normal(16, 16, seed=i) for i, k in enumerate("abc")}
    x = normal(4, 16)
    both = Recipe(steps=(RTN(format=Int(4), include=("a",)), RTN(format=Int(8), include=("b",))))
    compressed = jc.compress(apply, params, both, [(x,)]).params
    assert [compressed[k].parts[0].bits for k in "ab"] == [4, 8]
    assert compressed["c"] is params["c"]
    expected = apply(jc.materialize(compressed), x)
    np.testing.assert_allclose(jc.dispatch(apply)(compressed, x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("fmt", [Int(4, group_size=8), Int(8)])
def test_linen_scan(fmt, remat):
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return jnp.tanh(nn.Dense(16)(x)), None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            block = nn.remat(Block) if remat else Block
            stack = nn.scan(
                block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
            )
            return stack()(x, None)[0]

    module, x = Model(), normal(4, 16)
    apply, params = jc.functional((module, module.init(jax.random.key(0), x)))
    compressed = jc.compress(apply, params, recipe(fmt), [(x,)]).params
    leaves = jax.tree.leaves(compressed, is_leaf=lambda v: isinstance(v, CompressedArray))
    (kernel,) = [v for v in leaves if isinstance(v, CompressedArray)]
    assert kernel.shape == (3, 16, 16)
    dense = jc.materialize(compressed)
    expected = apply(dense, x)
    np.testing.assert_allclose(jc.dispatch(apply)(compressed, x), expected, rtol=1e-5, atol=1e-5)
    got = jax.grad(lambda x: jc.dispatch(apply)(compressed, x).sum())(x)
    expected = jax.grad(lambda x: apply(dense, x).sum())(x)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_scaled_weight_is_an_error_that_names_it():
    params = {"w": normal(16, 8), "s": normal(8)}
    apply = lambda p, x: x @ (p["w"] * p["s"])  # noqa: E731
    with pytest.raises(jc.RecipeError, match=r"w \(16, 8\): reached through 'mul'.*exclude"):
        jc.compress(apply, params, recipe(include=("w",)), [(normal(4, 16),)])


def test_weight_only_convolution():
    def apply(p, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, p["w"], (1, 1), "SAME", dimension_numbers=numbers)

    params, x = {"w": normal(3, 3, 4, 8)}, normal(2, 5, 5, 4)
    compressed = jc.compress(apply, params, recipe(Int(4, group_size=12)), [(x,)]).params
    assert 0 < error(apply, params, compressed, x) < 3
    dense = jc.materialize(compressed)
    np.testing.assert_allclose(
        jc.dispatch(apply)(compressed, x), apply(dense, x), rtol=1e-5, atol=1e-5
    )


def test_output_projection_with_groups_over_several_heads():
    """The contraction runs over (heads, head_dim); a group may be longer than a head."""
    module = nn.MultiHeadDotProductAttention(num_heads=4, qkv_features=32)
    x = normal(2, 5, 32)
    apply, params = jc.functional((module, module.init(jax.random.key(0), x)))
    compressed = jc.compress(apply, params, recipe(Int(4, group_size=32)), [(x,)]).params
    assert compressed["out"]["kernel"].parts[0].group_size == 32 > 32 // 4
    assert compressed["query"]["kernel"].shape == (32, 4, 8)
    np.testing.assert_allclose(
        jc.dispatch(apply)(compressed, x),
        apply(jc.materialize(compressed), x),
        rtol=1e-4,
        atol=1e-5,
    )


def test_a_rule_that_matches_nothing():
    apply, params = _at_model("plain")
    with pytest.raises(jc.RecipeError, match="kernel"):
        jc.compress(apply, params, recipe(include=("*kernel*",)), [(normal(4, 16),)])


def test_unsigned_asymmetric_groups_are_close():
    """Minima and maxima with a zero point: the error stays below half a step everywhere."""
    apply, params = _at_model("plain")
    fmt = Int(4, group_size=8, symmetric=False)
    compressed = jc.compress(apply, params, recipe(fmt), [(normal(4, 16),)]).params
    w = np.asarray(params["w"]).T.reshape(8, 2, 8)
    got = np.asarray(jc.materialize(compressed)["w"]).T.reshape(8, 2, 8)
    step = (np.maximum(w.max(-1), 0) - np.minimum(w.min(-1), 0)) / 15
    assert (np.abs(w - got).max(-1) <= 0.501 * step).all()


@pytest.mark.parametrize("bits, packed", [(2, 1 / 4), (3, 3 / 8), (4, 1 / 2)])
def test_low_bits_are_stored_at_their_width(bits, packed):
    apply = lambda p, x: x @ p["w"]  # noqa: E731
    params = {"w": normal(64, 32)}
    compressed = jc.compress(apply, params, recipe(Int(bits)), [(normal(4, 64),)]).params
    assert compressed["w"].parts[0].values.nbytes == int(64 * 32 * packed)


@pytest.mark.parametrize("wrap", [jax.checkpoint, lambda f: f])
def test_cast_and_checkpoint_are_not_silently_dense(wrap):
    def apply(p, x):
        def body(c, w):
            return jnp.tanh(c @ w.astype(jnp.bfloat16)).astype(jnp.float32), None

        return jax.lax.scan(wrap(body), x, p["w"])[0]

    params, x = {"w": normal(3, 16, 16)}, normal(4, 16)
    compressed = jc.compress(apply, params, recipe(), [(x,)]).params
    assert isinstance(compressed["w"], CompressedArray)
    choices = jc.dispatch(apply).report(compressed, x)
    assert [c.kind for c in choices] == ["dot_general"]
    np.testing.assert_allclose(
        jc.dispatch(apply)(compressed, x), apply(jc.materialize(compressed), x), atol=0.03
    )


def test_custom_vjp_around_a_matmul():
    @jax.custom_vjp
    def multiply(x, w):
        return x @ w

    multiply.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))
    apply = lambda p, x: multiply(x, p["w"])  # noqa: E731
    params, x = {"w": normal(16, 8)}, normal(4, 16)
    compressed = jc.compress(apply, params, recipe(), [(x,)]).params
    assert error(apply, params, compressed, x) > 1e-3
    got = jax.grad(lambda x: jc.dispatch(apply)(compressed, x).sum())(x)
    expected = jnp.ones((4, 8)) @ jc.materialize(compressed)["w"].T
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_nnx_scanned_layers_with_remat():
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(16, 16, rngs=rngs)

        def __call__(self, x):
            return jnp.tanh(self.linear(x))

    class Model(nnx.Module):
        def __init__(self, rngs):
            @nnx.split_rngs(splits=3)
            @nnx.vmap
            def make(rngs):
                return Block(rngs)

            self.blocks = make(rngs)

        def __call__(self, x):
            @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
            @nnx.remat
            def forward(block, x):
                return block(x)

            return forward(self.blocks, x)

    apply, params = jc.functional(Model(nnx.Rngs(0)))
    x = normal(4, 16)
    compressed = jc.compress(apply, params, recipe(Int(4, group_size=8)), [(x,)]).params
    (choice,) = jc.dispatch(apply).report(compressed, x)
    assert choice.path == "blocks/linear/kernel"
    np.testing.assert_allclose(
        jc.dispatch(apply)(compressed, x),
        apply(jc.materialize(compressed), x),
        rtol=1e-5,
        atol=1e-5,
    )
