"""Writes notebooks/*.ipynb from examples/*.py, cell by cell; with --check, says which differ.

An example is a script in cells: a line "# %%" begins code, "# %% [markdown]" text whose lines begin
with "# ". Its first line names the notebook, as in "# notebook: 02_qat".
"""

import json
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]


def cells(source: str) -> list[dict]:
    found: list[dict] = []
    for line in source.splitlines():
        if line.startswith("# %%"):
            markdown = line.startswith("# %% [markdown]")
            found.append({"kind": "markdown" if markdown else "code", "lines": []})
        elif found:
            if found[-1]["kind"] == "markdown":
                line = line.removeprefix("#").removeprefix(" ")
            found[-1]["lines"].append(line)
    made = []
    for number, cell in enumerate(found):
        text = "\n".join(cell["lines"]).strip("\n")
        lines = [line + "\n" for line in text.split("\n")]
        lines[-1] = lines[-1].removesuffix("\n")
        made.append(
            {
                "cell_type": cell["kind"],
                **({"execution_count": None, "outputs": []} if cell["kind"] == "code" else {}),
                "id": f"cell-{number:02}",
                "metadata": {},
                "source": lines,
            }
        )
    return made


def notebook(source: str) -> str:
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    content = {
        "cells": cells(source),
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(content, indent=1) + "\n"


def main() -> None:
    stale = []
    for path in sorted((ROOT / "examples").glob("*.py")):
        source = path.read_text()
        first = source.splitlines()[0]
        target = ROOT / "notebooks" / f"{first.removeprefix('# notebook: ')}.ipynb"
        text = notebook(source)
        if not target.exists() or target.read_text() != text:
            stale.append(target.name)
            if "--check" not in sys.argv:
                target.write_text(text)
    print("written:" if "--check" not in sys.argv else "differ:", ", ".join(stale) or "none")
    sys.exit(bool(stale) and "--check" in sys.argv)


if __name__ == "__main__":
    main()
