"""Type checkers pass a user's right code and report each wrong argument."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pyright", reason="install the lint group for type checkers")
pytest.importorskip("mypy", reason="install the lint group for type checkers")

README = (Path(__file__).parents[2] / "README.md").read_text()
EXAMPLE, *_ = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
WRONG = """
import jax.numpy as jnp
import jaxbn

params, state = jaxbn.init(3)
x = jnp.ones((4, 3))
jaxbn.batch_norm(params, state, x, train="yes")
jaxbn.batch_norm(params, state, x, True, momentum="high")
jaxbn.batch_norm(params, state, x, True, epsilon="small")
jaxbn.batch_norm(params, state, x, True, autodiff="forward")
jaxbn.batch_norm(params, state, x, True, axis="channels")
jaxbn.batch_norm(params, state, x, True, eps=1e-3)
jaxbn.batch_norm(state, params, x, True)
jaxbn.population([x], variance="all")
"""
RIGHT = """
import jax
import jax.numpy as jnp
import numpy as np
import optax
import jaxbn

params, state = jaxbn.init(3)
optimizer = optax.adam(1e-3)
opt_state = optimizer.init(params)
twice: jax.Array = params.scale * 2
no_bias, _ = jaxbn.init((3, 4), use_bias=False)
y, state = jaxbn.batch_norm(no_bias, state, np.ones((4, 3)), True, momentum=0)
y, state = jaxbn.batch_norm(
    jaxbn.BatchNormParams(None, None), state, y, False, momentum=np.float32(0.9)
)
mean: jax.Array = state.mean


def learn(params: jaxbn.BatchNormParams) -> optax.OptState:
    return optimizer.init(params)
"""


def reported_by_pyright(path: Path) -> set[int]:
    """Return the lines, from 0, in which pyright reports errors."""
    out = run_module("pyright", "--outputjson", "--pythonpath", sys.executable, path)
    found = json.loads(out)["generalDiagnostics"]
    return {d["range"]["start"]["line"] for d in found if d["severity"] == "error"}


def reported_by_mypy(path: Path) -> set[int]:
    """Return the lines, from 0, in which mypy --strict reports errors."""
    out = run_module("mypy", "--strict", path)
    lines = re.findall(
        r"^[^:]+:(\d+): error: (?!Skipping analyzing)", out, re.MULTILINE
    )
    return {int(line) - 1 for line in lines}


def run_module(name: str, *options: str | Path) -> str:
    command = [sys.executable, "-m", name, *map(str, options)]
    folder = Path(options[-1]).parent
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=folder
    ).stdout


CHECKERS = {"pyright": reported_by_pyright, "mypy": reported_by_mypy}


@pytest.mark.parametrize("checker", CHECKERS)
def test_type_checker_reports_each_wrong_argument(checker, tmp_path):
    path = tmp_path / "user.py"
    path.write_text(WRONG)
    lines = WRONG.splitlines()
    calls = [i for i, line in enumerate(lines) if re.match(r"jaxbn\.\w+\(", line)]
    assert len(calls) == 8
    assert sorted(CHECKERS[checker](path)) == calls


@pytest.mark.parametrize(
    ("checker", "source"),
    [("pyright", RIGHT), ("mypy", RIGHT), ("pyright", EXAMPLE)],  # EXAMPLE has no types
)
def test_type_checker_accepts_right_code(checker, source, tmp_path):
    path = tmp_path / "user.py"
    path.write_text(source)
    assert CHECKERS[checker](path) == set()
