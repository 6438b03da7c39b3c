"""Reject invalid layers, maps and trees, and leave the arguments unchanged."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convert_helpers import (
    NAMES,
    ONES,
    STATE_DICT,
    NnxNet,
    linen_variables,
    random_layer,
)
from flax import nnx
from helpers import assert_near
from libraries import LIBRARIES, C, Haiku

from jaxbn import convert

# Other libraries promote dtypes and ranks.
pytestmark = pytest.mark.usefixtures("standard_promotion", "any_rank")


def changed(**arrays):
    """Return `STATE_DICT` with other arrays; `__` stands for "."."""
    return STATE_DICT | {k.replace("__", ".", 1): v for k, v in arrays.items()}


def without(*keys):
    """Return `STATE_DICT` without some keys."""
    return {k: v for k, v in STATE_DICT.items() if k not in keys}


OF_B = [k for k in STATE_DICT if k[0] == "b"]
TREE_ERRORS: dict[str, Any] = {
    "name not in the source": (
        STATE_DICT,
        NAMES | {"c": "BatchNorm_2"},
        r"keys of names must be batch norm layers of the other library's model; got "
        r"'c', and there are 'a', 'b'",
    ),
    "name not in the target": (
        STATE_DICT,
        NAMES | {"b": "Dense_0"},
        r"values of names .* of our variables; got 'Dense_0', and there are 'BatchN",
    ),
    "source layer left out": (
        STATE_DICT,
        {"a": "BatchNorm_0"},
        r"keys leave out 'b' of the other",
    ),
    "target layer left out": (
        without(*OF_B),
        {"a": "BatchNorm_0"},
        r"values leave out 'BatchNorm_1' of our variables",
    ),
    "target layer given twice": (
        STATE_DICT,
        NAMES | {"b": "BatchNorm_0"},
        r"give each layer once; got \{'BatchNorm_0': \['a', 'b'\]\}",
    ),
    "other feature count": (
        STATE_DICT | {k: np.ones(4) for k in OF_B},
        NAMES,
        r"layer 'BatchNorm_1' must fit .* got .*'mean': \(4,\).* for .*'mean': \(3,\)",
    ),
    "no bias": (without("b.bias"), NAMES, r"must fit .* scale and bias on both sides"),
    "no variance": (
        without("b.running_var"),
        NAMES,
        r"layer 'b' must have .* got no var",
    ),
    "two shapes": (
        changed(a__bias=np.ones(1)),
        NAMES,
        r"'a' must have one shape.*\(1,\)",
    ),
    "negative variance": (
        changed(b__running_var=np.array([1.0, 2.0, -0.5])),
        NAMES,
        r"var of layer 'b' must not be negative or NaN; got -0.5 at \(2,\), and 1 such",
    ),
    "NaN variance": (
        changed(b__running_var=np.nan * ONES),
        NAMES,
        r"got nan at \(0,\), and 3",
    ),
}
DTYPE_ERRORS: dict[str, Any] = {
    "integer": (np.ones(C, np.int32), r"mean of layer 'a' .* got int32. Cast"),
    "bool": (np.ones(C, bool), r"got bool"),
    "complex": (np.ones(C, np.complex64), r"got complex64"),
    "object": (np.array([None, 1.0, 2.0]), r"must be floating; got object"),
    "text": (np.array(["1", "2", "3"]), r"must be floating; got <U1"),
}


def assert_rejected(error, match, state_dict, names: dict[str, str], rng):
    """Check the error for linen and for nnx, and that no argument changes."""
    variables = linen_variables(rng)
    before = jax.tree.map(np.array, (variables, state_dict))
    with pytest.raises(error, match=match):
        convert.from_torch_tree(state_dict, names, variables)
    state = nnx.state(NnxNet())
    paths = {"BatchNorm_1": "blocks/0"}
    names = {k: paths.get(v, v) for k, v in names.items()}
    with pytest.raises(error, match=match.replace("BatchNorm_1", "blocks/0")):
        convert.from_torch_tree(state_dict, names, state)
    jax.tree.map(np.testing.assert_array_equal, before, (variables, state_dict))


@pytest.mark.parametrize("case", TREE_ERRORS)
def test_from_torch_tree_rejects_invalid_values(case, rng):
    state_dict, names, match = TREE_ERRORS[case]
    assert_rejected(ValueError, match, state_dict, names, rng)


@pytest.mark.parametrize("case", DTYPE_ERRORS)
def test_from_torch_tree_rejects_other_dtypes(case, rng):
    value, match = DTYPE_ERRORS[case]
    assert_rejected(TypeError, match, changed(a__running_mean=value), NAMES, rng)


@pytest.mark.parametrize(
    ("names", "match"),
    [
        ({"a": "BatchNorm_0"}, "keys leave out 'b' of the other"),
        (NAMES | {"b": "BatchNorm_0"}, "give each layer once"),
        (NAMES | {"b": "elsewhere"}, "got 'elsewhere'"),
    ],
)
def test_to_torch_tree_rejects_the_same_maps(names, match, rng):
    with pytest.raises(ValueError, match=match):
        convert.to_torch_tree(linen_variables(rng), names, STATE_DICT)


def test_to_torch_tree_rejects_other_feature_counts(rng):
    state_dict = STATE_DICT | {k: np.ones(4) for k in OF_B}
    with pytest.raises(ValueError, match="layer 'b' must fit its target"):
        convert.to_torch_tree(linen_variables(rng), NAMES, state_dict)


def test_to_torch_tree_keeps_other_layers(rng):
    variables = linen_variables(rng)
    linear = {"fc.weight": np.ones((2, 2))}
    new = convert.to_torch_tree(variables, NAMES, STATE_DICT | linear)
    assert new["fc.weight"] is linear["fc.weight"]
    assert_near(new["b.weight"], variables["params"]["BatchNorm_1"]["scale"], 0)


def test_replace_layers_rejects_unknown_paths(rng):
    with pytest.raises(ValueError, match="got 'nowhere', and there are 'BatchNorm_0'"):
        convert.replace_layers(linen_variables(rng), {"nowhere": random_layer(rng)})
    with pytest.raises(ValueError, match="got 'nowhere', and there are none"):
        convert.replace_layers({"params": {}}, {"nowhere": random_layer(rng)})


def test_from_torch_rejects_two_layers():
    with pytest.raises(ValueError, match=r"got 2: 'a', 'b'.* ends in _tree"):
        convert.from_torch(STATE_DICT)


def test_from_torch_rejects_layer_without_running_statistics():
    with pytest.raises(ValueError, match=r"got 0: none.*track_running_stats=False"):
        convert.from_torch({"weight": ONES, "bias": ONES})


def test_from_keras_rejects_list_of_other_length():
    with pytest.raises(ValueError, match=r"got 3 arrays\. Pass scale=False, center"):
        convert.from_keras([ONES] * 3)


def test_from_torch_explains_arrays_unreadable_by_numpy():
    class Tensor:
        def __array__(self, *args, **kwargs):
            raise TypeError("Got unsupported ScalarType BFloat16")

    arrays = {"running_mean": Tensor(), "running_var": ONES}
    with pytest.raises(TypeError, match=r"got Tensor: Got unsupp.*\.float\(\)\.cpu\("):
        convert.from_torch(arrays)


@pytest.mark.parametrize("name", ["Haiku", "Equinox"])
def test_debiased_libraries_reject_count_of_0(name, rng):
    library = LIBRARIES[name]()
    with pytest.raises(ValueError, match=r"must have absorbed a batch.*got count=0"):
        library.write(*random_layer(rng, count=0))
    library = LIBRARIES[name](depth=2)
    with pytest.raises(ValueError, match=r"'.*' must have absorbed a batch"):
        library.write_tree(linen_variables(rng), None)


def test_from_equinox_tree_rejects_new_layer_with_mode_ema():
    with pytest.raises(ValueError, match="'layers/0' must have seen a batch"):
        LIBRARIES["EquinoxEma"](depth=2).read_tree({})


def test_from_haiku_rejects_several_feature_axes():
    library = Haiku()
    scale, offset = np.ones((1, 2, 3)), np.ones((1, 3))
    library.params = {"norm_0": {"scale": scale, "offset": offset}}
    match = r"scale of layer 'norm_0' .* shape \(1, 2, 3\)"
    with pytest.raises(ValueError, match=match):
        library.read()


@pytest.mark.filterwarnings("ignore:__array__ impl:DeprecationWarning")  # of Keras
@pytest.mark.parametrize("name", LIBRARIES)
def test_a_variance_is_negative_if_it_is_with_epsilon(name, rng):
    """Inference computes with Caffe's variance minus ε too."""
    library = LIBRARIES[name]()
    params, state = random_layer(rng)

    def read(share):
        var = state.var.at[1].set(share * library.epsilon)
        library.write(params, state._replace(var=var))
        return library.read()[1].var, var

    read_var, var = read(-0.99)
    assert_near(read_var, var, 1e-6)
    for share, match in ((-1.01, "got -"), (np.nan, "got nan")):
        with pytest.raises(ValueError, match=f"negative or NaN; {match}"):
            read(share)


