"""What a type checker says of a user's code: nothing of right code, each wrong option."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pyright", reason="pyright is a linter's dependency, not a test's")

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


def reported_lines(source: str, folder: Path) -> list[str]:
    """Return the lines of `source` in which pyright reports errors."""
    path = folder / "user.py"
    path.write_text(source)
    command = [sys.executable, "-m", "pyright", "--outputjson"]
    command += ["--pythonpath", sys.executable, str(path)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    found = json.loads(run.stdout)["generalDiagnostics"]
    errors = [d for d in found if d["severity"] == "error"]
    numbers = sorted({d["range"]["start"]["line"] for d in errors})
    return [source.splitlines()[number] for number in numbers]


def test_pyright_reports_each_wrong_argument(tmp_path):
    calls = [line for line in WRONG.splitlines() if re.match(r"jaxbn\.\w+\(", line)]
    assert len(calls) == 8
    assert reported_lines(WRONG, tmp_path) == calls


@pytest.mark.parametrize("source", [RIGHT, EXAMPLE], ids=["options", "README"])
def test_pyright_accepts_right_code(source, tmp_path):
    assert reported_lines(source, tmp_path) == []
