"""The snippets of the documentation pages run."""

import re
from pathlib import Path

import jax
import numpy as np

DOCS = Path(__file__).parent.parent / "docs"


def run_page(name):
    text = (DOCS / name).read_text()
    names = {}
    for block in re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        exec(block, names)
    return names


def test_many_devices():
    names = run_page("many_devices.md")
    x = np.asarray(names["x"], np.float64)
    expected = 0.01 * x.mean(0)
    np.testing.assert_allclose(names["same_state"].mean, expected, atol=1e-6)
    np.testing.assert_allclose(names["same_y"], (x - x.mean(0)) / x.std(0), atol=1e-4)
    np.testing.assert_allclose(names["new_state"].mean, 0.01 * x[:5].mean(0), atol=1e-6)
    assert len(jax.devices()) == 8
