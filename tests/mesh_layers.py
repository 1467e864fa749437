"""Layers, scanned and unrolled, compressed on meshes of eight devices.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m tests.mesh_layers

For tests/test_mesh_layers.py. Prints one line of JSON: for each recipe, mesh and kind of model, how
far the compressed arrays are from those of the scanned model on the default device. Sixteen layers
by RTN and GPTQ; two by what else searches, sums or masks, each algorithm on a weight of its own.
"""

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

import jaxcomp as jc
from jaxcomp import formats

LAYERS, FEW, WIDTH, TOKENS = 16, 2, 16, 80
# The bound of sums over tokens and then columns, from layer to layer, in another order.
ROUNDING = (TOKENS + WIDTH) * LAYERS * float(np.finfo(np.float32).eps)
MESHES = {"1": (1, 1), "2x4": (2, 4), "4x2": (4, 2), "8x1": (8, 1)}
FORMAT = formats.Int(bits=4, group_size=8)  # Scales in float32, so that rounding would show.
PRESETS = jc.presets
MIXED = {  # By weight; the clips of AWQ and of "out" are searched for.
    "awq": PRESETS.w4a16_awq(group_size=8, include=["*awq"]),
    "smooth": PRESETS.w8a8_smoothquant(granularity="tensor", dynamic=False, include=["*smooth"]),
    "joint": PRESETS.sparsegpt_int4(group_size=8, include=["*joint"]),
    "half": PRESETS.sparsegpt(sparsity=0.5, include=["*half"]),
    "pairs": PRESETS.sparsegpt(n=2, m=4, include=["*pairs"]),
    "out": PRESETS.w4a16_rtn(group_size=8, clipping="mse", include=["*out"]),
}


def block(x, p):
    """A layer with a residual; its two weights have the same shape, so compile once."""
    y = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * p["gain"]
    return x + jax.nn.relu(y @ p["up"]) @ p["down"], None


def mixed_block(x, p):
    """A layer of six weights of one shape, each with an input of its own."""
    for gain, first, second in (
        ("gain", "awq", "joint"),
        ("gain2", "smooth", "half"),
        ("gain3", "pairs", "out"),
    ):
        x, _ = block(x, {"gain": p[gain], "up": p[first], "down": p[second]})
    return x, None


def scanned(params, x, block=block):
    """All layers under one scan."""
    return jax.lax.scan(block, x, params["blocks"])[0]


def unrolled(params, x, block=block):
    """Layer after layer, each with weights of its own."""
    for p in params["blocks"]:
        x, _ = block(x, p)
    return x


