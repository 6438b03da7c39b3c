"""Run the example that switches a published model to jaxbn."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples/switch_model.py"
HINT = "install the extra examples-models, and transformers before version 5"


@pytest.mark.skipif(find_spec("transformers") is None, reason=HINT)
def test_switched_model_equals_published_one(tmp_path):
    command = [sys.executable, SCRIPT, "--quick", "--output", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    if "Skipped" in done.stdout:
        pytest.skip(HINT)
    assert "switched: 13 of 13 norms" in done.stdout
    assert "folded: 13 of 13 norms" in done.stdout
    assert done.stdout.count("rounding") + done.stdout.count("equal") == 5
    assert "not equal" not in done.stdout
