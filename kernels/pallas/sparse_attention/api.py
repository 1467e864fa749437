"""Sparse attention: one call for every mask, on whatever chip the operands are."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxcomp.kernels import arguments, chips, implementations, meshes
from jaxcomp.kernels.sparse_attention import (
    cache_sharding,
    checks,
    decode,
    gpu,
    gpu_decode,
    reference,
    rows,
    sharding,
    tpu,
    tpu_decode,
    tpu_parts,
    xla,
)
from jaxcomp.kernels.sparse_attention.masks import causal, full
from jaxcomp.kernels.sparse_attention.rules import Mask
from jaxcomp.kernels.sparse_attention.schedule import schedule

# Where more of the blocks than this are listed, gathering them costs more than the whole matrix.
DENSE_FROM = 0.75
_BY_NAME = "it was never run on a GPU; ask for it by name"


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask | None = None,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
    segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    span: jax.Array | None = None,
    span_ramp: float = 32.0,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    block_q: int | None = None,
    block_k: int | None = None,
    return_logsumexp: bool = False,
    implementation: str | None = None,
    interpret: Any = False,
    q_spec: PartitionSpec | None = None,
    kv_spec: PartitionSpec | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attention that computes only the blocks that the mask leaves.

    Args:
      q: queries (batch, queries, heads, head_dim), float32, bfloat16 or float16.
      k: keys (batch, keys, kv_heads, head_dim) of q's dtype, or int8 or fp8 with ``k_scale``;
        each key head serves ``heads // kv_heads`` query heads.
      v: values (batch, keys, kv_heads, value_dim) of q's dtype, or int8 or fp8 with ``v_scale``.
      mask: which query looks at which key; ``causal()`` if None. See ``masks``.
      scale: of the products; ``head_dim ** -0.5`` if None. It may be traced, and has a gradient.
      soft_cap: bound c of the scores, ``c tanh(s / c)``. Traced, it is left to XLA, like
        ``span_ramp``; where positions are split it must be known.
      segment_ids: int (batch, queries): queries look at keys of their own segment only. Negative
        ids are padding, which looks at nothing and is not looked at.
      kv_segment_ids: int (batch, keys); ``segment_ids`` if None.
      span: float (heads,), the learned reach z of each head's adaptive span (arXiv 1905.07799).
      span_ramp: distance over which a span fades.
      k_scale: float (batch, keys, kv_heads): a key is ``k * k_scale``. A constant, like the codes
        that it scales: they have no gradient.
      v_scale: float (batch, keys, kv_heads), likewise.
      block_q: queries in a block, a multiple of 128; the implementation's choice if None.
      block_k: keys in a block, likewise.
      return_logsumexp: also return the log-sum-exps of the scores, which have a gradient too.
      implementation: "xla", "mosaic_tpu", "mosaic_gpu", or None for the best that fits. The kernel
        for GPUs was never run on one: it is chosen by its name only.
      interpret: run the kernel interpreted: False, ``pltpu.InterpretParams(..)``, or
        ``plgpu.InterpretGPUParams(..)`` for "mosaic_gpu".
      q_spec: mesh axes of q, on a mesh of Auto axes; Explicit ones are seen. Batch and heads may be
        split over any, positions over one: keys and values then go round in a ring. Without it XLA
        does it, all sequences and heads at once; split positions it brings to every device.
      kv_spec: mesh axes of k and v; those of q if None. Heads of k may be whole where those of q
        are split.

    Returns:
      Outputs (batch, queries, heads, value_dim) of q's dtype. A query that may look at nothing gets
      zeros and gives no gradient. With ``return_logsumexp`` also float32 (batch, heads, queries),
      -inf for such a query.

    Raises:
      ValueError: shapes that do not fit together, or are split in ways that do not; numbers out of
        range.
      TypeError: dtypes that do not, or what is no array or mask.
      Unsupported: no implementation, or not the one asked for, takes these operands.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxcomp.kernels.sparse_attention import attention, global_, window
      >>> x = jnp.ones((1, 300, 2, 64))
      >>> attention(x, x, x, window(64) | global_(8)).shape
      (1, 300, 2, 64)

    Source: FlashAttention-2, arXiv 2307.08691.
    """
    mask = causal() if mask is None else mask
    if segment_ids is not None and kv_segment_ids is None:
        kv_segment_ids = segment_ids
    checks.check(
        q,
        k,
        v,
        mask,
        segment_ids=segment_ids,
        kv_segment_ids=kv_segment_ids,
        span=span,
        k_scale=k_scale,
        v_scale=v_scale,
        blocks={"block_q": block_q, "block_k": block_k},
    )
    numbers = checks.numbers(q, scale, soft_cap, span_ramp, span)
    operands = {
        "q": q,
        "k": k,
        "v": v,
        "segment_ids": segment_ids,
        "kv_segment_ids": kv_segment_ids,
        "span": span,
        "k_scale": k_scale,
        "v_scale": v_scale,
    }
    (operands,) = meshes.vary_alike({n: x for n, x in operands.items() if x is not None})
    place = sharding.placement(q, k, mask, span, q_spec, kv_spec)
    if place is not None and place.sequence:
        # The ring has a derivative of its own, of its operands alone.
        if reason := checks.constants(soft_cap=numbers["soft_cap"]):
            raise implementations.Unsupported(f"attention whose positions are split: {reason}")
        if arguments.is_traced(numbers["scale"]):
            operands["q"], numbers["scale"] = tpu.scaled(
                operands["q"], numbers["scale"], numbers["soft_cap"]
            )
    run = functools.partial(
        _run,
        logsumexp=return_logsumexp or place is not None,
        blocks=(block_q, block_k),
        implementation=implementation,
        interpret=interpret,
        **numbers,
    )
    if place is None:
        out, lse = run(operands, mask)
    else:
        out, lse = sharding.attention(run, operands, mask, place)
    return (out, lse) if return_logsumexp else out


