"""Pruning in training: exact masks through any optimizer, exact counts, states that resume."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType

from jaxcomp import pruning
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
    schedules,
    sparsity_counts,
    wrap,
)
from tests.helpers import counted

METHODS = {
    "gradual": (GradualMagnitude(), schedules.cubic(0.7, end=6)),
    "gradual global": (GradualMagnitude(scope="global"), 0.5),
    "gradual slices": (GradualMagnitude(axis=-1), 0.5),
    "taylor": (Taylor(), schedules.cubic(0.7, end=6)),
    "movement": (Movement(), schedules.cubic(0.7, end=6)),
    "movement N:M": (Movement(n=1, m=4), None),
    "soft movement": (SoftMovement(threshold=0.49, strength=0.01), None),
    "SR-STE": (SRSTE(), None),
    "RigL": (RigL(end=8), 0.6),
}


@pytest.fixture
def params(rng):
    return {
        "up": {"kernel": rng.normal(size=(8, 6)), "bias": rng.normal(size=6)},
        "down": {"kernel": rng.normal(size=(12, 5)), "bias": rng.normal(size=5)},
    }


def f32(tree, dtype=jnp.float32):
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


def loss(params, x):
    """Depends on every weight, with curvature."""
    a = jnp.tanh(x[:, :8] @ params["up"]["kernel"] + params["up"]["bias"])
    b = jnp.tanh(x @ params["down"]["kernel"] + params["down"]["bias"])
    return (a.sum(1) - b.sum(1)).astype(jnp.float32).var() + (b**2).astype(jnp.float32).mean()


def batches(count, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(1).normal(size=(count, 16, 12)), dtype)


def make_step(tx):
    @counted
    def step(params, state, x):
        gradients = jax.grad(loss)(params, x)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return step


def stable(scores, k):
    """Which of flat scores stay when a stable sort drops the k smallest."""
    keep = np.ones(scores.size, bool)
    keep[np.argsort(scores.ravel(), kind="stable")[:k]] = False
    return keep.reshape(scores.shape)


def assert_masked(params, masks):
    for name in ("up", "down"):
        mask = np.asarray(masks[name]["kernel"])
        assert masks[name]["bias"] is None
        assert (np.asarray(params[name]["kernel"], np.float32)[~mask] == 0).all()


OPTIMIZERS = {
    "adamw": lambda: optax.adamw(0.05, weight_decay=0.1),
    "momentum": lambda: optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.05, 0.9, True)),
    "noise": lambda: optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(0)), optax.lion(0.02)),
}


@pytest.mark.parametrize("name", METHODS)
def test_masks_are_exact_in_every_step(params, name):
    method, schedule = METHODS[name]
    tx = wrap(optax.adamw(0.05, weight_decay=0.1), method, schedule, every=2)
    params = f32(params)
    state = tx.init(params)
    step = make_step(tx)
    ever = []
    for x in batches(12):
        before = get_masks(state)
        params, state = step(params, state, x)
        assert_masked(params, get_masks(state))
        ever.append(sum(dropped for dropped, _ in sparsity_counts(get_masks(state)).values()))
        if int(state.count) % 2 == 0:  # no recomputation in steps 1, 3, ..
            assert jax.tree.all(jax.tree.map(jnp.array_equal, before, get_masks(state)))
    assert ever[-1] > 0 and step.traces == 1


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_states_keep_their_types(params, name, dtype):
    """So that a training loop may be a scan, and nothing is traced again."""
    method, schedule = METHODS[name]
    params = f32(params, dtype)
    tx = wrap(optax.adamw(0.05), method, schedule)
    before = jax.eval_shape(tx.init, params)
    updates, after = jax.eval_shape(tx.update, params, before, params)
    for old, new in ((before, after), (params, updates)):
        assert jax.tree.structure(old) == jax.tree.structure(new)
        for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
            assert (a.shape, a.dtype, a.weak_type) == (b.shape, b.dtype, b.weak_type)


@pytest.mark.parametrize(
    ("optimizer", "dtypes", "method", "schedule"),
    [
        ("adamw", "bfloat16 updates", GradualMagnitude(), 0.5),
        ("momentum", "bfloat16", SRSTE(), None),
        ("noise", "float32", SRSTE(), None),
        ("noise", "bfloat16 updates", GradualMagnitude(), 0.5),
    ],
)
def test_masks_are_exact_through_any_optimizer_and_dtype(
    params, optimizer, dtypes, method, schedule
):
    """bf16 updates of float32 parameters too: minus p is not rounded to the updates' dtype."""
    params = f32(params, jnp.bfloat16 if dtypes == "bfloat16" else jnp.float32)
    inner = OPTIMIZERS[optimizer]()
    if dtypes == "bfloat16 updates":
        cast = optax.stateless(lambda u, _: f32(u, jnp.bfloat16))
        inner = optax.chain(inner, cast)
    kept_dtype = jax.tree.map(lambda p: p.dtype, params)
    tx = wrap(inner, method, schedule, every=3)
    p, state, step = params, tx.init(params), make_step(tx)
    for x in batches(5, params["up"]["kernel"].dtype):
        p, state = step(p, state, x)
        assert_masked(p, get_masks(state))
    assert jax.tree.map(lambda p: p.dtype, p) == kept_dtype
    assert sum(d for d, _ in sparsity_counts(get_masks(state)).values()) == (48 + 60) // 2


