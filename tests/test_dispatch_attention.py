"""What dispatch reports of attention: which implementation runs, and why no other."""

import jax
import jax.numpy as jnp
from jaxcomp.kernels import chips

import jaxcomp as jc
from jaxcomp.formats import CompressedArray, Int, quantize

MASK = jc.attention.window(8, causal=True)


def layer(params, x):
    q = (x @ params["w"]).reshape(*x.shape[:2], 2, 128)
    return jc.attention.attention(q, q, q, MASK).reshape(x.shape)


def looped(params, x):
    """Attention in a loop, in a jitted function and under remat, then a step of decoding."""
    body = jax.checkpoint(jax.jit(lambda x, w: (layer({"w": w}, x), None)))
    x, _ = jax.lax.scan(body, x, params["w"])
    k = x.reshape(*x.shape[:2], 2, 128)
    return jc.attention.decode_attention(k[:, -1:], k, k, jnp.full(x.shape[:1], x.shape[1]))


def weights(*stack):
    part = quantize(Int(8), jnp.ones((*stack, 256, 256)))
    n = len(stack)
    w = CompressedArray.from_matrix(
        part, (*stack, 256, 256), jnp.float32, tuple(range(n)), (n + 1,), (n,)
    )
    return {"w": w}


def test_the_report_names_attention_and_why_no_kernel_runs(monkeypatch):
    params, x = weights(2), jax.ShapeDtypeStruct((1, 16, 256), jnp.float32)
    fast = jc.dispatch(looped)
    of_weight, one, two = fast.report(params, x)
    assert of_weight.path == "w"
    assert (one.path, one.kind, one.implementation) == ("attention", "attention", "xla")
    assert (two.path, two.kind, two.implementation) == ("decode_attention",) * 2 + ("xla",)
    for choice in (one, two):
        assert "mosaic_tpu: it runs on TPU, not on cpu" in choice.reason
        assert "mosaic_gpu: it runs on Hopper GPUs, not on cpu" in choice.reason
    monkeypatch.setattr(chips, "chip_of", lambda *_: chips.V5E)
    jax.clear_caches()  # What was traced for a CPU would be found again.
    one, two = (c for c in fast.report(params, x) if "attention" in c.kind)
    assert one.implementation == two.implementation == "mosaic_tpu"
    jax.clear_caches()


def test_noting_changes_no_result_and_taps_no_name():
    params, x = weights(), jnp.linspace(0, 1, 16 * 256).reshape(1, 16, 256)
    fast = jc.dispatch(layer)
    out, taps = jc.tap(layer, ["*"])(params, x)
    assert set(taps) == {"w"}
    assert (out == fast(params, x)).all()
    grads = jax.grad(lambda x: fast(params, x).sum())(x)
    assert jnp.isfinite(grads).all()
