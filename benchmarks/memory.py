"""Peak host memory of compressing and saving models of 4, 16 and 64 layers of the same width.

    python -m benchmarks.memory [--layers 4 16 64] [--recipe w8a8_smoothquant] [--save [NAME]]
        [--hidden 768] [--mlp 2048] [--kv-heads N] [--experts N] [--dtype float32] [--stream]

Random weights are written to a safetensors file, from which they are memory-mapped; finished
weights go to a journal on disk, and from there to a checkpoint (``jc.save``), or with ``--stream``
to the checkpoint's own files (``save_to``). Each model is handled in a process of its own, on the
CPU, so that what a device would hold counts too.

Counted is the anonymous memory of the process (RssAnon of /proc/PID/status, read every few
milliseconds by the parent): pages of memory-mapped files can be dropped at any time and are left
out. From the peak is taken the fixed cost, measured in the same process just before: Python, JAX,
and the programs (1.4 MB each, of which JAX keeps a megabyte from lowering) that a narrow model of
two layers takes, whose weights and activations weigh nothing. Those are thrown away before the
model brings as many of its own, and what was freed is given back to the system; arrays of more
than 64 KB are mapped each by itself: so none hides in memory that is counted already. The bound is
twice the bytes of a layer in the file, plus the activations that wait between layers: of all tokens
the residual stream and the widest input of a weight, of experts that of both which a token chooses.
"""

import argparse
import gc
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time

from benchmarks import common

VOCABULARY, HEAD_SIZE = 512, 128
SAMPLES, LENGTH, BATCH_SIZE = 4, 128, 2
CHOSEN = 2  # Experts that each token goes through.
NARROW = ["--layers", "2", "--hidden", "128", "--mlp", "512"]
ENVIRONMENT = {
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "JAX_PLATFORMS": "cpu",
    # Otherwise glibc keeps freed arrays of up to 32 MB for itself, where others may hide.
    "MALLOC_MMAP_THRESHOLD_": str(2**16),
}
INTERVAL = 0.004


def write_model(
    folder: pathlib.Path,
    layers: int,
    hidden: int,
    mlp: int,
    dtype: str,
    kv_heads: int = 0,
    experts: int = 0,
) -> None:
    """Writes a Llama, or with experts a Mixtral, with random weights in Hugging Face layout.

    Args:
      folder: made if need be.
      layers: number of layers.
      hidden: its width.
      mlp: width of its MLPs.
      dtype: of the weights in the file.
      kv_heads: heads of keys and values; 0 for as many as of queries.
      experts: of each layer, each an MLP; 0 for a plain one.
    """
    import jax.numpy as jnp
    import numpy as np

    from jaxcomp import models
    from jaxcomp.io import safetensors
    from jaxcomp.models import llama, mixtral

    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "max_position_embeddings": LENGTH,
        "num_attention_heads": hidden // HEAD_SIZE,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads or hidden // HEAD_SIZE,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "vocab_size": VOCABULARY,
    }
    if experts:
        config |= {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "num_local_experts": experts,
            "num_experts_per_tok": CHOSEN,
        }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    shapes = _shapes(models.load_architecture(folder).params)
    names = (mixtral if experts else llama).tensor_names(models.read_config(folder)[0])
    # Every tensor is another window of one array of random numbers, so that a model of any depth
    # can be written by a small process.
    each = [
        (one, shapes[path][-2:], transposed)
        for path, (name, transposed) in names.items()
        for one in (name if isinstance(name, tuple) else (name,))
    ]
    noise = np.random.default_rng(0).standard_normal(hidden * mlp + len(each), np.float32)
    noise = (0.03 * noise).astype(jnp.dtype(dtype))
    tensors = {}
    for k, (name, shape, transposed) in enumerate(each):
        values = noise[k : k + math.prod(shape)].reshape(shape[::-1] if transposed else shape)
        tensors[name] = np.ones_like(values) if len(shape) == 1 else values
    safetensors.write(folder / safetensors.SINGLE, tensors)


def _shapes(tree, prefix: str = "") -> dict:
    found = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        found |= _shapes(value, path + "/") if isinstance(value, dict) else {path: value.shape}
    return found


