"""Folding keeps the output of random networks, or leaves their norms and says so.

More networks are tried by
`pytest tests/inference/test_fold_fuzz.py --hypothesis-profile=search`.
"""

import re
import secrets

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax_helpers import assert_same, randomize_for_inference, with_warnings
from fold_networks import (
    SHAPE,
    LinenNetwork,
    NNXNetwork,
    draw_steps,
    is_exact,
)
from hypothesis import settings

import jaxbn
from jaxbn.linen import skip_folded

pytestmark = pytest.mark.usefixtures("standard_promotion")
ITEMS = 5  # in each API, for the processes that share the tests


def counts():
    """Return the number of networks in an item, and the first seed of all."""
    if settings.default and settings.default.max_examples > 40:
        return 600, secrets.randbits(32)
    return 30, 0


def randomize(rng, tree):
    """Return random variables; variances are positive."""

    def draw(path, a):
        positive = "var" in jax.tree_util.keystr(path)
        values = (
            rng.uniform(0.5, 2.0, a.shape) if positive else rng.normal(size=a.shape)
        )
        return jnp.asarray(values, a.dtype)

    return jax.tree.map_with_path(draw, tree)


def check(expected, actual, steps):
    size = max(float(jnp.abs(a.astype(jnp.float32)).max()) for a in expected)
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        tolerance = 1e-4 if is_exact(steps) else 1e-1
        difference = a.astype(jnp.float32) - b.astype(jnp.float32)
        assert float(jnp.abs(difference).max()) <= tolerance * size


def paths_in(caught):
    """Return the paths of the norms that the warnings list."""
    assert all(w.category is UserWarning for w in caught)
    return {p for w in caught for p in re.findall(r"\n  (\S*): ", str(w.message))}


def paths_with_var(tree):
    keyed, _ = jax.tree.flatten_with_path(tree)
    paths = [tuple(str(getattr(k, "key", k)) for k in path) for path, _ in keyed]
    return {"/".join(p[: p.index("var")]) for p in paths if "var" in p}


def fold_linen(rng):
    """Fold a random network; return the number of norms before and afterwards."""
    steps = draw_steps(rng)
    model, x = LinenNetwork(tuple(steps)), jnp.asarray(rng.normal(size=SHAPE), "f")
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    variables = randomize(rng, shapes)
    norms = paths_with_var(variables.get("batch_stats", {}))
    if not norms:
        return 0, 0
    before = jax.tree.map(jnp.copy, variables)
    folded, caught = with_warnings(jaxbn.linen.fold, model, variables, x)
    left = paths_with_var(folded["batch_stats"])
    assert paths_in(caught) == left
    assert_same(variables, before, 0)
    if left == norms:
        assert_same(folded, variables, 0)
        return len(norms), len(left)
    expected = model.apply(variables, x)
    with skip_folded():
        check(expected, model.apply(folded, x), steps)
        if rng.random() < 0.2:
            check(expected, model.apply(variables, x), steps)
    return len(norms), len(left)


def fold_nnx(rng):
    steps = draw_steps(rng)
    if not any(step.kind == "norm" for step in steps):
        return 0, 0
    model, x = NNXNetwork(steps, nnx.Rngs(0)), jnp.asarray(rng.normal(size=SHAPE), "f")
    randomize_for_inference(rng, model)
    before = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(model)))
    folded, caught = with_warnings(jaxbn.nnx.fold, model, x)
    left = paths_with_var(nnx.to_pure_dict(nnx.state(folded)))
    assert paths_in(caught) == left
    assert_same(nnx.to_pure_dict(nnx.state(model)), before, 0)
    norms = paths_with_var(before)
    if left == norms:
        assert_same(nnx.to_pure_dict(nnx.state(folded)), before, 0)
    else:
        check(model(x), folded(x), steps)
    return len(norms), len(left)


@pytest.mark.parametrize("item", range(ITEMS))
@pytest.mark.parametrize("fold_network", [fold_linen, fold_nnx])
def test_fold_keeps_the_output_of_random_networks(fold_network, item):
    number, first = counts()
    found = np.zeros(2, int)
    for seed in range(first + item * number, first + (item + 1) * number):
        try:
            found += fold_network(np.random.default_rng(seed))
        except Exception as error:
            error.add_note(f"The seed of the network is {seed}.")
            raise
    norms, left = found
    assert (norms - left) / norms > 0.25  # a fold that left all would pass otherwise
