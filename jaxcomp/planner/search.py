"""Which split of the mesh serves a model fastest: ranked by bytes and rates, the best compiled.

The best split is the one on which a request takes least of all devices' time: the prefill steps of
its prompt, each shared with one more prompt in every other data-parallel group, and as many decode
steps as it makes tokens, each shared with the whole batch (``Serving.share``).
"""

import concurrent.futures
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxcomp.errors import JaxcompError
from jaxcomp.graph.trace import leaf_paths
from jaxcomp.planner.compiler import Compiler
from jaxcomp.planner.steps import PHASES, Serving, Split, Workload
from jaxcomp.planner.targets import Topology


@dataclasses.dataclass(frozen=True)
class Roofline:
    """The least time that a step can take on one device, in seconds, and why.

    Attributes:
      read: bytes of weights and cache that it reads, once each.
      operations: multiplications and additions.
      sent: bytes to other devices.
      memory: time of ``read``.
      compute: time of ``operations``.
      links: time of ``sent``.
    """

    read: int
    operations: float
    sent: float
    memory: float
    compute: float
    links: float

    @property
    def seconds(self) -> float:
        """All three at once, without a pause."""
        return max(self.memory, self.compute, self.links)

    @property
    def bound(self) -> str:
        """Which of the three takes longest."""
        return max(("memory", "compute", "links"), key=lambda name: getattr(self, name))


@dataclasses.dataclass(frozen=True)
class Tried:
    """A split of the mesh and what became of it.

    Attributes:
      split: the split.
      weights: bytes of weights on a device.
      cache: bytes of the cache on a device.
      estimate: of ``request`` before anything was compiled.
      problem: why it cannot be used; None if it can.
      decode: what the compiler said about the decode step, and its "roofline".
      prefill: likewise.
      request: seconds of all devices that a request takes, once both steps were compiled.
    """

    split: Split
    weights: int
    cache: int
    estimate: float
    problem: str | None = None
    decode: dict[str, Any] | None = None
    prefill: dict[str, Any] | None = None
    request: float | None = None


@dataclasses.dataclass(frozen=True)
class Variant:
    """A model in one form of weights.

    Attributes:
      name: "bf16", or the recipe's.
      nbytes: of all weights.
      best: the fastest split that fits, or None.
      tried: the splits that were compiled, best estimate first.
      version: of JAX and the compiler.
    """

    name: str
    nbytes: int
    best: Tried | None
    tried: tuple[Tried, ...]
    version: str


def roofline(
    serving: Serving, topology: Topology, split: Split, phase: str, compiled: Any = None
) -> Roofline:
    """The least time of a step.

    Args:
      serving: the model.
      topology: on which devices.
      split: how they are used.
      phase: "decode" or "prefill".
      compiled: what the compiler said; without it Megatron's two all-reduces a layer are assumed,
        and what attention exchanges among the devices of a head.

    Returns:
      Bytes, operations and times of one device.
    """
    work, device, config = serving.workload, topology.device, serving.config
    batch = serving.sequences(split, phase)
    tokens = batch // split.data * (1 if phase == "decode" else work.chunk)
    layers, _, size = config.cache_shape
    tied = getattr(config, "tie_word_embeddings", True)
    # Experts are split over "model", so every token of a data-parallel group may ask for each.
    weights, parameters = float(serving.weight_bytes(split)), 0.0
    integer, integers = 0.0, serving.integer_weights
    if compiled is not None:
        integers = integers & set(compiled["integer"])
    for path, leaf in leaf_paths(serving.dense_params)[0]:
        multiplied, read = serving.expert_shares(path, tokens)
        if path == "embed_tokens/embedding" and not tied:
            multiplied, read = 0.0, 0.0  # Only the rows of the tokens are read.
        parameters += multiplied * float(np.prod(leaf.shape))
        if path in integers:
            integer += multiplied * float(np.prod(leaf.shape))
        if read < 1:
            weights -= (1 - read) * serving.weight_bytes(split, path)
    cache = serving.cache_bytes(split, phase)
    attended = 4 * tokens * work.context * config.num_attention_heads * size * layers
    operations = (2 * parameters * tokens + attended) / split.model
    if compiled is None:
        sent = 2 * layers * tokens * config.hidden_size * 2 * 2 * (1 - 1 / split.model)
        sent += layers * _attention_sent(serving, split, phase)
    else:
        sent = sum(compiled["sent"].values())
    # Attention and what the recipe leaves alone are bfloat16's.
    of_integers = 2 * integer * tokens / split.model
    compute = of_integers / (device.int8 or device.flops)
    compute += (operations - of_integers) / device.flops
    read = round(weights) + cache
    return Roofline(
        read,
        operations,
        sent,
        read / device.bandwidth,
        compute,
        sent / device.interconnect,
    )


