"""Which attention the models run: the kernel's numbers, its compiled programs, and the report."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas import tpu as pltpu
from jaxcomp.kernels import chips, sparse_attention

import jaxcomp as jc
from jaxcomp.models import GPT2, Attending, Bert, BertConfig, GPT2Config, Llama, generate
from jaxcomp.pruning import units
from tests.kernels import aot
from tests.models.helpers import TINY, tokens
from tests.models.programs import LENGTH, ROOM

BERT = BertConfig(64, 32, 48, 2, 4, max_position_embeddings=128)
KERNEL = Attending(implementation="mosaic_tpu")
PROGRAMS = [
    ("training", {"mesh": [2, 4], "remat": True}, ("forward", "dq", "dkv")),
    ("encoder", {}, ("forward",)),
    # Whose sharding is not told reads a prompt by plain products, and has the scores.
    ("prompt", {"mesh": [2, 4], "told": False}, ()),
]
MORE = [
    ("prompt", {"mesh": [2, 4], "dtype": "int8"}, ("forward",)),
    ("prompt", {"mesh": [2, 4], "by": ["data", "model"]}, ("forward",)),
    ("prompt", {"mesh": [2, 4], "empty": False}, ("forward",)),
]


@pytest.mark.skipif(not aot.available(), reason="the TPU compiler (libtpu) is not installed")
@pytest.mark.parametrize("programs", [PROGRAMS, pytest.param(MORE, marks=pytest.mark.slow)])
def test_programs_for_tpus_hold_no_scores(programs):
    cases = [(f"tests.models.programs:{name}", options) for name, options, _ in programs]
    found = aot.compile_cases("v5e", cases)
    for (name, options, kernels), result in zip(programs, found, strict=True):
        assert result["error"] is None, (name, options)
        for kernel in kernels:
            assert f"sparse_attention_{kernel}" in result["hlo"], (name, options)
        scores = rf"\[[\d,]*\b{LENGTH},({LENGTH}|{ROOM})\b[\d,]*\]"
        held = re.findall(scores, result["hlo"])
        assert bool(held) != bool(kernels), (name, options, held[:3])


@pytest.fixture
def interpreted(monkeypatch):
    run = functools.partial(sparse_attention.attention, interpret=pltpu.InterpretParams())
    monkeypatch.setattr(sparse_attention, "attention", run)


def make(kind, config, **options):
    return jc.functional(kind(config, scan=True, rngs=nnx.Rngs(1), **options))


def test_training_by_the_kernel_equals_that_by_plain_products(interpreted):
    """Windows of a loop's layers, heads that share keys, and gradients of every weight."""
    config = dataclasses.replace(TINY, num_hidden_layers=2, sliding_windows=(None, 4))
    x = tokens(1, 70)

    def values(how):
        apply, params = make(Llama, config, attention=how)
        loss = jax.value_and_grad(lambda p: jnp.square(apply(p, x)).mean())
        return jax.jit(loss)(params)

    got, want = values(KERNEL), values(Attending())
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6, rtol=2e-4)


def test_padded_sequences_by_the_kernel_equal_those_by_plain_products(interpreted):
    x, real = tokens(2, 70), jnp.arange(70) < jnp.array([[70], [31]])
    got, want = (
        jax.jit(apply)(params, x, real)
        for apply, params in (make(Bert, BERT, attention=how) for how in (KERNEL, Attending()))
    )
    np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_prompt_read_by_the_kernel_equals_one_by_plain_products(interpreted, dtype):
    """Of int8 both read the codes, as later tokens will."""
    config, x = GPT2Config(64, 128, 32, 2, 4, 48), tokens(1, 70)
    model = GPT2(config, scan=True, rngs=nnx.Rngs(1))
    found = []
    for how, empty in ((KERNEL, True), (Attending(), True), (Attending(), False)):
        apply, params = make(GPT2, config, attention=how)
        cache = model.init_cache(1, 80, dtype, empty=empty)
        logits, cache = jax.jit(lambda p, c, apply=apply: apply(p, x, cache=c))(params, cache)
        assert "empty" not in cache and int(cache["length"]) == 70
        found.append((logits, cache))
    for other in found[:2]:
        for a, b in zip(*map(jax.tree.leaves, (other, found[2])), strict=True):
            near = a.dtype == jnp.int8  # A code that is a tie may fall to the other side.
            np.testing.assert_allclose(a, b, atol=1 if near else 2e-5, rtol=1e-5)


def test_a_prompt_in_pieces_by_the_kernel_equals_one_by_plain_products(interpreted):
    """Tokens that continue a cache, without a window, and with one that reaches before it."""
    config = dataclasses.replace(TINY, num_hidden_layers=2, sliding_windows=(None, 30))
    model, x, found = Llama(config, scan=True, rngs=nnx.Rngs(1)), tokens(1, 40), []
    for how in (KERNEL, Attending()):
        apply, params = make(Llama, config, attention=how)
        read = jax.jit(lambda p, x, c, f=apply: f(p, x, cache=c))
        cache, logits = model.init_cache(1, 42, "int8"), []
        for part in (x[:, :20], x[:, 20:]):
            out, cache = read(params, part, cache)
            logits.append(out)
        found.append(jnp.concatenate(logits, 1))
    np.testing.assert_allclose(*found, atol=2e-5, rtol=1e-5)


def test_a_forced_implementation_that_does_not_fit_is_an_error():
    apply, params = make(Llama, TINY, attention=KERNEL)
    with pytest.raises(NotImplementedError, match="it runs on TPU, not on cpu"):
        apply(params, tokens(1, 70))
    with pytest.raises(NotImplementedError, match="mosaic_gpu"):
        gpu, params = make(Llama, TINY, attention=Attending(implementation="mosaic_gpu"))
        generate(gpu, params, TINY, tokens(1, 4), 2)


def test_the_report_and_units_of_a_model_on_a_tpu(monkeypatch):
    """The report says what runs; what reads equations finds heads there as on a CPU."""
    apply, params = make(Llama, TINY)
    long, short = tokens(1, 70), tokens(1, 20)

    def report(x, cache=None):
        jax.clear_caches()
        found = jc.dispatch(apply).report(params, x, None, cache)
        return {(c.implementation, c.reason) for c in found if c.kind == "attention"}

    def heads():
        size = 2 * TINY.head_dim
        return units(apply, params, long, include="*o_proj*", kind="head", size=size)

    on_cpu, ((name, why),) = heads(), report(long)
    assert name == "xla" and "mosaic_tpu: it runs on TPU, not on cpu" in why
    monkeypatch.setattr(chips, "chip_of", lambda *_: chips.V5E)
    assert {name for name, _ in report(long)} == {"mosaic_tpu"}
    ((name, why),) = report(short)
    assert name == "xla" and "fewer than 64 tokens" in why
    cache = Llama(TINY, rngs=nnx.Rngs(0)).init_cache(1, 128)
    assert {name for name, _ in report(long, cache)} == {"mosaic_tpu"}
    assert heads() == on_cpu
    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        ((name, why),) = report(long)
    assert name == "xla" and "models.Attending(spec=..)" in why
    jax.clear_caches()
