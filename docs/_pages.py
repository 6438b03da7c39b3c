"""A hook for MkDocs: the pages that live elsewhere in the repository.

They are read from where GitHub shows them, so that nothing is copied: whole pages, the
tables of the benchmarks, and the examples with their code.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from textwrap import indent
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent

# At the same paths as in the repository, so that the links among them hold.
WHOLE = ["CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md"]

# A section opens the page named "index" in it: its summary, not the full results.
PUBLISHED_AS = {
    "performance.md": ("index", "performance.html"),
    "benchmarks/README.md": ("full_results", "benchmarks/full_results.html"),
}

# Lines that are only links, and on the site become what they link to.
RESULTS = re.compile(r"^\[[^\]]*\]\((results/[\w-]+\.md)\)\n", re.MULTILINE)
PICTURES = re.compile(r"^!\[[^\]]*\]\([^)]*\)\n", re.MULTILINE)
FIGURES = re.compile(f"(?:{RESULTS.pattern}|{PICTURES.pattern})+", re.MULTILINE)
GALLERY = re.compile(r"^\[[^\]]*\]\(\.\./(examples/[\w/]*README\.md)\)$", re.MULTILINE)

# A table of the benchmarks, with its title; an example in the table of a README.
TABLE = re.compile(r"\*\*(.*)\*\*\n\n((?:\|.*\n)+)")
EXAMPLE = re.compile(
    r"^\| `(python (examples/[\w/]+\.py).*?)` \| (.+?) \| (.+?) \|", re.MULTILINE
)


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


def on_page_markdown(markdown: str, page: Any, config: MkDocsConfig, **_: Any) -> str:
    """Fill in tables and examples, and lead links to where the site has the pages."""
    uri = page.file.src_uri
    if uri in WHOLE:  # `docs/` is the top of the site
        page.edit_url = f"{config.repo_url}/edit/main/{uri}"
        markdown = FIGURES.sub(_figures, markdown)
        return re.sub(r"(\]\((?:\.\./)*)docs/", r"\1", markdown)
    markdown = GALLERY.sub(_gallery, markdown)
    return re.sub(r"(\]\((?:\.\./)*)\.\./(?=benchmarks/|[A-Z]+\.md)", r"\1", markdown)


def _figures(lines: re.Match[str]) -> str:
    """Return the pictures of a section, then its tables, folded."""
    pictures, results = PICTURES.findall(lines[0]), RESULTS.findall(lines[0])
    tables = [
        f'??? note "{title}"\n\n{indent(table, "    ")}'
        for name in results
        for title, table in TABLE.findall((ROOT / "benchmarks" / name).read_text())
    ]
    return "\n".join(["", *pictures, *tables])


def _gallery(link: re.Match[str]) -> str:
    """Return the examples in the table of a README."""
    rows = EXAMPLE.findall((ROOT / link[1]).read_text())
    return "\n".join(_example(*row) for row in rows)


def _example(command: str, path: str, purpose: str, length: str) -> str:
    """Return a script's section: its purpose, picture, command and code, folded."""
    script, code = Path(path), (ROOT / path).read_text()
    pictures = [
        f"![The picture that {script.name} draws]({folder}/{script.stem}.png)"
        for folder in ("images", "experiments")
        if (ROOT / "docs" / folder / f"{script.stem}.png").exists()
    ]
    block = f"```` {{ .python data-search-exclude='' }}\n{code}````"
    return "\n\n".join(
        [
            f"### {script.name}",
            purpose[0].upper() + purpose[1:] + ("" if purpose.endswith("?") else "."),
            *pictures,
            f"```sh\n{command}\n```",
            f"By default: {length}.",
            f'??? example "{path}"\n\n{indent(block, "    ")}\n',
        ]
    )


def on_page_content(html: str, **_: Any) -> str:
    """Link each picture to its file, to look at it in full size."""
    image = r'<img alt="[^"]*" src="([^"]+\.png)"[^>]*>'
    return re.sub(image, r'<a class="picture" href="\1">\g<0></a>', html)
