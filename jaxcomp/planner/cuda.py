"""JAX's compiler for NVIDIA GPUs without a GPU: where it is, and what it is told of the device.

It needs JAX's CUDA plugin, 0.11.2 or newer, and CUDA's assembler; no driver and no GPU. Products
are not tuned on the device then, so the compiler takes its default for each.
"""

import importlib.util
import os
import pathlib
import re
import shutil
import sys

# A folder with the compiler beside the environment's packages, where `make` installs it: among
# them, every process would look for a GPU.
BESIDE = pathlib.Path(sys.prefix) / "cuda"

# What the driver says of an H100 SXM, as the compiler's ``GpuTargetConfigProto``.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84929347584
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 7 }
runtime_version { major: 13 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
OLDEST = (0, 11, 2)


def missing(version: str) -> str:
    """What to install where a JAX of this version has no compiler for GPUs."""
    if tuple(map(int, re.findall(r"\d+", version)[:3])) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        return (
            f"plan: compiling for GPUs needs JAX {oldest} or newer, and this is {version}; upgrade "
            "JAX (it needs Python 3.12 or newer)."
        )
    return (
        "plan: JAX's compiler for GPUs is not installed; it needs no GPU, install it beside the "
        f"packages with: pip install --no-deps --target {BESIDE} jax-cuda13-plugin=={version} "
        f"jax-cuda13-pjrt=={version} nvidia-cuda-nvcc nvidia-nvvm"
    )


def toolkit() -> pathlib.Path | None:
    """The folder of a CUDA toolkit: an installed wheel's, or the machine's; None without one."""
    spec = importlib.util.find_spec("nvidia")
    wheels = [BESIDE / "nvidia", *((spec and spec.submodule_search_locations) or ())]
    folders = [pathlib.Path(x) / "cu13" for x in wheels]
    if (compiler := shutil.which("nvcc")) is not None:
        folders.append(pathlib.Path(compiler).resolve().parents[1])
    folders.append(pathlib.Path("/usr/local/cuda"))
    return next((x for x in folders if (x / "bin/ptxas").exists() and (x / "nvvm").exists()), None)


def available() -> bool:
    """Whether the plugin and an assembler are installed."""
    try:
        plugin = importlib.util.find_spec("jax_plugins.xla_cuda13") is not None
    except ModuleNotFoundError:
        plugin = False
    plugin = plugin or (BESIDE / "jax_plugins" / "xla_cuda13").is_dir()
    return plugin and toolkit() is not None


def environment() -> dict[str, str]:
    """Variables of a process that compiles for GPUs and runs on the CPU."""
    folder = toolkit()
    package = str(pathlib.Path(__file__).parents[2])
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_gpu_cuda_data_dir={folder} --xla_gpu_autotune_level=0",
        "CUDA_ROOT": str(folder),
        "PATH": os.pathsep.join([f"{folder}/bin", os.environ.get("PATH", "")]),
        "PYTHONPATH": os.pathsep.join(
            filter(None, [package, str(BESIDE), os.environ.get("PYTHONPATH")])
        ),
    }
