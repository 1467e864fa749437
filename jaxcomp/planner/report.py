"""``plan``: what serving a compressed model takes on TPUs or GPUs that are not here."""

import dataclasses
from collections.abc import Callable
from typing import Any

from jaxcomp.errors import JaxcompError
from jaxcomp.models.cache import check_dtype
from jaxcomp.planner import search
from jaxcomp.planner.shapes import config_from, fields_of
from jaxcomp.planner.steps import PHASES, Workload
from jaxcomp.planner.targets import GIB, Topology, topology
from jaxcomp.recipe import Recipe

BF16 = "bf16"
_NOTES = (
    "Memory as the compiler counts it, for one device. Times are lower bounds: weights and cache "
    "read once, the products at the peak rate, what the compiled program sends over all links, "
    "the three at once. Measured on no hardware. What XLA counts as accessed are operands and "
    "results of all operations, also those that stay on the chip between two of them."
)
_MATERIALIZED = (
    "materialized weights are decoded by XLA, which may write them dense and read them again; the "
    "roofline is that of a kernel which reads them packed"
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What was found.

    Attributes:
      model: its name.
      recipe: its name; None when only bfloat16 was asked for.
      topology: the devices.
      batch: sequences decoded at once.
      context: positions of the cache.
      chunk: prompt tokens of a prefill step.
      new_tokens: of a request's context, what is generated; splits are ranked for such requests.
      cache_dtype: of the cache.
      variants: the compressed model, then the same in bfloat16.
      experts: whether the model is a mixture of experts.
    """

    model: str
    recipe: str | None
    topology: Topology
    batch: int
    context: int
    chunk: int
    new_tokens: int
    cache_dtype: str
    variants: tuple[search.Variant, ...]
    experts: bool = False

    @property
    def rule(self) -> str:
        """By what the splits are ranked."""
        prompt = self.context - self.new_tokens
        return (
            f"splits are ranked by what a request of {prompt} prompt and {self.new_tokens} new "
            "tokens takes of the time of all devices: its prefill steps, each shared by one prompt "
            "of every data-parallel group, and its decode steps, each shared by the batch"
        )

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What the times rest on beside published numbers and the compiler's."""
        device = self.topology.device
        found = [f"{device.name}: {text}" for text in device.assumptions]
        if self.experts:
            found.append(
                "tokens choose experts evenly, each by itself; an unchosen one is not read"
            )
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """All of it as values that JSON can hold."""
        return {
            "model": self.model,
            "recipe": self.recipe,
            "topology": self.topology.name,
            "devices": self.topology.devices,
            "device": dataclasses.asdict(self.topology.device),
            "batch": self.batch,
            "context": self.context,
            "chunk": self.chunk,
            "new_tokens": self.new_tokens,
            "cache_dtype": self.cache_dtype,
            "rule": self.rule,
            "assumptions": list(self.assumptions),
            "compiler": self.variants[0].version,
            "variants": [_variant(v) for v in self.variants],
        }

    def table(self) -> Any:
        """The best split of each variant, as a ``rich.table.Table``."""
        from rich import box
        from rich.table import Table

        title = (
            f"{self.model} on {self.topology.name} ({self.topology.devices} devices), batch "
            f"{self.batch}, context {self.context} in {self.cache_dtype}, prefill in chunks of "
            f"{self.chunk}, {self.new_tokens} new tokens a request"
        )
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        table.add_column("a device")
        columns = []
        for variant in self.variants:
            for phase in PHASES:
                table.add_column(f"{variant.name}\n{phase}", justify="right")
                columns.append(_column(variant, phase, self))
        for name in columns[0]:
            table.add_row(name, *(column[name] for column in columns))
        return table

    def notes(self) -> str:
        """The splits that were tried, what does not fit, and what the numbers mean."""
        lines = []
        for variant in self.variants:
            lines.append(f"{variant.name}: {variant.nbytes / GIB:.2f} GiB of weights in all; tried")
            for tried in variant.tried:
                mark = "*" if tried is variant.best else " "
                took = [
                    f"{phase} compiled in {found['seconds']:.1f} s "
                    f"({found['cpu_seconds']:.1f} s of CPU)"
                    for phase, found in (("decode", tried.decode), ("prefill", tried.prefill))
                    if found is not None and "roofline" in found
                ]
                if tried.request is not None:
                    took.insert(0, f"{tried.request * 1e3:.1f} ms a request")
                told = tried.problem or "; ".join(took)
                lines.append(f"  {mark} {tried.split}: {told}")
            if variant.best is not None:
                lines += [f"    {text}" for text in _remarks(variant.best)]
        lines.append(f"{self.rule[0].upper()}{self.rule[1:]}.")
        lines.append(_NOTES)
        lines += [f"Assumption: {text}." for text in self.assumptions]
        lines.append(f"Compiled by {self.variants[0].version}.")
        return "\n".join(lines)


def plan(
    model: str,
    recipe: Recipe | None,
    on: str,
    *,
    batch: int = 16,
    context: int = 4096,
    chunk: int = 512,
    new_tokens: int | None = None,
    cache_dtype: str = "bfloat16",
    tries: int = 2,
    recipe_name: str = "compressed",
    say: Callable[[str], None] = lambda text: None,
) -> Plan:
    """Compiles the sharded decode and prefill steps of a model for TPUs or GPUs, without any.

    Args:
      model: a name such as "llama-3-70b", a ``config.json``, or a folder that has one.
      recipe: how its weights are compressed; None for bfloat16 alone.
      on: the topology, such as "v5e:4x4" or "h100:8".
      batch: sequences decoded at once.
      context: positions of the key-value cache.
      chunk: prompt tokens that a prefill step reads; at most ``context``.
      new_tokens: how many tokens a request makes; the rest of the context is its prompt, and the
        best split is best for such requests. None stands for an eighth of the context.
      cache_dtype: of the cached keys and values: a float, or "int8" or fp8 with a scale for each
        token and head.
      tries: how many splits of the mesh to compile for each form of the weights.
      recipe_name: what to call the compressed form.
      say: is told what goes on.

    Returns:
      The plan.

    Raises:
      JaxcompError: the model, recipe, cache's dtype or topology is wrong, no split is possible, or
        the compiler is not installed.
    """
    where = topology(on)
    fields = fields_of(model)
    experts = hasattr(config_from(fields, model), "num_experts")
    if min(batch, context, chunk, tries) < 1 or chunk > context:
        raise JaxcompError(
            f"plan: batch {batch}, context {context}, chunk {chunk} and tries {tries} must be at "
            "least 1, and the chunk at most the context."
        )
    new_tokens = max(1, context // 8) if new_tokens is None else new_tokens
    if not 0 < new_tokens <= context:
        raise JaxcompError(
            f"plan: a request makes {new_tokens} of {context} tokens of context; give new_tokens "
            f"from 1 to {context}."
        )
    texts = {BF16: None} if recipe is None else {recipe_name: recipe.dumps(), BF16: None}
    check_dtype(cache_dtype)
    sizes = (batch, context, chunk, new_tokens, cache_dtype)
    work = {n: Workload(model, fields, text, *sizes) for n, text in texts.items()}
    variants = search.search_all(work, where, tries, say)
    name = None if recipe is None else recipe_name
    return Plan(model, name, where, *sizes, tuple(variants), experts)


def _column(variant: search.Variant, phase: str, plan: Plan) -> dict[str, str]:
    """One column of the table: of the best split, or of the first that was tried."""
    tried = variant.best or variant.tried[0]
    found = getattr(tried, phase) or {}
    times = found.get("roofline")
    rows = {
        "data x model": f"{tried.split.data} x {tried.split.model}",
        "cache by": tried.split.cache,
        "weights": _gib(found.get("weights", tried.weights)),
        "of an even share": "-" if times is None else f"{found['weights_to_ideal']:.3f}",
        "cache": _gib(tried.cache),
        "temporaries": _gib(found.get("temporaries")),
        "total": _gib(found.get("total", found.get("needed"))),
        "fits": "-" if not found else "yes" if variant.best is not None else "no",
    }
    sequences = plan.batch if phase == "decode" else tried.split.data
    tokens = sequences * (1 if phase == "decode" else plan.chunk)
    if times is None:
        names = (
            "read",
            "accessed, by XLA",
            "sent",
            "whole weights gathered",
            "matmuls run by",
            "roofline",
            "of a request",
        )
        return rows | dict.fromkeys((*names, "bound by", "tokens/s, all devices"), "-")
    ran = ", ".join(f"{k} {v}" for k, v in sorted(found["implementations"].items()))
    return rows | {
        "read": _gib(times["read"]),
        "accessed, by XLA": _gib(found["accessed"]),
        "sent": f"{times['sent'] / 2**20:.1f} MiB",
        "whole weights gathered": str(len(found["whole_weight_gathers"])),
        "matmuls run by": ran or "XLA",
        "roofline": f"{times['seconds'] * 1e3:.2f} ms",
        "of a request": f"{times['of_request'] * 1e3:.1f} ms",
        "bound by": times["bound"],
        "tokens/s, all devices": f"{tokens / times['seconds']:.0f}",
    }


def _remarks(best: search.Tried) -> list[str]:
    """What is to be known of a split's programs: how weights are read, and if any is gathered."""
    lines = list(best.decode["reasons"])
    if "materialize" in best.decode["implementations"]:
        lines.append(_MATERIALIZED)
    for phase in PHASES:
        gathered, sent = (getattr(best, phase)[name] for name in ("cache_gathered", "sent"))
        if gathered:
            lines.append(
                f"{phase}: {gathered / 2**20:.0f} of {sum(sent.values()) / 2**20:.0f} MiB sent "
                "bring each layer's cached keys and values together"
            )
        found = getattr(best, phase)["whole_weight_gathers"]
        shapes = {f"{c['dtype']}[{','.join(map(str, c['shape']))}]" for c in found}
        if shapes:
            lines.append(f"{phase}: brings together whole weights: {', '.join(sorted(shapes))}")
    return lines


def _gib(nbytes: int | None) -> str:
    return "-" if nbytes is None else f"{nbytes / GIB:.2f} GiB"


def _variant(variant: search.Variant) -> dict[str, Any]:
    tried = []
    for one in variant.tried:
        split = one.split._asdict() | {"model": one.split.model, "cache": one.split.cache}
        fields = ("weights", "cache", "problem", "decode", "prefill", "request")
        tried.append({"split": split} | {name: getattr(one, name) for name in fields})
    best = None if variant.best is None else variant.tried.index(variant.best)
    return {"name": variant.name, "nbytes": variant.nbytes, "best": best, "tried": tried}
