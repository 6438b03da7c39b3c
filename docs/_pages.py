"""A hook for MkDocs: the pages that live elsewhere in the repository.

They are read from where GitHub shows them, so that nothing is copied.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent

# At the same paths as in the repository, so that the links among them hold.
WHOLE = ["CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md"]

# Wide tables take the place of the table of contents.
WIDE = ["benchmarks/README.md"]

# A line that is only a link to a table: the site shows the table instead.
TABLE_LINK = re.compile(r"^\[[^\]]*\]\((results/[\w-]+\.md)\)$", re.MULTILINE)

# A section opens the page named "index" in it: its summary, not the full results.
PUBLISHED_AS = {
    "performance.md": ("index", "performance.html"),
    "benchmarks/README.md": ("full_results", "benchmarks/full_results.html"),
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in `docs/`, and their pictures."""
    for file in _files(config):
        files.append(file)
    for uri, (name, dest_uri) in PUBLISHED_AS.items():
        file = files.src_uris[uri]
        file.name, file.dest_uri = name, dest_uri
    return files


def _files(config: MkDocsConfig) -> Iterator[File]:
    pictures = sorted(ROOT.glob("benchmarks/results/*.png"))
    for path in [*(ROOT / name for name in WHOLE), *pictures]:
        uri = path.relative_to(ROOT).as_posix()
        yield File.generated(config, uri, abs_src_path=str(path))


def _table(link: re.Match[str]) -> str:
    return (ROOT / "benchmarks" / link[1]).read_text() + "\n"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Drop `docs/` from links: on the site it is the top, where GitHub has a folder."""
    if page.file.src_uri in WIDE:
        page.meta["hide"] = ["toc"]
        markdown = TABLE_LINK.sub(_table, markdown)
    if page.file.src_uri in WHOLE:
        return re.sub(r"(\]\((?:\.\./)*)docs/", r"\1", markdown)
    return re.sub(r"(\]\((?:\.\./)*)\.\./(?=benchmarks/|[A-Z]+\.md)", r"\1", markdown)
