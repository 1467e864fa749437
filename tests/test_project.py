"""The project's own files: README and notebooks run, packaging is complete, nothing has gone
stale."""

import doctest
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib

import pytest

import jaxcomp as jc
from jaxcomp import demo

ROOT = pathlib.Path(__file__).parent.parent


def test_readme_snippets():
    failed, tried = doctest.testfile(str(ROOT / "README.md"), module_relative=False)
    assert failed == 0 and tried > 8


def test_readme_links_lead_somewhere():
    for name in ("README.md", "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / name).read_text()):
            assert target.startswith("http") or (ROOT / target).exists(), target


def test_readme_table_has_every_row_of_the_demo():
    table = (ROOT / "README.md").read_text().split("demo table")[1]
    for name in ("dense", *demo.RECIPES):
        assert f"| {name} |" in table


# The other notebooks are made of examples, which test_examples.py runs.
@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("01_*.ipynb")), ids=str)
def test_notebooks_run(path, tmp_path, monkeypatch, capsys):
    notebook = json.loads(path.read_text())
    assert notebook["nbformat"] == 4
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for i, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code":
            assert not cell["outputs"] and cell["execution_count"] is None
            exec(compile("".join(cell["source"]), f"{path.name}[{i}]", "exec"), names)
    assert "perplexity: dense" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def _project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_all_packages_are_listed():
    found = {
        ".".join(f.parent.relative_to(ROOT).parts) for f in (ROOT / "jaxcomp").rglob("__init__.py")
    }
    kernels = ROOT / "kernels" / "pallas"
    for file in kernels.rglob("__init__.py"):
        found.add(".".join(("jaxcomp.kernels", *file.parent.relative_to(kernels).parts)))
    assert set(_project()["tool"]["setuptools"]["packages"]) == found


def test_one_version():
    assert _project()["project"]["version"] == jc.__version__
    assert jc.__version__ in (ROOT / "CHANGELOG.md").read_text()


def test_an_importable_kernels_would_shadow_another_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.slow
def test_a_wheel_holds_code_assets_and_kernels(tmp_path):
    import zipfile

    source = tmp_path / "source"
    source.mkdir()
    # Not what other tests write meanwhile.
    written = shutil.ignore_patterns("__pycache__")
    for name in ("jaxcomp", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=written)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    made = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "-w", tmp_path, source],
        capture_output=True,
        text=True,
    )
    if "No matching distribution" in made.stderr or "Could not find a version" in made.stderr:
        pytest.skip("building needs setuptools from a package index")
    assert made.returncode == 0, made.stderr
    (wheel,) = tmp_path.glob("jaxcomp-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for name in (
        "jaxcomp/cli.py",
        "jaxcomp/graph/_compat.py",
        "jaxcomp/kernels/__init__.py",
        "jaxcomp/assets/tinylm/config.json",
        "jaxcomp/assets/tinylm/model.safetensors",
        "jaxcomp/assets/tinylm/heldout.txt",
    ):
        assert name in names
    assert not [n for n in names if n.startswith(("tests/", "kernels/", "benchmarks/"))]


def test_it_imports_without_torch_and_without_starting_a_device():
    code = (
        "import sys, jaxcomp, jax; from jax._src import xla_bridge;"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules;"
        "assert 'orbax.checkpoint' not in sys.modules and 'matplotlib' not in sys.modules;"
        "assert not xla_bridge._backends"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
