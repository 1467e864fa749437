"""Which split of the mesh serves a model fastest: ranked by bytes and rates, the best compiled."""

import concurrent.futures
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxcomp.errors import JaxcompError
from jaxcomp.graph.trace import leaf_paths
from jaxcomp.planner.compiler import Compiler
from jaxcomp.planner.steps import Serving, Split, Workload
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
      estimate: roofline of a decode step before it was compiled.
      problem: why it cannot be used; None if it can.
      decode: what the compiler said about the decode step, and its "roofline".
      prefill: likewise.
    """

    split: Split
    weights: int
    cache: int
    estimate: Roofline
    problem: str | None = None
    decode: dict[str, Any] | None = None
    prefill: dict[str, Any] | None = None


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
      compiled: what the compiler said; without it Megatron's two all-reduces a layer are assumed.

    Returns:
      Bytes, operations and times of one device.
    """
    work, device, config = serving.workload, topology.device, serving.config
    sequences = work.batch // split.data if phase == "decode" else 1
    tokens = sequences * (1 if phase == "decode" else work.chunk)
    layers, _, size = config.cache_shape
    table = "embed_tokens/embedding"
    tied = getattr(config, "tie_word_embeddings", True)
    weights, parameters = serving.weight_bytes(split), 0
    for path, leaf in leaf_paths(serving.dense_params)[0]:
        if path != table or tied:
            parameters += int(np.prod(leaf.shape))
    if not tied:  # Of the embedding only the rows of the tokens are read.
        weights -= serving.weight_bytes(split, table)
    cache = serving.cache_bytes(split, phase)
    attended = 4 * tokens * work.context * config.num_attention_heads * size * layers
    operations = (2 * parameters * tokens + attended) / split.model
    if compiled is None:
        sent = 2 * layers * tokens * config.hidden_size * 2 * 2 * (1 - 1 / split.model)
        ran = {}
    else:
        sent, ran = sum(compiled["sent"].values()), compiled["implementations"]
    rate = device.int8 if device.int8 and set(ran) == {"int8"} else device.flops
    read = weights + cache
    return Roofline(
        read,
        operations,
        sent,
        read / device.bandwidth,
        operations / rate,
        sent / device.interconnect,
    )


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
        split = Split(data, model, "length" if heads % model else "heads")
        problem = serving.unfit(split)
        if problem is not None:
            refused[str(split)] = problem
            continue
        sizes = serving.weight_bytes(split), serving.cache_bytes(split)
        found.append(Tried(split, *sizes, roofline(serving, topology, split, "decode")))

    def order(tried: Tried) -> tuple[bool, float]:
        fits = tried.weights + tried.cache <= topology.device.memory
        return (not fits, tried.estimate.seconds if fits else tried.weights + tried.cache)

    return sorted(found, key=order), refused


def search(
    name: str, workload: Workload, topology: Topology, tries: int, say: Callable[[str], None]
) -> Variant:
    """Compiles the best splits of one form of a model.

    Args:
      name: of the variant.
      workload: what is served.
      topology: on which devices.
      tries: how many splits to compile.
      say: is told what goes on.

    Returns:
      The variant.

    Raises:
      JaxcompError: no split is possible, the compiler is missing, or the model is wrong.
    """
    serving = Serving(workload)
    ranked, refused = candidates(serving, topology)
    if not ranked:
        told = "; ".join(f"{split}: {why}" for split, why in refused.items())
        raise JaxcompError(f"{name} on {topology.name}: no split is possible ({told}).")
    results = []
    with Compiler(workload, topology) as compiler:
        for tried in ranked[:tries]:
            say(f"{name}: compiling decode, {tried.split}")
            results.append(_compiled(tried, "decode", compiler, serving, topology))
        usable = [i for i, tried in enumerate(results) if tried.problem is None]
        usable.sort(key=lambda i: results[i].decode["roofline"]["seconds"])
        best = None
        for i in usable:
            say(f"{name}: compiling prefill, {results[i].split}")
            results[i] = _compiled(results[i], "prefill", compiler, serving, topology)
            if results[i].problem is None:
                best = results[i]
                break
        version = compiler.version
    nbytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(serving.params))
    return Variant(name, nbytes, best, tuple(results), version)


def search_all(
    variants: dict[str, Workload], topology: Topology, tries: int, say: Callable[[str], None]
) -> list[Variant]:
    """``search`` of several forms of a model, side by side."""
    with concurrent.futures.ThreadPoolExecutor(len(variants)) as pool:
        jobs = [pool.submit(search, n, w, topology, tries, say) for n, w in variants.items()]
        return [job.result() for job in jobs]


def _compiled(
    tried: Tried, phase: str, compiler: Compiler, serving: Serving, topology: Topology
) -> Tried:
    found = compiler.compile(phase, tried.split)
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
    return dataclasses.replace(tried, problem=problem, **{phase: found})


def too_large(phase: str, needed: int, granted: int) -> str:
    """What to say of a step that does not fit."""
    return (
        f"{phase} does not fit: needs {needed / 2**30:.2f} GiB of {granted / 2**30:.2f} GiB a "
        "device; use more chips, fewer bits, a smaller --batch or --context"
    )