def _run(operands, mask, *, blocks, implementation, interpret, logsumexp, **options):
    """Outputs and log-sum-exps from operands that are at hand, by what fits them best."""
    q, k, v = (operands[name] for name in "qkv")
    several = chips.shared_by_many(q, k, v)
    numbers = {name: options[name] for name in ("soft_cap", "span_ramp")}
    on_tpu = several or tpu.unfit(q, k, v, chips.chip_of(q, k, v), interpret)
    on_tpu, parts = on_tpu or checks.constants(**numbers), None
    if not on_tpu and implementation not in ("xla", "mosaic_gpu"):
        parts, on_tpu = tpu_parts.plan(q, k, mask, *blocks, span="span" in operands)
    on_gpu = several or _not_on_gpu(q, k, v, blocks, implementation, interpret)
    on_gpu = on_gpu or checks.constants(**numbers, scale=options["scale"])
    reasons = {"mosaic_tpu": on_tpu, "mosaic_gpu": on_gpu, "xla": None}
    chosen = implementations.choose(
        f"attention of q {jnp.dtype(q.dtype)}{q.shape} and k {jnp.dtype(k.dtype)}{k.shape}",
        reasons,
        implementation,
    )
    if chosen == "mosaic_gpu":
        out, lse = gpu.attention(**operands, **options, mask=mask, interpret=interpret)
    elif chosen == "mosaic_tpu":
        options |= {"interpret": interpret, "logsumexp": logsumexp}
        out, lse = tpu_parts.attention(parts, **operands, **options)
    else:
        out, lse = _xla(operands, mask, blocks, several is not None, options)
    return implementations.noted(out, "attention", chosen, reasons), lse


def _not_on_gpu(q, k, v, blocks, implementation, interpret) -> str | None:
    reason = gpu.unfit(q, k, v, chips.H100 if interpret else chips.chip_of(q, k, v), blocks)
    return reason or (None if implementation else _BY_NAME)


def problems(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    *,
    q_spec: PartitionSpec | None = None,
    kv_spec: PartitionSpec | None = None,
) -> dict[str, str | None]:
    """Why ``attention`` would leave out each of its implementations, before it is called.

    Args:
      q: as for ``attention``, like all others.
      k: likewise.
      v: likewise.
      mask: likewise.
      q_spec: likewise.
      kv_spec: likewise.

    Returns:
      Name -> reason, None where it would take it; best first, "xla" among them.
    """
    try:
        place = sharding.placement(q, k, mask, None, q_spec, kv_spec)
    except ValueError as error:
        reason = str(error)
        return {"mosaic_tpu": reason, "mosaic_gpu": reason, "xla": None}
    chip = chips.chip_of(q, k, v)
    several = chips.shared_by_many(q, k, v) if place is None else None
    if place is not None:
        q, k, v, mask = sharding.one_device(q, k, v, mask, place)
    on_tpu = several or tpu.unfit(q, k, v, chip, False) or tpu_parts.plan(q, k, mask)[1]
    on_gpu = several or gpu.unfit(q, k, v, chip, (None, None)) or _BY_NAME
    return {"mosaic_tpu": on_tpu, "mosaic_gpu": on_gpu, "xla": None}


