"""What a second process gains: compressing on one and two CPU processes, a core and thread each.

    python -m benchmarks.scale [--recipe gptq] [--layers 1] [--samples 32] [--repeats 2] [--save]

The processes are joined by ``jax.distributed`` over gloo; each has one virtual device, is pinned to
one core and computes in one thread, so that only their number differs. A first pass compiles; the
passes that count find their programs in JAX's compilation cache. Runs alternate, and the fastest
of each counts: on a machine with other work the times of one run say little. The user time of a
process does not count others' work, nor its own waiting. With the sizes below GPTQ's four runs take
about three minutes on two idle cores, AWQ's search three times as long.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile

from benchmarks import common

WIDTH, MLP, HEADS, VOCABULARY = 1024, 2816, 16, 512
LENGTH, BATCH_SIZE = 256, 4
# A preset and its options.
RECIPES = {
    "gptq": ("w4a16_gptq", {"group_size": 128}),
    "awq": ("w4a16_awq", {"group_size": 128}),
    "sparsegpt": ("sparsegpt", {"sparsity": 0.5}),
    "sparsegpt_2_4": ("sparsegpt", {"n": 2, "m": 4}),
    "mse": ("w4a16_rtn", {"group_size": 128, "clipping": "mse"}),
}
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=1 --xla_cpu_multi_thread_eigen=false",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}


def work(
    address: str, count: int, index: int, layers: int, samples: int, repeats: int, recipe: str
) -> dict:
    """Compresses a model in this process, together with the others.

    Args:
      address: of the first process.
      count: number of processes; one is not joined with any.
      index: this one.
      layers: of the model.
      samples: sequences to calibrate on.
      repeats: passes that count.
      recipe: one of ``RECIPES``.

    Returns:
      Seconds and user seconds of each pass, and the mean error of the layers.
    """
    import time

    import jax

    if count > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(address, count, index)
    import numpy as np
    from flax import nnx

    import jaxcomp as jc
    from jaxcomp.models import Llama, LlamaConfig

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=MLP,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=WIDTH // HEADS,
    )
    apply, params = jc.functional(Llama(config, rngs=nnx.Rngs(0)))
    params = jax.tree.map(np.asarray, params)
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, (samples, LENGTH), np.int32)
    batches = [(tokens[i : i + BATCH_SIZE],) for i in range(0, samples, BATCH_SIZE)]
    mesh = jax.make_mesh((count,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    preset, chosen = RECIPES[recipe]
    steps = getattr(jc.presets, preset)(**chosen)
    wall, cpu = [], []
    for _ in range(1 + repeats):
        started, before = time.perf_counter(), os.times().user
        result = jc.compress(apply, params, steps, batches, mesh=mesh, progress=False)
        wall.append(time.perf_counter() - started)
        cpu.append(os.times().user - before)
    errors = [row.error for row in result.report.rows]
    return {"wall": wall[1:], "cpu": cpu[1:], "error": statistics.mean(errors)}


def run(count: int, sizes: tuple[int, int, int], recipe: str, cache: str) -> list[dict]:
    """Runs processes to their end.

    Args:
      count: how many; each gets the core of its number.
      sizes: layers, samples and repeats, as in ``work``.
      recipe: one of ``RECIPES``.
      cache: folder of compiled programs.

    Returns:
      What ``work`` returned on each.
    """
    with socket.socket() as s:
        s.bind(("localhost", 0))
        address = f"localhost:{s.getsockname()[1]}"
    cores = sorted(os.sched_getaffinity(0))
    worker = [sys.executable, "-m", "benchmarks.scale", "--worker"]
    running = []
    for index in range(count):
        arguments = [address, count, index, *sizes, recipe]
        running.append(
            subprocess.Popen(
                ["taskset", "-c", str(cores[index]), *worker, *map(str, arguments)],
                stdout=subprocess.PIPE,
                cwd=common.ROOT,
                env={**os.environ, **ENVIRONMENT, "JAX_COMPILATION_CACHE_DIR": cache},
                text=True,
            )
        )
    outputs = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise RuntimeError(f"exit codes {[process.returncode for process in running]}")
    return [json.loads(output.strip().splitlines()[-1]) for output in outputs]


def main() -> int:
    """Prints the table; the exit code is 1 if two processes do not share the work of one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", choices=RECIPES, default="gptq")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2, help="starts of each number of processes")
    parser.add_argument("--save", action="store_true", help="write results/scale_processes*.txt")
    parser.add_argument("--worker", nargs=7, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        address, *numbers, recipe = options.worker
        print(json.dumps(work(address, *map(int, numbers), recipe)))
        return 0
    wall: dict[int, list[float]] = {1: [], 2: []}
    cpu: dict[int, list[float]] = {1: [], 2: []}
    errors = {}
    sizes = (options.layers, options.samples, options.repeats)
    with tempfile.TemporaryDirectory() as cache:
        for _ in range(options.rounds):
            for count in wall:
                replies = run(count, sizes, options.recipe, cache)
                wall[count] += map(max, zip(*(r["wall"] for r in replies), strict=True))
                cpu[count] += map(max, zip(*(r["cpu"] for r in replies), strict=True))
                errors[count] = replies[0]["error"]
    output = common.Output()
    output(common.machine("jax", "jaxlib"))
    output(f"python -m benchmarks.scale {' '.join(sys.argv[1:])}".strip())
    output(
        f"{options.recipe} of a Llama {WIDTH} wide (MLP {MLP}, {options.layers} layers), "
        f"{options.samples} x {LENGTH} calibration tokens; a core and a thread each process"
    )
    output(f"load of the machine at the end (other work included): {os.getloadavg()[1]:.1f}")
    output()
    columns = ("processes", "fastest s", "median s", "user s of one", "layer error")
    rows = [
        (
            count,
            f"{min(wall[count]):.1f}",
            f"{statistics.median(wall[count]):.1f}",
            f"{min(cpu[count]):.1f}",
            f"{errors[count]:.5f}",
        )
        for count in wall
    ]
    output(common.table(columns, rows))
    output()
    ratio, busy = min(wall[2]) / min(wall[1]), min(cpu[2]) / min(cpu[1])
    output(f"two processes to one: {ratio:.2f} of the time, {busy:.2f} of a process's user time")
    falls, shares = ratio < 1, busy <= 0.7
    output(common.requirement("the time falls with the number of processes", falls))
    output(common.requirement("of two a process needs at most 0.7 of one's user time", shares))
    if options.save:
        name = "scale_processes"
        output.save(name if options.recipe == "gptq" else f"{name}_{options.recipe}")
    return 0 if falls and shares else 1


if __name__ == "__main__":
    sys.exit(main())
