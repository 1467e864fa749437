"""Puts the table of the last `make demo` into README.md, between its two markers."""

import pathlib
import re
import sys

root = pathlib.Path(__file__).parent.parent
output = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else root / "demo-output")
readme = root / "README.md"
markers = re.compile(r"(<!-- demo table.*?-->\n).*?(<!-- end of demo table -->)", re.DOTALL)
table = "\n" + (output / "table.md").read_text() + "\n"
text, count = markers.subn(lambda found: found[1] + table + found[2], readme.read_text())
if count != 1:
    sys.exit("README.md has not exactly one pair of markers")
readme.write_text(text)
