"""What each method of pruning in training does to weights and scores, against NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcomp.errors import JaxcompError
from jaxcomp.pruning import (
    SRSTE,
    GradualMagnitude,
    Movement,
    RigL,
    SoftMovement,
    Taylor,
    apply_mask,
    get_masks,
    latent_weights,
    layer_densities,
    soft_movement_penalty,
    wrap,
)
from tests.helpers import x64

LR = 0.1


def run(method, schedule, w, gradients, lr=LR, **options):
    """Steps of SGD with given gradients: the masked weights, masks and states after each."""
    tx = wrap(optax.sgd(lr), method, schedule, **options)
    params = {"w": jnp.asarray(w)}
    state, update = tx.init(params), jax.jit(tx.update)
    out = []
    for g in gradients:
        updates, state = update({"w": jnp.asarray(g)}, state, params)
        params = optax.apply_updates(params, updates)
        out.append((np.asarray(params["w"]), np.asarray(get_masks(state)["w"]), state))
    return out


def lowest(scores, k):
    keep = np.ones(scores.size, bool)
    keep[np.argsort(scores.ravel(), kind="stable")[:k]] = False
    return keep.reshape(scores.shape)


def nm(w, n, m):
    """Mask of the n largest of every m rows of a kernel (in, out)."""
    blocks = np.abs(w).T.reshape(w.shape[1], -1, m)
    keep = np.zeros(blocks.shape, bool)
    np.put_along_axis(keep, np.argsort(blocks, -1, kind="stable")[..., m - n :], True, -1)
    return keep.reshape(w.shape[1], -1).T


def test_srste_is_the_papers_update(rng):
    w, gradients = rng.normal(size=(8, 3)), rng.normal(size=(6, 8, 3))
    strength = 0.5
    with x64():
        got = run(SRSTE(strength=strength), None, w, gradients)
        dense, mask = w.copy(), np.ones(w.shape, bool)
        flips = 0
        for g, (params, masks, state) in zip(gradients, got, strict=True):
            dense = dense - LR * (g + strength * ~mask * dense)
            new = nm(dense, 2, 4)
            flips += (new & ~mask).sum()
            mask = new
            np.testing.assert_array_equal(masks, mask)
            np.testing.assert_allclose(params, mask * dense, rtol=1e-12)
            hidden = latent_weights(state, {"w": jnp.asarray(params)})["w"]
            np.testing.assert_allclose(hidden, dense, rtol=1e-12)
    assert flips > 0


def test_movement_keeps_what_moves_away_from_zero():
    """S = -sum lr w g: a weight that grows has a positive score, one that shrinks a negative."""
    w = np.array([[1.0, -1.0], [1.0, -1.0]])
    away = -np.sign(w) * np.array([[1.0, 1.0], [-1.0, -1.0]])  # the first row grows
    (_, mask, state), *_ = run(Movement(), 0.5, w, [away])
    np.testing.assert_allclose(state.method["w"], [[1, 1], [-1, -1]])
    np.testing.assert_array_equal(mask, [[True, True], [False, False]])


def test_movement_scores_and_returning_weights(rng):
    """Large weights with low scores go; a hidden weight is frozen, scored on, and returns."""
    w, gradients = rng.normal(size=(4, 6)), rng.normal(size=(8, 4, 6))
    rate = [0.3, 0.1]
    with x64():
        method = Movement(learning_rate=lambda t: jnp.where(t < 4, *rate))
        got = run(method, 0.5, w, gradients)
        dense, mask, scores = w.copy(), np.ones(w.shape, bool), np.zeros(w.shape)
        returned = 0
        for t, (g, (params, masks, _)) in enumerate(zip(gradients, got, strict=True)):
            scores -= rate[t >= 4] * dense * g
            dense = dense - LR * g * mask
            new = lowest(scores, 12)
            returned += (new & ~mask).sum()
            mask = new
            np.testing.assert_array_equal(masks, mask)
            np.testing.assert_allclose(params, mask * dense, rtol=1e-12)
    assert returned > 0


def test_soft_movement_thresholds_and_penalises(rng):
    w, gradients = rng.normal(size=(4, 6)), rng.normal(size=(6, 4, 6))
    tau, strength, rate = 0.4, 0.7, 0.5
    with x64():
        method = SoftMovement(threshold=tau, strength=strength, learning_rate=rate)
        got = run(method, None, w, gradients)
        dense, mask, scores = w.copy(), np.ones(w.shape, bool), np.zeros(w.shape)
        for g, (params, masks, state) in zip(gradients, got, strict=True):
            penalty = jax.grad(soft_movement_penalty)(jnp.asarray(scores), strength)
            scores = scores - rate * (dense * g + np.asarray(penalty))
            dense = dense - LR * g * mask
            mask = 1 / (1 + np.exp(-scores)) > tau
            np.testing.assert_array_equal(masks, mask)
            np.testing.assert_allclose(params, mask * dense, rtol=1e-12)
            np.testing.assert_allclose(state.method["w"], scores, rtol=1e-10)
        sigmoid = 1 / (1 + np.exp(-scores))
        penalty = float(soft_movement_penalty(jnp.asarray(scores), strength))
    assert penalty == pytest.approx(strength * sigmoid.sum(), rel=1e-12)
    assert 0 < mask.sum() < mask.size


@pytest.mark.parametrize(("axis", "reduction"), [(None, "abs"), (0, "square"), (0, "abs")])
def test_taylor_is_a_running_mean_and_masks_only_grow(rng, axis, reduction):
    w, gradients = rng.normal(size=(6, 4)), rng.normal(size=(5, 6, 4))
    with x64():
        method = Taylor(decay=0.7, reduction=reduction, axis=axis)
        got = run(method, lambda t: 0.1 * (t + 1.0), w, gradients)
        value, mask = w.copy(), np.ones(w.shape, bool)
        units = (6, 1) if axis == 0 else w.shape
        mean, kept = np.zeros(units), np.ones(units, bool)
        for t, (g, (params, masks, _)) in enumerate(zip(gradients, got, strict=True)):
            first = value * g
            if axis == 0:
                first = first.sum(1, keepdims=True)
            mean = 0.7 * mean + 0.3 * (np.abs(first) if reduction == "abs" else first**2)
            value = mask * (value - LR * g * mask)
            k = round(0.1 * (t + 1) * mean.size)
            kept = lowest(np.where(kept, mean, -np.inf), k) & kept
            mask = np.broadcast_to(kept, w.shape)
            value = value * mask
            np.testing.assert_array_equal(masks, mask)
            np.testing.assert_allclose(params, value, rtol=1e-12)


def test_rigl_exchanges_at_constant_counts_and_grown_weights_start_at_zero(rng):
    w, gradients = rng.normal(size=(10, 7)), rng.normal(size=(12, 10, 7))
    end = 10
    with x64():
        method = RigL(end=end, fraction=0.4)
        tx = wrap(optax.sgd(LR, 0.9), method, 0.6, every=2)
        params = {"w": jnp.asarray(w)}
        state = tx.init(params)
        params = apply_mask(params, get_masks(state))
        mask = np.asarray(get_masks(state)["w"])
        kept = 70 - round(0.6 * 70)
        assert mask.sum() == kept
        update, velocity, grown_ever = jax.jit(tx.update), np.zeros_like(w), 0
        for t, g in enumerate(gradients):
            value = np.asarray(params["w"])
            velocity = 0.9 * velocity + g * mask
            value = mask * (value - LR * velocity)
            new = mask
            if t % 2 == 0:
                fraction = 0.2 * (1 + math.cos(math.pi * t / end)) if t < end else 0
                k = round(fraction * kept)
                stay = lowest(np.where(mask, np.abs(value), -1), 70 - kept + k)
                grow = ~stay & lowest(np.where(stay, -1, np.abs(g)), 70 - k)
                new = stay | grow
                if k:
                    grown_ever += (new & ~mask).sum()
                velocity = velocity * new
            updates, state = update({"w": jnp.asarray(g)}, state, params)
            params = optax.apply_updates(params, updates)
            got = np.asarray(get_masks(state)["w"])
            np.testing.assert_array_equal(got, new)
            assert got.sum() == kept
            assert (np.asarray(params["w"])[new & ~mask] == 0).all()
            np.testing.assert_allclose(params["w"], value * new, rtol=1e-12)
            np.testing.assert_allclose(state.inner[0].trace["w"], velocity, rtol=1e-12)
            mask = new
        assert grown_ever > 5


def test_rigl_counts_hold_under_ties_and_on_stacks():
    w = jnp.ones((3, 8, 5))
    tx = wrap(optax.sgd(0.0), RigL(end=100, fraction=0.5), 0.7, stack=1)
    params, update = {"w": w}, jax.jit(tx.update)
    state = tx.init(params)
    masks = [np.asarray(get_masks(state)["w"])]
    for _ in range(3):
        _, state = update(jax.tree.map(jnp.zeros_like, params), state, params)
        masks.append(np.asarray(get_masks(state)["w"]))
    assert all((m.sum((1, 2)) == 12).all() for m in masks)
    assert not (masks[0][0] == masks[0][1]).all()


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.8, 0.95])
def test_layer_densities(sparsity):
    shapes = [(3, 3, 4, 16), (64, 32), (8, 8), (256, 10)]
    counts = [1, 4, 2, 1]
    sizes = np.array([c * math.prod(s) for c, s in zip(counts, shapes, strict=True)])
    for kind in ("erk", "uniform"):
        density = np.array(layer_densities(shapes, sparsity, kind, counts))
        assert (density * sizes).sum() == pytest.approx((1 - sparsity) * sizes.sum())
        assert (density <= 1).all()
    erk = np.array(layer_densities(shapes, sparsity, "erk", counts))
    raw = np.array([sum(s) / math.prod(s) for s in shapes])
    partly = erk < 1
    factors = (erk / raw)[partly]
    np.testing.assert_allclose(factors, np.full(partly.sum(), factors[:1].sum()), rtol=1e-12)
    # Nothing is dense that the common factor would not have filled.
    assert not partly.any() or (raw[~partly] * factors[0] >= 1).all()
    with pytest.raises(JaxcompError, match="'erk' or 'uniform'"):
        layer_densities(shapes, 0.5, "er")


def test_gradual_magnitude_gives_the_optimizer_no_gradient_of_dropped_weights(rng):
    """The norm that clipping sees is the kept weights'."""
    w, g = rng.normal(size=(4, 4)), rng.normal(size=(4, 4))
    tx = wrap(optax.chain(optax.clip_by_global_norm(1e-3), optax.sgd(1.0)), GradualMagnitude(), 0.5)
    with x64():
        params = {"w": jnp.asarray(w)}
        update = jax.jit(tx.update)
        _, state = update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
        params = apply_mask(params, get_masks(state))
        mask = np.asarray(get_masks(state)["w"])
        updates, _ = update({"w": jnp.asarray(g)}, state, params)
        expected = -1e-3 * g * mask / np.linalg.norm(g * mask)
        np.testing.assert_allclose(np.asarray(updates["w"])[mask], expected[mask], rtol=1e-12)
