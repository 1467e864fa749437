"""First-order scores against true changes of the loss, and Michel's head importance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.errors import JaxcompError
from jaxcomp.pruning import (
    head_importance,
    mean_importance,
    normalize_layers,
    prune_units,
    taylor_scores,
    taylor_unit_scores,
)
from tests.helpers import x64


def removed(loss, w):
    """True change of the loss when each weight alone is set to zero."""
    return np.array([float(loss(w.at[i].set(0)) - loss(w)) for i in range(w.size)])


def test_signed_score_is_exact_on_a_linear_loss(rng):
    with x64():
        w, c = jnp.asarray(rng.normal(size=6)), jnp.asarray(rng.normal(size=6))

        def loss(w):
            return c @ w + 3.0

        scores = taylor_scores(w, jax.grad(loss)(w), "signed")
        np.testing.assert_allclose(scores, removed(loss, w), atol=1e-10)


def test_remainder_on_a_quadratic_is_half_w_squared_h(rng):
    with x64():
        w, x = jnp.asarray(rng.normal(size=6)), jnp.asarray(rng.normal(size=(9, 6)))
        h = x.T @ x

        def loss(w):
            return 0.5 * w @ h @ w + x[0] @ w

        rest = removed(loss, w) - np.asarray(taylor_scores(w, jax.grad(loss)(w), "signed"))
        np.testing.assert_allclose(rest, 0.5 * w**2 * jnp.diag(h), atol=1e-10)


def test_sums_over_a_rescalable_pair_are_invariant(rng):
    """w1 c, w2 / c leaves the function and the scores of both alone."""
    with x64():
        w1, w2, x = (jnp.asarray(rng.normal(size=s)) for s in ((4, 3), (3, 2), (7, 4)))

        def loss(w1, w2):
            return (jnp.maximum(x @ w1, 0) @ w2).var()

        def scores(w1, w2):
            g1, g2 = jax.grad(loss, (0, 1))(w1, w2)
            return [taylor_unit_scores([w1, w2], [g1, g2], [-1, 0], r) for r in ("abs", "square")]

        for a, b in zip(scores(w1, w2), scores(8 * w1, w2 / 8), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12)


def test_unit_scores_sum_before_the_magnitude(rng):
    w, g = rng.normal(size=(2, 5, 4))
    with x64():
        for reduction, expected in (
            ("signed", -(w * g).sum(0)),
            ("abs", np.abs((w * g).sum(0))),
            ("square", (w * g).sum(0) ** 2),
        ):
            got = taylor_unit_scores(jnp.asarray(w), jnp.asarray(g), -1, reduction)
            np.testing.assert_allclose(got, expected, rtol=1e-12)
            one = taylor_scores(jnp.asarray(w), jnp.asarray(g), reduction)
            single = {"signed": -w * g, "abs": np.abs(w * g), "square": (w * g) ** 2}[reduction]
            np.testing.assert_allclose(one, single, rtol=1e-12)


def attention(params, gates, x):
    """One layer of attention of one example (tokens, width): each head's output, and the sum."""
    q, k, v, o = params
    scores = jnp.einsum("td,hde,shd->hts", x, q, jnp.einsum("sd,hde->she", x, k))
    heads = jnp.einsum("hts,she->hte", jax.nn.softmax(scores), jnp.einsum("sd,hde->she", x, v))
    return heads, jnp.einsum("hte,hed,h->td", heads, o, gates)


@pytest.fixture
def model(rng):
    params = [rng.normal(size=(3, 4, 4)) for _ in range(4)]
    return [p / 2 for p in params], rng.normal(size=(5, 6, 4)), rng.normal(size=(5, 6, 4))


def example_loss(params):
    def loss(gates, example):
        x, y = example
        return ((attention(params, gates, x)[1] - y) ** 2).mean()

    return loss


def test_gate_gradient_is_the_sum_of_output_times_gradient(model):
    """sum att . dL/datt == dL/dxi, by finite differences of the gates."""
    with x64():
        params, x, y = jax.tree.map(jnp.asarray, model)
        o = params[3]
        heads, _ = attention(params, jnp.ones(3), x[0])

        def from_heads(heads):
            return ((jnp.einsum("hte,hed->td", heads, o) - y[0]) ** 2).mean()

        identity = (heads * jax.grad(from_heads)(heads)).sum((1, 2))
        loss, step = example_loss(params), 1e-6
        slope = []
        for h in range(3):
            shift = step * jnp.eye(3)[h]
            up, down = (loss(jnp.ones(3) + s, (x[0], y[0])) for s in (shift, -shift))
            slope.append(float(up - down) / (2 * step))
        np.testing.assert_allclose(identity, slope, atol=1e-8)
        one = head_importance(loss, jnp.ones(3), (x[:1], y[:1]), normalize=False)
        np.testing.assert_allclose(one, np.abs(identity), rtol=1e-10)


