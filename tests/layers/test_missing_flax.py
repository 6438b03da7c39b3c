"""Imports of the layers without Flax."""

import subprocess
import sys

import pytest

from jaxbn._flax import explain_missing_flax

SCRIPT = """
import sys
sys.modules["flax"] = None  # as if it were not installed
try:
    import jaxbn.{name}
except ModuleNotFoundError as error:
    print(error)
"""


@pytest.mark.parametrize("name", ["linen", "nnx"])
def test_import_without_flax_explains_installation(name):
    script = SCRIPT.format(name=name)
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == (
        f"jaxbn.{name} needs Flax, which is not installed: pip install 'jaxbn[flax]'"
    )


def test_explanation_leaves_other_missing_modules_alone():
    missing = pytest.raises(ModuleNotFoundError, match="'nowhere'")
    with missing, explain_missing_flax("jaxbn.linen"):
        import nowhere  # noqa: F401  # pyright: ignore[reportMissingImports]
