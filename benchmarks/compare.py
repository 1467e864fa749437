"""jaxcomp beside llm-compressor: the same recipes, model, calibration and held-out tokens.

    python -m benchmarks.compare --peer-python PEER/bin/python [--threads 1] [--save]

Each recipe runs in a new process on each side, one after the other, on the same processors. Seconds
are those of compressing, compilation included; imports, loading and evaluation are not.
"""

import argparse
import json
import os
import resource
import sys
import tempfile
import time

from benchmarks import common

NAMES = {
    "dense": "dense",
    "rtn_w4": "RTN W4",
    "rtn_w3": "RTN W3 asym",
    "rtn_w2": "RTN W2 asym",
    "gptq_w4": "GPTQ W4",
    "gptq_w3": "GPTQ W3 asym",
    "gptq_w2": "GPTQ W2 asym",
    "gptq_w4_activation": "GPTQ W4, act. order",
    "gptq_w3_activation": "GPTQ W3 asym, act. order",
    "gptq_w2_activation": "GPTQ W2 asym, act. order",
    "awq_w4": "AWQ W4 asym",
    "awq_w3": "AWQ W3 asym",
    "smoothquant_w8a8": "SmoothQuant W8A8",
    "wanda_50": "Wanda 50%",
    "wanda_2_4": "Wanda 2:4",
    "sparsegpt_50": "SparseGPT 50%",
    "sparsegpt_2_4": "SparseGPT 2:4",
}
FASTER = {"gptq_w4": 2.0, "awq_w4": 8.0, "awq_w3": 8.0}
WORSE = 0.01


def ours(recipe: str, calibration: str, held_out: str) -> dict:
    """Compresses the embedded model by one recipe in this process.

    Args:
      recipe: its key in ``NAMES``.
      calibration: .npy file of token windows.
      held_out: .npy file of token windows.

    Returns:
      Perplexity, seconds and seconds of processor time.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    import jaxcomp as jc
    from jaxcomp import data, evaluation, models, presets

    recipes = {f"rtn_w{bits}": getattr(presets, f"w{bits}a16_rtn")() for bits in (4, 3, 2)}
    for bits in (4, 3, 2):
        make = getattr(presets, f"w{bits}a16_gptq")
        # Its scales are always those of the original weights.
        recipes[f"gptq_w{bits}"] = make(static_groups=True)
        recipes[f"gptq_w{bits}_activation"] = make(order="activation", static_groups=True)
    recipes |= {"awq_w4": presets.w4a16_awq(), "awq_w3": presets.w3a16_awq()}
    recipes["smoothquant_w8a8"] = presets.w8a8_smoothquant()
    for name in ("wanda_50", "wanda_2_4", "sparsegpt_50", "sparsegpt_2_4"):
        recipes[name] = presets.get(name)

    model = models.load(common.TINYLM, dtype=jnp.float32)
    batches = data.group(np.load(calibration), common.BATCH_SIZE)
    held = data.group(np.load(held_out), common.BATCH_SIZE)
    apply, params, seconds, cpu = model.apply, model.params, 0.0, 0.0
    if recipe != "dense":
        started, before = time.perf_counter(), _cpu()
        result = jc.compress(apply, params, recipes[recipe], batches, progress=False)
        jax.block_until_ready(jax.tree.leaves(result.params))
        seconds, cpu = time.perf_counter() - started, _cpu() - before
        apply, params = jc.dispatch(apply), result.params
    perplexity = evaluation.perplexity(apply, params, held)
    return {"recipe": recipe, "perplexity": perplexity, "wall": seconds, "cpu": cpu}


def _cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def write_windows(calibration: str, held_out: str, samples: int, windows: int) -> dict:
    """Writes the token windows that both sides read.

    Args:
      calibration: .npy file to write.
      held_out: .npy file to write.
      samples: windows of calibration text.
      windows: windows of held-out text.

    Returns:
      The versions of this side's packages.
    """
    import importlib.metadata

    import numpy as np

    from jaxcomp import data

    tokenizer = data.load_tokenizer(common.TINYLM)
    for file, text, rows in (
        (calibration, "calibration.txt", samples),
        (held_out, "heldout.txt", windows),
    ):
        ids = data.encode(data.read_text(common.TINYLM / text), tokenizer)
        np.save(file, data.windows(ids, common.LENGTH, rows=rows))
    return {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}


def main() -> int:
    """Prints the table; the exit code is 1 if a requirement is not met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-python", default=os.environ.get("PEER_PYTHON"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--samples", type=int, default=common.SAMPLES, help="calibration windows")
    parser.add_argument("--held-out", type=int, default=common.HELD_OUT, help="windows")
    parser.add_argument("--only", nargs="*", default=list(NAMES), choices=list(NAMES))
    parser.add_argument("--peer-batch-size", type=int, default=1, help="its default is 1")
    parser.add_argument("--save", action="store_true", help="write results/compare_N_threads.txt")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--windows", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(ours(*options.worker)))
        return 0
    if options.windows:
        print(json.dumps(write_windows(*options.windows, options.samples, options.held_out)))
        return 0
    if not options.peer_python:
        parser.error("--peer-python: the interpreter of llm-compressor's environment is needed")
    return compared(options)