def test_what_is_kept_moves_as_without_pruning(params):
    """With plain SGD on separate weights, the mask only freezes what it drops."""
    params = {"w": f32(params)["up"]["kernel"]}
    tx = wrap(optax.sgd(0.1), GradualMagnitude(), 0.5)
    updates, state = jax.jit(tx.update)(params, tx.init(params), params)
    mask = get_masks(state)["w"]
    np.testing.assert_array_equal(
        optax.apply_updates(params, updates)["w"],
        jnp.where(mask, optax.apply_updates(params["w"], -0.1 * params["w"]), 0),
    )


@pytest.mark.parametrize("scope", ["tensor", "row", "global"])
def test_gradual_magnitude_follows_the_schedule_and_a_stable_sort(rng, scope):
    """Tied weights, a zero learning rate: the masks are those of a stable sort of magnitudes."""
    w = {k: np.round(rng.normal(size=s), 1) for k, s in (("a", (8, 6)), ("b", (12, 5)))}
    params = f32(w)
    schedule = schedules.cubic(0.9, end=8)
    tx = wrap(optax.sgd(0.0), GradualMagnitude(scope=scope), schedule)
    update = jax.jit(tx.update)
    state, drawn = tx.init(params), params
    previous = None
    for t in range(10):
        updates, state = update(drawn, state, drawn)
        drawn = optax.apply_updates(drawn, updates)
        masks = {k: np.asarray(v) for k, v in get_masks(state).items()}
        s = float(schedule(t))
        if scope == "tensor":
            expected = {k: stable(np.abs(v), round(s * v.size)) for k, v in w.items()}
        elif scope == "row":
            expected = {
                k: np.stack([stable(np.abs(c), round(s * len(c))) for c in v.T], 1)
                for k, v in w.items()
            }
        else:
            flat = np.concatenate([v.ravel() for v in w.values()])
            keep = stable(np.abs(flat), round(s * flat.size))
            expected = {"a": keep[:48].reshape(8, 6), "b": keep[48:].reshape(12, 5)}
        for k in w:
            np.testing.assert_array_equal(masks[k], expected[k])
            assert previous is None or not (masks[k] & ~previous[k]).any()
        previous = masks


