"""Attention on several devices against one device, and what is sent between them."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxcomp.kernels.sparse_attention import (
    attention,
    blocks,
    causal,
    full,
    global_,
    per_head,
    random,
    ring,
    shifts,
    strided,
    window,
)

from tests.kernels.sparse_attention import cases

P = PartitionSpec
COLLECTIVES = r"(all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
HEADS = per_head([causal(), window(9)] * 2)
RANDOM = window(5) | global_(3) | random(1, block_size=16)
WINDOW = window(20, causal=True)
# What the kernel for TPUs does on a device, interpreted.
KERNEL = {"implementation": "mosaic_tpu", "interpret": True, "block_q": 128, "block_k": 128}
# Kind of mesh, shape of it, specs of q and of k, mask, key heads, options.
CASES = {
    "batch and heads": ("Auto", (2, 2), P("x", None, "y"), None, causal(), 2, {}),
    "heads with masks": ("Explicit", (1, 2), P("x", None, "y"), None, HEADS, 2, {}),
    "whole key heads": ("Explicit", (1, 4), P(None, None, "y"), P(), window(20), 2, {"span": True}),
    "ring": ("Auto", (1, 4), P("x", "y"), None, causal(), 2, {}),
    "ring of a window": ("Explicit", (1, 4), P(None, "y"), None, window(9, causal=True), 1, {}),
    "ring and heads": ("Explicit", (2, 2), P(None, "y", "x"), None, RANDOM, 2, {"segments": True}),
    "ring of head masks": (
        "Auto", (1, 4), P(None, "y"), None, per_head([~full(), causal(), window(3), full()]), 2,
        {"soft_cap": 5.0},
    ),
    "ring of codes": ("Auto", (1, 4), P(None, "y"), None, strided(7), 2, {"cache": "int8"}),
    "ring of kernels": ("Auto", (1, 2), P(None, "y"), None, causal(), 1, {"kernel": True}),
    "ring of kernels, heads": (
        "Explicit", (2, 2), P(None, "y", "x"), None, WINDOW, 2, {"kernel": True, "segments": True},
    ),
}  # fmt: skip


def put(mesh, array, spec):
    return jax.device_put(array, NamedSharding(mesh, spec))


LAST = [*CASES][-1]  # Half a minute.


@pytest.mark.parametrize(
    "name", [*(n for n in CASES if n != LAST), pytest.param(LAST, marks=pytest.mark.slow)]
)
def test_same_numbers_and_gradients(name, rng):
    kind, shape, q_spec, kv_spec, mask, kv_heads, options = CASES[name]
    kind = AxisType[kind]
    mesh = jax.make_mesh(shape, ("x", "y"), axis_types=(kind, kind))
    batch, length, heads = 2, 64, 4
    q, k, v = cases.operands(3, batch, length, length, heads, kv_heads, 16, 8)
    told = {"q_spec": q_spec, "kv_spec": kv_spec} if kind is AxisType.Auto else {}
    told |= KERNEL if options.get("kernel") else {}
    b, s, h = (*q_spec, None, None)[:3]
    of_keys = q_spec if kv_spec is None else kv_spec
    extras, extra_specs = {}, {}
    if options.get("segments"):
        # The first positions are padding, which no query of their own part may look at either.
        extras["segment_ids"] = np.where(np.arange(length) < 20, -1, np.arange(length) // 40)
        extras["segment_ids"] = np.broadcast_to(extras["segment_ids"], (batch, length))
        extra_specs["segment_ids"] = P(b, s)
    if options.get("span"):
        extras["span"], extra_specs["span"] = np.array([1.0, 5, 9, 30], np.float32), P(h)
    if options.get("cache"):
        (k, extras["k_scale"]), (v, extras["v_scale"]) = (
            cases.quantized(x, options["cache"]) for x in (k, v)
        )
        extra_specs |= {"k_scale": P(*of_keys), "v_scale": P(*of_keys)}
    fixed = {"soft_cap": options["soft_cap"]} if "soft_cap" in options else {}
    trained = {"q": q} if options.get("cache") else {"q": q, "k": k, "v": v}
    if "span" in extras:
        trained["span"] = extras["span"]
    held = {"q": q, "k": k, "v": v, **extras}
    want = cases.expected(q, k, v, mask, **extras, **fixed)
    weights = rng.normal(size=want[0].shape).astype(np.float32)

    def loss(trained, held, weights, told):
        out, lse = attention(**(held | trained), mask=mask, return_logsumexp=True, **fixed, **told)
        lse = jnp.where(jnp.isneginf(lse), 0.0, lse)
        return jnp.sum(out * weights) + jnp.sum(jnp.sin(lse))

    def run(held):
        return attention(**held, mask=mask, return_logsumexp=True, **fixed, **told)

    specs = {"q": q_spec, "k": of_keys, "v": of_keys, **extra_specs}
    placed = {n: put(mesh, jnp.asarray(x), specs[n]) for n, x in held.items()}
    compiled = jax.jit(run).lower(placed).compile()
    for got, exact in zip(compiled(placed), want, strict=True):
        cases.assert_close(got, exact, "float32")
    used = set(re.findall(COLLECTIVES, compiled.as_text()))
    assert used == ({"collective-permute"} if s else set())
    trained = {n: jnp.asarray(x) for n, x in trained.items()}
    one = jax.jit(jax.grad(lambda *a: loss(*a, {})))(trained, held, weights)
    backward = jax.jit(jax.grad(lambda *a: loss(*a, told)))
    arguments = {n: placed[n] for n in trained}, placed, put(mesh, weights, q_spec)
    compiled = backward.lower(*arguments).compile()
    several = compiled(*arguments)
    for n in trained:
        np.testing.assert_allclose(several[n], one[n], atol=1e-4, err_msg=n)
    if s:
        assert "all-gather" not in compiled.as_text()


def test_parts_of_masks_are_the_mask_there(rng):
    cells = blocks(rng.random((7, 7)) < 0.5, 10)
    masks = [*cases.MASKS.values(), cells, ~cells & causal(), RANDOM]
    for mask in masks:
        bound = mask.bind(70, 70)
        for q_start, k_start in ((0, 0), (32, 32), (32, 0), (0, 32)):
            here = shifts.part(bound, (q_start, 32), (k_start, 32))
            for head in range(4):
                if not hasattr(mask, "masks") or len(mask.masks) == 4 or head == 0:
                    want = bound.head(head).block(q_start, 32, k_start, 32)
                    np.testing.assert_array_equal(here.head(head).block(0, 32, 0, 32), want)


def test_a_ring_computes_and_sends_only_what_the_mask_leaves():
    plan = ring.plan(causal(), "x", 4, 64, 64)
    assert plan.steps == 4 and (plan.which > 0).sum() == 10 and len(plan.masks) == 3
    plan = ring.plan(window(18, causal=True), "x", 8, 128, 128)
    assert plan.steps == 3 and (plan.which > 0).sum() == 8 + 7 + 6 and len(plan.masks) == 4
    assert ring.plan(~full(), "x", 4, 64, 64).steps == 1


def test_parts_that_see_only_themselves_compute_one_thing():
    mesh = jax.make_mesh((1, 4), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    q, k, v = (put(mesh, x, P(None, "y")) for x in cases.operands(0, 1, 64, 64, 2, 1, 8))
    mask = blocks(np.eye(4), 16)
    run = jax.jit(functools.partial(attention, mask=mask, return_logsumexp=True))
    assert "case" not in run.lower(q, k, v).as_text()
    for got, want in zip(run(q, k, v), cases.expected(q, k, v, mask), strict=True):
        cases.assert_close(got, want, "float32")


def test_what_cannot_be_split_is_an_error():
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    q, k, v = (put(mesh, x, P()) for x in cases.operands(0, 2, 30, 30, 4, 2))
    for message, options in {
        "one mesh axis": {"q_spec": P(None, ("x", "y"))},
        "split alike, heads alike": {"q_spec": P("x"), "kv_spec": P("y")},
        "4 devices, which do not divide the heads of k, 2": {"q_spec": P(None, None, ("x", "y"))},
        "2 devices, which do not divide the queries, 29": {"q_spec": P(None, "x")},
        "different masks": {
            "q_spec": P(None, None, "x"), "mask": per_head([causal(), causal(), full(), full()]),
        },
        "whole sequences": {"q_spec": P(None, "x"), "span": jnp.ones(4)},
        "names 'z'; the mesh has the axes": {"q_spec": P("z")},
        "kv_spec .* 5 entries, the array has 4": {"q_spec": P(), "kv_spec": P(*[None] * 5)},
        "leaves an axis open": {"q_spec": P(P.UNCONSTRAINED)},
    }.items():  # fmt: skip
        length = 29 if "queries" in message else 30
        with pytest.raises(ValueError, match=message):
            attention(*(x[:, :length] for x in (q, k, v)), **options)


def test_traced_numbers_in_a_ring():
    """A scale has its gradient; a cap would have none, and is refused."""
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
    x = jnp.asarray(cases.operands(5, queries=32)[0])
    place = put(mesh, x, P(None, "x"))

    def loss(x, scale, **told):
        return (attention(x, x, x, scale=scale, soft_cap=2.0, **told) ** 2).sum()

    with jax.set_mesh(mesh):
        told = {"q_spec": P(None, "x")}
        got = jax.jit(jax.grad(functools.partial(loss, **told), (0, 1)))(place, 0.3)
        with pytest.raises(NotImplementedError, match="positions are split: soft_cap must be"):
            jax.jit(lambda x, cap: attention(x, x, x, soft_cap=cap, **told))(place, 2.0)
    for one, want in zip(got, jax.grad(loss, (0, 1))(x, 0.3), strict=True):
        cases.assert_close(one, want, "float32", cases.GRADIENT_TOLERANCE)
