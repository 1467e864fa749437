"""Operations inside a caller's ``jax.shard_map``, which by default accounts for what varies.

A kernel in there has to say over which mesh axes its results vary; gradients of what is the same on
several devices are sums over them. Kernels are traced and compiled here, not interpreted: the
interpreter of JAX 0.10 does not end on several devices.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jaxcomp.kernels import chips

from tests.kernels import aot
from tests.kernels.cases import CASES, NOT_ON_GPUS, Case, with_gradients


def inside(case: Case, mesh, **options) -> Callable[[dict], jax.Array]:
    """The call in a shard_map as it is by default."""
    return jax.shard_map(
        lambda operands: case.call(**operands, **options),
        mesh=mesh,
        in_specs=(case.specs,),
        out_specs=case.out,
    )


def mesh_of_four() -> jax.sharding.Mesh:
    return jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


@pytest.mark.parametrize("name", CASES)
def test_numbers_and_gradients_are_those_outside(name, rng):
    case = CASES[name](rng, 8, "float32")
    run = functools.partial(with_gradients, case)
    expected = jax.jit(functools.partial(run, lambda operands: case.call(**operands)))
    actual = jax.jit(functools.partial(run, inside(case, mesh_of_four())))
    actual, expected = actual(case.operands), expected(case.operands)
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        size = 1e-30 + float(jnp.abs(other.astype(jnp.float32)).max())
        np.testing.assert_allclose(
            np.asarray(one, np.float32) / size, np.asarray(other, np.float32) / size, atol=2e-6
        )


@pytest.mark.parametrize("name", CASES)
def test_tpu_kernels_say_how_results_vary(name, rng, monkeypatch):
    monkeypatch.setattr(chips, "chip_of", lambda *arrays: chips.V5E)
    traced(CASES[name](rng, 8, "bfloat16"), "mosaic_tpu")


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="Mosaic GPU kernels need jax 0.11")
@pytest.mark.parametrize("name", CASES)
def test_gpu_kernels_say_how_results_vary(name, rng, monkeypatch):
    monkeypatch.setattr(chips, "chip_of", lambda *arrays: chips.H100)
    case = CASES[name](rng, 8, "bfloat16")
    if name in NOT_ON_GPUS:
        pytest.skip(NOT_ON_GPUS[name])
    traced(case, "mosaic_gpu")


def traced(case: Case, implementation: str) -> None:
    """Traces a call and its gradients, which checks types, and finds a kernel."""
    run = inside(case, mesh_of_four(), implementation=implementation)
    jaxpr = jax.make_jaxpr(functools.partial(with_gradients, case, run))(case.operands)
    assert "pallas_call" in str(jaxpr) or "mpmd_map" in str(jaxpr)


def program(mesh, name):
    """A case, with its gradients where kernels compute them, and the shapes of its operands."""
    case = CASES[name](np.random.default_rng(0), 16, "bfloat16")

    def struct(spec, part):
        place = NamedSharding(mesh, spec)
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), part)

    operands = {name: struct(case.specs[name], part) for name, part in case.operands.items()}
    run = inside(case, mesh, implementation="mosaic_tpu")
    if name in ("attention", "block_sparse_matmul"):
        run = functools.partial(with_gradients, case, run)
    return run, (operands,)


@pytest.mark.slow
@pytest.mark.skipif(not aot.available(), reason="the TPU compiler (libtpu) is not installed")
def test_compiles():
    names = [name for name in CASES if "," not in name or name.endswith("split outputs")]
    names.remove("dispatch")
    requests = [
        ("tests.kernels.test_shard_map:program", {"mesh": [2, 2], "name": name}) for name in names
    ]
    for name, result in zip(names, aot.compile_cases("v5e", requests), strict=True):
        assert result["error"] is None, (name, result["error"])
        assert "tpu_custom_call" in result["hlo"], name
