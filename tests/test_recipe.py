import pathlib
import re

import msgspec
import pytest

from jaxcomp import presets
from jaxcomp.errors import JaxcompError, RecipeError
from jaxcomp.formats.spec import Codebook, Float, Int
from jaxcomp.pruning import Magnitude, SparseGPT, Wanda
from jaxcomp.quantization import AWQ, GPTQ, RTN, LLMInt8, SmoothQuant
from jaxcomp.recipe import KEPT, Recipe
from jaxcomp.step import Activation

PATHS = [
    "embed/embedding",
    "layers/0/attention/q/kernel",
    "layers/0/mlp/up/kernel",
    "layers/1/attention/q/kernel",
    "layers/1/mlp/up/kernel",
]
EVERY_KIND = Recipe(
    steps=(
        SmoothQuant(alpha=0.25, include=("*mlp*", r"re:.*/attention/[qkv]/.*")),
        RTN(format=Int(bits=3, group_size=32, symmetric=False), clipping="mse"),
        RTN(format=Float(kind="nvfp4")),
        RTN(format=Codebook(kind="levels", levels=(-1.0, -0.1, 0.1, 1.0), group_size=16)),
        GPTQ(
            format=Int(bits=8, full_range=False),
            activation=Activation(granularity="tensor", dynamic=False),
            order="activation",
            damping=0.05,
        ),
        AWQ(format=Int(bits=4, group_size=None, out_group_size=None), exclude=("*head*",)),
        LLMInt8(),
        Magnitude(sparsity=1 / 3),
        Wanda(n=2, m=4),
        SparseGPT(n=2, m=4, format=Int(bits=4, group_size=128)),
    )
)


def test_yaml_round_trip_is_exact(tmp_path):
    EVERY_KIND.dump(tmp_path / "r.yaml")
    loaded = Recipe.load(tmp_path / "r.yaml")
    assert loaded == EVERY_KIND
    assert loaded.fingerprint() == EVERY_KIND.fingerprint()
    assert hash(loaded) == hash(EVERY_KIND)
    assert loaded.dumps() == EVERY_KIND.dumps()


def test_round_trip_keeps_what_equals_a_default_of_another_type():
    recipe = Recipe(steps=(RTN(format=Int(bits=4, out_group_size=None), include=("1",)),))
    text = recipe.dumps()
    assert Recipe.loads(text) == recipe and "out_group_size: null" in text


def test_yaml_has_no_defaults_and_no_python_tags():
    text = Recipe(steps=(RTN(format=Int(bits=4)),)).dumps()
    assert text.split() == "steps: - algorithm: rtn format: format: int bits: 4".split()


def test_fingerprint_tells_recipes_apart():
    step = GPTQ(format=Int(bits=4, group_size=128))
    variants = [
        Recipe(steps=(step,)),
        Recipe(steps=(step, step)),
        Recipe(steps=(GPTQ(format=Int(bits=4, group_size=64)),)),
        Recipe(steps=(GPTQ(format=Int(bits=4, group_size=128), damping=0.02),)),
        Recipe(steps=(GPTQ(format=Int(bits=4, group_size=128), exclude=("a",)),)),
        Recipe(steps=(RTN(format=Int(bits=4, group_size=128)),)),
    ]
    assert len({recipe.fingerprint() for recipe in variants}) == len(variants)
    assert all(re.fullmatch("[0-9a-f]{64}", recipe.fingerprint()) for recipe in variants)


@pytest.mark.parametrize(
    "rule, path, expected",
    [
        ("*", "a/b", True),
        ("*kernel", "layers/0/mlp/up/kernel", True),
        ("layers/*/kernel", "layers/0/mlp/up/kernel", True),
        ("layers/?/mlp*", "layers/0/mlp/up/kernel", True),
        ("layers/?/mlp*", "layers/10/mlp/up/kernel", False),
        ("layers/[12]/*", "layers/1/x", True),
        ("layers/[12]/*", "layers/3/x", False),
        ("mlp", "layers/0/mlp", False),
        ("*MLP*", "layers/0/mlp", False),
        ("a.b", "axb", False),
        (r"re:layers/\d+/mlp", "layers/12/mlp", True),
        (r"re:layers/\d+/mlp", "layers/12/mlp/up", False),
        (r"re:mlp", "layers/12/mlp", False),
    ],
)
def test_rules(rule, path, expected):
    recipe = Recipe(steps=(RTN(format=Int(bits=4), include=(rule,)),))
    assert recipe.matches(0, path) is expected


def _steps(*rules):
    made = (RTN(format=Int(bits=4), include=i, exclude=e) for i, e in rules)
    return Recipe(steps=tuple(made))


def test_resolve_orders_steps_and_exclude_wins():
    recipe = _steps((("*mlp*", "*attention*"), ("*/1/*",)), (("*/0/mlp*",), ()))
    assert recipe.resolve(PATHS[1:], PATHS[:1]) == {
        "layers/0/attention/q/kernel": (0,),
        "layers/0/mlp/up/kernel": (0, 1),
    }


def test_star_takes_what_contractions_use_and_names_take_the_rest():
    assert list(_steps((("*",), ())).resolve(PATHS[1:], PATHS[:1])) == PATHS[1:]
    everything = _steps((("*", "*embed*"), ())).resolve(PATHS[1:], PATHS[:1])
    assert sorted(everything) == sorted(PATHS)
    assert list(_steps((("embed*",), ())).resolve(PATHS[1:], PATHS[:1])) == PATHS[:1]