@pytest.mark.parametrize("scope", ["tensor", "global", "row"])
def test_counts_are_exact_where_every_score_is_tied(scope):
    params = {"w": jnp.ones((40, 25)), "v": jnp.ones((3, 7))}
    values = [0.0, 0.123, 0.5, 0.9, 1.0]
    tx = wrap(optax.sgd(0.0), GradualMagnitude(scope=scope), lambda t: jnp.array(values)[t])
    state, update = tx.init(params), jax.jit(tx.update)
    for value in values:
        _, state = update(params, state, params)
        (v, _), (w, _) = sparsity_counts(get_masks(state)).values()
        if scope == "global":
            assert v + w == round(value * 1021)
        elif scope == "row":
            assert (v, w) == (7 * round(value * 3), 25 * round(value * 40))
        else:
            assert (v, w) == (round(value * 21), round(value * 1000))


def test_signed_scores_are_ordered_as_numbers():
    from jaxcomp.pruning.masks import drop_smallest, drop_smallest_of_all

    scores = np.array([0.5, -0.0, 0.0, -np.inf, -3.0, np.inf, -1e-45, 1e-45], np.float32)
    for k in range(9):
        got = drop_smallest(jnp.asarray(scores), k, signed=True)
        np.testing.assert_array_equal(got, stable(scores, k))
        parts = drop_smallest_of_all([jnp.asarray(p) for p in np.split(scores, 2)], k, signed=True)
        np.testing.assert_array_equal(np.concatenate(parts), stable(scores, k))


def test_counts_of_traced_sparsities_hold_beyond_float32():
    from jaxcomp.pruning.masks import traced_counts

    sizes = [1, 7, 1000, 2**24 + 3, 10**9, 7 * 10**10]
    for value in (0.0, 0.1, 0.37, 0.8999999, 0.9, 0.999, 1.0):
        high, low = jax.jit(lambda s: traced_counts(s, sizes))(jnp.float32(value))
        got = [int(h) * 2**15 + int(x) for h, x in zip(high, low, strict=True)]
        ten_millionths = round(value * 10**7)
        exact = [divmod(ten_millionths * size, 10**7) for size in sizes]
        assert got == [q + (r > 5 * 10**6 or (r == 5 * 10**6 and q % 2)) for q, r in exact]


def stable_rows(w, k):
    return np.apply_along_axis(lambda column: stable(column, k), 0, np.abs(w))


@pytest.mark.parametrize(
    ("method", "schedule", "alone"),
    [
        (GradualMagnitude(), 0.4, lambda w: stable(np.abs(w), round(0.4 * 48))),
        (GradualMagnitude(scope="row"), 0.4, lambda w: stable_rows(w, 3)),
        (
            GradualMagnitude(n=2, m=4),
            None,
            lambda w: np.concatenate([stable_rows(w[:4], 2), stable_rows(w[4:], 2)]),
        ),
        (
            GradualMagnitude(axis=-1),
            0.5,
            lambda w: np.broadcast_to(stable((w**2).sum(0), 3), w.shape),
        ),
    ],
)
def test_stacked_leaves_are_pruned_layer_by_layer(rng, method, schedule, alone):
    """Scanned layers of very different sizes: each layer has the mask it would have alone."""
    layers = [rng.normal(size=(8, 6)) * scale for scale in (1, 10, 0.1)]
    stacked = f32({"layers": {"kernel": np.stack(layers), "scale": np.ones((3, 6))}})
    tx = wrap(optax.sgd(0.0), method, schedule, stack=lambda path: path.count("layers"))
    _, state = jax.jit(tx.update)(stacked, tx.init(stacked), stacked)
    got = get_masks(state)["layers"]
    assert got["scale"] is None
    np.testing.assert_array_equal(got["kernel"], np.stack([alone(w) for w in layers]))


