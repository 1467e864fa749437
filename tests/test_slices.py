"""Stacks that are compressed matrix by matrix, against the same as a whole."""

import math
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcomp as jc
from benchmarks import memory
from jaxcomp import calibration, slices
from jaxcomp.formats import Int
from jaxcomp.io import safetensors
from jaxcomp.io.stacked import Stacked
from jaxcomp.pruning import SparseGPT
from jaxcomp.quantization import GPTQ, RTN, SmoothQuant, gptq, rtn
from jaxcomp.recipe import Recipe
from jaxcomp.step import Activation
from tests import xla

E, IN, OUT = 3, 16, 24
SIZES = np.array([20, 0, 12], np.int32)
RNG = np.random.default_rng(0)
UP, GATE = RNG.standard_normal((2, E, IN, OUT)).astype(np.float32)
RECIPES = {
    "data free": (RTN(format=Int(4, 8)),),
    "masks": (SparseGPT(n=2, m=4), RTN(format=Int(8))),
    "smoothing": (SmoothQuant(), RTN(format=Int(4, 8))),
    "static": (RTN(format=Int(8), activation=Activation(granularity="tensor", dynamic=False)),),
}


def batched(p, x):
    return jnp.einsum("eti,eio->eto", x, p["up"]) * jnp.einsum("eti,eio->eto", x, p["gate"])


def ragged(p, x):
    return jax.lax.ragged_dot(x, p["up"], SIZES) * jax.lax.ragged_dot(x, p["gate"], SIZES)


def inputs(*shape):
    x = np.random.default_rng(1).standard_normal((2, *shape)).astype(np.float32)
    return [(a * np.linspace(0.1, 3, IN, dtype=np.float32),) for a in x]


def compressed(apply, steps, data, params):
    return jc.compress(apply, params, Recipe(steps=steps), data, progress=False)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_result_is_that_of_the_whole_stack(monkeypatch, recipe):
    params = {"up": UP, "gate": Stacked(list(GATE))}
    made = []
    monkeypatch.setattr(
        Stacked, "__array__", lambda s, *_, **__: made.append(s) or np.stack(s.parts)
    )
    data = inputs(E, 10, IN)
    whole = compressed(batched, RECIPES[recipe], data, params)
    reads = len(made)
    monkeypatch.setattr(slices, "SMALLEST", 1)
    taken = compressed(batched, RECIPES[recipe], data, params)
    if recipe != "masks":  # Whose Hessians are summed, and inverted, in another order.
        jax.tree.map(np.testing.assert_array_equal, taken.params, whole.params)
    assert jax.tree.structure(taken.params) == jax.tree.structure(whole.params)
    types = lambda r: [type(a) for a in jax.tree.leaves(r.params)]  # noqa: E731
    assert types(taken) == types(whole)
    for a, b in zip(taken.report.rows, whole.report.rows, strict=True):
        assert a.error == pytest.approx(b.error, rel=1e-5 if recipe != "masks" else 1e-2)
        assert (a.path, a.format, a.nbits, a.notes) == (b.path, b.format, b.nbits, b.notes)
    assert reads and len(made) == reads  # Nor is the stack read as a whole again.


@pytest.mark.parametrize("apply", [batched, ragged])
def test_each_expert_has_the_hessian_of_its_own_tokens(monkeypatch, apply):
    data = inputs(E, 10, IN) if apply is batched else inputs(sum(SIZES), IN)
    steps, params = (GPTQ(format=Int(4, 8)),), {"up": UP, "gate": GATE}
    whole = compressed(apply, steps, data, params)
    monkeypatch.setattr(slices, "SMALLEST", 1)
    taken = compressed(apply, steps, data, params)
    starts = np.cumsum([0, *SIZES])
    for k in range(E):
        state = calibration.init(IN, frozenset({"hessian"}))
        for (x,) in data:
            mine = x[k] if apply is batched else x[starts[k] : starts[k + 1]]
            state = calibration.update(state, mine)
        for name, w in (("up", UP), ("gate", GATE)):
            expected = gptq(w[k].T, state.hessian, Int(4, 8))
            np.testing.assert_array_equal(taken.params[name].materialize()[k].T, expected)
    for a, b in zip(taken.report.rows, whole.report.rows, strict=True):
        assert a.error == pytest.approx(b.error, rel=1e-2) and a.notes == b.notes
    assert ("no calibration tokens" in taken.report.rows[0].notes) == (apply is ragged)


def test_what_is_not_finite_is_said(monkeypatch):
    monkeypatch.setattr(slices, "SMALLEST", 1)
    (x,), _ = inputs(E, 10, IN)
    x = np.where(np.arange(E)[:, None, None] == 2, np.nan, x)
    params = {"up": UP, "gate": GATE}
    with pytest.raises(jc.JaxcompError, match="the hessian of its input is NaN"):
        compressed(batched, (GPTQ(format=Int(4, 8)),), [(x,)], params)


def test_what_is_left_whole():
    step, shape = RTN(format=Int(8)), (4, 256, 256)
    assert slices.can_be_taken_apart([shape, shape], [step, SmoothQuant(), GPTQ(format=Int(8))])
    assert not slices.can_be_taken_apart([shape[1:]], [step])
    assert not slices.can_be_taken_apart([(4, 64, 64)], [step])  # A turn costs more than it saves.
    assert not slices.can_be_taken_apart([shape, (2, *shape[1:])], [SmoothQuant()])
    assert not slices.can_be_taken_apart([shape], [step, jc.pruning.Magnitude(sparsity=0.5)])


PROGRAM = """
import json, os, sys, time
import jax, numpy as np
import jaxcomp as jc
from benchmarks import memory
from jaxcomp import host
from jaxcomp.io import safetensors
from jaxcomp.io.stacked import Stacked

def compress(count, out):
    experts = Stacked([tensors[str(k)] for k in range(count)])
    sizes = np.full(count, 1, np.int32)
    apply = lambda p, x: jax.lax.ragged_dot(x, p["w"], sizes)
    x = np.zeros((count, experts.shape[1]), np.float32)
    recipe = jc.presets.w4a16_rtn(group_size=32)
    jc.compress(apply, {"w": experts}, recipe, [(x,)], save_to=out, progress=False)

tensors = safetensors.read(sys.argv[1])
compress(2, sys.argv[1] + ".warm")
host.trim()
fixed, began = memory._anonymous(os.getpid()), time.monotonic()
compress(len(tensors), sys.argv[1] + ".out")
print(json.dumps({"fixed": fixed, "began": began, "ended": time.monotonic()}))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc")
def test_a_stack_of_experts_is_never_whole_in_float32(tmp_path, monkeypatch):
    count, shape = 16, (256, 1024)
    rng = np.random.default_rng(0)
    weights = {str(k): rng.standard_normal(shape, np.float32) for k in range(count)}
    safetensors.write(tmp_path / "experts", weights)
    monkeypatch.setenv("XLA_FLAGS", xla.flags(1))
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "experts")]
    reply, seen = memory.watched(command)
    inside = [n for t, n in seen if reply["began"] <= t <= reply["ended"]]
    assert len(inside) > 5
    stack = 4 * count * math.prod(shape)
    assert max(inside) - reply["fixed"] < stack  # Three times as much when it was rounded whole.
    saved = jc.load(tmp_path / "experts.out").params["w"].materialize()
    step = jc.presets.w4a16_rtn(group_size=32).steps[0]
    for k in (0, count - 1):
        expected = rtn(weights[str(k)].T, step.format, step.clipping).materialize()
        np.testing.assert_array_equal(saved[k].T, expected)
