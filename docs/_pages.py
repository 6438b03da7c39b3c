"""A hook for MkDocs: the pages that live elsewhere in the repository.

They are read from where GitHub shows them, so that nothing is copied.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent

# At the same paths as in the repository, so that the links among them hold.
WHOLE = ["CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md"]

# Wide tables take the place of the table of contents.
WIDE = ["benchmarks/README.md"]

# A line that is only a link to a table: the site shows the table instead.
TABLE_LINK = re.compile(r"^\[[^\]]*\]\((results/[\w-]+\.md)\)$", re.MULTILINE)

# Pages made of sections of the README: their title, and the headings of these.
FROM_README = {
    "performance.md": ("Performance in short", ["Performance"]),
    "compared.md": (
        "Beside other libraries",
        ["What jaxbn does that others don't", "Against Flax and PyTorch"],
    ),
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in `docs/`, and their pictures."""
    for file in _files(config):
        files.append(file)
    return files


def _files(config: MkDocsConfig) -> Iterator[File]:
    pictures = sorted(ROOT.glob("benchmarks/results/*.png"))
    for path in [*(ROOT / name for name in WHOLE), *pictures]:
        uri = path.relative_to(ROOT).as_posix()
        yield File.generated(config, uri, abs_src_path=str(path))
    readme = (ROOT / "README.md").read_text()
    for uri, (title, headings) in FROM_README.items():
        text = "\n".join(_section(readme, heading) for heading in headings)
        if len(headings) == 1:  # whose heading the title stands for
            text = text.partition("\n")[2]
        yield File.generated(config, uri, content=f"# {title}\n\n{text}")


def _section(text: str, heading: str) -> str:
    """From `## heading` to the next one of its level."""
    found = re.search(rf"^## {re.escape(heading)}\n.*?(?=^## |\Z)", text, re.M | re.S)
    if found is None:
        raise PluginError(f"README.md has no section {heading!r}, which a page wants")
    return found[0]


def _table(link: re.Match[str]) -> str:
    return (ROOT / "benchmarks" / link[1]).read_text() + "\n"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Drop `docs/` from links: on the site it is the top, where GitHub has a folder."""
    if page.file.src_uri in WIDE:
        page.meta["hide"] = ["toc"]
        markdown = TABLE_LINK.sub(_table, markdown)
    if page.file.src_uri in {*WHOLE, *FROM_README}:
        return re.sub(r"(\]\((?:\.\./)*)docs/", r"\1", markdown)
    return re.sub(r"(\]\((?:\.\./)*)\.\./(?=benchmarks/|[A-Z]+\.md)", r"\1", markdown)
