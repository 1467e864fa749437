"""A call of every operation, for tests of programs that any of them may be in."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxcomp.kernels.quantized_matmul import (
    grouped_quantized_matmul,
    layer_of,
    prepare,
    quantized_matmul,
)
from jaxcomp.kernels.sparse_attention import attention, decode_attention, random, window
from jaxcomp.kernels.sparse_matmul import block_sparse_matmul, nm_matmul

import jaxcomp as jc
from jaxcomp.formats import CompressedArray, Int, quantize
from tests.kernels.quantized_matmul import cases as quantized
from tests.kernels.sparse_attention import cases as attended
from tests.kernels.sparse_matmul import cases as sparse

P = PartitionSpec
K, N = 512, 256


@dataclasses.dataclass
class Case:
    """A call, and how its operands lie on a mesh of the axes "data" and "model".

    Attributes:
      call: takes the operands, with the keyword ``implementation``.
      operands: arrays, by name.
      specs: of the operands.
      out: spec of the result.
      wanted: operands with a gradient; of a part of a mesh it is the same as of the whole.
    """

    call: Callable[..., jax.Array]
    operands: dict[str, Any]
    specs: dict[str, Any]
    out: PartitionSpec
    wanted: tuple[str, ...]


def columns(rng, rows, dtype) -> Case:
    """Rows over "data", outputs over "model"."""
    case = quantized.make(rng, "int4", (N, K), 128, zeros=True)

    def call(x, codes, scales, zeros, bias, **options):
        return quantized_matmul(
            x, codes, scales, zeros, group_size=128, bias=bias, activation="gelu", **options
        )

    operands = {
        "x": quantized.rows(rng, (rows, K), dtype),
        "codes": case.codes,
        "scales": case.scales,
        "zeros": case.zeros,
        "bias": jnp.asarray(rng.normal(size=N), jnp.float32),
    }
    of_groups = P(None, "model")
    specs = {"x": P("data"), "codes": P("model"), "scales": of_groups, "zeros": of_groups}
    specs["bias"] = P("model")
    return Case(call, operands, specs, P("data", "model"), ("x", "scales", "zeros", "bias"))


def quantized_rows(rng, rows, dtype) -> Case:
    """A weight that all devices have."""
    case = quantized.make(rng, "int4", (N, K), 128)

    def call(x, x_scales, codes, scales, **options):
        options |= {"activation_dtype": "float8_e4m3fn", "x_scales": x_scales}
        return quantized_matmul(x, codes, scales, group_size=128, **options)

    operands = {
        "x": quantized.rows(rng, (rows, K), dtype),
        "x_scales": jnp.float32(0.25),
        "codes": case.codes,
        "scales": case.scales,
    }
    specs = {"x": P("data"), "x_scales": P(), "codes": P(), "scales": P()}
    return Case(call, operands, specs, P("data"), ("x",))


def codebook_of_a_layer(rng, rows, dtype) -> Case:
    """One of several layers, whose index all devices have."""
    case = quantized.make(rng, "codebook", (N, K), 128, stack=(2,), scale_dtype="bfloat16")
    weight = prepare(*case.arguments(), **case.options, chip="v5e")

    def call(x, weight, layer, **options):
        return quantized_matmul(x, layer_of(weight, layer), **options)

    operands = {"x": quantized.rows(rng, (rows, K), "bfloat16"), "weight": weight}
    operands["layer"] = jnp.int32(1)
    specs = {"x": P("data"), "weight": P(), "layer": P()}
    return Case(call, operands, specs, P("data"), ("x",))


def experts(rng, rows, dtype) -> Case:
    """Rows that all devices have, outputs over "model"."""
    case = quantized.make(rng, "codebook", (N, K), 128, stack=(3,))
    table = case.options.get("table", jnp.linspace(-1, 1, 16))

    def call(x, sizes, codes, scales, table, bias, **options):
        options |= {"format": "codebook", "group_size": 128, "activation": "silu"}
        return grouped_quantized_matmul(x, sizes, codes, scales, table=table, bias=bias, **options)

    operands = {
        "x": quantized.rows(rng, (rows, K), dtype),
        "sizes": jnp.array([rows // 2, 0, rows // 4]),
        "codes": case.codes,
        "scales": case.scales,
        "table": table,
        "bias": jnp.asarray(rng.normal(size=(3, N)), jnp.float32),
    }
    split = P(None, None, "model")
    specs = {"x": P(), "sizes": P(), "codes": P(None, "model"), "scales": split, "table": P()}
    specs["bias"] = P(None, "model")
    return Case(call, operands, specs, P(None, "model"), ("x", "scales", "table", "bias"))


def attending(rng, rows, dtype) -> Case:
    """Query heads over "model", the one head of keys on all of it."""
    del rows
    q, k, v = (jnp.asarray(x, dtype) for x in attended.operands(0, 2, 300, 300, 2, 1, 64))

    def call(q, k, v, segments, span, **options):
        mask = window(40) | random(1, block_size=64)
        return attention(q, k, v, mask, segment_ids=segments, span=span, **options)

    segments = jnp.asarray(np.repeat([[0, 1, -1]], 100, axis=1).repeat(2, 0))
    span = jnp.asarray([20.0, 60.0])
    operands = {"q": q, "k": k, "v": v, "segments": segments, "span": span}
    heads = P("data", None, "model")
    specs = {"q": heads, "k": P("data"), "v": P("data"), "segments": P("data"), "span": P("model")}
    return Case(call, operands, specs, heads, ("q", "k", "v", "span"))


def decoding(rng, rows, dtype) -> Case:
    """A cache of codes, sequences over "data" and heads over "model"."""
    del rows
    q, k, v = attended.operands(0, 2, 1, 304, 4, 2, 128)
    (k, k_scale), (v, v_scale) = (attended.quantized(x, "int8") for x in (k, v))
    cache = {"k": k, "v": v, "k_scale": k_scale, "v_scale": v_scale}
    cache = {name: jnp.stack([jnp.asarray(x)] * 2) for name, x in cache.items()}

    def call(q, implementation=None, **operands):
        # On GPUs one rule on positions.
        mask = window(40) if implementation == "mosaic_gpu" else window(40) | random(1)
        return decode_attention(q, mask=mask, implementation=implementation, **operands)

    operands = cache | {"q": jnp.asarray(q, dtype), "lengths": jnp.array([170, 300])}
    operands["layer"] = jnp.int32(1)
    heads = P("data", None, "model")
    specs = dict.fromkeys(cache, P(None, *heads)) | {"q": heads, "lengths": P("data")}
    return Case(call, operands, specs | {"layer": P()}, heads, ())


def blocks(rng, rows, dtype, values=None) -> Case:
    """Rows over "data", and a block-sparse weight that all devices have."""
    weight, _ = sparse.blocks(rng, (N, K), (128, 128), np.eye(2, 4), values or dtype)
    return _sparse(rng, rows, dtype, weight, block_sparse_matmul)


def two_of_four(rng, rows, dtype, values=None) -> Case:
    """Rows over "data", and a 2:4 weight that all devices have."""
    group_size = 512 if values else None
    weight, _ = sparse.nm(rng, (N, K), dtype=values or dtype, group_size=group_size)
    return _sparse(rng, rows, dtype, weight, nm_matmul)


def _sparse(rng, rows, dtype, weight, product) -> Case:
    name = "values" if weight.scales is None else "scales"

    def call(x, leaf, weight, bias, **options):
        return product(x, dataclasses.replace(weight, **{name: leaf}), bias, "silu", **options)

    operands = {
        "x": sparse.rows(rng, (rows, K), dtype),
        "leaf": getattr(weight, name),
        "weight": weight,
        "bias": jnp.asarray(rng.normal(size=N), dtype),
    }
    specs = {"x": P("data"), "leaf": P(), "weight": P(), "bias": P()}
    return Case(call, operands, specs, P("data"), ("x", "leaf", "bias"))


def dispatched(rng, rows, dtype) -> Case:
    """A compressed model inside of data-parallel code."""
    w = jnp.asarray(rng.normal(size=(N, K)), jnp.float32)
    leaf = CompressedArray.from_matrix(
        quantize(Int(4, 128), w), (K, N), jnp.dtype(dtype), (), (1,), (0,)
    )

    def call(x, w, **options):
        forced = "kernel" if options.get("implementation") else None
        apply = jc.dispatch(lambda p, x: jax.nn.relu(x @ p["w"]), forced)
        return apply({"w": w}, x)

    operands = {"x": quantized.rows(rng, (rows, K), dtype), "w": leaf}
    return Case(call, operands, {"x": P("data"), "w": P()}, P("data"), ("x",))


CASES = {
    "quantized_matmul, split outputs": columns,
    "quantized_matmul, quantized rows": quantized_rows,
    "quantized_matmul, one of several layers": codebook_of_a_layer,
    "grouped_quantized_matmul": experts,
    "attention": attending,
    "decode_attention": decoding,
    "block_sparse_matmul": blocks,
    "block_sparse_matmul, int8 values": functools.partial(blocks, values="int8"),
    "nm_matmul": two_of_four,
    "nm_matmul, int4 values": functools.partial(two_of_four, values="int4"),
    "dispatch": dispatched,
}

NOT_ON_GPUS = {
    "quantized_matmul, one of several layers": "its weight is prepared for TPUs",
    "block_sparse_matmul, int8 values": "there is no kernel for them",
}


def with_gradients(case: Case, run: Callable[[dict], jax.Array], operands: dict):
    """The result, and gradients of its sum with weights that differ."""

    def loss(wanted):
        y = run(operands | wanted)
        weights = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
        return (y.astype(jnp.float32) * weights).sum(), y

    wanted = {name: operands[name] for name in case.wanted}
    gradients, y = jax.grad(loss, has_aux=True)(wanted)
    return y, gradients
