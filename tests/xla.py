"""How XLA compiles for the CPU devices of the tests.

Two thirds of the tests' time was compilation of programs that then run for milliseconds. So LLVM
optimizes nothing here; with ``JAXCOMP_TEST_OPTIMIZED=1`` it does what is cheap, such as fusing
products with sums, and with ``=3`` all that it does for users. Continuous integration does so for
the core, on Python 3.12. Every test holds with all of them.
"""

import importlib.metadata
import os

__all__ = ["flags"]


def flags(devices: int | None) -> str:
    """Value of ``XLA_FLAGS`` for a process with so many CPU devices; None leaves it to XLA."""
    level = os.environ.get("JAXCOMP_TEST_OPTIMIZED", "0")
    found = [
        # A module in one piece: in 32, for threads that here have no core, a third more work.
        "--xla_cpu_parallel_codegen_split_count=1",
        f"--xla_backend_optimization_level={level}",
    ]
    if devices is not None:
        found.append(f"--xla_force_host_platform_device_count={devices}")
    if level == "0":
        version = importlib.metadata.version("jaxlib").split(".")
        # XLA ends a process whose flags it does not know.
        if tuple(map(int, version[:2])) < (0, 11):
            found.append("--xla_cpu_use_fusion_emitters=false")
    return " ".join(found)
