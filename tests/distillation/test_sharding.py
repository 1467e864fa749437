"""Losses on sharded batches, with Auto and Explicit axes."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxcomp.distillation as kd


def losses(z, v, labels):
    parts = [dict.fromkeys(("query", "key", "value"), a) for a in (z, v)]
    return {
        "hinton": kd.hinton_loss(z, v, labels),
        "reverse": kd.reverse_kl_divergence(z, v, 2.0),
        "jensen_shannon": kd.jensen_shannon(z, v),
        "mse": kd.logits_mse(z, v, center=True),
        "topk": kd.topk_kl_divergence(z, kd.compress_logits(v, 3)),
        "hint": kd.hint_loss(z, v),
        "pkd": kd.pkd_loss(z, v),
        "fsp": kd.fsp_loss((z, z), (v, v)),
        "rkd_distance": kd.rkd_distance_loss(z, v),
        "rkd_angle": kd.rkd_angle_loss(z, v),
        "minilm": kd.minilmv2_loss(*parts, 2),
    }


@functools.partial(jax.value_and_grad, has_aux=True)
def total(z, v, labels):
    found = losses(z, v, labels)
    return sum(loss.mean() for loss in found.values()), found


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
def test_a_sharded_batch_gives_the_same_losses_and_gradients(rng, kind):
    z, v = np.float32(rng.normal(size=(2, 4, 5, 8)))
    labels = rng.integers(0, 8, (4, 5))
    gradient = jax.jit(total)
    want = gradient(z, v, labels)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, PartitionSpec("data"))
        got = gradient(*(jax.device_put(a, sharding) for a in (z, v, labels)))
    assert got[1].sharding.spec[0] == "data"
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, want)


def test_no_nan_arises_on_the_way(rng):
    """Under debug_nans every operation is looked at, excluded entries and padding included."""
    z, v = np.float32(rng.normal(size=(2, 6, 8)))
    z[:, 6:], v[:, 6:], v[0, 5] = -np.inf, -np.inf, -np.inf
    where = np.arange(6) > 1
    with jax.debug_nans(True):
        for loss in (
            kd.kl_divergence,
            kd.jensen_shannon,
            lambda z, v, where: kd.topk_kl_divergence(z, kd.compress_logits(v, 7), where),
        ):
            value, gradient = jax.value_and_grad(lambda z, f=loss: f(z, v, where=where).sum())(z)
            assert np.isfinite(value) and np.isfinite(gradient).all()
