"""Relations against float64 NumPy loops, and what they must not depend on."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from jaxcomp.distillation import (
    attention_kl,
    fsp_loss,
    fsp_matrix,
    minilm_loss,
    minilmv2_loss,
    projection,
    relation,
    rkd_angle_loss,
    rkd_distance_loss,
)
from jaxcomp.errors import JaxcompError
from tests.helpers import x64

RKD = [rkd_distance_loss, rkd_angle_loss]


def rotation(rng, n):
    return np.linalg.qr(rng.normal(size=(n, n)))[0]


# FSP.


def test_flow_matrix_is_the_mean_product_and_ignores_the_order_of_positions(rng):
    a, b = rng.normal(size=(2, 5, 3)), rng.normal(size=(2, 5, 4))
    want = np.stack([x.T @ y / 5 for x, y in zip(a, b, strict=True)])
    order = rng.permutation(5)
    with x64():
        run = jax.jit(fsp_matrix)
        np.testing.assert_allclose(run(a, b), want, rtol=1e-12)
        np.testing.assert_allclose(run(a[:, order], b[:, order]), want, rtol=1e-12)
        where = np.array([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0]], bool)
        got = run(np.where(where[..., None], a, np.nan), b, where)
        keep = where[0]
        np.testing.assert_allclose(got[0], a[0, keep].T @ b[0, keep] / 3, rtol=1e-12)
        np.testing.assert_array_equal(got[1], 0)


def test_the_larger_grid_is_pooled_by_its_maximum(rng):
    a, b = rng.normal(size=(2, 4, 6, 3)), rng.normal(size=(2, 2, 3, 4))
    pooled = a.reshape(2, 2, 2, 3, 2, 3).max((2, 4))
    want = np.einsum("bhwi,bhwj->bij", pooled, b) / 6
    with x64():
        run = jax.jit(fsp_matrix, static_argnames="spatial_axes")
        np.testing.assert_allclose(run(a, b, spatial_axes=2), want, rtol=1e-12)
        got = run(b, a, spatial_axes=2)
        np.testing.assert_allclose(got, want.transpose(0, 2, 1), rtol=1e-12)
        where = np.zeros((2, 4, 6), bool)
        where[0, :2, :2] = True
        where[0, 0, 0] = False
        got = run(a, b, where, spatial_axes=2)
        top = np.maximum(np.maximum(a[0, 0, 1], a[0, 1, 0]), a[0, 1, 1])
        np.testing.assert_allclose(got[0], np.outer(top, b[0, 0, 0]), rtol=1e-12)
        np.testing.assert_array_equal(got[1], 0)
        gradient = jax.jit(jax.grad(lambda a: fsp_matrix(a, b, where, 2).sum()))(a)
    assert np.isfinite(gradient).all() and np.all(np.asarray(gradient)[~where] == 0)


def test_flow_loss(rng):
    s = [jnp.float32(rng.normal(size=(2, 6, c))) for c in (3, 4)]
    t = [jnp.float32(rng.normal(size=(2, 8, c))) for c in (3, 4)]
    flows = [np.einsum("bpi,bpj->bij", *map(np.float64, x)) / x[0].shape[1] for x in (s, t)]
    want = ((flows[0] - flows[1]) ** 2).sum((1, 2))
    run = jax.jit(fsp_loss)
    np.testing.assert_allclose(run(tuple(s), tuple(t)), want, rtol=1e-5)
    np.testing.assert_allclose(run(tuple(s), tuple(s)), 0, atol=1e-12)
    gradient = jax.jit(jax.grad(lambda s, t: fsp_loss(s, t).sum(), argnums=(0, 1)))
    ours, theirs = gradient(tuple(s), tuple(t))
    assert np.any(ours[0] != 0) and all(np.all(g == 0) for g in theirs)
    narrow = (s[0][..., :2], s[1])
    with pytest.raises(JaxcompError, match="channels differ, pass projections"):
        fsp_loss(narrow, tuple(t))
    params = projection.init(jax.random.key(0), 2, 3)
    assert fsp_loss(narrow, tuple(t), projections=(params, None)).shape == (2,)


def test_flow_refuses_what_does_not_fit():
    with pytest.raises(JaxcompError, match=r"grid \(4,\) does not divide \(6,\)"):
        fsp_matrix(jnp.ones((2, 6, 3)), jnp.ones((2, 4, 3)))
    with pytest.raises(JaxcompError, match="same examples"):
        fsp_matrix(jnp.ones((2, 6, 3)), jnp.ones((3, 6, 3)))
    with pytest.raises(JaxcompError, match="with 2 axes"):
        fsp_matrix(jnp.ones((6, 3)), jnp.ones((6, 3)), spatial_axes=2)


# RKD.


def rkd_reference(loss, s, t):
    """Loops over distinct pairs and triples."""

    def huber(d):
        return 0.5 * d * d if abs(d) < 1 else abs(d) - 0.5

    n, psi = len(s), []
    for x in (s, t):
        if loss is rkd_distance_loss:
            d = {p: np.linalg.norm(x[p[0]] - x[p[1]]) for p in itertools.permutations(range(n), 2)}
            mean = np.mean(list(d.values()))
            psi.append({p: v / mean for p, v in d.items()})
        else:
            angles = {}
            for i, j, k in itertools.permutations(range(n), 3):
                a, b = x[i] - x[j], x[k] - x[j]
                angles[i, j, k] = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
            psi.append(angles)
    return np.mean([huber(psi[1][p] - psi[0][p]) for p in psi[0]])


@pytest.mark.parametrize("loss", RKD, ids=lambda f: f.__name__)
def test_rkd(rng, loss):
    s, t = rng.normal(size=(6, 3)), rng.normal(size=(6, 5)) ** 3
    where = np.array([1, 0, 1, 1, 1, 1], bool)
    with x64():
        run = jax.jit(loss)
        full = np.ones(6, bool)
        want = rkd_reference(loss, s, t)
        np.testing.assert_allclose(run(s, t, full), want, rtol=1e-12)
        moved = 3 * s @ rotation(rng, 3) + rng.normal(size=3)
        np.testing.assert_allclose(run(moved, t, full), want, rtol=1e-12)
        bad = np.where(where[:, None], s, np.nan)
        got = run(bad, t, where)
        np.testing.assert_allclose(got, rkd_reference(loss, s[where], t[where]), rtol=1e-12)
        gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
        ours, theirs = gradient(jnp.asarray(s), jnp.asarray(t), full)
        directions = 1e-6 * jnp.eye(18).reshape(18, 6, 3)
        slopes = jax.jit(jax.vmap(lambda h: (loss(s + h, t, full) - loss(s - h, t, full)) / 2e-6))(
            directions
        )
        np.testing.assert_allclose(ours.ravel(), slopes, atol=1e-8)
        np.testing.assert_array_equal(theirs, 0)
        for points in (np.zeros((6, 3)), bad):  # all the same; one not there
            ours, _ = gradient(jnp.asarray(points), jnp.asarray(t), where)
            assert np.isfinite(ours).all()
        assert run(s, t, np.arange(6) == 0) == 0
    with pytest.raises(JaxcompError, match="same examples"):
        loss(jnp.ones((4, 3)), jnp.ones((5, 3)))


# MiniLM.


def relation_reference(x, heads):
    n, width = x.shape
    parts = x.reshape(n, heads, width // heads).transpose(1, 0, 2)
    return log_softmax(parts @ parts.transpose(0, 2, 1) / np.sqrt(width // heads), -1)


def kl(log_t, log_s):
    return (np.exp(log_t) * (log_t - log_s)).sum(-1).mean()


def test_relations_do_not_depend_on_rotation_or_width(rng):
    x = rng.normal(size=(5, 12))
    blocks = np.zeros((12, 12))
    for h in range(3):
        blocks[4 * h : 4 * h + 4, 4 * h : 4 * h + 4] = rotation(rng, 4)
    with x64():
        run = jax.jit(relation, static_argnums=1)
        got = run(x, 3)
        np.testing.assert_allclose(got, relation_reference(x, 3), rtol=1e-10)
        np.testing.assert_allclose(run(x @ blocks, 3), got, rtol=1e-10)
        np.testing.assert_allclose(jnp.exp(got).sum(-1), 1, rtol=1e-12)
        assert run(rng.normal(size=(5, 30)), 3).shape == got.shape == (3, 5, 5)
        assert not np.allclose(run(x @ rotation(rng, 12), 3), got)


def test_minilm_is_the_sum_of_both_divergences(rng):
    ss, ts = rng.normal(size=(2, 2, 3, 5, 5))
    sv, tv = rng.normal(size=(2, 5, 6)), rng.normal(size=(2, 5, 12))
    want = [
        kl(log_softmax(ts[b], -1), log_softmax(ss[b], -1))
        + kl(relation_reference(tv[b], 3), relation_reference(sv[b], 3))
        for b in range(2)
    ]
    with x64():
        run = jax.jit(minilm_loss)
        np.testing.assert_allclose(run(ss, ts, sv, tv), want, rtol=1e-11)
        logs = log_softmax(ss, -1)  # probabilities do as well as scores
        np.testing.assert_allclose(run(logs, ts, sv, tv), want, rtol=1e-11)
        np.testing.assert_allclose(run(ss, ss, sv, sv), 0, atol=1e-14)
        got = jax.jit(lambda *a: minilm_loss(*a, value_heads=2) - attention_kl(*a[:2]))(
            ss, ts, sv, tv
        )
        want = [kl(relation_reference(tv[b], 2), relation_reference(sv[b], 2)) for b in range(2)]
        np.testing.assert_allclose(got, want, rtol=1e-10)


def parts(rng, *shape):
    return {name: rng.normal(size=shape) for name in ("query", "key", "value")}


def test_minilmv2_with_other_widths_and_heads(rng):
    s, t = parts(rng, 2, 5, 8), parts(rng, 2, 5, 12)
    terms = {
        name: np.array(
            [
                kl(relation_reference(t[name][b], 4), relation_reference(s[name][b], 4))
                for b in range(2)
            ]
        )
        for name in s
    }
    with x64():
        run = jax.jit(minilmv2_loss, static_argnums=2)
        np.testing.assert_allclose(run(s, t, 4), sum(terms.values()), rtol=1e-11)
        got = run(s, t, 4, weights=(0.5, 0.0, 2.0))
        np.testing.assert_allclose(got, 0.5 * terms["query"] + 2 * terms["value"], rtol=1e-11)
        gradient = jax.grad(lambda s, t: minilmv2_loss(s, t, 4).sum(), argnums=(0, 1))
        ours, theirs = jax.jit(gradient)(s, t)
    assert all(np.any(np.asarray(g) != 0) for g in ours.values())
    assert all(np.all(np.asarray(g) == 0) for g in theirs.values())


def test_padding_equals_a_shorter_sequence(rng):
    s, t = parts(rng, 2, 5, 8), parts(rng, 2, 5, 12)
    ss, ts = rng.normal(size=(2, 2, 2, 5, 5))
    where = np.zeros((2, 5), bool)
    where[0, :3] = True
    short = jax.tree.map(lambda a: a[:1, :3], (s, t))
    with x64():
        bad = jax.tree.map(lambda a: jnp.asarray(np.where(where[..., None], a, np.nan)), s)
        run = jax.jit(jax.value_and_grad(lambda s: minilmv2_loss(s, t, 4, where).sum()))
        value, gradient = run(bad)
        np.testing.assert_allclose(value, minilmv2_loss(*short, 4)[0], rtol=1e-11)
        for g in gradient.values():
            assert np.isfinite(g).all() and np.all(np.asarray(g)[~where] == 0)
        got = attention_kl(ss, ts, where)
        want = attention_kl(ss[:1, :, :3, :3], ts[:1, :, :3, :3])
        np.testing.assert_allclose(got, [want[0], 0], rtol=1e-11)


def test_causal_relations_do_not_see_the_future(rng):
    with x64():
        x = rng.normal(size=(5, 8))
        later = x.copy()
        later[3:] += 1
        run = jax.jit(lambda v: relation(v, 2, causal=True))
        a, b = run(x), run(later)
        np.testing.assert_array_equal(a[:, :3], b[:, :3])
        assert np.isneginf(np.asarray(a)[:, 0, 1:]).all()
        ss, ts = rng.normal(size=(2, 2, 5, 5))
        hidden = np.where(np.tri(5, dtype=bool), 0, -np.inf)
        got = attention_kl(ss, ts, causal=True)
        np.testing.assert_allclose(got, attention_kl(ss + hidden, ts + hidden), rtol=1e-12)


def test_bad_input_is_refused(rng):
    x = jnp.ones((2, 5, 8))
    same = dict.fromkeys(["query", "key", "value"], x)
    with pytest.raises(JaxcompError, match=r"3 relation heads do not divide the width 8; use 1, 2"):
        relation(x, 3)
    with pytest.raises(JaxcompError, match="not query, value"):
        minilmv2_loss({"key": x}, {"key": x}, 2)
    with pytest.raises(JaxcompError, match=r"query: student .* same tokens"):
        minilmv2_loss(same, parts(rng, 2, 4, 8), 2)
    with pytest.raises(JaxcompError, match=r"numbers of heads use minilmv2_loss"):
        attention_kl(jnp.ones((2, 4, 5, 5)), jnp.ones((2, 8, 5, 5)))
    with pytest.raises(JaxcompError, match="weights"):
        minilmv2_loss(same, same, 2, weights=(1,))
    with pytest.raises(JaxcompError, match=r"where \(2, 4\) does not broadcast"):
        relation(x, 2, jnp.ones((2, 4), bool))
