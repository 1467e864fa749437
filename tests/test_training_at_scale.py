"""W4A8 training with distillation under FSDP and tensor parallelism, on eight virtual devices."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

import jaxcomp as jc
from tests import xla

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def found():
    done = subprocess.run(
        [sys.executable, "-m", "tests.scale_step"],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": xla.flags(8), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_losses_are_those_of_one_device(found):
    np.testing.assert_allclose(found["together"], found["alone"], rtol=1e-3)
    assert found["alone"][-1] < found["alone"][0]


@pytest.mark.slow
def test_no_weight_is_ever_gathered_whole(found):
    """FSDP may put a slice over the tensor axis together; not a matrix or a stack of them."""
    matrices = [shape for shape in found["weights"] if np.prod(shape) >= 32 * 16]
    forbidden = {tuple(sorted(s)) for shape in matrices for s in (shape, shape[-2:])}
    gathered = {tuple(sorted(n for n in g if n != 1)) for g in found["gathers"]}
    assert found["gathers"] and not gathered & forbidden


@pytest.mark.slow
def test_state_is_split_like_its_weights_and_buffers_are_donated(found):
    assert found["kept"] and found["donated"]
    assert found["pieces"] == [4, 4, 4]


def test_states_without_a_plan_and_of_other_shapes_are_replicated():
    params = {"w": np.ones((8, 4), np.float32)}
    mesh = AbstractMesh((2,), ("model",))
    state = {"mu": params, "learned": {"w": {"scale": np.ones((4, 8))}}, "count": np.zeros(())}
    found = jc.sharding.like(state, params, [("w", P("model"))], mesh)
    specs = jax.tree.map(lambda sharding: tuple(sharding.spec), found)
    assert specs == {"mu": {"w": ("model", None)}, "learned": {"w": {"scale": ()}}, "count": ()}