def test_head_importance_takes_magnitudes_per_example(model):
    with x64():
        params, x, y = jax.tree.map(jnp.asarray, model)
        loss = example_loss(params)
        single = jax.jit(jax.grad(loss))
        singles = [np.asarray(single(jnp.ones(3), pair)) for pair in zip(x, y, strict=True)]
        got = head_importance(loss, jnp.ones(3), (x, y), normalize=False)
        np.testing.assert_allclose(got, np.abs(singles).mean(0), rtol=1e-12)
        trap = np.abs(np.mean(singles, 0))
        assert (np.asarray(got) > trap * (1 + 1e-6)).any()
        weights = jnp.array([1.0, 1, 0, 0, 2])
        padded = head_importance(
            loss, jnp.ones(3), (x, y), normalize=False, example_weights=weights
        )
        np.testing.assert_allclose(padded, np.average(np.abs(singles), 0, weights), rtol=1e-12)
        parts = [
            head_importance(loss, jnp.ones(3), (x[s], y[s]), normalize=False)
            for s in (slice(0, 2), slice(2, 5))
        ]
        np.testing.assert_allclose(mean_importance(parts, [2, 3]), got, rtol=1e-12)


def test_a_head_of_zeros_scores_zero_and_twins_score_equal(model):
    params, x, y = model
    q, k, v, o = [p.copy() for p in params]
    v[0] = 0
    for p in (q, k, v, o):
        p[2] = p[1]
    with x64():
        loss = example_loss(jax.tree.map(jnp.asarray, [q, k, v, o]))
        got = np.asarray(head_importance(loss, jnp.ones(3), (jnp.asarray(x), jnp.asarray(y))))
    assert got[0] == 0 and got[1] == pytest.approx(got[2], rel=1e-12)
    assert np.linalg.norm(got) == pytest.approx(1, rel=1e-12)


def test_layers_are_normalised(rng):
    scores = np.abs(rng.normal(size=(3, 5)))
    scores[1] = 0
    got = np.asarray(normalize_layers(jnp.asarray(scores)))
    np.testing.assert_allclose(np.linalg.norm(got, axis=-1), [1, 0, 1], rtol=1e-5)


def test_units_are_selected_exactly_with_ties(rng):
    tree = {"a": np.round(rng.normal(size=(3, 6)), 1), "b": np.round(rng.normal(size=4), 1)}
    scores = jax.tree.map(jnp.asarray, tree)
    for fraction in (0.0, 0.3, 0.6, 0.8):
        kept = prune_units(scores, fraction)
        flat = np.concatenate([np.asarray(kept["a"]).ravel(), kept["b"]])
        assert (~flat).sum() == round(fraction * 22)
        assert np.asarray(kept["a"]).any(1).all() and np.asarray(kept["b"]).any()
        free = prune_units(scores, fraction, keep_one=False)
        values = np.concatenate([tree["a"].ravel(), tree["b"]]).astype(np.float32)
        expected = np.ones(22, bool)
        expected[np.argsort(values, kind="stable")[: round(fraction * 22)]] = False
        got = np.concatenate([np.asarray(free["a"]).ravel(), free["b"]])
        np.testing.assert_array_equal(got, expected)
    layer = prune_units(scores, 0.5, "layer")
    assert (~np.asarray(layer["a"])).sum(1).tolist() == [3, 3, 3]
    assert int((~layer["b"]).sum()) == 2


def test_wrong_use_is_refused():
    scores = jnp.ones((2, 3))
    with pytest.raises(JaxcompError, match="fewer than one in each layer"):
        prune_units(scores, 0.9)
    with pytest.raises(JaxcompError, match="fewer than one in each layer"):
        prune_units(scores, 1.0, "layer")
    with pytest.raises(JaxcompError, match="scope 'all'"):
        prune_units(scores, 0.5, "all")
    with pytest.raises(JaxcompError, match=r"write 50 % as 0\.5"):
        prune_units(scores, 50)
    with pytest.raises(JaxcompError, match="reduction 'max'"):
        taylor_scores(scores, scores, "max")
    with pytest.raises(JaxcompError, match="must agree"):
        taylor_scores(scores, scores.T)
    with pytest.raises(JaxcompError, match="scalar"):
        head_importance(lambda g, x: g * x, jnp.ones(3), jnp.ones((2, 3)))
