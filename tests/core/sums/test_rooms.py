"""Test that no platform's file reaches another's."""

import ast
from pathlib import Path

import pytest

import jaxbn

SUMS = Path(jaxbn.__file__).parent / "_core" / "sums"
PLATFORMS = {"cpu", "cuda", "tpu"}


def imported_files(path):
    """Return the files beside this one that it imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            yield from [node.module] if node.module else [a.name for a in node.names]


def test_every_file_is_shared_or_a_platforms():
    files = {path.stem for path in SUMS.glob("*.py")}
    assert files == PLATFORMS | {"__init__", "forms", "plain", "shift"}


@pytest.mark.parametrize("name", sorted(PLATFORMS | {"plain", "shift"}))
def test_no_platform_is_reached_from_another_file(name):
    assert not PLATFORMS & {*imported_files(SUMS / f"{name}.py")}


def test_forms_reaches_all_of_them():
    assert {*imported_files(SUMS / "forms.py")} >= PLATFORMS
