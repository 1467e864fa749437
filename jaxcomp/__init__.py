"""jaxcomp: model compression for JAX."""

__version__ = "0.1.0"

from jaxcomp import (
    data,
    diagnostics,
    distillation,
    evaluation,
    formats,
    graph,
    io,
    models,
    presets,
    pruning,
    quantization,
    sharding,
)
from jaxcomp.compress import Result, compress
from jaxcomp.dispatch import dispatch
from jaxcomp.errors import (
    DataError,
    JaxcompError,
    ModelError,
    OutOfMemoryError,
    RecipeError,
)
from jaxcomp.formats import CompressedArray, materialize, nbits
from jaxcomp.functional import functional
from jaxcomp.graph import Graph, Site, trace
from jaxcomp.io.checkpoint import load, save
from jaxcomp.io.output import Output
from jaxcomp.qat import qat
from jaxcomp.recipe import Recipe
from jaxcomp.report import Report
from jaxcomp.sharding import shard
from jaxcomp.taps import tap

__all__ = [
    "CompressedArray",
    "DataError",
    "Graph",
    "JaxcompError",
    "ModelError",
    "OutOfMemoryError",
    "Output",
    "Recipe",
    "RecipeError",
    "Report",
    "Result",
    "Site",
    "attention",
    "compress",
    "data",
    "diagnostics",
    "dispatch",
    "distillation",
    "evaluation",
    "formats",
    "functional",
    "graph",
    "io",
    "load",
    "materialize",
    "models",
    "nbits",
    "presets",
    "pruning",
    "qat",
    "quantization",
    "save",
    "shard",
    "sharding",
    "tap",
    "trace",
]


def __getattr__(name: str):
    # Its kernels' imports take as long as all others together.
    if name == "attention":
        import importlib

        return importlib.import_module("jaxcomp.attention")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
