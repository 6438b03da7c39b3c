"""Test the example, the snippets and the numbers of the README."""

import inspect
import re
from pathlib import Path

import jax
import numpy as np
from flax import linen as nn
from flax import nnx
from pages import code_blocks

import jaxbn

README = (Path(__file__).parents[2] / "README.md").read_text()


def test_example_learns_its_target():
    source, *_ = code_blocks(README)
    assert len([line for line in source.splitlines() if line]) == 12
    names = {}
    with jax.numpy_dtype_promotion("standard"):  # optax needs it
        exec(source, names)
    np.testing.assert_allclose(names["y"], np.arctanh(0.5), atol=0.02)
    kept = 1 - 0.99**200
    np.testing.assert_allclose(names["state"].mean, 100 * kept, rtol=0.01)


def run_snippet(number, **names):
    source = code_blocks(README)[number]
    assert len([line for line in source.splitlines() if line]) <= 3
    exec(source, names)
    return names


class Switched(nn.Module):
    """Run the linen snippet of the README inside a model."""

    @nn.compact
    def __call__(self, x):
        return run_snippet(1, x=x, train=True)["y"]


def test_switched_flax_models_have_unit_deviation(rng):
    """None of the three ways has the cancelling variance of Flax."""
    x = (1e4 + rng.normal(size=(64, 64))).astype(np.float32)
    y, _ = Switched().init_with_output(jax.random.key(0), x)
    np.testing.assert_allclose(y.std(0), 1, rtol=1e-4)

    norm = run_snippet(2, rngs=nnx.Rngs(0))["norm"]
    np.testing.assert_allclose(norm(x).std(0), 1, rtol=1e-4)

    model = nn.BatchNorm(use_running_average=False)
    after = run_snippet(
        3,
        jaxbn=jaxbn,
        linen_model=model,
        variables=model.init(jax.random.key(0), x),
        nnx_model=nnx.BatchNorm(64, rngs=nnx.Rngs(0)),
        x=x,
    )
    np.testing.assert_allclose(after["y"].std(0), 1, rtol=1e-4)
    np.testing.assert_allclose(after["nnx_model"](x).std(0), 1, rtol=1e-4)


def test_quick_start_has_two_commands():
    block, *_ = code_blocks(README, "sh")
    run, test = block.splitlines()
    assert run == "pip install -e '.[examples]' && python examples/quickstart.py"
    assert test == "pip install -e '.[test]' && pytest"


def test_option_table_states_the_defaults():
    parameters = inspect.signature(jaxbn.batch_norm).parameters
    rows = dict(re.findall(r"^\| (`[^|]+`) \| (`[^|]+`) \|", README, re.MULTILINE))
    for names, default in rows.items():
        for name in re.findall(r"`(\w+)`", names):
            stated = eval(default.strip("`"))
            assert parameters[name].default == stated, name


def test_initial_statistics_keep_37_percent_after_100_steps(rng):
    params, state = jaxbn.init(1)
    x = rng.normal(size=(8, 1)).astype(np.float32)
    x = (x - x.mean()) / x.std()  # the batches add 0 to the mean

    def step(state, _):
        return jaxbn.batch_norm(params, state, x, True)[1], None

    state = state._replace(mean=state.mean + 1)
    after, _ = jax.lax.scan(step, state, None, length=100)
    np.testing.assert_allclose(after.mean, 0.37, atol=0.005)


def test_momentum_and_unbiased_reproduce_pytorch_and_flax(rng):
    """The table translates both options."""
    x = rng.normal(size=(10, 3)).astype(np.float32)
    params, state = jaxbn.init(3)
    _, torch_like = jaxbn.batch_norm(params, state, x, True, momentum=0.9)
    _, flax_like = jaxbn.batch_norm(params, state, x, True, unbiased=False)
    variances = [x.astype(np.float64).var(0, ddof=ddof) for ddof in (1, 0)]
    np.testing.assert_allclose(torch_like.var, 0.9 + 0.1 * variances[0], rtol=1e-5)
    np.testing.assert_allclose(flax_like.var, 0.99 + 0.01 * variances[1], rtol=1e-5)
    assert isinstance(torch_like.mean, jax.Array)
