"""The examples in docstrings, and that every public name has one."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

import jaxcomp as jc
from jaxcomp import kernels

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(jc.__path__, "jaxcomp.")
    if not module.name.startswith("jaxcomp.kernels") and not module.name.endswith("__main__")
)
# The path of jaxcomp.kernels is mapped by the installation, where a walk does not find it.
MODULES += sorted(
    module.name
    for module in pkgutil.walk_packages(kernels.__path__, "jaxcomp.kernels.")
    if not module.name.rpartition(".")[2].startswith("gpu")  # they need a newer JAX
)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    module = importlib.import_module(name)
    assert doctest.testmod(module).failed == 0


PUBLIC = [
    jc,
    jc.attention,
    jc.distillation,
    jc.formats,
    jc.graph,
    jc.models,
    jc.pruning,
    jc.quantization,
]


@pytest.mark.parametrize("module", PUBLIC, ids=lambda m: m.__name__)
def test_public_names_exist_and_are_documented(module):
    assert sorted(set(module.__all__)) == sorted(module.__all__)
    for name in module.__all__:
        item = getattr(module, name)
        if inspect.isfunction(item) or inspect.isclass(item) or inspect.ismodule(item):
            assert inspect.getdoc(item), name


def test_the_contract():
    assert {
        "functional",
        "trace",
        "Recipe",
        "presets",
        "compress",
        "dispatch",
        "materialize",
        "nbits",
        "save",
        "load",
        "qat",
        "tap",
        "quantization",
        "pruning",
        "distillation",
        "formats",
    } <= set(jc.__all__)
    for name in (
        "w4a16_rtn w4a16_gptq w4a16_awq w3a16_gptq w2a16_gptq w8a8_smoothquant w8a8_dynamic "
        "fp8_dynamic llm_int8 nf4 magnitude wanda sparsegpt sparsegpt_int4"
    ).split():
        assert callable(getattr(jc.presets, name))