def test_equinox_layers_have_their_own_epsilon(rng):
    params, state = random_layer(rng)
    state = state._replace(var=jnp.full(C, -9e-4))

    def convert_there_and_back(epsilon):
        make = eqx.nn.make_with_state(eqx.nn.BatchNorm)
        new = make(C, "rows", epsilon, mode="batch")
        return convert.from_equinox(*convert.to_equinox(params, state, *new))

    match = "negative or NaN; got -0.0008.* an epsilon of 1e-05 added.* epsilon=0"
    with pytest.raises(ValueError, match=match):
        convert_there_and_back(1e-5)
    assert_near(convert_there_and_back(1e-3)[1].var, state.var)


def test_variables_of_a_library_have_its_epsilon(rng):
    """What `from_keras_tree` takes, `to_keras_tree` takes; `layers_of` knows Flax's."""
    keras, flax = -9e-4 * ONES, -9e-6 * ONES
    weights = {"a/moving_mean": ONES, "a/moving_variance": keras}
    tree = {"batch_stats": {"bn": {"mean": ONES, "var": ONES}}}
    new = convert.from_keras_tree(weights, {"a": "bn"}, tree)
    back = convert.to_keras_tree(new, {"a": "bn"}, weights)
    assert_near(back["a/moving_variance"], keras, 0)
    with pytest.raises(ValueError, match="var of layer 'bn' must not be negative"):
        convert.layers_of(new)
    tree["batch_stats"]["bn"]["var"] = flax
    assert_near(convert.layers_of(tree)["bn"][1].var, flax, 0)


def test_error_lists_at_most_eight_names(rng):
    names = NAMES | {f"extra{i}": f"path{i}" for i in range(20)}
    with pytest.raises(ValueError, match="'extra15' and 12 more, and there are"):
        convert.from_torch_tree(STATE_DICT, names, linen_variables(rng))
