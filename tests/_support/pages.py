"""Run the snippets of a documentation page."""

import re
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def run_page(name):
    text = (DOCS / name).read_text()
    names = {}
    for block in re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        exec(block, names)
    return names
