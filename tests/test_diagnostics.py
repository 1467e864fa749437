"""Where NaN comes from: the step, the parameter or the matmul, the iteration of a loop."""

import jax
import jax.numpy as jnp
import pytest

import jaxcomp as jc
from jaxcomp.diagnostics import NonFinite, check_finite, find_nonfinite

PARAMS = {"layers": jnp.stack([jnp.eye(4)] * 3), "head": jnp.ones((4, 2))}
X = jnp.ones((2, 4))


def apply(params, x):
    def body(h, w):
        h = h @ w
        return jnp.where(h > 3.5, jnp.inf, h * 2), None

    return jax.lax.scan(body, x, params["layers"])[0] @ params["head"]


def test_a_finite_model_has_no_place_to_name():
    assert find_nonfinite(apply, PARAMS, X * 0.1) == []
    check_finite(1.0, 3, apply, PARAMS, X * 0.1)


def test_the_first_place_is_named_with_the_iteration_of_its_loop():
    # 1, 2, 4: the third matmul's result is still 4, what follows it is infinite.
    found = find_nonfinite(apply, PARAMS, X)
    assert found == [NonFinite("input", "head"), NonFinite("result", "head")]
    found = find_nonfinite(apply, PARAMS, 2 * X)
    assert found[0] == NonFinite("input", "layers", (2,))
    with pytest.raises(
        jc.JaxcompError, match=r"loss is nan at step 7.*input of layers, iteration 2"
    ):
        check_finite(float("nan"), 7, apply, PARAMS, 2 * X)


def test_a_broken_parameter_comes_before_what_it_breaks():
    params = PARAMS | {"head": PARAMS["head"].at[0, 0].set(jnp.nan)}
    with pytest.raises(jc.JaxcompError, match="parameter head is no longer finite"):
        check_finite(jnp.inf, 1, apply, params, X * 0.1)


def test_a_loss_that_breaks_by_itself_is_said_to():
    with pytest.raises(jc.JaxcompError, match="look at the loss itself"):
        check_finite(jnp.nan, 1, apply, PARAMS, X * 0.1)


def test_in_a_loop_an_earlier_iteration_comes_first():
    def two(params, x):
        return jax.lax.scan(lambda x, w: (x @ w["a"] @ w["b"], None), x, params)[0]

    params = {"a": jnp.full((3, 2, 2), 1e10), "b": jnp.full((3, 2, 2), 1e10).at[0].set(1e30)}
    found = find_nonfinite(two, params, jnp.ones((1, 2)))
    assert found[:2] == [NonFinite("result", "b", (0,)), NonFinite("input", "a", (1,))]
