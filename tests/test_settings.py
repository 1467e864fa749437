"""Settings: a YAML file and overrides in its types, every mistake an error with the fix."""

import pytest

import jaxcomp as jc
from jaxcomp.settings import VARIABLE, read_settings


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("steps: 100\nlearning_rate: 0.1\nbits: [2, 3]\ncheckpoint: null\n")
    return path


def test_overrides_have_the_types_of_what_they_replace(file):
    s = read_settings(file, ["steps=2", "learning_rate=1e-3", "bits=[4]", "checkpoint=there"])
    assert (s.steps, s.learning_rate, s.bits, s.checkpoint) == (2, 1e-3, [4], "there")
    assert read_settings(file, ["learning_rate=1"]).learning_rate == 1.0
    assert read_settings(file, []).checkpoint is None


def test_the_environment_overrides_too(file, monkeypatch):
    monkeypatch.setenv(VARIABLE, "steps=7 bits=[1]")
    assert read_settings(file).steps == 7


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("step=2", r"no 'step'; the closest are steps"),
        ("steps", r"'steps' is no override; write name=value"),
        ("steps=many", r"must be of type int, as 100"),
        ("learning_rate=fast", r"must be of type float"),
    ],
)
def test_wrong_overrides_are_errors(file, argument, message):
    with pytest.raises(jc.DataError, match=message):
        read_settings(file, [argument])


def test_a_missing_or_malformed_file_is_an_error(tmp_path):
    with pytest.raises(jc.DataError, match="No such file"):
        read_settings(tmp_path / "none.yaml", [])
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(jc.DataError, match="must be a mapping"):
        read_settings(tmp_path / "list.yaml", [])
