"""Read and run the snippets of the documentation."""

import re
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def run_page(name):
    """Run the Python snippets of a page in order and return their variables."""
    names = {}
    for block in code_blocks((DOCS / name).read_text()):
        exec(block, names)
    return names


def code_blocks(markdown: str, language="python") -> list[str]:
    """Return the fenced code blocks of a language."""
    pattern = rf"^```{language}\n(.*?)^```"
    return re.findall(pattern, markdown, re.DOTALL | re.MULTILINE)
