"""Test the commands and the snippets of the README, each pasted as it is."""

import contextlib
import io
from pathlib import Path

import numpy as np
import pytest
from pages import code_blocks

import jaxbn.nnx

README = (Path(__file__).parents[2] / "README.md").read_text()
EXAMPLE, FLAX = code_blocks(README)


def run_pasted(source):
    """Run a snippet alone; return its variables and what it printed."""
    names, printed = {}, io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(source, names)
    return names, printed.getvalue()


@pytest.fixture(scope="module")
def example():
    return run_pasted(EXAMPLE)


def test_example_prints_its_comment(example):
    _, printed = example
    assert len([line for line in EXAMPLE.splitlines() if line]) <= 14
    _, comment = EXAMPLE.splitlines()[-1].split("  # ")
    assert printed.split() == comment.split()


def test_example_ends_with_the_statistics_and_the_map_of_its_data(example):
    names, _ = example
    params, state = names["params"], names["state"]
    np.testing.assert_allclose(state.mean, 100, atol=0.5)
    np.testing.assert_allclose(state.var, 25, rtol=0.1)
    np.testing.assert_allclose(params.scale, 5 / 10, rtol=0.1)
    np.testing.assert_allclose(params.bias, 100 / 10, rtol=0.01)


def test_flax_snippet_replaces_both_layers():
    names, _ = run_pasted(FLAX)
    x, y = np.asarray(names["x"]), names["y"]
    np.testing.assert_allclose(y, (x - x.mean(0)) / x.std(0), atol=1e-5)
    stats = names["updates"]["batch_stats"]
    np.testing.assert_allclose(stats["mean"], 0.01 * x.mean(0), rtol=1e-5)
    assert type(names["nnx_model"].layers[0]) is jaxbn.nnx.BatchNorm


def test_quick_start_has_two_commands():
    block, *_ = code_blocks(README.partition("## Quick start\n")[2], "sh")
    run, test = block.splitlines()
    assert run == "pip install -e '.[examples]' && python examples/quickstart.py"
    assert test == "pip install -e '.[test]' && pytest"


def test_readme_and_start_page_install_alike():
    page = (Path(__file__).parents[2] / "docs/index.md").read_text()
    commands = [code_blocks(text, "sh")[0] for text in (README, page)]
    clone = "git clone https://github.com/jaxbn/jaxbn && cd jaxbn\n"
    assert commands == [f"{clone}pip install -e '.[flax]'\n"] * 2
