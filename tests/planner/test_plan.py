"""The planner: bytes against what they should be, programs compiled for TPUs, and its errors."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import msgspec
import pytest
from jaxcomp.kernels import chips, offline

import jaxcomp as jc
from jaxcomp import planner, presets
from jaxcomp.errors import JaxcompError, ModelError
from jaxcomp.planner import compiler, cost, cuda, hlo, search
from jaxcomp.planner.shapes import NAMED, config_from, fields_of
from jaxcomp.planner.steps import Serving, Split, Workload
from jaxcomp.planner.targets import DEVICES, topology
from jaxcomp.step import Activation

FIELDS = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": 2048,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
}
W4 = presets.w4a16_rtn(group_size=64)
needs_libtpu = pytest.mark.skipif(not offline.available(), reason="libtpu is not installed")


def serving(recipe=W4, batch=8, context=256, fields=FIELDS):
    text = None if recipe is None else recipe.dumps()
    return Serving(Workload("tiny", fields, text, batch, context, 64, 32))


@pytest.mark.parametrize("name", NAMED)
def test_named_models_have_their_number_of_parameters(name):
    _, params = jc.functional(jc.models.build(config_from(fields_of(name), name), scan=True))
    count = sum(x.size for x in jax.tree.leaves(params)) / 1e9
    # As their model cards give it.
    published = {
        "llama-3-8b": 8.03,
        "llama-3-70b": 70.6,
        "llama-3.1-405b": 405.9,
        "qwen3-8b": 8.19,
        "qwen3-32b": 32.8,
        "mixtral-8x7b": 46.7,
        "qwen3-30b-a3b": 30.5,
    }
    assert count == pytest.approx(published[name], rel=0.003)


@pytest.mark.parametrize("model", [2, 8])
def test_bytes_of_weights_and_cache_are_their_share(model):
    whole, split = serving(), Split(8 // model, 1, model)
    total = jc.nbits(whole.params) / 8
    assert whole.weight_bytes(split) == pytest.approx(total / model, rel=0.01)
    layers, heads, size = whole.config.cache_shape
    assert whole.cache_bytes(split) == 2 * layers * 8 * 256 * heads * size * 2 / 8


def test_roofline_of_bf16_by_hand():
    model, split, where = serving(recipe=None), Split(1, 4, 2), topology("v5e:2x4")
    found = search.roofline(model, where, split, "decode")
    matrices = 4 * (2 * 1024 * 1024 + 2 * 1024 * 512 + 3 * 1024 * 2048) + 2048 * 1024
    norms = 9 * 1024 * 2
    read = 2 * matrices / 8 + norms + model.cache_bytes(split)
    assert found.read == read
    assert found.memory == pytest.approx(read / 819e9)
    products = 2 * (matrices + 9 * 1024) * 8 + 4 * 8 * 256 * 1024 * 4
    assert found.operations == products / 8
    assert found.bound == "memory" and found.seconds == found.memory


def test_roofline_of_integers_uses_the_integer_rate():
    where, split = topology("v5e:2x4"), Split(1, 4, 2)
    weight_only = presets.w4a16_rtn()
    step = msgspec.structs.replace(weight_only.steps[0], activation=Activation())
    floats, integers = map(serving, (weight_only, jc.Recipe(steps=(step,))))
    matrices = 4 * (2 * 1024 * 1024 + 2 * 1024 * 512 + 3 * 1024 * 2048)
    slow, fast = (search.roofline(s, where, split, "prefill") for s in (floats, integers))
    assert fast.operations == slow.operations == slow.compute * 197e12
    products = 2 * matrices * 64 / 8
    saved = products / 197e12 - products / 393e12
    assert slow.compute - fast.compute == pytest.approx(saved)
    # Where the program decodes a weight first, its products are bfloat16's.
    told = {"integer": [], "sent": {}}
    assert search.roofline(integers, where, split, "prefill", told).compute == slow.compute
    for name, device in DEVICES.items():
        assert bool(device.int8) == chips.BY_NAME[name].multiplies("int8")


MOE = FIELDS | {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_hidden_layers": 2,
    "intermediate_size": 1024,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}


def test_roofline_of_experts_by_hand():
    """Of 8 experts a token multiplies 2; of 3 tokens each chooses an expert with 1/4."""
    model, split = serving(recipe=None, batch=3, fields=MOE), Split(1, 4, 2)
    found = search.roofline(model, topology("v5e:2x4"), split, "decode")
    experts = 2 * 8 * 3 * 1024 * 1024  # Layers, experts, projections.
    attention = 2 * (2 * 1024 * 1024 + 2 * 1024 * 512)
    router, norms, head = 2 * 1024 * 8, 5 * 1024, 2048 * 1024
    read = 2 * ((attention + head + experts * (1 - 0.75**3)) / 8 + router + norms)
    assert found.read == round(read) + model.cache_bytes(split)
    products = 2 * (attention + router + norms + head + experts / 4) * 3
    assert found.operations == (products + 4 * 3 * 256 * 1024 * 2) / 8


@needs_libtpu
def test_a_mixture_of_experts_and_what_its_compiled_program_gathers(monkeypatch):
    monkeypatch.setattr(planner.report, "fields_of", lambda name: MOE)
    recipe = presets.w4a16_rtn()
    found = planner.plan(
        "tiny", recipe, "v5e:2x4", batch=8, context=256, chunk=64, tries=1, cache_dtype="int8"
    )
    small, large = (variant.best for variant in found.variants)
    assert small is not None and large is not None, found.notes()
    # Keys and values of 8 bits, and a float32 scale for each head.
    assert small.cache == large.cache == 2 * 2 * 8 * 256 * 4 * (128 + 4) // 8
    assert "context 256 in int8" in found.table().title
    for phase in (small.decode, small.prefill):
        assert phase["weights_to_ideal"] == pytest.approx(1, abs=0.05)
        assert phase["implementations"] == {"kernel": 7}
        assert phase["whole_weight_gathers"] == []
    # XLA brings the dense experts of a ragged product together, nothing else; the plan says so.
    for phase in (large.decode, large.prefill):
        assert {one["shape"][0] for one in phase["whole_weight_gathers"]} <= {8}
    if large.decode["whole_weight_gathers"]:
        assert "decode: brings together whole weights: bf16[8," in found.notes()
    assert any("choose experts evenly" in text for text in found.to_dict()["assumptions"])


def test_candidates_say_why_others_are_not_possible():
    found, refused = search.candidates(serving(batch=4), topology("v5e:2x4"))
    assert {(t.split.data, t.split.model) for t in found} == {(1, 8), (2, 4), (4, 2)}
    # More devices than key-value heads: the positions of each are split.
    (eight,) = (t.split for t in found if t.split.model == 8)
    assert eight == (1, 4, 2) and eight.cache == "4 heads x 2 length"
    (why,) = refused.values()
    assert why == "data 8 does not divide the batch of 4"


def test_exchanges_in_a_loop_count_once_a_trip_and_in_fusions_once_a_channel():
    mesh = jax.make_mesh((4,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec

    def f(w, x):  # The product over a split axis is summed over devices, in each of 5 trips.
        return jax.lax.scan(lambda x, w: (jax.nn.relu(x @ w), None), x, w)[0]

    def place(*names):
        return jax.sharding.NamedSharding(mesh, spec(*names))

    w = jax.ShapeDtypeStruct((5, 64, 64), jnp.float32, sharding=place(None, "model", None))
    x = jax.ShapeDtypeStruct((8, 64), jnp.float32, sharding=place())
    text = jax.jit(f, out_shardings=place()).lower(w, x).compile().as_text()
    (one,) = [c for c in hlo.collectives(text) if c.kind == "all-reduce"]
    assert (one.kind, one.shape, one.group, one.times) == ("all-reduce", (8, 64), 4, 5)
    assert one.sent == 5 * 2 * 3 / 4 * 8 * 64 * 4
    assert hlo.whole_weights([one], [(64, 64)]) == []

    # XLA counts a loop's body once; here each trip counts as much, and reads its slice of w.
    def bytes_of(trips):
        shape = jax.ShapeDtypeStruct((trips, 64, 64), jnp.float32)
        loop = jax.jit(lambda w, x: f(w, x)).lower(shape, jnp.zeros((8, 64))).compile()
        return cost.accessed(loop)

    few, more, many = map(bytes_of, (2, 4, 8))
    assert many - more == 2 * (more - few) and more - few >= 2 * 64 * 64 * 4

    # A sum in shard_map and another: both have channel 1, and both count.
    add = lambda x, w: jax.lax.psum(x @ w, "model")  # noqa: E731
    add = jax.shard_map(
        add, mesh=mesh, in_specs=(spec(None, "model"), spec("model")), out_specs=spec()
    )
    narrow = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=place("model"))
    twice = jax.jit(lambda x, w, v: jax.nn.relu(add(jax.nn.relu(add(x, w)), v)))
    one = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=place("model"))
    text = twice.lower(x, one, narrow).compile().as_text()
    sums = [c for c in hlo.collectives(text) if c.kind == "all-reduce"]
    assert {c.shape for c in sums} == {(8, 64), (8, 32)}

    whole = jax.jit(lambda w: w, out_shardings=place())
    text = whole.lower(w).compile().as_text()
    assert [c.shape for c in hlo.whole_weights(hlo.collectives(text), [(5, 64, 64)])] == [
        (5, 64, 64)
    ]


def test_splits_are_ranked_by_what_a_request_takes():
    """Of 256 tokens 32 are new: 4 chunks of 64 are read, in each data-parallel group one prompt."""
    where, model = topology("v5e:2x4"), serving(recipe=None)
    found, _ = search.candidates(model, where)
    for tried in found:
        read, made = (search.roofline(model, where, tried.split, p) for p in ("prefill", "decode"))
        expected = 4 * read.seconds / tried.split.data + 32 * made.seconds / 8
        assert tried.estimate == pytest.approx(expected)
    assert [t.estimate for t in found] == sorted(t.estimate for t in found)
    # Every data-parallel group reads all weights in each step.
    assert found[0].split.model == 8 and found[-1].split.data == 8


@needs_libtpu
def test_a_plan_for_v5e_from_the_command_line(tmp_path):
    file = tmp_path / "config.json"
    fields = FIELDS | {"num_key_value_heads": 2}
    file.write_text(json.dumps(fields))
    arguments = ["plan", str(file), "--recipe", "w4a16_rtn", "--topology", "v5e:2x4"]
    # A cache that no core has room for, of one sequence: its positions are split.
    sizes = ["--batch", "1", "--context", "262144", "--chunk", "64"]
    arguments += [*sizes, "--tries", "1", "--json"]
    command = [sys.executable, "-m", "jaxcomp", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [v["name"] for v in found["variants"]] == ["w4a16_rtn", "bf16"]
    for variant, recipe in zip(found["variants"], (presets.w4a16_rtn(), None), strict=True):
        (tried,) = variant["tried"]
        assert variant["best"] == 0 and tried["problem"] is None
        whole = serving(recipe=recipe, fields=fields)
        ideal = jc.nbits(whole.params) / 8 / tried["split"]["model"]
        assert tried["weights"] == pytest.approx(ideal, rel=0.05)
        # q, k, v, o, gate, up and down: by their kernel, each device on its own part.
        ran = {"kernel": 7} if recipe else {}
        for phase in ("decode", "prefill"):
            compiled = tried[phase]
            expected = ideal + tried["cache"]
            assert compiled["arguments"] == pytest.approx(expected, rel=0.05)
            assert compiled["weights_to_ideal"] == pytest.approx(1, abs=0.05)
            assert compiled["implementations"] == ran
            assert compiled["whole_weight_gathers"] == []
            # Decoding, each device attends to the positions that it holds.
            # While a prompt is read, the devices of a head bring together its keys and values.
            heads, length = tried["split"]["heads"], tried["split"]["length"]
            assert heads == 2 and length > 1
            most = 0 if phase == "decode" else 4 * 2 * 262144 * 128 * 2 * (1 - 1 / length)
            assert compiled["cache_gathered"] <= most
            # Decoding, a kernel reads the cache where it lies.
            kernel = "decode_attention: mosaic_tpu: it fits, and is the first choice"
            assert (kernel in compiled["reasons"]) == bool(recipe and phase == "decode")
            # XLA's count has what is read at the least.
            assert compiled["accessed"] > 0.9 * compiled["roofline"]["read"]
            # And no copy of the cache for a layer, of keys or values alone.
            if phase == "decode":
                assert compiled["accessed"] - compiled["roofline"]["read"] < tried["cache"]
            # No second cache: each layer writes to the donated one. A prompt's chunk brings one
            # layer's keys or values together.
            most = tried["cache"] / 2 if phase == "decode" else tried["cache"]
            assert compiled["temporaries"] < most
            # Two sums over devices a layer.
            assert compiled["sent"]["all-reduce"] > 0
        # An eighth of the positions is made, the rest read 64 at a time.
        times = [tried[phase]["roofline"]["seconds"] for phase in ("prefill", "decode")]
        groups = tried["split"]["data"]
        assert tried["request"] == pytest.approx(3584 * times[0] / groups + 32768 * times[1])
    assert "229376 prompt and 32768 new tokens" in found["rule"]
    small, large = found["variants"]
    assert small["nbytes"] < 0.4 * large["nbytes"]


def test_what_the_compiler_is_told_of_gpus():
    eight = topology("h100:8")
    assert eight.devices == 8 and eight.jax_arguments["topology"] == "1x1x8"
    assert "NVIDIA H100" in eight.jax_arguments["target_config"]
    assert topology("v5p:2x2x2").jax_arguments == {
        "platform": "tpu",
        "topology_name": "v5p:2x2x2",
    }
    found = search.roofline(serving(recipe=None), eight, Split(1, 4, 2), "decode")
    assert found.memory == found.read / 3350e9


@pytest.mark.skipif(not cuda.available(), reason="JAX's CUDA plugin is not installed")
def test_a_plan_for_gpus(monkeypatch):
    monkeypatch.setattr(planner.report, "fields_of", lambda name: FIELDS)
    found = planner.plan("tiny", W4, "h100:2", batch=8, context=256, chunk=64, tries=1)
    small, large = found.variants
    assert small.best is not None and large.best is not None, found.notes()
    for variant in found.variants:
        for phase in (variant.best.decode, variant.best.prefill):
            assert phase["weights_to_ideal"] == pytest.approx(1, abs=0.05)
            assert phase["sent"]["all-reduce"] > 0
    assert small.best.decode["weights"] < 0.4 * large.best.decode["weights"]
    assert "jax-cuda13-plugin" in found.notes()


@needs_libtpu
def test_what_does_not_fit_is_said(monkeypatch):
    fields = FIELDS | {"num_hidden_layers": 8, "hidden_size": 8192, "intermediate_size": 262144}
    file_fields = fields | {"num_attention_heads": 64}
    monkeypatch.setattr(planner.report, "fields_of", lambda name: file_fields)
    found = planner.plan("wide", None, "v5e:2x2", batch=1, context=64, chunk=8, tries=1)
    (variant,) = found.variants
    assert variant.best is None
    assert "does not fit: needs " in variant.tried[0].problem
    assert "use more chips, fewer bits, a smaller --batch" in variant.tried[0].problem
    assert "does not fit" in found.notes()


@needs_libtpu
def test_the_compiler_says_that_there_is_no_such_slice():
    work = Workload("tiny", FIELDS, None, 8, 256, 64, 32)
    with (
        compiler.Compiler({"bf16": work}, topology("v5e:3x5")) as one,
        pytest.raises(JaxcompError, match=r"v5e:3x5"),
    ):
        one.compile("bf16", "decode", Split(1, 1, 15))


def test_errors(monkeypatch, tmp_path):
    with pytest.raises(JaxcompError, match=r"h100 slice has 1 axes; .* as in h100:8"):
        topology("h100:2x4")
    with pytest.raises(JaxcompError, match="'v9:2x2': the device 'v9' is unknown; known are v5e"):
        topology("v9:2x2")
    with pytest.raises(JaxcompError, match=r"v5p slice has 3 axes; .* as in v5p:2x2x2"):
        topology("v5p:4x4")
    with pytest.raises(ModelError, match=r"'llama-9': is neither .* llama-3-70b"):
        fields_of("llama-9")
    with pytest.raises(ModelError, match="no key-value cache"):
        bert = {"vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1}
        bert |= {"num_attention_heads": 2, "intermediate_size": 8, "max_position_embeddings": 8}
        bert |= {"architectures": ["BertForMaskedLM"], "model_type": "bert", "type_vocab_size": 2}
        config_from(bert, "bert")
    with pytest.raises(ModelError, match="cache of int4 cannot be; use one of"):
        planner.plan("llama-3-8b", None, "v5e:2x4", cache_dtype="int4")
    with pytest.raises(JaxcompError, match="chunk at most the context"):
        planner.plan("llama-3-8b", None, "v5e:2x4", context=64, chunk=128)
    monkeypatch.setattr(compiler.cuda, "available", lambda: False)
    told = "pip install --no-deps jax-cuda13-plugin==0|needs JAX 0.11.2 or newer, and this is 0.10"
    with pytest.raises(JaxcompError, match=told):
        compiler.Compiler({}, topology("h100:1"))
    monkeypatch.setattr(compiler.offline, "available", lambda: False)
    with pytest.raises(JaxcompError, match="pip install libtpu"):
        compiler.Compiler({}, topology("v5e:2x4"))


def test_no_split_is_possible_names_the_reasons():
    work = Workload("tiny", FIELDS | {"vocab_size": 2049}, None, 1, 256, 64, 32)
    with pytest.raises(JaxcompError, match=r"no split is possible .*embed_tokens.*2049"):
        search.search("bf16", Serving(work), topology("v5e:2x4"), 1, lambda text: None, None)
