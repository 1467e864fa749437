"""One training step with everything: QAT, gates, distillation, masks, accumulation, scan, remat."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import jaxcomp as jc
from jaxcomp import pruning
from tests import xla
from tests.together import VARIANTS, Everything, tokens

ROOT = pathlib.Path(__file__).parent.parent


def run(everything, carry, begin, end):
    losses = []
    for step in range(begin, end):
        carry, value = everything.update(carry, tokens(step))
        losses.append(float(value))
    return carry, losses


@pytest.fixture(scope="module", params=["learned scales, static activations", "dynamic"])
def trained(request):
    """After six steps (three updates) and after twelve."""
    everything = Everything(VARIANTS[request.param])
    six, losses = run(everything, everything.start(), 0, 6)
    twelve, _ = run(everything, six, 6, 12)
    return everything, six, twelve, losses


def test_every_part_trains_in_one_compilation(trained):
    everything, (after, state, opt), _, losses = trained
    before, start, _ = everything.start()
    assert np.isfinite(losses).all()
    assert everything.update.traces == 1
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), after, before)
    assert all(jax.tree.leaves(moved)), moved
    assert int(state.step) == 6
    # The ranges of static activations, and those of the cache, follow the data.
    static = bool(state.learned["weights"])
    assert ("layers/mlp/up_proj/kernel" in state.ranges) == ("value:key" in state.ranges) == static
    same = jax.tree.map(lambda a, b: bool((a == b).all()), state.ranges, start.ranges)
    assert not any(any(r[k] for k in ("low", "high")) for r in same.values())
    assert opt.gradient_step == 3


def test_masks_are_exact_behind_the_gates(trained):
    _, _, (after, _, opt), _ = trained
    masks = pruning.get_masks(opt)
    kept = masks["params"]["layers"]
    assert jax.tree.leaves(masks["learned"]) == jax.tree.leaves(masks["log_alpha"]) == []
    # Updates 0, 2 and 4 choose masks; the schedule ends with half of each layer's weights.
    for name in ("mlp/up_proj", "mlp/down_proj", "self_attn/o_proj"):
        group, leaf = name.split("/")
        mask = kept[group][leaf]["kernel"]
        weight = after["params"]["layers"][group][leaf]["kernel"]
        np.testing.assert_array_equal((~mask).sum((1, 2)), mask[0].size // 2)
        assert not np.asarray(weight)[~np.asarray(mask)].any()
        assert np.asarray(weight)[np.asarray(mask)].all()


def test_a_checkpoint_of_everything_resumes_to_the_same_bits(trained, tmp_path):
    everything, six, twelve, _ = trained
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "six", six)
        checkpointer.wait_until_finished()
        again = checkpointer.restore(tmp_path / "six", jax.eval_shape(lambda: six))
    # Restored arrays are tied to their device, which alone would make jit compile again.
    again = jax.tree.map(lambda a: jnp.asarray(np.asarray(a)), again)
    again, _ = run(everything, again, 6, 12)
    assert jax.tree.structure(again) == jax.tree.structure(twelve)
    jax.tree.map(np.testing.assert_array_equal, again, twelve)
    assert everything.update.traces == 1


def test_scan_and_remat_change_nothing(trained):
    everything, (after, state, _), _, _ = trained
    plain = Everything(everything.item, scan=False, remat=False)

    def unstacked(tree):
        layers = {str(i): jax.tree.map(lambda a, i=i: a[i], tree["layers"]) for i in range(2)}
        return {**tree, "layers": layers}

    def by_layer(flat):
        found = {}
        for path, value in flat.items():
            for i in range(2):
                name = path.replace("layers/", f"layers/{i}/", 1)
                found[name] = jax.tree.map(lambda a, i=i: a[i], value)
        return found

    plain.dense = unstacked(everything.dense)

    # The loss takes test-time gates here: sampled ones would be drawn in another order.
    def loss(model, trained, state):
        return model.loss(trained, state, tokens(20), sampled=False)[0]

    scanned = jax.jit(jax.value_and_grad(lambda t: loss(everything, t, state)))
    value, g = scanned(after)
    other = {
        "params": unstacked(after["params"]),
        "learned": {k: by_layer(v) for k, v in after["learned"].items()},
        "log_alpha": by_layer(after["log_alpha"]),
        "multipliers": after["multipliers"],
    }
    fresh, start, _ = plain.start()
    assert jax.tree.structure(fresh) == jax.tree.structure(other)
    ranges = by_layer({k: v for k, v in state.ranges.items() if k.startswith("layers")})
    for name in ("value:key", "value:value"):
        for i in range(2 if name in state.ranges else 0):
            ranges[f"{name}#{i}"] = jax.tree.map(lambda a, i=i: a[i], state.ranges[name])
    assert jax.tree.structure(start.ranges) == jax.tree.structure(ranges)
    start = start.replace(ranges=ranges, step=state.step)
    value2, g2 = jax.jit(jax.value_and_grad(lambda t: loss(plain, t, start)))(other)
    np.testing.assert_allclose(value, value2, rtol=1e-5)
    expected = {
        "params": unstacked(g["params"]),
        "learned": {k: by_layer(v) for k, v in g["learned"].items()},
        "log_alpha": by_layer(g["log_alpha"]),
        "multipliers": g["multipliers"],
    }
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), g2, expected)


def test_what_was_trained_is_what_is_stored(trained):
    everything, _, (after, state, _), _ = trained
    gated = everything.l0.apply(after["params"], after["log_alpha"])
    state = state.replace(learned=after["learned"])
    packed = everything.qat.convert(gated, state)
    # Stored weights do not quantize the cache, so neither does what they are compared with.
    qat = jc.qat(everything.apply, jc.Recipe(steps=(everything.item,)))
    ours, _ = jax.jit(qat.apply)(gated, state, tokens(0))
    stored = jax.jit(jc.dispatch(everything.apply))(packed, tokens(0))
    np.testing.assert_allclose(stored, ours, rtol=1e-4, atol=1e-5)
    whole, _ = everything.qat.apply(gated, state, tokens(0))
    assert float(abs(whole[0] - ours).max()) > 1e-4


@pytest.mark.slow
def test_sharded_parameters_train_like_those_of_one_device():
    """Fully sharded parameters and optimizer state on eight devices, in float64."""
    environment = {
        **os.environ,
        "XLA_FLAGS": xla.flags(8),
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_X64": "1",
    }
    code = "from tests.together import sharded; sharded()"
    found = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr[-4000:]
    assert "sharded: ok" in found.stdout