def compared(options: argparse.Namespace) -> int:
    """Runs both sides and prints the table."""
    me = [sys.executable, "-m", "benchmarks.compare"]
    cpus = sorted(os.sched_getaffinity(0))[: options.threads]
    environment = {
        "OMP_NUM_THREADS": str(options.threads),
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "JAX_PLATFORMS": "cpu",
        "TOKENIZERS_PARALLELISM": "false",
    }
    rows, met, versions = [], [], {}
    with tempfile.TemporaryDirectory() as place:
        files = [f"{place}/calibration.npy", f"{place}/held_out.npy"]
        sizes = ["--samples", str(options.samples), "--held-out", str(options.held_out)]
        versions |= common.child([*me, "--windows", *files, *sizes]).reply
        for key in options.only:
            mine = common.child([*me, "--worker", key, *files], environment=environment, cpus=cpus)
            command = [options.peer_python, str(common.HERE / "llm_compressor.py")]
            command += [str(common.TINYLM), "--recipe", key]
            command += ["--calibration", files[0], "--held-out", files[1]]
            command += ["--threads", str(options.threads)]
            command += ["--batch-size", str(options.peer_batch_size)]
            try:
                theirs = common.child(command, environment=environment, cpus=cpus)
            except RuntimeError as error:
                print(error, file=sys.stderr)
                theirs = None
            rows.append(_row(key, mine, theirs))
            print(" | ".join(map(str, rows[-1])), file=sys.stderr, flush=True)
            if theirs is not None:
                versions |= theirs.reply["versions"]
                met += _requirements(key, mine.reply, theirs.reply)
    output = common.Output()
    output(common.machine())
    output(", ".join(f"{name} {version}" for name, version in versions.items()))
    output(
        f"embedded model, {options.threads} thread(s), {options.samples} calibration windows and "
        f"{options.held_out} held-out windows of {common.LENGTH} tokens"
    )
    output()
    columns = (
        "recipe (groups of 128)",
        "perplexity",
        "llm-compressor",
        "ratio",
        "wall s",
        "llm-compressor",
        "times faster",
        "CPU s",
        "llm-compressor",
        "peak MB",
        "llm-compressor",
    )
    output(common.table(columns, rows))
    output()
    for claim, holds in met:
        output(common.requirement(claim, holds))
    if options.save:
        output.save(f"compare_{options.threads}_threads")
    return 0 if met and all(holds for _, holds in met) else 1


def _row(key: str, mine: common.Cost, theirs: common.Cost | None) -> tuple:
    name, a = NAMES[key], mine.reply
    timed = key != "dense"
    ours = (f"{a['perplexity']:.3f}", f"{a['wall']:.1f}", f"{a['cpu']:.1f}")
    peak = f"{mine.peak / 1e6:.0f}"
    if theirs is None:
        return (name, ours[0], "failed", None, ours[1], None, None, ours[2], None, peak, None)
    b = theirs.reply
    return (
        name,
        ours[0],
        f"{b['perplexity']:.3f}",
        f"{a['perplexity'] / b['perplexity']:.4f}",
        ours[1] if timed else None,
        f"{b['wall']:.1f}" if timed else None,
        f"{b['wall'] / a['wall']:.1f}" if timed else None,
        ours[2] if timed else None,
        f"{b['cpu']:.1f}" if timed else None,
        peak,
        f"{theirs.peak / 1e6:.0f}",
    )


def _requirements(key: str, mine: dict, theirs: dict) -> list[tuple[str, bool]]:
    name = NAMES[key]
    worse = mine["perplexity"] / theirs["perplexity"] - 1
    found = [(f"{name}: llm-compressor not better by over 1% ({worse:+.2%})", worse <= WORSE)]
    if key in FASTER:
        factor = theirs["wall"] / mine["wall"]
        found.append((f"{name}: {FASTER[key]:g}x faster ({factor:.1f}x)", factor >= FASTER[key]))
    return found


if __name__ == "__main__":
    sys.exit(main())
