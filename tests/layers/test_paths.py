"""Paths of layers: tuples, and strings with "/" or "."."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

import jaxbn
from jaxbn._flax.paths import join, split

SEPARATORS = ("/", ".")
X = jnp.ones((2, 2))


def test_join_inverts_split():
    assert join(("blocks", 0, "conv")) == "blocks/0/conv"
    assert split("blocks/0.conv") == ("blocks", "0", "conv")
    assert split(("a.b", 0)) == ("a.b", 0)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(True, name="norm")(nn.Dense(2, name="dense")(x))


class Net(nn.Module):
    """A layer in a block, and a layer whose name holds a "."."""

    @nn.compact
    def __call__(self, x):
        x = Block(name="block")(x)
        return nn.BatchNorm(True, name="norm.1")(nn.Dense(2, name="dense.1")(x))


@pytest.fixture
def variables() -> Any:
    return Net().init(jax.random.key(0), X)


@pytest.mark.parametrize("separator", SEPARATORS)
def test_linen_fold_accepts_both_separators(separator, variables):
    pairs = {f"block{separator}dense": f"block{separator}norm"}
    folded = jaxbn.linen.fold(Net(), variables, X, pairs=pairs)
    assert folded["params"]["block"].keys() == {"dense"}


@pytest.mark.parametrize("separator", SEPARATORS)
def test_linen_fold_finds_names_that_hold_a_dot(separator, variables):
    pairs = {f"dense{separator}1": f"norm{separator}1"}
    folded = jaxbn.linen.fold(Net(), variables, X, pairs=pairs)
    assert folded["params"].keys() == {"block", "dense.1"}


def test_linen_population_keeps_names_that_hold_a_dot(variables):
    batches = [jnp.arange(8.0).reshape(4, 2)]
    new = jaxbn.linen.population(Net(), variables, batches)
    assert jax.tree.structure(new) == jax.tree.structure(variables)


@pytest.mark.parametrize("separator", SEPARATORS)
def test_nnx_fold_accepts_both_separators(separator):
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(3, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs))
    pairs = {f"layers{separator}0": f"layers{separator}1"}
    model.eval()
    folded = jaxbn.nnx.fold(model, jnp.ones((2, 3)), pairs=pairs)
    assert not isinstance(folded.layers[1], nnx.BatchNorm)


def test_nnx_fold_writes_paths_with_slashes():
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(3, 3, rngs=rngs), nnx.LayerNorm(3, rngs=rngs))
    with pytest.raises(TypeError, match="only BatchNorm") as caught:
        jaxbn.nnx.fold(model, jnp.ones((2, 3)), pairs={"layers.0": "layers.1"})
    assert "'layers/1' into 'layers/0'" in caught.value.__notes__[0]
