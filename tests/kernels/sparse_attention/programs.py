"""Programs that are compiled for TPUs ahead of time: Llama-3-8B's heads unless told otherwise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention
from jaxcomp.kernels.sparse_attention import (
    attention,
    blocks,
    causal,
    chunked,
    decode_attention,
    full,
    global_,
    per_head,
    random,
    strided,
    window,
)

BLOCK = 512
# A tenth of the blocks of 16k queries and keys, wherever they are.
TENTH = np.random.default_rng(0).permutation(1024).reshape(32, 32) < 102
MASKS = {
    "full": full(),
    "causal": causal(),
    "window": window(1024, causal=True),
    "tenth": blocks(TENTH, BLOCK),
    "strided": strided(192),
    "chunked": chunked(3000) & causal(),
    "bigbird": window(256) | global_(64) | random(3, block_size=64),
    "heads": per_head([causal(), window(512)] * 16),
}


def attend(
    mesh,
    mask="causal",
    queries=2048,
    batch=1,
    heads=32,
    kv_heads=8,
    dim=128,
    dtype="bfloat16",
    cache=None,
    gradient="",
    segments=False,
    span=False,
    soft_cap=None,
    specs=None,
    chip=None,
    **options,
):
    """Attention, or its gradients, as a function and the shapes of its arguments.

    ``specs`` are those of q and of k and v, as lists; ``gradient`` True, or of which operands.
    """
    del chip
    q_spec, kv_spec = (_spec(s) for s in specs or ((), ()))
    if specs:
        options = {**options, "q_spec": q_spec, "kv_spec": kv_spec}

    def shape(*sizes, of=dtype):
        spec = q_spec if sizes[2:3] == (heads,) else kv_spec
        place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec[: len(sizes)]))
        return jax.ShapeDtypeStruct(sizes, jnp.dtype(of), sharding=place)

    operands = {
        "q": shape(batch, queries, heads, dim),
        "k": shape(batch, queries, kv_heads, dim, of=cache or dtype),
        "v": shape(batch, queries, kv_heads, dim, of=cache or dtype),
    }
    if cache:
        scale = shape(batch, queries, kv_heads, of="float32")
        operands |= {"k_scale": scale, "v_scale": scale}
    if segments:
        operands["segment_ids"] = shape(batch, queries, of="int32")
    if span:
        operands["span"] = shape(heads, of="float32")
    run = functools.partial(
        attention, mask=MASKS[mask], soft_cap=soft_cap, implementation="mosaic_tpu", **options
    )
    names = list(operands)
    if not gradient:
        return (lambda *xs: run(**dict(zip(names, xs, strict=True)))), list(operands.values())
    if gradient is True:
        gradient = ["q", "span"] if cache else ["q", "k", "v", "span"]
    wanted = [i for i, n in enumerate(names) if n in gradient]

    def loss(*xs):
        return run(**dict(zip(names, xs, strict=True))).astype(jnp.float32).sum()

    return jax.grad(loss, argnums=wanted), list(operands.values())


def decode(
    mesh,
    capacity=16384,
    batch=8,
    queries=1,
    heads=32,
    kv_heads=8,
    dim=128,
    dtype="bfloat16",
    cache=None,
    mask="causal",
    segments=False,
    span=False,
    specs=None,
    layers=None,
    chip=None,
    **options,
):
    """Decoding, as a function and the shapes of its arguments.

    ``specs`` are those of q, or None, and of the cache, as lists; ``layers`` of a cache of several.
    """
    del chip
    q_spec, kv_spec = (None if s is None else _spec(s) for s in specs or (None, None))
    told = {"q_spec": q_spec, "kv_spec": kv_spec} if specs else {}
    kv_spec = kv_spec or jax.sharding.PartitionSpec()
    if q_spec is None:
        q_spec = jax.sharding.PartitionSpec(*kv_spec[:1])

    def shape(*sizes, of=dtype, spec=kv_spec):
        place = jax.sharding.NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(sizes, jnp.dtype(of), sharding=place)

    kv = shape(batch, capacity, kv_heads, dim, of=cache or dtype)
    query = shape(batch, queries, heads, dim, spec=q_spec)
    arguments = {"q": query, "k": kv, "v": kv}
    arguments["lengths"] = shape(batch, of="int32", spec=jax.sharding.PartitionSpec())
    if cache:
        arguments["k_scale"] = shape(batch, capacity, kv_heads, of="float32")
        arguments["v_scale"] = arguments["k_scale"]
    if layers:
        stacked = jax.sharding.PartitionSpec(None, *kv_spec)
        for name in arguments.keys() - {"q", "lengths"}:
            one = arguments[name]
            arguments[name] = shape(layers, *one.shape, of=one.dtype, spec=stacked)
        arguments["layer"] = shape(of="int32", spec=jax.sharding.PartitionSpec())
    if segments:
        arguments["segment_ids"] = shape(batch, queries, of="int32", spec=q_spec)
        arguments["kv_segment_ids"] = shape(batch, capacity, of="int32")
    if span:
        arguments["span"] = shape(heads, of="float32", spec=jax.sharding.PartitionSpec())
    run = functools.partial(
        decode_attention, mask=MASKS[mask], implementation="mosaic_tpu", **told, **options
    )
    return (lambda *xs: run(**dict(zip(arguments, xs, strict=True)))), list(arguments.values())


def splash(
    mesh, mask, queries, heads, kv_heads, dim, size, gradient="", chip=None, dtype="bfloat16"
):
    """jax's own kernel for causal masks and windows, in blocks of this size, or its gradients."""
    del chip, kv_heads
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shape = queries, queries
    one = {
        "causal": splash_attention.CausalMask(shape),
        "window": splash_attention.LocalMask(shape, (1023, 0), 0),
    }[mask]
    sides = ("q", "kv", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    sizes = {f"block_{side}": size for side in sides[: None if gradient else 2]}
    run = splash_attention.make_splash_mha_single_device(
        splash_attention.MultiHeadMask([one] * heads),
        block_sizes=splash_attention.BlockSizes(**sizes),
    )
    x = jax.ShapeDtypeStruct((heads, queries, dim), jnp.dtype(dtype), sharding=place)
    if not gradient:
        return run, [x, x, x]
    wanted = ["qkv".index(name) for name in gradient]
    return jax.grad(lambda *xs: run(*xs).astype(jnp.float32).sum(), argnums=wanted), [x, x, x]


def _spec(axes):
    return jax.sharding.PartitionSpec(*(tuple(a) if isinstance(a, list) else a for a in axes))