def _attention_sent(serving: Serving, split: Split, phase: str) -> float:
    """Bytes that a device sends in a layer because others hold positions of its heads."""
    batch = serving.sequences(split, phase) // split.data
    _, heads, size = serving.config.cache_shape
    others = 1 - 1 / split.length
    if phase == "decode":  # Of each query the sum of values over all positions, in float32.
        return 2 * others * batch * serving.config.num_attention_heads / split.heads * size * 4
    return 2 * others * batch * serving.workload.context * heads / split.heads * size * 2


def splits(devices: int) -> list[tuple[int, int]]:
    """All (data, model) with this product.

    Example:
      >>> splits(4)
      [(1, 4), (2, 2), (4, 1)]
    """
    return [(d, devices // d) for d in range(1, devices + 1) if devices % d == 0]


def candidates(serving: Serving, topology: Topology) -> tuple[list[Tried], dict[str, str]]:
    """The possible splits, those that should fit and be fast first.

    Args:
      serving: the model.
      topology: on which devices.

    Returns:
      The splits; and of the others, by name, why they are not possible.
    """
    found, refused = [], {}
    _, heads, _ = serving.config.cache_shape
    for data, model in splits(topology.devices):
        of_heads = math.gcd(heads, model)
        split = Split(data, of_heads, model // of_heads)
        problem = serving.unfit(split)
        if problem is not None:
            refused[str(split)] = problem
            continue
        sizes = serving.weight_bytes(split), serving.cache_bytes(split)
        times = {p: roofline(serving, topology, split, p).seconds for p in PHASES}
        estimate = sum(serving.share(split, phase) * t for phase, t in times.items())
        found.append(Tried(split, *sizes, estimate))

    def order(tried: Tried) -> tuple[bool, float]:
        fits = fits_at_least(tried, topology)
        return (not fits, tried.estimate if fits else tried.weights + tried.cache)

    return sorted(found, key=order), refused


def fits_at_least(tried: Tried, topology: Topology) -> bool:
    """Whether weights and cache fit, before anything is computed."""
    return tried.weights + tried.cache <= topology.device.memory


def search(
    name: str,
    serving: Serving,
    topology: Topology,
    tries: int,
    say: Callable[[str], None],
    compiler: Compiler,
) -> Variant:
    """Compiles the best splits of one form of a model.

    Args:
      name: of the variant.
      serving: the model in this form.
      topology: on which devices.
      tries: how many splits to compile.
      say: is told what goes on.
      compiler: of the topology, that knows the workload by this name.

    Returns:
      The variant.

    Raises:
      JaxcompError: no split is possible, or the compiler knows no such topology.
    """
    ranked, refused = candidates(serving, topology)
    if not ranked:
        told = "; ".join(f"{split}: {why}" for split, why in refused.items())
        raise JaxcompError(f"{name} on {topology.name}: no split is possible ({told}).")
    chosen = ranked[:tries]
    fits = [fits_at_least(tried, topology) for tried in chosen]

    def compiled(i: int, phase: str, wanted: Callable[[], bool]) -> dict[str, Any] | None:
        split = chosen[i].split

        def start() -> bool:
            if wanted():
                say(f"{name}: compiling {phase}, {split}")
            return wanted()

        return compiler.compile(name, phase, split, start)

    def decoded(i: int) -> Tried:
        found = compiled(i, "decode", lambda: True)
        tried = judged(chosen[i], "decode", found, serving, topology)
        fits[i] = tried.problem is None
        return tried

    # Both steps of a split at once, unless one does not fit.
    with concurrent.futures.ThreadPoolExecutor(2 * len(chosen)) as pool:
        first = [pool.submit(decoded, i) for i in range(len(chosen))]
        second = [
            pool.submit(compiled, i, "prefill", lambda i=i: fits[i]) for i in range(len(chosen))
        ]
        results = [job.result() for job in first]
        for i, tried in enumerate(results):
            found = second[i].result()
            if found is None and tried.problem is None:  # It looked as if it would not fit.
                found = compiled(i, "prefill", lambda: True)
            if found is not None and tried.problem is None:
                results[i] = judged(tried, "prefill", found, serving, topology)
    usable = [tried for tried in results if tried.request is not None]
    best = min(usable, key=lambda tried: tried.request, default=None)
    nbytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(serving.params))
    return Variant(name, nbytes, best, tuple(results), compiler.version)


def search_all(
    variants: dict[str, Workload], topology: Topology, tries: int, say: Callable[[str], None]
) -> list[Variant]:
    """``search`` of several forms of a model, side by side.

    Raises:
      JaxcompError: as of ``search``, or the compiler is not installed.
    """
    with (
        Compiler(variants, topology) as compiler,
        concurrent.futures.ThreadPoolExecutor(len(variants)) as pool,
    ):
        servings = {name: Serving(workload) for name, workload in variants.items()}
        jobs = [
            pool.submit(search, n, s, topology, tries, say, compiler) for n, s in servings.items()
        ]
        return [job.result() for job in jobs]


def judged(
    tried: Tried, phase: str, found: dict[str, Any], serving: Serving, topology: Topology
) -> Tried:
    """A split with what the compiler found of a step, and whether that fits."""
    if "needed" in found:
        problem = too_large(phase, found["needed"], found["granted"])
    elif found.get("error"):
        problem = f"{phase}: {' '.join(found['error'].split())[:400]}"
    else:
        problem = None
        times = roofline(serving, topology, tried.split, phase, found)
        found["roofline"] = {
            **dataclasses.asdict(times),
            "seconds": times.seconds,
            "of_request": serving.share(tried.split, phase) * times.seconds,
            "bound": times.bound,
        }
        # As the compiler lays them out; the tokens beside weights and cache are a few bytes.
        found["weights"] = found["arguments"] - serving.cache_bytes(tried.split, phase)
        found["weights_to_ideal"] = found["weights"] / serving.ideal_bytes(tried.split)
        # The cache of all sequences stays while one prompt is read.
        new = found["outputs"] - found["aliased"]
        needed = found["weights"] + tried.cache + found["temporaries"] + new
        found["total"] = needed
        if needed > topology.device.memory:
            problem = too_large(phase, needed, topology.device.memory)
    tried = dataclasses.replace(tried, problem=problem, **{phase: found})
    steps = {phase: getattr(tried, phase) for phase in PHASES}
    if problem is not None or None in steps.values():
        return tried
    request = sum(found["roofline"]["of_request"] for found in steps.values())
    return dataclasses.replace(tried, request=request)


def too_large(phase: str, needed: int, granted: int) -> str:
    """What to say of a step that does not fit."""
    return (
        f"{phase} does not fit: needs {needed / 2**30:.2f} GiB of {granted / 2**30:.2f} GiB a "
        "device; use more chips, fewer bits, a smaller --batch or --context"
    )
