"""Run Flax's own tests with jaxbn's BatchNorm in the place of Flax's.

    python tests/flax_suite.py

takes the tests from PyPI's sdist of the installed Flax and runs those that speak of
BatchNorm with our class; if any fails, again with Flax's: every test must end alike. It
is also the pytest plugin that puts our classes there, and counts the tests that build
one.
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
    """Put our classes under Flax's names, where the environment says so."""
    for actual, *homes in (
        (jaxbn.linen.BatchNorm, flax.linen, flax.linen.normalization),
        (jaxbn.nnx.BatchNorm, flax.nnx, flax.nnx.nn.normalization),
    ):
        for home in homes if SWITCH in os.environ else ():
            setattr(home, "BatchNorm", actual)  # noqa: B010
        count_instances(homes[0].BatchNorm)


def count_instances(layer):
    init = layer.__init__

    def counted(self, *args, **kwargs):
        instances[BUILT] += 1
        init(self, *args, **kwargs)

    layer.__init__ = counted


def pytest_collection_modifyitems(config, items):
    """Keep the tests that speak of BatchNorm, or whose file has models that do."""
    kept = [
        item
        for item in items
        if "BatchNorm" in inspect.getsource(item.function)
        or models_speak_of_it(item.path)
    ]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


@cache
def models_speak_of_it(path):
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
    """The sdist of the installed Flax, its tests and their settings only."""
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
    """How each test ended, and whether it built a BatchNorm."""
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
        check=False,  # what fails with Flax's own class may fail with actual
    )
    return {
        (case.get("classname"), case.get("name")): (
            next((c.tag for c in case if c.tag != "properties"), "passed"),
            any(int(p.get("value", 0)) for p in case.iter("property")),
        )
        for case in ElementTree.parse(report).iter("testcase")
    }


def main() -> None:
    """Fail where our class changes how a test ends, or where no test builds one."""
    with tempfile.TemporaryDirectory() as folder:
        root = download(Path(folder))
        files = sorted((root / "tests").rglob("*_test.py"))
        files = [f for f in files if "BatchNorm" in f.read_text()]
        actual = outcomes(root, files, with_jaxbn=True)
        fine = all(outcome in ("passed", "skipped") for outcome, _ in actual.values())
        expected = actual if fine else outcomes(root, files, with_jaxbn=False)
    built = sum(uses for _, uses in actual.values())
    changed = {t: (expected.get(t), actual[t]) for t in actual if expected.get(t) != actual[t]}
    for test, (before, after) in changed.items():
        print("DIFFERS", "::".join(test), before, after)
    print(f"flax {version('flax')}: {len(actual)} tests, {built} build a BatchNorm")
    print("with jaxbn's class:", Counter(outcome for outcome, _ in actual.values()))
    if changed or expected.keys() != actual.keys() or not built:
        sys.exit("The tests end otherwise than with Flax's class, or none was run.")


if __name__ == "__main__":
    main()