def main() -> None:
    """Compresses on one device and on every mesh."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
    stacked = {
        "gain": 1 + 0.1 * normal(LAYERS, WIDTH),
        "up": 0.3 * normal(LAYERS, WIDTH, WIDTH),
        "down": 0.1 * normal(LAYERS, WIDTH, WIDTH),
    }
    data = [(normal(8, 5, WIDTH),) for _ in range(2)]
    models = {"scanned": (scanned, {"blocks": stacked}), "unrolled": (unrolled, split(stacked))}
    found = []
    for recipe in (
        jc.Recipe(steps=(jc.quantization.RTN(format=FORMAT),)),
        jc.Recipe(steps=(jc.quantization.GPTQ(format=FORMAT),)),
    ):
        expected = codes_and_scales(jc.compress(*models["scanned"], recipe, data, progress=False))
        for mesh, shape in MESHES.items():
            for kind, (apply, params) in models.items():
                result = jc.compress(
                    apply, params, recipe, data, mesh=make_mesh(shape), progress=False
                )
                row = {"step": type(recipe.steps[0]).__name__, "mesh": mesh, "kind": kind}
                found.append(row | compare(codes_and_scales(result), expected))
    print(json.dumps(found + mixed(normal, data)))


def mixed(normal, data) -> list[dict]:
    """By a recipe of every other algorithm; each larger mesh sees one of the two kinds of model."""
    stacked = {name: 0.2 * normal(FEW, WIDTH, WIDTH) for name in MIXED}
    stacked |= {name: 1 + 0.1 * normal(FEW, WIDTH) for name in ("gain", "gain2", "gain3")}
    recipe = jc.Recipe(steps=tuple(step for preset in MIXED.values() for step in preset.steps))
    kinds = {"scanned": (scanned, {"blocks": stacked}), "unrolled": (unrolled, split(stacked))}
    kinds = {
        k: (functools.partial(f, block=mixed_block), params) for k, (f, params) in kinds.items()
    }
    expected = leaves(jc.compress(*kinds["scanned"], recipe, data, progress=False))
    found = []
    for mesh, kind in (("2x4", "unrolled"), ("4x2", "scanned"), ("8x1", "unrolled")):
        on = make_mesh(MESHES[mesh])
        result = jc.compress(*kinds[kind], recipe, data, mesh=on, progress=False)
        for name, ours in leaves(result).items():
            differing = difference(ours, expected[name])
            found.append({"step": name, "mesh": mesh, "kind": kind, "differing": differing})
    return found


def split(stacked) -> dict:
    """The parameters of the unrolled model."""
    layers = len(jax.tree.leaves(stacked)[0])
    return {"blocks": [jax.tree.map(lambda a, t=t: a[t], stacked) for t in range(layers)]}


def leaves(result) -> dict[str, Any]:
    """The layers' leaves by name, each as a stack ``(layers, ..)`` whatever the model."""
    blocks = result.params["blocks"]
    if not isinstance(blocks, list):
        return {name: jax.tree.map(np.asarray, leaf) for name, leaf in blocks.items()}
    names = blocks[0]
    return {n: jax.tree.map(lambda *a: np.stack(a), *(b[n] for b in blocks)) for n in names}


def difference(ours, theirs) -> float:
    """The share of a leaf's numbers that are not the same: floats but for the rounding of sums.

    Where a weight falls to the other side of a tie, the later ones of its row may move with it.
    """
    differing, count = 0, 0
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        away = a != b
        if jnp.issubdtype(a.dtype, jnp.floating):
            a, b = a.astype(np.float32), b.astype(np.float32)
            away = np.abs(a - b) > ROUNDING * np.abs(b).max()
        differing, count = differing + int(away.sum()), count + away.size
    return differing / count


def make_mesh(shape):
    """A mesh of as many of the devices as its shape asks for."""
    devices = jax.devices()[: np.prod(shape)]
    return jax.make_mesh(shape, ("data", "model"), devices=devices, axis_types=(AxisType.Auto,) * 2)


def codes_and_scales(result) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Of ``up`` and ``down``: codes ``(layers, out, in)``, scales ``(layers, groups, out)``."""
    blocks = result.params["blocks"]
    found = {}
    for name in ("up", "down"):
        if isinstance(blocks, list):
            part = jax.tree.map(lambda *a: np.stack(a), *(b[name].parts[0] for b in blocks))
        else:
            part = blocks[name].parts[0]
        found[name] = (np.asarray(part.codes()), np.asarray(part.scale))
    return found


def compare(found, expected) -> dict:
    """The share of codes that differ, the largest relative difference of scales, rows that moved.

    A code that lies at a tie may fall to either side, and GPTQ corrects the later columns of its
    row for it, their scales too; such rows are counted as codes, and left out of the scales. So are
    all matrices after the first with such rows, of which it has few: they see other inputs.
    """
    codes, count, scales, moved = 0, 0, 0.0, 0
    for name, (code, scale) in expected.items():
        other, theirs = found[name]
        assert other.shape == code.shape and other.dtype == code.dtype
        assert theirs.shape == scale.shape and theirs.dtype == scale.dtype == np.float32
        codes, count = codes + int((code != other).sum()), count + code.size
    for layer in range(LAYERS):
        for name, (code, scale) in expected.items():  # In the order in which they are compressed.
            other, theirs = (array[layer] for array in found[name])
            same = (code[layer] == other).all(-1)  # (out,)
            if not moved:
                scales = max(scales, float((np.abs(theirs / scale[layer] - 1) * same).max()))
            moved = moved or int((~same).sum())
    return {"codes": codes / count, "scales": scales, "moved": moved}


if __name__ == "__main__":
    main()