def test_rows_and_blocks_run_along_the_inputs(rng):
    """A kernel (heads, head_dim, out) sums over two axes; (in, heads, head_dim) over the first."""
    w = rng.normal(size=(2, 4, 3))
    params = {"out": jnp.asarray(w, jnp.float32), "query": jnp.asarray(w.T, jnp.float32)}
    tx = wrap(
        optax.sgd(0.0),
        GradualMagnitude(n=2, m=4),
        input_axes=lambda path: (-3, -2) if path == "out" else 0,
        include="out",
    )
    _, state = jax.jit(tx.update)(params, tx.init(params), params)
    mask = np.asarray(get_masks(state)["out"])
    assert (mask.sum(1) == 2).all()
    expected = np.stack([[stable(np.abs(w[h, :, o]), 2) for o in range(3)] for h in range(2)])
    np.testing.assert_array_equal(mask, expected.transpose(0, 2, 1))
    tx = wrap(optax.sgd(0.0), GradualMagnitude(scope="row"), 1 / 3, include="query", input_axes=0)
    _, state = jax.jit(tx.update)(params, tx.init(params), params)
    expected = np.apply_along_axis(lambda v: stable(v, 1), 0, np.abs(w.T))
    np.testing.assert_array_equal(get_masks(state)["query"], expected)


def test_slices_are_dropped_by_their_norm(rng):
    w = rng.normal(size=(6, 8))
    params = {"kernel": jnp.asarray(w, jnp.float32)}
    tx = wrap(optax.sgd(0.0), GradualMagnitude(axis=1), 0.5)
    _, state = jax.jit(tx.update)(params, tx.init(params), params)
    expected = np.broadcast_to(stable(np.linalg.norm(w, axis=0), 4), w.shape)
    np.testing.assert_array_equal(get_masks(state)["kernel"], expected)


def test_momentum_of_dropped_weights_is_forgotten(params):
    params = f32(params)
    tx = wrap(optax.adam(0.1), GradualMagnitude(), 0.5)
    step, state = make_step(tx), tx.init(params)
    for x in batches(3):
        params, state = step(params, state, x)
    for moment in (state.inner[0].mu, state.inner[0].nu):
        mask = np.asarray(get_masks(state)["up"]["kernel"])
        values = np.asarray(moment["up"]["kernel"])
        assert (values[~mask] == 0).all() and (values[mask] != 0).all()
        assert (np.asarray(moment["up"]["bias"]) != 0).all()


def test_a_fixed_mask_survives_fine_tuning(params):
    """The pattern of upstream pruning stays locked: masks after training equal those before."""
    params = f32(params)
    tx = wrap(optax.adamw(0.05), GradualMagnitude(), 0.6, end=0)
    step, state = make_step(tx), tx.init(params)
    params, state = step(params, state, batches(1)[0])
    before = get_masks(state)
    for x in batches(8):
        params, state = step(params, state, x)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, before, get_masks(state)))


def test_begin_and_end(params):
    params = f32(params)
    tx = wrap(optax.sgd(0.1), Movement(), 0.5, begin=2, end=4, every=2)
    step, state = make_step(tx), tx.init(params)
    dropped, masks = [], []
    for x in batches(8):
        params, state = step(params, state, x)
        masks.append(get_masks(state)["up"]["kernel"].tolist())
        dropped.append(sum(d for d, _ in sparsity_counts(get_masks(state)).values()))
    assert dropped == [0, 0] + [54] * 6
    assert masks[2] == masks[3] and masks[4] == masks[7]


def test_accumulated_gradients_make_the_same_steps(params):
    """MultiSteps around wrap: k equal micro-batches are one step."""
    params = f32(params)
    for method, schedule in (
        (GradualMagnitude(), schedules.cubic(0.7, end=4)),
        (SRSTE(), None),
    ):
        tx = wrap(optax.adamw(0.05), method, schedule)
        many = optax.MultiSteps(tx, 2)
        p, state, step = params, tx.init(params), make_step(tx)
        q, slow, micro = params, many.init(params), make_step(many)
        for x in batches(4):
            p, state = step(p, state, x)
            for _ in range(2):
                q, slow = micro(q, slow, x)
            assert_masked(q, get_masks(slow))
        assert int(slow.inner_opt_state.count) == 4
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), p, q)
        assert jax.tree.all(jax.tree.map(jnp.array_equal, get_masks(state), get_masks(slow)))


