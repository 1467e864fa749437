"""Arithmetic in NumPy where arrays are on the host."""

import weakref

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp import host
from tests.helpers import x64


def test_numpy_sees_host_arrays_and_gives_back_jax_arrays():
    seen = []

    def double(tree):
        seen.append(type(tree["a"]))
        return {"b": tree["a"] * 2, "n": None}

    result = host.call(double, {"a": jnp.arange(3.0)})
    assert seen == [np.ndarray] and isinstance(result["b"], jax.Array)
    np.testing.assert_array_equal(result["b"], [0, 2, 4])
    assert isinstance(host.numpy(jnp.ones(2)), np.ndarray)
    assert host.numpy(None, np.ones(2))[0] is None


def test_tracers_stay_jax():
    doubled = jax.jit(lambda a: host.call(lambda a: host.numpy(a) * 2, a))(jnp.arange(3.0))
    np.testing.assert_array_equal(doubled, [0, 2, 4])
    assert jax.grad(lambda a: host.call(lambda a: a * a, a))(3.0) == 6.0


def test_dtypes_are_kept():
    assert host.to_device(np.ones(2)).dtype == jnp.float32
    assert host.to_device(jnp.ones(2, jnp.bfloat16)).dtype == jnp.bfloat16
    with x64():
        assert host.to_device(np.ones(2)).dtype == jnp.float64


def test_fetched_arrays_are_numpy_wherever_their_parts_are():
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
    tree = {"host": np.arange(3), "one": jnp.ones(2), "four": jax.device_put(np.arange(8), split)}
    found = host.fetch(tree)
    assert all(type(a) is np.ndarray for a in found.values())
    jax.tree.map(np.testing.assert_array_equal, found, jax.tree.map(np.asarray, tree))


def test_any_rows_looks_at_every_element(monkeypatch):
    monkeypatch.setattr(host, "_ELEMENTS", 6)
    for shape in ((), (0,), (5,), (7, 4), (2, 3, 4)):
        values = np.zeros(shape)
        assert not host.any_rows(np.isnan, values)
        for index in np.ndindex(shape):
            values[index] = np.nan
            assert host.any_rows(np.isnan, values) and host.any_rows(np.isnan, values.T)
            values[index] = 0


def test_what_was_computed_from_goes_when_a_result_settles():
    given = host.empty((1024, 1024), np.float32)
    given[...] = 1
    memory = weakref.ref(given.base)
    result = jax.jit(jnp.negative)(host.to_device(given))
    del given
    jax.block_until_ready(result)
    for _ in range(1000):  # The first time, unless the machine has better things to do.
        if memory() is None:
            break
        host.settle(result)
    assert memory() is None
    host.trim()
    assert float(result[0, 0]) == -1
