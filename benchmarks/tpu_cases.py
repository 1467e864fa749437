"""A kernel to compile for TPUs, and what its schedule is held against."""

import dataclasses
from collections.abc import Callable

from jaxcomp.kernels import chips
from jaxcomp.kernels.schedules import Bundles, Schedule


@dataclasses.dataclass(frozen=True)
class Case:
    """A kernel to compile and what its schedule is held against.

    Attributes:
      name: printed.
      kernel: how the kernel's name begins in the dump.
      target: "module:function" for ``tests.kernels.aot``.
      options: of the function, the chip aside.
      cycles: (schedule, chip) -> scheduled cycles of the whole product.
      bytes: bytes of the weight or the cache that it reads, or 0 where that does not bound it.
      against: name of the case, among those of the same call, that its cycles are held against.
      inner: the bundles that its work is in.
    """

    name: str
    kernel: str
    target: str
    options: dict
    cycles: Callable[[Schedule, chips.Chip], float]
    bytes: float = 0.0
    against: str = ""
    inner: Callable[[Schedule], list[Bundles]] = lambda schedule: list(schedule.loops)
