"""Run Flax's own tests with jaxbn's BatchNorm instead of Flax's.

    python tests/flax_suite.py

downloads the tests in the sdist of the installed Flax from PyPI, and runs the tests
that mention BatchNorm with jaxbn's class; if any fails, again with Flax's: every test
must have the same outcome. This file is also the pytest plugin that replaces the
classes, and counts the tests that build one.
"""

import ast
import inspect
import os
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from functools import cache
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

import flax.linen.normalization
import flax.nnx.nn.normalization
import pytest

import jaxbn

SWITCH = "FLAX_SUITE_WITH_JAXBN"
BUILT = "batch norms built"
instances = Counter()


def pytest_configure():
    """Put jaxbn's classes under Flax's names if the environment asks for it."""
    for layer, *homes in (
        (jaxbn.linen.BatchNorm, flax.linen, flax.linen.normalization),
        (jaxbn.nnx.BatchNorm, flax.nnx, flax.nnx.nn.normalization),
    ):
        for home in homes if SWITCH in os.environ else ():
            setattr(home, "BatchNorm", layer)  # noqa: B010
        count_instances(homes[0].BatchNorm)


def count_instances(layer):
    init = layer.__init__

    def counted(self, *args, **kwargs):
        instances[BUILT] += 1
        init(self, *args, **kwargs)

    layer.__init__ = counted


def pytest_collection_modifyitems(config, items):
    """Keep the tests that mention BatchNorm, or whose file has models that do."""
    kept = [
        item
        for item in items
        if "BatchNorm" in inspect.getsource(item.function)
        or models_mention_it(item.path)
    ]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


@cache
def models_mention_it(path):
    source = path.read_text()
    return any(
        "BatchNorm" in (ast.get_source_segment(source, node) or "")
        for node in ast.parse(source).body
        if not getattr(node, "name", "Test").endswith("Test")
        and not getattr(node, "name", "Test").startswith("Test")
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    instances.clear()
    try:
        return (yield)
    finally:
        item.user_properties.append((BUILT, instances[BUILT]))


def download(folder: Path) -> Path:
    """Download the sdist of the installed Flax, and return its folder."""
    wanted = f"flax=={version('flax')}"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--no-binary=flax", "-d", folder, wanted], check=True)
    (sdist,) = folder.glob("flax-*.tar.gz")
    with tarfile.open(sdist) as archive:
        # Python before 3.11.4 has no filters.
        archive.extraction_filter = getattr(tarfile, "data_filter", lambda m, _: m)
        archive.extractall(folder)
    return folder / sdist.name.removesuffix(".tar.gz")


def outcomes(root: Path, files: list[Path], with_jaxbn: bool) -> dict:
    """Return the outcome of each test, and whether it built a BatchNorm."""
    report = root / "report.xml"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    if with_jaxbn:
        environment[SWITCH] = "1"
    subprocess.run(
        [
            *(sys.executable, "-P", "-m", "pytest", "-p", "flax_suite", "-n", "auto"),
            *("-q", "--tb=short", f"--junitxml={report}", *map(str, files)),
        ],
        cwd=root,
        env=environment,
        check=False,  # a test may fail with Flax's class too
    )
    return {
        (case.get("classname"), case.get("name")): (
            next((c.tag for c in case if c.tag != "properties"), "passed"),
            any(int(p.get("value", 0)) for p in case.iter("property")),
        )
        for case in ElementTree.parse(report).iter("testcase")
    }


def main() -> None:
    """Fail if jaxbn's class changes an outcome, or if no test builds one."""
    with tempfile.TemporaryDirectory() as folder:
        root = download(Path(folder))
        files = sorted((root / "tests").rglob("*_test.py"))
        files = [f for f in files if "BatchNorm" in f.read_text()]
        actual = outcomes(root, files, with_jaxbn=True)
        fine = all(outcome in ("passed", "skipped") for outcome, _ in actual.values())
        expected = actual if fine else outcomes(root, files, with_jaxbn=False)
    built = sum(uses for _, uses in actual.values())
    changed = {
        test: (expected.get(test), outcome)
        for test, outcome in actual.items()
        if expected.get(test) != outcome
    }
    for test, (before, after) in changed.items():
        print("DIFFERS", "::".join(test), before, after)
    print(f"flax {version('flax')}: {len(actual)} tests, {built} build a BatchNorm")
    print("with jaxbn's class:", Counter(outcome for outcome, _ in actual.values()))
    if changed or expected.keys() != actual.keys() or not built:
        sys.exit("Outcomes differ from Flax's class, or no test was run.")


if __name__ == "__main__":
    main()