def compress(folder: pathlib.Path, out: pathlib.Path, recipe: str, stream: bool) -> dict:
    """Compresses and saves a model in this process.

    Args:
      folder: the model.
      out: an existing folder for the journal and the checkpoint.
      recipe: name of a preset.
      stream: write the checkpoint with ``save_to``, in place of a journal and ``jc.save``.

    Returns:
      When it began, when everything was compressed and when it was saved (``time.monotonic``, the
      same clock in all processes), and bytes of the compressed weights.
    """
    import numpy as np

    import jaxcomp as jc
    from jaxcomp import models, presets

    began = time.monotonic()
    model = models.load(folder, lazy=True)
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, (SAMPLES, LENGTH), np.int32)
    batches = [(tokens[i : i + BATCH_SIZE],) for i in range(0, SAMPLES, BATCH_SIZE)]
    result = jc.compress(
        model.apply,
        model.params,
        presets.get(recipe),
        batches,
        progress=False,
        **({"save_to": out / "model"} if stream else {"journal": out / "journal"}),
    )
    compressed = time.monotonic()
    if not stream:
        jc.save(out / "model", result)
    times = {"began": began, "compressed": compressed, "saved": time.monotonic()}
    return {**times, "bytes": jc.nbits(result.params) // 8}


def worker(narrow: pathlib.Path, folder: pathlib.Path, recipe: str, stream: bool) -> dict:
    """The fixed cost and then the model itself, in this process.

    Args:
      narrow: a model that weighs nothing.
      folder: the model.
      recipe: name of a preset.
      stream: as of ``compress``.

    Returns:
      What ``compress`` gives, and the bytes of anonymous memory before.
    """
    import jax

    from jaxcomp import host

    with tempfile.TemporaryDirectory() as place:
        compress(narrow, pathlib.Path(place), recipe, stream)
    gc.collect()
    host.trim()
    fixed = _anonymous(os.getpid())
    jax.clear_caches()
    gc.collect()
    host.trim()
    with tempfile.TemporaryDirectory() as place:
        found = compress(folder, pathlib.Path(place), recipe, stream)
    gc.collect()
    return {**found, "fixed": fixed, "left": _anonymous(os.getpid())}


def _anonymous(process: int) -> int:
    """Anonymous resident memory of a process in bytes, 0 once it has ended."""
    try:
        lines = pathlib.Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return 1024 * next((int(x.split()[1]) for x in lines if x.startswith("RssAnon")), 0)


def watched(command: list[str]) -> tuple[dict, list[tuple[float, int]]]:
    """Runs a worker and watches its memory.

    Args:
      command: program and arguments.

    Returns:
      The JSON object that it printed last, and moments with the bytes of anonymous memory.
    """
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=common.ROOT,
            env={**os.environ, **ENVIRONMENT},
        )
        seen: list[tuple[float, int]] = []
        ended = threading.Event()

        def watch():
            while not ended.wait(INTERVAL):
                seen.append((time.monotonic(), _anonymous(process.pid)))

        thread = threading.Thread(target=watch)
        thread.start()
        printed, _ = process.communicate()
        ended.set()
        thread.join()
        if process.returncode:
            errors.seek(0)
            raise RuntimeError(f"{' '.join(command)}: {errors.read()[-3000:]}")
    return json.loads(printed.splitlines()[-1]), seen


