"""Imports of the layers without Flax."""

import subprocess
import sys

import pytest

import jaxbn
import jaxbn._flax

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


def test_require_flax_reraises_other_missing_modules(monkeypatch):
    def import_module(name):
        raise ModuleNotFoundError("No module named 'nowhere'", name="nowhere")

    monkeypatch.setattr(jaxbn._flax, "import_module", import_module)
    with pytest.raises(ModuleNotFoundError, match="'nowhere'"):
        jaxbn._flax.require_flax("jaxbn.linen")