def _xla(operands, mask, blocks, at_once, options):
    """What XLA computes: the listed blocks, or all of them where there are few others."""
    q, k = operands["q"], operands["k"]
    block_q, block_k = (block or 128 for block in blocks)
    listed = schedule(mask, q.shape[2], q.shape[1], k.shape[1], block_q, block_k)
    if listed.density > DENSE_FROM or listed.row_blocks * listed.column_blocks < 4:
        return reference.attention(**operands, **options, mask=mask)
    options = options | {"blocks": listed, "block_q": block_q, "block_k": block_k}
    return xla.attention(**operands, **options, at_once=at_once)


def decode_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    mask: Mask | None = None,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
    segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    span: jax.Array | None = None,
    span_ramp: float = 32.0,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    layer: jax.Array | int | None = None,
    finite: bool = False,
    block_k: int | None = None,
    return_logsumexp: bool = False,
    implementation: str | None = None,
    interpret: Any = False,
    q_spec: PartitionSpec | None = None,
    kv_spec: PartitionSpec | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attention of the newest tokens to a cache that is filled up to a length.

    Args:
      q: queries (batch, queries, heads, head_dim): the last tokens of each sequence, few of them.
      k: cached keys (batch, capacity, kv_heads, head_dim) of q's dtype, or int8 or fp8 with
        ``k_scale``, the queries' own among them. Codes of e4m3 that are not numbers, which
        quantizing to it gives of no numbers, may be read as 480 and -480.
      v: cached values (batch, capacity, kv_heads, value_dim), likewise.
      lengths: int (batch,), tokens in the cache; query ``i`` is at ``length - queries + i``.
      mask: any mask, of ``capacity`` positions; ``causal()`` if None. Queries never look beyond the
        length. Only the blocks that a row of the mask leaves are read. ``random()`` draws among the
        blocks of the capacity: to prefill with the same draw, bind the mask to it,
        ``mask.bind(capacity, capacity)``, and use that for both.
      scale: of the products; ``head_dim ** -0.5`` if None. Numbers that are traced are left to XLA.
      soft_cap: bound of the scores.
      segment_ids: int (batch, queries): queries look at keys of their own segment only, negative
        ones at nothing.
      kv_segment_ids: int (batch, capacity), given with ``segment_ids``.
      span: float (heads,), the reach z of each head's adaptive span (arXiv 1905.07799).
      span_ramp: distance over which a span fades.
      k_scale: float (batch, capacity, kv_heads).
      v_scale: float (batch, capacity, kv_heads).
      layer: which one to read of a cache of several layers, from 0: k, v and their scales then have
        an axis of layers in front. The kernel for TPUs reads it where it is; a slice would be a
        copy.
      finite: whether what the cache holds past a length is finite, as in one that began as zeros.
        Otherwise XLA's form replaces it, and may copy all layers of a cache for that.
      block_k: keys in a block, a multiple of 128; chosen if None, and on a GPU.
      return_logsumexp: also return the log-sum-exps of the scores, by which results of parts of a
        cache can be merged.
      implementation: "xla", "mosaic_tpu", "mosaic_gpu", or None for the best that fits. The kernel
        for GPUs was never run on one: it is chosen by its name only.
      interpret: run the kernel interpreted: False, ``pltpu.InterpretParams(..)``, or
        ``plgpu.InterpretGPUParams(..)`` for "mosaic_gpu".
      q_spec: mesh axes of q, on a mesh of Auto axes; Explicit ones are seen. Batch and heads may be
        split; those of the cache's batch and heads if None.
      kv_spec: mesh axes of k, v and their scales; those of q if None. The cache may be split along
        its length: each device attends to its own part, and the results are merged exactly.
        Heads of k may be whole where those of q are split.

    Returns:
      Outputs (batch, queries, heads, value_dim) of q's dtype. The kernels have no gradients. With
      ``return_logsumexp`` also float32 (batch, heads, queries), -inf for a query that looks at
      nothing.

    Raises:
      ValueError: shapes that do not fit together, or are split in ways that do not; numbers out of
        range.
      TypeError: dtypes that do not, or what is no array or mask.
      Unsupported: no implementation, or not the one asked for, takes these operands.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxcomp.kernels.sparse_attention import decode_attention
      >>> cache = jnp.ones((2, 256, 2, 64))
      >>> decode_attention(jnp.ones((2, 1, 4, 64)), cache, cache, jnp.array([7, 256])).shape
      (2, 1, 4, 64)
    """
    mask = causal() if mask is None else mask
    layers = None
    if layer is not None:
        layer = checks.layer_index(layer, k)
        layers = {"k": k, "v": v, "k_scale": k_scale, "v_scale": v_scale}
        k, v, k_scale, v_scale = checks.one_layer(layers, layer)
    small = {
        "segment_ids": segment_ids,
        "kv_segment_ids": kv_segment_ids,
        "span": span,
        "k_scale": k_scale,
        "v_scale": v_scale,
    }
    capacity = k.shape[1] if getattr(k, "ndim", 0) == 4 else None
    checks.check(
        q,
        k,
        v,
        mask,
        **small,
        positions=capacity,
        blocks={"block_k": block_k},
    )
    numbers = checks.numbers(q, scale, soft_cap, span_ramp, span)
    if segment_ids is not None and kv_segment_ids is None:
        raise ValueError("segment_ids are given without kv_segment_ids, those of the cache")
    checks.check_lengths(lengths, q)
    operands = {"q": q, "k": k, "v": v, "lengths": lengths}
    operands |= {name: x for name, x in small.items() if x is not None}
    run = functools.partial(
        _decode,
        capacity=capacity,
        block_k=block_k,
        implementation=implementation,
        interpret=interpret,
        finite=finite,
        **numbers,
    )
    mask = mask.bind(capacity, capacity)
    place = cache_sharding.placement(q, k, mask, q_spec, kv_spec)
    if layers is not None and cache_sharding.reads_layers(q, place):
        operands |= {name: layers[name] for name in ("k", "v")}
        operands["layer"] = layer
    (operands,) = meshes.vary_alike(operands)
    if place is None:
        out, lse = run(operands, mask, 0, q.dtype)
    else:
        out, lse = cache_sharding.attention(run, operands, mask, place)
    return (out, lse) if return_logsumexp else out


def _decode(operands, mask, start, out_dtype, *, capacity, block_k, implementation, interpret,
            span_ramp, finite, **options):  # fmt: skip
    """Outputs and log-sum-exps from a cache, or the part from ``start`` on, that is at hand."""
    operands = dict(operands)
    layer, held = operands.pop("layer", None), {name: operands[name] for name in "kv"}
    if layer is not None:
        operands["k"], operands["v"] = checks.one_layer(held, layer)
    q, k, v = (operands[name] for name in "qkv")
    chip, several = chips.chip_of(q, k, v), chips.shared_by_many(q, k, v)
    rule = rows.is_rule(mask, "segment_ids" in operands)
    traced = checks.constants(
        scale=options["scale"], soft_cap=options["soft_cap"], span_ramp=span_ramp
    )
    on_tpu = several or tpu_decode.unfit(q, k, v, chip, interpret, rule) or traced
    on_gpu = several or gpu_decode.unfit(
        q, k, v, chips.H100 if interpret else chip, block_k, rule, "span" in operands
    )
    on_gpu = on_gpu or traced
    if implementation is None:
        on_gpu = on_gpu or _BY_NAME
    reasons = {"mosaic_tpu": on_tpu, "mosaic_gpu": on_gpu, "xla": None}
    chosen = implementations.choose(
        f"decode_attention of q {jnp.dtype(q.dtype)}{q.shape} and k {jnp.dtype(k.dtype)}{k.shape}",
        reasons,
        implementation,
    )
    options |= {"mask": mask, "out_dtype": out_dtype}
    operands["start"] = start
    if chosen == "mosaic_gpu":
        kernel = functools.partial(gpu_decode.attention, **options, interpret=interpret)
        out, lse = _without_gradient(chosen, kernel, operands)
    elif chosen == "mosaic_tpu":
        options |= {"whole_capacity": capacity, "block_k": block_k, "interpret": interpret}
        options |= {"span_ramp": span_ramp, "chip": chip}
        kernel = functools.partial(tpu_decode.attention, **options)
        out, lse = _without_gradient(chosen, kernel, operands | held | {"layer": layer})
    else:
        out, lse = decode.plain(**operands, **options, span_ramp=span_ramp, finite=finite)
    return implementations.noted(out, "decode_attention", chosen, reasons), lse


def _without_gradient(name, kernel, operands):
    """Runs a kernel for decoding on operands by name."""
    told = (
        f"decode_attention by {name} has no gradient: train with attention(), or use "
        'decode_attention(.., implementation="xla")'
    )
    return implementations.without_gradient(lambda operands: kernel(**operands), told)(operands)


def attention_fn(mask: Mask | None = None, **options: Any) -> Callable[..., jax.Array]:
    """The function that Flax's multi-head attention takes as its ``attention_fn``.

    Args:
      mask: which query looks at which key; ``full()`` if None.
      **options: of ``attention``.

    Returns:
      A function of query, key and value (.., length, heads, head_dim), with Flax's keywords. A
      ``mask`` of Flax, bool or of zeros and ones, is taken where it is the same for all queries and
      heads, (.., 1, 1, keys), as the padding of keys; ``is_causal`` adds ``causal()``. One query
      with such a mask is taken for a step of Flax's ``decode=True``: its position is that of the
      last key that the mask allows, later keys are not looked at, and ``decode_attention`` runs.
      What it cannot honour (another mask array, a bias, dropout, weights to be recorded) is a
      ValueError.

    Example:
      >>> from flax import nnx
      >>> from jaxcomp.kernels.sparse_attention import attention_fn, window
      >>> layer = nnx.MultiHeadAttention(
      ...     4, 32, attention_fn=attention_fn(window(128)), decode=False, rngs=nnx.Rngs(0)
      ... )
    """
    own = full() if mask is None else mask
    known = inspect.signature(attention).parameters.keys() - {"return_logsumexp"}
    unknown = options.keys() - known
    if unknown:
        raise TypeError(f"attention_fn has no option {', '.join(sorted(unknown))}")

    # Flax passes the keywords that it finds in the signature, and only those.
    def apply(
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        bias: jax.Array | None = None,
        mask: jax.Array | None = None,
        *,
        dropout_rng: jax.Array | None = None,
        dropout_rate: float = 0.0,
        broadcast_dropout: bool = True,
        deterministic: bool = False,
        dtype: jax.typing.DTypeLike | None = None,
        precision: Any = None,
        module: Any = None,
        is_causal: bool = False,
    ) -> jax.Array:
        # Products are summed in float32 at least: no precision asks for more.
        del dropout_rng, broadcast_dropout, precision
        if bias is not None:
            raise ValueError(f"sparse attention takes no bias, but one of {bias.shape} is given")
        if dropout_rate > 0 and not deterministic:
            raise ValueError(
                f"sparse attention has no dropout, but dropout_rate is {dropout_rate}; set it to 0"
            )
        if module is not None:
            raise ValueError("sparse attention makes no weights to record; use sow_weights=False")
        lead = query.shape[:-3]
        query, key, value = (
            x.reshape(-1, *x.shape[-3:]).astype(dtype or x.dtype) for x in (query, key, value)
        )
        rule = own & causal() if is_causal else own
        if mask is None:
            out = attention(query, key, value, rule, **options)
        else:
            real = _real_keys(mask, lead, query.shape[1], key.shape[1])
            padded = {
                "segment_ids": jnp.zeros(query.shape[:2], jnp.int32),
                "kv_segment_ids": jnp.where(real, 0, -1),
            }
            call = _flax_step if query.shape[1] == 1 else attention
            out = call(query, key, value, rule, **padded, **options)
        return out.reshape(*lead, *out.shape[1:])

    return apply


def _flax_step(q, k, v, mask, *, kv_segment_ids, block_q=None, **options):
    """Attention of one query, whose position is that of the last key that is no padding."""
    del block_q
    lengths = jnp.max(jnp.where(kv_segment_ids < 0, 0, jnp.arange(1, k.shape[1] + 1)), axis=1)
    return decode_attention(q, k, v, lengths, mask, kv_segment_ids=kv_segment_ids, **options)


def _real_keys(mask, lead, queries, keys) -> jax.Array:
    """Which keys are no padding, bool (batch, keys), from a mask of Flax."""
    whole = (
        "sparse attention takes the mask given to attention_fn(), and an array only as padding of "
        f"keys, (.., 1, 1, {keys}); "
    )
    if mask.ndim != len(lead) + 3 or mask.shape[-3:] != (1, 1, keys):
        what = f"this one is {mask.dtype}{mask.shape}"
        if mask.shape[-2:] == (queries, keys):
            what += (
                ", of queries by keys. If it is causal, give the rule, attention_fn(causal()); if "
                "it is padding, give that of the keys alone, such as "
                "make_attention_mask(jnp.ones((batch, 1)), real)"
            )
        raise ValueError(whole + what)
    signed = mask.dtype != bool and not isinstance(mask, jax.core.Tracer)
    if signed and np.min(mask, initial=0) < 0:
        raise ValueError(
            f"{whole}this one is {mask.dtype}{mask.shape} with negative entries, as what is added "
            "to scores has: it must hold True or 1 for keys that are looked at, False or 0 for "
            "others"
        )
    return jnp.broadcast_to(mask != 0, (*lead, 1, 1, keys)).reshape(-1, keys)


__all__ = ["attention", "attention_fn", "decode_attention", "problems"]
