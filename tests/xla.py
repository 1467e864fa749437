"""How XLA compiles for the CPU devices of the tests.

Two thirds of the tests' time was compilation of programs that then run for milliseconds. So XLA
optimizes nothing here; with ``JAXCOMP_TEST_OPTIMIZED=1`` it compiles as it does for users, which
continuous integration does for the core, on Python 3.12. Every test holds with both.
"""

import importlib.metadata
import os

__all__ = ["flags"]


def flags(devices: int | None) -> str:
    """Value of ``XLA_FLAGS`` for a process with so many CPU devices; None leaves it to XLA."""
    # A module in one piece: in 32, for threads that here have no core, a third more work.
    found = ["--xla_cpu_parallel_codegen_split_count=1"]
    if devices is not None:
        found.append(f"--xla_force_host_platform_device_count={devices}")
    if os.environ.get("JAXCOMP_TEST_OPTIMIZED") != "1":
        found.append("--xla_backend_optimization_level=0")
        version = importlib.metadata.version("jaxlib").split(".")
        # XLA ends a process whose flags it does not know.
        if tuple(map(int, version[:2])) < (0, 11):
            found.append("--xla_cpu_use_fusion_emitters=false")
    return " ".join(found)
