"""Batches are on their way to the devices while the one before is computed with."""

import jax
import numpy as np
import pytest

import jaxcomp as jc
from jaxcomp import placing


def test_the_next_is_asked_for_before_one_is_used():
    seen = []
    for b in placing.ahead(lambda b: seen.append(f"load {b}") or b, 3):
        seen.append(f"use {b}")
    assert seen == ["load 0", "load 1", "use 0", "load 2", "use 1", "use 2"]
    assert list(placing.ahead(None, 0)) == []


@pytest.fixture
def case(rng):
    def apply(params, x):
        return jax.nn.relu(x @ params["first"]) @ params["second"]

    params = {name: rng.standard_normal((16, 16), np.float32) for name in ("first", "second")}
    batches = [(rng.standard_normal((4, 16), np.float32),) for _ in range(4)]
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), "d")
    options = {"mesh": mesh, "progress": False}
    return lambda: jc.compress(apply, params, jc.presets.wanda(0.5), batches, **options)


def test_a_pass_waits_for_a_batch_after_the_next_one_is_on_its_way(case, monkeypatch):
    """By name of what a batch became: its transfer, and its results, which are waited for."""
    seen, numbers = [], {}
    load, keep = placing.OnMesh.load, placing.OnMesh.keep

    def loading(place, value):
        loaded = load(place, value)
        seen.append(("load", numbers[id(value)]))
        return loaded

    def keeping(place, value):
        kept = keep(place, value)
        if isinstance(value, jax.Array):
            seen.append(("wait", len([e for e in seen if e[0] == "wait"])))
        numbers[id(kept)] = len(numbers) % 4
        return kept

    monkeypatch.setattr(placing.OnMesh, "load", loading)
    monkeypatch.setattr(placing.OnMesh, "keep", keeping)
    case()
    # The statistics of the first weight, the way to the second, and the statistics of that.
    evaluated = seen[4:-4]
    assert [b for kind, b in seen if kind == "load"] == [*range(4)] * 3
    assert evaluated == [
        ("load", 0),
        ("load", 1),
        ("load", 2),
        ("wait", 0),
        ("load", 3),
        ("wait", 1),
        ("wait", 2),
        ("wait", 3),
    ]


def test_a_batch_that_does_not_fit_is_told_by_the_weight_that_needs_it(case, monkeypatch):
    load, left = placing.OnMesh.load, []
    planted = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17179869184 bytes."

    def failing(place, value):
        if not left:
            raise jax.errors.JaxRuntimeError(planted)
        left.pop()
        return load(place, value)

    monkeypatch.setattr(placing.OnMesh, "load", failing)
    # The second batch: for the statistics of the first weight, and on the way to the second.
    for before, path, what in ((1, "first", "its input"), (5, "second", "evaluating the model")):
        left[:] = range(before)
        with pytest.raises(jc.errors.OutOfMemoryError, match=r"16\.00 GiB") as raised:
            case()
        assert str(raised.value).startswith(f"{path} (16, 16)") and what in str(raised.value)
