"""Peak memory of compressing models of 4, 8 and 16 layers of the same width.

    python -m benchmarks.memory [--layers 4 8 16] [--recipe w4a16_gptq] [--save]

Random weights are written to safetensors files, from which they are memory-mapped; finished weights
go to a journal on disk. Each model is compressed in a process of its own, and the peak is that of
the process, Python, JAX and compiled code included.
"""

import argparse
import json
import pathlib
import sys
import tempfile
import time

from benchmarks import common

HIDDEN, MLP, HEADS, VOCABULARY = 1024, 2816, 16, 512
SAMPLES, LENGTH, BATCH_SIZE = 16, 128, 4
LIMIT = 0.15


def write_model(folder: pathlib.Path, layers: int) -> dict:
    """Writes a Llama with random float32 weights in Hugging Face layout.

    Args:
      folder: made if need be.
      layers: number of layers.

    Returns:
      The number of bytes of the weights.
    """
    import numpy as np

    from jaxcomp import models
    from jaxcomp.io import safetensors
    from jaxcomp.models.llama import tensor_names

    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "max_position_embeddings": LENGTH,
        "num_attention_heads": HEADS,
        "num_hidden_layers": layers,
        "num_key_value_heads": HEADS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "vocab_size": VOCABULARY,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    shapes = _shapes(models.load_architecture(folder).params)
    rng = np.random.default_rng(0)
    tensors = {}
    for path, (name, transposed) in tensor_names(models.read_config(folder)[0]).items():
        shape = shapes[path][::-1] if transposed else shapes[path]
        if len(shape) == 1:
            tensors[name] = np.ones(shape, np.float32)
        else:
            tensors[name] = 0.03 * rng.standard_normal(shape, np.float32)
    safetensors.write(folder / safetensors.SINGLE, tensors)
    return {"bytes": sum(t.nbytes for t in tensors.values())}


def _shapes(tree, prefix: str = "") -> dict:
    found = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        found |= _shapes(value, path + "/") if isinstance(value, dict) else {path: value.shape}
    return found


def compress(folder: pathlib.Path, journal: pathlib.Path, recipe: str) -> dict:
    """Compresses a model in this process.

    Args:
      folder: the model.
      journal: folder of finished weights.
      recipe: name of a preset.

    Returns:
      Seconds, and what is left: the number of bytes of the compressed weights.
    """
    import numpy as np

    import jaxcomp as jc
    from jaxcomp import models, presets

    model = models.load(folder)
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, (SAMPLES, LENGTH), np.int32)
    batches = [(tokens[i : i + BATCH_SIZE],) for i in range(0, SAMPLES, BATCH_SIZE)]
    before = _resident()
    started = time.perf_counter()
    result = jc.compress(
        model.apply, model.params, presets.get(recipe), batches, journal=journal, progress=False
    )
    seconds = time.perf_counter() - started
    bits = jc.nbits(result.params)
    return {"seconds": seconds, "bytes": bits // 8, "before": before, "after": _resident()}


def _resident() -> int:
    """Resident memory now in bytes, 0 where the system does not tell."""
    try:
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return 1024 * int(next(line for line in lines if line.startswith("VmRSS")).split()[1])


def main() -> int:
    """Prints the table; the exit code is 1 if the largest peak is over 15% above the smallest."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--recipe", default="w4a16_gptq", help="name of a preset")
    parser.add_argument("--save", action="store_true", help="write results/memory.txt")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--write", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write:
        print(json.dumps(write_model(pathlib.Path(options.write), options.layers[0])))
        return 0
    if options.worker:
        folder, journal = map(pathlib.Path, options.worker)
        print(json.dumps(compress(folder, journal, options.recipe)))
        return 0
    me = [sys.executable, "-m", "benchmarks.memory", "--recipe", options.recipe]
    environment = {"JAX_ENABLE_COMPILATION_CACHE": "false", "JAX_PLATFORMS": "cpu"}
    rows, peaks = [], []
    for layers in options.layers:
        with tempfile.TemporaryDirectory() as place:
            model, journal = f"{place}/model", f"{place}/journal"
            made = common.child(
                [*me, "--write", model, "--layers", str(layers)], environment=environment
            )
            cost = common.child([*me, "--worker", model, journal], environment=environment)
        peaks.append(cost.peak)
        print(f"{layers} layers: {cost.peak / 1e6:.0f} MB", file=sys.stderr, flush=True)
        numbers = (
            made.reply["bytes"],
            cost.reply["bytes"],
            cost.reply["before"],
            cost.peak,
            cost.reply["after"],
        )
        ratio = f"{cost.peak / peaks[0] - 1:+.1%}"
        seconds = f"{cost.reply['seconds']:.1f}"
        rows.append((layers, *(f"{n / 1e6:.0f}" for n in numbers), ratio, seconds))
    output = common.Output()
    output(common.machine("jax", "jaxlib"))
    output(
        f"{options.recipe} of a Llama {HIDDEN} wide (MLP {MLP}), float32 weights memory-mapped, "
        f"{SAMPLES} x {LENGTH} calibration tokens, journal on disk"
    )
    output()
    columns = (
        "layers",
        "weights MB",
        "compressed MB",
        "RSS at start MB",
        "peak RSS MB",
        "RSS at end MB",
        f"to {options.layers[0]} layers",
        "seconds",
    )
    output(common.table(columns, rows))
    output()
    most = max(peaks) / peaks[0] - 1
    holds = most <= LIMIT
    output(
        common.requirement(
            f"peak at most {LIMIT:.0%} above the smallest model's ({most:+.1%})", holds
        )
    )
    if options.save:
        output.save("memory")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
