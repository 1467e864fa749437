"""Scanned and unrolled layers give the same compressed bytes on every mesh of eight devices."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests import mesh_layers, xla

ROOT = pathlib.Path(__file__).parents[1]
MESHES, KINDS, STEPS = ("1", "2x4", "4x2", "8x1"), ("scanned", "unrolled"), ("RTN", "GPTQ")


@pytest.fixture(scope="module")
def found():
    done = subprocess.run(
        [sys.executable, "-m", "tests.mesh_layers"],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": xla.flags(8), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {(r["step"], r["kind"], r["mesh"]): r for r in json.loads(done.stdout.splitlines()[-1])}


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_sixteen_layers_on_every_mesh(found, step):
    rows = {(kind, mesh): found[step, kind, mesh] for kind in KINDS for mesh in MESHES}
    # Without calibration nothing is summed over devices, and all bytes are equal. With it the sums
    # of a layer's statistics, over tokens and then columns, may be rounded in another order, and
    # so on through the layers: the bound of such sums on scales, and a few codes at ties.
    ties, tolerance = (0, 0) if step == "RTN" else (0.01, mesh_layers.ROUNDING)
    assert {k: r["codes"] for k, r in rows.items() if r["codes"] > ties} == {}
    assert {k: r["scales"] for k, r in rows.items() if r["scales"] > tolerance} == {}
    # Of the first matrix that differs at all: other statistics would move most of its 16 rows.
    assert {k: r["moved"] for k, r in rows.items() if r["moved"] > 2} == {}


@pytest.mark.slow
def test_every_other_algorithm_on_every_mesh(found):
    """AWQ with its clips, SmoothQuant, SparseGPT by share, by pattern and joint, a search of clips.

    Were the tokens of one device left out, scales, masks and folded gains would all be others.
    """
    rows = {key: r["differing"] for key, r in found.items() if "differing" in r}
    assert {step for step, _, _ in rows} == {*mesh_layers.MIXED, "gain", "gain2", "gain3"}
    assert {mesh for _, _, mesh in rows} == set(MESHES) - {"1"}
    assert {key: share for key, share in rows.items() if share > 0.01} == {}
