"""Sixteen layers, scanned and unrolled, compressed on meshes of eight devices.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m tests.mesh_layers

For tests/test_mesh_layers.py. Prints one line of JSON: for each recipe, mesh and kind of model, how
far the compressed arrays are from those of the scanned model on the default device.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

import jaxcomp as jc
from jaxcomp import formats

LAYERS, WIDTH = 16, 16
MESHES = {"1": (1, 1), "2x4": (2, 4), "4x2": (4, 2), "8x1": (8, 1)}
FORMAT = formats.Int(bits=4, group_size=8)  # Scales in float32, so that rounding would show.


def block(x, p):
    """A layer with a residual; its two weights have the same shape, so compile once."""
    y = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * p["gain"]
    return x + jax.nn.relu(y @ p["up"]) @ p["down"], None


def scanned(params, x):
    """All layers under one scan."""
    return jax.lax.scan(block, x, params["blocks"])[0]


def unrolled(params, x):
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
    split = [jax.tree.map(lambda a, t=t: a[t], stacked) for t in range(LAYERS)]
    models = {"scanned": (scanned, {"blocks": stacked}), "unrolled": (unrolled, {"blocks": split})}
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
    print(json.dumps(found))


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
    """The share of codes that differ, and the largest relative difference of scales.

    A code that lies at a tie may fall to either side, and GPTQ corrects the later columns of its
    row for it, their scales too; such rows are counted as codes, and left out of the scales.
    """
    codes, scales, count = 0, 0.0, 0
    for name, (code, scale) in expected.items():
        other, theirs = found[name]
        assert other.shape == code.shape and other.dtype == code.dtype
        assert theirs.shape == scale.shape and theirs.dtype == scale.dtype == np.float32
        same = (code == other).all(-1)[:, None]  # (layers, 1, out)
        codes, count = codes + int((code != other).sum()), count + code.size
        scales = max(scales, float((np.abs(theirs / scale - 1) * same).max()))
    return {"codes": codes / count, "scales": scales}


if __name__ == "__main__":
    main()
