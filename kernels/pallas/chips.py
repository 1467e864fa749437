"""What each chip's matrix unit multiplies, and how fast it reads: facts that kernels choose by.

Bandwidths and the arithmetic of the matrix units are the makers' published ones; clocks are the
ones that their published peak rates imply.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType


@dataclasses.dataclass(frozen=True)
class Chip:
    """A generation of accelerators, one core of it.

    Attributes:
      name: short name: "v5e", "v5p", "v6e", "7x", "h100", "cpu".
      platform: JAX's platform: "tpu", "gpu" or "cpu".
      products: dtypes that the matrix unit multiplies with themselves, by name.
      mxu: rows and columns of the matrix unit; 0 where that has no meaning.
      clock: cycles a second.
      bandwidth: bytes a second from the memory of one core.
      cores: of a device, which share the parallel part of a kernel's grid.
      vmem: bytes of a core's vector memory, of TPUs.
    """

    name: str
    platform: str
    products: frozenset[str]
    mxu: int = 0
    clock: float = 0.0
    bandwidth: float = 0.0
    cores: int = 1
    vmem: int = 0

    def multiplies(self, dtype: jax.typing.DTypeLike) -> bool:
        """Whether the matrix unit takes two operands of a dtype as they are."""
        return jax.numpy.dtype(dtype).name in self.products


_INTEGER = frozenset({"bfloat16", "int8", "int4"})
V5E = Chip("v5e", "tpu", _INTEGER, 128, 1.5e9, 819e9, vmem=128 << 20)
V5P = Chip("v5p", "tpu", _INTEGER, 128, 1.75e9, 2765e9 / 2, cores=2, vmem=64 << 20)
V6E = Chip("v6e", "tpu", _INTEGER, 256, 1.75e9, 1640e9, vmem=128 << 20)
V7X = Chip(
    "7x",
    "tpu",
    frozenset({"bfloat16", "float8_e4m3fn", "float8_e5m2"}),
    256,
    2.0e9,
    3690e9,
    vmem=64 << 20,
)
H100 = Chip(
    "h100",
    "gpu",
    frozenset({"bfloat16", "float16", "int8", "float8_e4m3fn", "float8_e5m2"}),
    clock=1.98e9,
    bandwidth=3352e9,
)
CPU = Chip("cpu", "cpu", frozenset({"float32", "float64", "int8"}))

# By JAX's ``device_kind``.
_KINDS = {
    "TPU v5 lite": V5E,
    "TPU v5e": V5E,
    "TPU v5": V5P,
    "TPU v5p": V5P,
    "TPU v6 lite": V6E,
    "TPU v6e": V6E,
    "TPU7x": V7X,
    "TPU v7x": V7X,
}
BY_NAME = {chip.name: chip for chip in (V5E, V5P, V6E, V7X, H100, CPU)}


def chip_of(*arrays: jax.Array) -> Chip | None:
    """The chip that arrays (or tracers of them) will be computed on.

    It is that of the mesh in use, of an array's own mesh, or of the default device, in this order,
    so a program that is compiled ahead of time for another machine gets that machine's kernels.

    Args:
      *arrays: operands, or shapes of them.

    Returns:
      The chip, or None for one that no kernel knows.
    """
    meshes = [jax.sharding.get_abstract_mesh(), *map(_mesh_of, arrays)]
    for mesh in meshes:
        device = getattr(mesh, "abstract_device", None)
        if device is not None:
            return _named(device.device_kind, device.platform)
    for array in arrays:
        if isinstance(array, jax.Array) and not isinstance(array, jax.core.Tracer):
            device = next(iter(array.devices()))
            return _named(device.device_kind, device.platform)
    device = (jax.config.jax_default_device and [jax.config.jax_default_device]) or jax.devices()
    return _named(device[0].device_kind, device[0].platform)


def mesh_of(*arrays: jax.Array) -> jax.sharding.AbstractMesh | None:
    """The mesh of several devices that arrays are on, outside of any shard_map; else None."""
    for mesh in (jax.sharding.get_abstract_mesh(), *map(_mesh_of, arrays)):
        if mesh is not None and not mesh.empty and mesh.size > 1:
            return None if AxisType.Manual in mesh.axis_types else mesh
    return None


def lacks_mosaic_gpu(chip: Chip | None, kernels: Callable[[], Any]) -> str | None:
    """Why kernels for Hopper GPUs do not run: another chip, or a JAX that cannot compile them.

    Args:
      chip: that they would run on, None for an unknown one.
      kernels: imports their modules, late since that takes a second; false where it cannot.

    Returns:
      The reason, or None where they run.
    """
    if chip is None or chip.name != "h100":
        return f"it runs on Hopper GPUs, not on {chip.name if chip else 'an unknown chip'}"
    if tuple(int(part) for part in jax.__version__.split(".")[:2]) < (0, 11) or not kernels():
        return f"it needs jax 0.11, and this is {jax.__version__}"
    return None


def shared_by_many(*arrays: jax.Array) -> str | None:
    """Why a kernel that knows no sharding cannot run on arrays, or None: they are on a mesh."""
    if mesh_of(*arrays) is None:
        return None
    return "the operands are on a mesh of several devices; call it inside a jax.shard_map"


def _mesh_of(array: jax.Array | jax.ShapeDtypeStruct):
    typed = array if isinstance(array, jax.ShapeDtypeStruct) else jax.typeof(array)
    mesh = getattr(getattr(typed, "sharding", None), "mesh", None)
    return getattr(mesh, "abstract_mesh", mesh)


def _named(kind: str, platform: str) -> Chip | None:
    if kind in _KINDS:
        return _KINDS[kind]
    if platform == "cpu":
        return CPU
    return H100 if any(name in kind.upper() for name in ("H100", "H200", "H800")) else None
