"""Accept "/" and "." in the paths of Flax layers."""

from typing import Any

import jax
import numpy as np
import pytest
from convert_helpers import NAMES, ONES, STATE_DICT, NnxNet, random_layer
from flax import nnx
from helpers import assert_near

import jaxbn
from jaxbn import convert


def nested(*paths) -> Any:
    """Return variables with a layer at each path of keys."""
    variables: Any = {"params": {}, "batch_stats": {}}
    fields = {"params": ("scale", "bias"), "batch_stats": ("mean", "var")}
    for path in paths:
        for collection, names in fields.items():
            module = variables[collection]
            for key in path:
                module = module.setdefault(key, {})
            module.update(dict.fromkeys(names, ONES))
    return variables


@pytest.mark.parametrize("path", ["blocks/0", "blocks.0"])
def test_replace_layers_accepts_slashes_and_dots(path, rng):
    layer = random_layer(rng, count=0)
    new = convert.replace_layers(nnx.state(NnxNet()), {path: layer})
    assert_near(convert.layers_of(new)["blocks/0"], layer, 0)


def test_tree_functions_accept_dots():
    names = NAMES | {"b": "blocks.0"}
    new = convert.from_torch_tree(STATE_DICT, names, nnx.state(NnxNet()))
    zeros = {key: 0 * array for key, array in STATE_DICT.items()}
    back = convert.to_torch_tree(new, names, zeros)
    jax.tree.map(np.testing.assert_array_equal, back, STATE_DICT)


@pytest.mark.parametrize("path", ["block.1/norm", "block/1/norm", "block.1.norm"])
def test_replace_layers_finds_names_that_contain_a_dot(path, rng):
    layer = random_layer(rng, count=0)
    new = convert.replace_layers(nested(["block.1", "norm"]), {path: layer})
    assert_near(convert.layers_of(new), {"block.1/norm": layer}, 0)


@pytest.mark.parametrize(("path", "other"), [("a.b", "a/b"), ("a/b", "a.b")])
def test_replace_layers_prefers_the_exact_path(path, other, rng):
    layer = random_layer(rng, count=0)
    variables = nested(["a.b"], ["a", "b"])
    new = convert.layers_of(convert.replace_layers(variables, {path: layer}))
    assert_near(new[path], layer, 0)
    assert_near(new[other][0].scale, ONES, 0)


def test_replace_layers_rejects_an_ambiguous_path(rng):
    variables = nested(["a.b", "c"], ["a", "b.c"])
    with pytest.raises(ValueError, match=r"got 'a/b/c', and there are 'a\.b/c'"):
        convert.replace_layers(variables, {"a.b.c": random_layer(rng)})


def test_replace_layers_rejects_two_paths_of_one_layer(rng):
    layers = {"blocks.0": random_layer(rng), "blocks/0": random_layer(rng)}
    match = r"layers must give each layer once; got \{'blocks/0': \['blocks.0', 'bl"
    with pytest.raises(ValueError, match=match):
        convert.replace_layers(nnx.state(NnxNet()), layers)


def test_from_torch_tree_rejects_two_paths_of_one_layer():
    names = {"a": "blocks.0", "b": "blocks/0"}
    with pytest.raises(ValueError, match=r"got \{'blocks/0': \['a', 'b'\]\}"):
        convert.from_torch_tree(STATE_DICT, names, nnx.state(NnxNet()))


def test_error_prints_unknown_path_with_slashes(rng):
    with pytest.raises(ValueError, match="got 'blocks/7', and there are 'BatchNorm_0'"):
        convert.replace_layers(nnx.state(NnxNet()), {"blocks.7": random_layer(rng)})


class NamedLikeCollections(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.params = jaxbn.nnx.BatchNorm(3, rngs=rngs)
        self.batch_stats = nnx.Dict(params=jaxbn.nnx.BatchNorm(3, rngs=rngs))
        self.head = nnx.Dict(params=nnx.Linear(3, 2, rngs=rngs))


@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_modules_may_be_called_like_collections(kind, rng):
    """Only the first key of linen variables is a collection."""
    names = {"a": "params", "b": "batch_stats/params"}
    variables = nested(["params"], ["batch_stats", "params"])
    if kind == "nnx":
        variables = nnx.state(NamedLikeCollections())
    layers = {path: random_layer(rng, count=0) for path in names.values()}
    new = convert.replace_layers(variables, layers)
    assert_near(convert.layers_of(new), layers, 0)
    new = convert.from_torch_tree(STATE_DICT, names, variables)
    for i, path in enumerate(names.values()):
        assert_near(convert.layers_of(new)[path][1].mean, (i + 1) * ONES, 0)
    zeros = {key: 0 * array for key, array in STATE_DICT.items()}
    back = convert.to_torch_tree(new, names, zeros)
    jax.tree.map(np.testing.assert_array_equal, back, STATE_DICT)


def test_other_layers_may_be_called_like_collections(rng):
    names = {"a": "params", "b": "batch_stats/params", "fc": "head/params"}
    dense = {"fc.weight": rng.normal(size=(2, 3)), "fc.bias": rng.normal(size=2)}
    state = nnx.state(NamedLikeCollections())
    new: Any = convert.from_torch_tree(STATE_DICT | dense, names, state)
    assert_near(new["head"]["params"]["kernel"][...], dense["fc.weight"].T)