def test_chains_and_two_methods_on_one_tree(params):
    params = f32(params)
    inner = wrap(optax.adamw(0.05), SRSTE(), include="up/*", exclude="*bias")
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        wrap(inner, GradualMagnitude(), 0.5, include="down/kernel"),
    )
    step, state = make_step(tx), tx.init(params)
    for x in batches(3):
        params, state = step(params, state, x)
        assert_masked(params, get_masks(state))
    assert sparsity_counts(get_masks(state)) == {"down/kernel": (30, 60), "up/kernel": (24, 48)}


def test_extra_arguments_reach_the_optimizer(params):
    params = f32(params)
    seen = []

    def update(updates, state, params=None, *, value, **extra_args):
        seen.append((value, extra_args))
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), update)
    tx = wrap(inner, GradualMagnitude(), 0.5)
    tx.update(params, tx.init(params), params, value=3.0, more=1)
    assert seen == [(3.0, {"more": 1})]


@pytest.mark.parametrize("name", ["taylor", "movement", "RigL"])
def test_a_checkpoint_resumes_bit_identically(params, name, tmp_path):
    method, schedule = METHODS[name]
    tx = wrap(optax.adamw(0.05), method, schedule, every=2)
    start = f32(params)
    step = make_step(tx)
    data = batches(8)
    p, state = start, tx.init(start)
    for x in data[:5]:
        p, state = step(p, state, x)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", {"params": p, "state": state})
        checkpointer.wait_until_finished()
        target = jax.eval_shape(lambda: {"params": start, "state": tx.init(start)})
        back = checkpointer.restore(tmp_path / "state", target)
    assert jax.tree.structure(back["state"]) == jax.tree.structure(state)
    q, resumed = back["params"], back["state"]
    for x in data[5:]:
        p, state = step(p, state, x)
        q, resumed = step(q, resumed, x)
    ours, theirs = jax.tree.leaves((p, state)), jax.tree.leaves((q, resumed))
    assert len(ours) > 10
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name", ["movement", "RigL"])
def test_state_is_sharded_like_the_weights(params, kind, name):
    method, schedule = METHODS[name]
    rows = {"w": jnp.asarray(params["up"]["kernel"], jnp.float32)}
    tx = wrap(optax.adamw(0.1), method, schedule)
    expected, alone = jax.jit(tx.update)(rows, tx.init(rows), rows)
    mesh = jax.make_mesh((2, 2), ("x", "y"), (kind, kind), devices=jax.devices()[:4])
    placed = jax.sharding.NamedSharding(mesh, jax.P("x", "y"))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(rows, placed)
        state = tx.init(sharded)
        updates, after = jax.jit(tx.update)(sharded, state, sharded)
    for own in (state, after):
        for tree in (own.masks, own.latent, own.method):
            for leaf in jax.tree.leaves(tree):
                assert leaf.sharding.is_equivalent_to(placed, 2)
    np.testing.assert_allclose(updates["w"], expected["w"], rtol=1e-6)
    np.testing.assert_array_equal(after.masks["w"], alone.masks["w"])