@pytest.mark.parametrize(
    "include, exclude, said",
    [
        (("*mpl*",), (), "include rule '*mpl*' matches none.*layers/0/mlp/up/kernel"),
        (("*", "layers/0/mlp"), (), "include rule 'layers/0/mlp' matches none.*whole path"),
        (("*",), ("*lmhead*",), "exclude rule '*lmhead*' matches none"),
        (("re:layers/.",), (), "include rule 're:layers/.' matches none"),
        (("*mlp*",), ("*up*",), "applies to no weight: exclude ['*up*'] removes all"),
    ],
)
def test_a_rule_that_matches_nothing_is_an_error(include, exclude, said):
    with pytest.raises(RecipeError) as caught:
        _steps((include, exclude)).resolve(PATHS[1:], PATHS[:1])
    assert "step 0 (rtn)" in str(caught.value)
    for part in said.split(".*"):
        assert part in str(caught.value)


def test_head_and_routers_may_be_absent_and_are_left_alone_when_present():
    recipe = presets.w4a16_rtn()
    assert recipe.steps[0].exclude == KEPT
    assert list(recipe.resolve(PATHS[1:])) == PATHS[1:]
    present = [*PATHS[1:], "lm_head/kernel", "layers/0/mlp/router/kernel"]
    assert list(recipe.resolve(present)) == PATHS[1:]


@pytest.mark.parametrize(
    "text, said",
    [
        ("steps: [", "not valid YAML"),
        ("steps: []", "at least one step"),
        ("[]", "the top level: expected 'object', got 'array'"),
        ("stepz: []", "the top level: .*Did you mean 'steps'. Allowed keys: steps"),
        (
            "steps:\n- {algorithm: gtpq, format: {format: int, bits: 4}}",
            r"steps\[0\].algorithm: invalid value 'gtpq'.*Did you mean 'gptq'. "
            "algorithm is one of .*smoothquant",
        ),
        (
            "steps:\n- {format: {format: int, bits: 4}}",
            r"steps\[0\]: missing .*'algorithm'.*one of",
        ),
        (
            "steps:\n- {algorithm: rtn, format: {format: int, bits: 4, groupsize: 128}}",
            r"steps\[0\].format: contains unknown field 'groupsize'.*Did you mean 'group_size'. "
            "Allowed keys: format, bits, group_size, symmetric",
        ),
        (
            "steps:\n- {algorithm: rtn, format: {format: int, bits: 4}}\n"
            "- {algorithm: gptq, dampening: 0.1, format: {format: int, bits: 4}}",
            r"steps\[1\]: .*'dampening'.*Did you mean 'damping'. Allowed keys: .*block_size",
        ),
        (
            "steps:\n- {algorithm: rtn, format: {format: int, bits: four}}",
            r"steps\[0\].format.bits: expected 'int', got 'str'",
        ),
        (
            "steps:\n- {algorithm: rtn, format: {format: integer, bits: 4}}",
            r"steps\[0\].format.format: invalid value 'integer'.*Did you mean 'int'. .*codebook",
        ),
        (
            "steps:\n- {algorithm: gptq, order: naturl, format: {format: int, bits: 4}}",
            r"steps\[0\].order: invalid enum value 'naturl'",
        ),
        (
            "steps:\n- {algorithm: rtn, include: [], format: {format: int, bits: 4}}",
            r"step 0 \(rtn\) has an empty include",
        ),
        (
            "steps:\n- {algorithm: rtn, include: ['re:*a'], format: {format: int, bits: 4}}",
            r"rule 're:\*a': not a regular expression",
        ),
        ("steps:\n- !!python/object:os.system {}", "not valid YAML"),
    ],
)
def test_bad_yaml_names_the_file_the_key_and_what_is_allowed(tmp_path, text, said):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(JaxcompError, match=f"(?s){said}") as caught:
        Recipe.load(file)
    assert "not a regular" in said or str(file) in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"nothing.yaml: No such file"):
        Recipe.load(tmp_path / "nothing.yaml")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="not a UTF-8 text file"):
        Recipe.load(tmp_path / "binary")


CONFIGS = pathlib.Path(__file__).parent.parent / "configs"


def test_configs_are_the_presets():
    on_disk = {file.stem: Recipe.load(file) for file in CONFIGS.glob("*.yaml")}
    assert on_disk == presets.named()


def test_presets_take_group_size_include_and_exclude():
    for make in (presets.w4a16_gptq, presets.w4a16_awq, presets.sparsegpt_int4, presets.nf4):
        (step,) = make(group_size=32, include=("*mlp*",), exclude=("*down*",)).steps
        assert step.format.group_size == 32
        assert (step.include, step.exclude) == (("*mlp*",), ("*down*",))
    for step in presets.w8a8_smoothquant(include=("*mlp*",)).steps:
        assert step.include == ("*mlp*",)


@pytest.mark.parametrize("pattern", [{}, {"sparsity": 0.5, "n": 2, "m": 4}, {"n": 2}, {"m": 4}])
def test_pruning_presets_need_one_pattern(pattern):
    with pytest.raises(RecipeError, match="either sparsity, or both n and m"):
        presets.wanda(**pattern)


def test_an_unknown_preset_lists_all():
    with pytest.raises(RecipeError, match=r"'w4a16'.*w4a16_gptq"):
        presets.get("w4a16")


def test_steps_are_frozen():
    with pytest.raises(AttributeError):
        EVERY_KIND.steps[0].alpha = 1.0
    assert msgspec.structs.replace(EVERY_KIND.steps[0], alpha=1.0) != EVERY_KIND.steps[0]
