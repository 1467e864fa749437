"""Straight-through estimators: quantized values, float gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcomp as jc
from jaxcomp.formats import Codebook, Float, Int
from jaxcomp.quantization import fake_quantize, fake_quantize_input, rtn, straight_through
from jaxcomp.step import Activation

FORMATS = [
    Int(2, 16),
    Int(3, 32, symmetric=False),
    Int(4, 64, full_range=False, scale_dtype="bfloat16"),
    Int(8, None, out_group_size=None),
    Float("e4m3"),
    Float("e2m1", 32),
    Float("mxfp4"),
    Float("nvfp4"),
    Codebook("nf4", group_size=32),
    Codebook("kmeans", bits=3),
    Codebook("levels", levels=(-1.0, 0.0, 1.0), group_size=16),
]
W = jax.random.normal(jax.random.key(0), (2, 6, 64))


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_forward_is_what_rtn_stores_and_backward_is_the_identity(fmt):
    cotangent = jax.random.normal(jax.random.key(1), W.shape)
    value, back = jax.vjp(lambda w: fake_quantize(w, fmt), W)
    np.testing.assert_array_equal(value, rtn(W, fmt).materialize())
    np.testing.assert_array_equal(back(cotangent)[0], cotangent)


@pytest.mark.parametrize(
    "fmt", [Int(4, 16), Int(4, 16, symmetric=False), Float("e2m1", 16)], ids=str
)
def test_the_clipped_gradient_is_zero_outside_the_grid(fmt):
    gradient = jax.grad(lambda w: fake_quantize(w, fmt, "percentile", 80.0, "clipped").sum())(W)
    grid = np.asarray(rtn(W, fmt, "percentile", 80.0).materialize()).reshape(2, 6, 4, 16)
    w = np.asarray(W).reshape(grid.shape)
    # Outside: further out than any value that the grid has on that side.
    part = rtn(W, fmt, "percentile", 80.0).parts[0]
    if isinstance(fmt, Int):
        scale = np.asarray(part.expanded(part.scale)).reshape(grid.shape)
        zero = 0 if part.zero_point is None else np.asarray(part.expanded(part.zero_point))
        zero = np.reshape(np.broadcast_to(zero, W.shape), grid.shape)
        low, high = (-8 - zero) * scale, (7 - zero) * scale
    else:
        scale = np.repeat(np.swapaxes(np.asarray(part.scale), -1, -2), 16, -1).reshape(grid.shape)
        low, high = -6 * scale, 6 * scale
    inside = (w >= low) & (w <= high)
    assert 0.05 < 1 - inside.mean() < 0.5
    np.testing.assert_array_equal(np.asarray(gradient).reshape(grid.shape), inside)


def test_weights_move_while_their_rounded_values_stay():
    w = jnp.array([[0.3, -1.0, 2.0]])
    fmt = Int(3, full_range=False)
    loss = lambda w: (fake_quantize(w, fmt) * jnp.array([1.0, 0.0, 0.0])).sum()  # noqa: E731
    moved = w - 0.01 * jax.grad(loss)(w)
    assert float(moved[0, 0]) == pytest.approx(0.29)
    np.testing.assert_array_equal(fake_quantize(moved, fmt), fake_quantize(w, fmt))


def test_it_can_be_jitted_mapped_and_run_in_bfloat16():
    fmt = Int(4, 16)
    each = jax.jit(jax.vmap(lambda w: fake_quantize(w, fmt)))(W)
    np.testing.assert_array_equal(each, fake_quantize(W, fmt))
    low = fake_quantize(W.astype(jnp.bfloat16), fmt)
    assert low.dtype == jnp.bfloat16
    np.testing.assert_array_equal(low, rtn(W.astype(jnp.bfloat16), fmt).materialize())


def test_a_dynamic_input_does_not_change_when_its_tokens_are_rescaled():
    x = W[0]
    scale = 2.0 ** jnp.arange(-3, 3)[:, None]
    spec = Activation()
    quantized = fake_quantize_input(x, spec)
    np.testing.assert_array_equal(fake_quantize_input(x * scale, spec), quantized * scale)
    np.testing.assert_array_equal(fake_quantize_input(x.T, spec, axes=(0,)), quantized.T)


def test_a_static_input_clips_and_so_does_its_gradient():
    spec = Activation(format="int4", granularity="tensor", dynamic=False)
    x = jnp.array([-9.0, -7.0, 0.4, 7.0, 9.0])
    value, back = jax.vjp(lambda x: fake_quantize_input(x, spec, (-1,), jnp.array(1.0)), x)
    assert value.tolist() == [-7, -7, 0, 7, 7]
    assert back(jnp.ones(5))[0].tolist() == [0, 1, 1, 1, 0]


def test_straight_through_gives_the_value_exactly():
    x = jnp.array([1e30, 1.0, 1e-30])
    q = jnp.array([0.1, 0.7, 0.3])
    np.testing.assert_array_equal(straight_through(x, q), q)


@pytest.mark.parametrize("option", [{"clipping": "max"}, {"estimator": "soft"}])
def test_unknown_options_are_errors(option):
    with pytest.raises(jc.JaxcompError, match=next(iter(option))):
        fake_quantize(W, Int(4), **option)
    with pytest.raises(jc.JaxcompError, match="does not divide"):
        fake_quantize(W, Int(4, 7))
