"""The devices that are planned for: what one holds, how fast it reads, multiplies and talks.

Memory is what the TPU compiler grants a program, as it says when one does not fit. The other
numbers are Google's published ones for a chip, but for those that ``assumptions`` names.

Source: https://docs.cloud.google.com/tpu/docs/v5e, ../v5p, ../v6e (compute, memory bandwidth,
bidirectional interconnect bandwidth a chip); https://www.nvidia.com/en-us/data-center/h100 (SXM).
"""

import dataclasses
import math
import re

from jaxcomp.errors import JaxcompError
from jaxcomp.planner import cuda

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Device:
    """One device as JAX counts them.

    Attributes:
      name: of its generation, as in a topology's name.
      memory: bytes that the compiler grants a program.
      bandwidth: bytes a second from its memory.
      flops: bfloat16 operations a second.
      int8: int8 operations a second; 0 without an integer matrix unit.
      interconnect: bytes a second that it can send to its neighbours, all links together.
      dimensions: axes of a topology.
      prefix: what JAX calls a topology of it.
      per_chip: devices of a chip.
      assumptions: what is not a published number.
      platform: JAX's, "tpu" or "cuda".
    """

    name: str
    memory: int
    bandwidth: float
    flops: float
    int8: float
    interconnect: float
    dimensions: int
    prefix: str
    per_chip: int = 1
    assumptions: tuple[str, ...] = ()
    platform: str = "tpu"


def _links(speed: str) -> str:
    return f"its links together carry {speed} a chip and direction (not checked against a source)"


DEVICES = {
    device.name: device
    for device in (
        Device(
            "v5e",
            int(15.75 * GIB),
            819e9,
            197e12,
            393e12,
            400e9 / 2,
            2,
            "v5e",
            assumptions=(_links("200 GB/s"),),
        ),
        Device("v5p", int(95.74 * GIB), 2765e9, 459e12, 918e12, 1200e9 / 2, 3, "v5p"),
        Device(
            "v6e",
            int(31.25 * GIB),
            1638e9,
            918e12,
            1836e12,
            800e9 / 2,
            2,
            "v6e",
            assumptions=(_links("400 GB/s"),),
        ),
        Device(
            "7x",
            int(94.75 * GIB),
            7380e9 / 2,
            2307e12 / 2,
            0.0,
            1200e9 / 2 / 2,
            3,
            "tpu7x",
            per_chip=2,
            assumptions=(
                "a core has half of its chip's bandwidth, compute and links",
                _links("600 GB/s"),
            ),
        ),
        Device(
            "h100",
            80 * 10**9,
            3350e9,
            989e12,
            1979e12,
            900e9 / 2,
            1,
            "h100",
            platform="cuda",
            assumptions=(
                "a program may have all 80 GB; JAX takes three quarters of them unless "
                "XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise",
            ),
        ),
    )
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips that are wired together.

    Attributes:
      name: as the user gave it.
      device: what one of its devices is.
      shape: chips along each axis.
    """

    name: str
    device: Device
    shape: tuple[int, ...]

    @property
    def devices(self) -> int:
        """Devices as JAX counts them."""
        return math.prod(self.shape) * self.device.per_chip

    @property
    def jax_arguments(self) -> dict[str, str]:
        """What ``jax.experimental.topologies.get_topology_desc`` takes for it."""
        name = f"{self.device.prefix}:{'x'.join(map(str, self.shape))}"
        if self.device.platform == "tpu":
            return {"platform": "tpu", "topology_name": name}
        # Slices, hosts of each, devices of each.
        return {
            "platform": "cuda",
            "topology_name": self.device.name,
            "topology": f"1x1x{self.devices}",
            "target_config": cuda.H100,
        }


def topology(name: str) -> Topology:
    """Reads the name of a topology.

    Args:
      name: such as "v5e:4x4", "v5p:2x2x2" or "h100:8" (the GPUs of one host).

    Returns:
      The topology; whether such a slice exists is for the compiler to say.

    Raises:
      JaxcompError: the generation is not known, or the shape has not its number of axes.

    Example:
      >>> topology("v5e:4x4").devices, topology("7x:2x2x1").devices
      (16, 8)
    """
    kind, _, shape = name.partition(":")
    kind = kind.lower().removeprefix("tpu")
    if kind not in DEVICES:
        raise JaxcompError(
            f"topology {name!r}: the device {kind!r} is unknown; known are {', '.join(DEVICES)}, "
            "as in v5e:4x4, v5p:2x2x2 or h100:8."
        )
    device = DEVICES[kind]
    sizes = tuple(map(int, shape.split("x"))) if re.fullmatch(r"\d+(x\d+)*", shape) else ()
    if len(sizes) != device.dimensions or 0 in sizes:
        example = {1: "8", 2: "4x4", 3: "2x2x2"}[device.dimensions]
        raise JaxcompError(
            f"topology {name!r}: a {kind} slice has {device.dimensions} axes; write the chips "
            f"along each, as in {kind}:{example}."
        )
    return Topology(name, device, sizes)