def test_dense_weights_are_those_behind_the_masks(params):
    params = f32(params)
    tx = wrap(optax.sgd(0.0), SRSTE(strength=0.0))
    updates, state = jax.jit(tx.update)(params, tx.init(params), params)
    masked = optax.apply_updates(params, updates)
    assert_masked(masked, get_masks(state))
    jax.tree.map(np.testing.assert_array_equal, latent_weights(state, masked), params)
    jax.tree.map(np.testing.assert_array_equal, apply_mask(params, get_masks(state)), masked)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda **k: wrap(optax.sgd(1), "magnitude", 0.5, **k), "is no jaxcomp.pruning.Method"),
        (lambda **k: wrap(optax.sgd(1), GradualMagnitude(), 50, **k), "write 50 % as 0.5"),
        (lambda **k: wrap(optax.sgd(1), GradualMagnitude(), **k), "needs a schedule"),
        (lambda **k: wrap(optax.sgd(1), GradualMagnitude(n=2, m=4), 0.5, **k), "needs a schedule"),
        (lambda **k: wrap(optax.sgd(1), GradualMagnitude(n=2), **k), "both n and m"),
        (lambda **k: wrap(optax.sgd(1), GradualMagnitude(n=2, m=4, axis=0), **k), "not both"),
        (lambda **k: wrap(optax.sgd(1), GradualMagnitude(n=2, m=5), **k), "down/kernel.*2:5.*12"),
        (lambda **k: wrap(optax.sgd(1), GradualMagnitude(axis=2), 0.5, **k), "axis 2 is none of"),
        (lambda **k: wrap(optax.sgd(1), GradualMagnitude(scope="layer"), 0.5, **k), "'layer'"),
        (lambda **k: wrap(optax.sgd(1), Taylor(decay=1.0), 0.5, **k), "decay 1.0"),
        (lambda **k: wrap(optax.sgd(1), SRSTE(), 0.5, **k), "takes no schedule"),
        (lambda **k: wrap(optax.sgd(1), SRSTE(strength=-1), **k), "strength -1"),
        (lambda **k: wrap(optax.sgd(1), SoftMovement(threshold=1), **k), "threshold 1"),
        (lambda **k: wrap(optax.sgd(1), SoftMovement(), 0.5, **k), "takes no schedule"),
        (lambda **k: wrap(optax.sgd(1), RigL(end=9), **k), "give it as a number"),
        (lambda **k: wrap(optax.sgd(1), RigL(end=9, density="x"), 0.5, **k), "'erk' or 'uniform'"),
        (lambda **k: wrap(optax.sgd(1), RigL(end=0), 0.5, **k), "ends at step 0"),
        (
            lambda **k: wrap(optax.sgd(1), SRSTE(), include="*kernal", **k),
            "include rule '[*]kernal' matches none.*closest are (up|down)/kernel",
        ),
        (
            lambda **k: wrap(optax.sgd(1), SRSTE(), exclude="upp/*", **k),
            "exclude rule 'upp/[*]' matches none.*up/",
        ),
        (lambda **k: wrap(optax.sgd(1), SRSTE(), exclude="*", **k), "no weight is left"),
        (lambda **k: wrap(optax.sgd(1), SRSTE(), every=0, **k), "every 0"),
        (lambda **k: wrap(optax.sgd(1), SRSTE(), begin=5, end=4, **k), "before begin"),
        (lambda **k: wrap(optax.sgd(1), SRSTE(), include="*kernel", stack=2, **k), "2 stack axes"),
        (lambda **k: wrap(optax.sgd(1), SRSTE(), input_axes=3, **k), "no input axes"),
        (lambda **k: wrap(optax.sgd(1), SRSTE(), input_axes=(0, 0), **k), "different axes"),
    ],
)
def test_wrong_use_is_refused(params, make, message):
    with pytest.raises(JaxcompError, match=message):
        make().init(f32(params))


def test_update_needs_params(params):
    params = f32(params)
    tx = wrap(optax.sgd(1), SRSTE())
    with pytest.raises(JaxcompError, match="needs params"):
        tx.update(params, tx.init(params))
    with pytest.raises(JaxcompError, match="no state of"):
        get_masks(optax.sgd(1).init(params))


def test_a_method_of_ones_own(params):
    """The protocol is open: keep the largest signed weights. Dropped ones, now zero, stay out."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Largest(pruning.Scored):
        def scores(self, weight):
            return weight.value

    params = f32(params)
    w = np.asarray(params["up"]["kernel"])
    tx = wrap(optax.sgd(0.0), Largest(), lambda t: 0.25 * (t + 1))
    state, update = tx.init(params), jax.jit(tx.update)
    for count in (12, 24):
        updates, state = update(params, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_array_equal(get_masks(state)["up"]["kernel"], stable(w, count))