def main() -> int:
    """Prints the table; the exit code is 1 if a peak is over the bound."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--recipe", default="w8a8_smoothquant", help="name of a preset")
    parser.add_argument("--hidden", type=int, default=768, help="width of the model")
    parser.add_argument("--mlp", type=int, default=2048, help="width of its MLPs")
    parser.add_argument("--kv-heads", type=int, default=0, help="of attention; 0: all heads")
    parser.add_argument("--experts", type=int, default=0, help="MLPs of a layer; 0: a plain one")
    parser.add_argument("--dtype", default="float32", help="of the weights in the file")
    parser.add_argument(
        "--save", nargs="?", const="memory", metavar="NAME", help="write results/NAME.txt"
    )
    parser.add_argument("--stream", action="store_true", help="write the checkpoint with save_to")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--write", help=argparse.SUPPRESS)
    options = parser.parse_args()
    o = options
    if o.write:
        sizes = (o.layers[0], o.hidden, o.mlp, o.dtype, o.kv_heads, o.experts)
        write_model(pathlib.Path(o.write), *sizes)
        return 0
    if o.worker:
        print(json.dumps(worker(*map(pathlib.Path, o.worker), o.recipe, o.stream)))
        return 0
    size = 2 if o.dtype == "bfloat16" else 4
    each = 3 * o.hidden * o.mlp
    kept = o.kv_heads * HEAD_SIZE or o.hidden
    mlps = o.experts * (each + o.hidden) or each
    layer = size * (2 * o.hidden * (o.hidden + kept) + mlps + 2 * o.hidden)
    activations = 4 * SAMPLES * LENGTH * (o.hidden + (CHOSEN if o.experts else 1) * o.mlp)
    bound = 2 * layer + activations
    me = [sys.executable, "-m", "benchmarks.memory", "--recipe", o.recipe]
    me += ["--hidden", str(o.hidden), "--mlp", str(o.mlp), "--dtype", o.dtype]
    me += ["--experts", str(o.experts)]
    shape = f"{o.hidden} wide"
    shape += f" ({o.kv_heads} heads of keys)" if o.kv_heads else ""
    me += ["--stream"] if o.stream else []
    rows, peaks = [], []
    for layers in o.layers:
        with tempfile.TemporaryDirectory() as place:
            heads = ["--kv-heads", str(o.kv_heads)]
            sizes = {"narrow": NARROW, "model": ["--layers", str(layers), *heads]}
            for folder, arguments in sizes.items():
                write = [*me, "--write", f"{place}/{folder}", *arguments]
                common.child(write, environment=ENVIRONMENT)
            reply, seen = watched([*me, "--worker", f"{place}/narrow", f"{place}/model"])
            stored = sum(f.stat().st_size for f in pathlib.Path(place, "model").iterdir())

        def peak(start, end, reply=reply, seen=seen):
            inside = (n for t, n in seen if reply[start] <= t <= reply[end])
            return max(inside, default=reply["fixed"]) - reply["fixed"]

        compressing, saving = peak("began", "compressed"), peak("compressed", "saved")
        peaks.append(max(compressing, saving))
        numbers = (stored, reply["bytes"], reply["fixed"], compressing, saving)
        numbers += (reply["left"] - reply["fixed"],)
        ratio = f"{(peaks[-1] - activations) / layer:.2f}"
        seconds = f"{reply['saved'] - reply['began']:.0f}"
        rows.append((layers, *(f"{n / 1e6:.0f}" for n in numbers), ratio, seconds))
        print(*rows[-1], file=sys.stderr, flush=True)
    output = common.Output()
    output(common.machine("jax", "jaxlib"))
    arguments = " ".join(a for a in sys.argv[1:] if a not in ("--save", o.save))
    output(f"python -m benchmarks.memory {arguments}".strip())
    output(
        f"{o.recipe} of a {'Mixtral' if o.experts else 'Llama'}, {shape}, "
        f"{f'{o.experts} MLPs' if o.experts else 'MLP'} of {o.mlp}, "
        f"{o.dtype} weights memory-mapped, "
        f"{SAMPLES} x {LENGTH} calibration tokens, "
        f"{'checkpoint' if o.stream else 'journal and checkpoint'} on disk"
    )
    output(
        f"a layer is {layer / 1e6:.0f} MB, activations {activations / 1e6:.0f} MB; anonymous "
        "memory, peaks and what is left above the fixed cost"
    )
    output()
    columns = (
        "layers",
        "weights MB",
        "compressed MB",
        "fixed MB",
        "peak compressing MB",
        "peak saving MB",
        "left MB",
        "(peak - activations) / layer",
        "seconds",
    )
    output(common.table(columns, rows))
    output()
    holds = max(peaks) <= bound
    output(
        common.requirement(
            f"peak at most 2 layers and the activations, {bound / 1e6:.0f} MB "
            f"({max(peaks) / 1e6:.0f} MB)",
            holds,
        )
    )
    if o.save:
        output.save(o.save)
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
