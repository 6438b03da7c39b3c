"""`jaxbn.convert` against the libraries themselves, and what it refuses."""

from inspect import isfunction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from libraries import DECAY, C, Haiku
from libraries import LIBRARIES as PEERS
from oracle import inference, random_case

import jaxbn
from jaxbn import convert

# Keras's own, from `get_weights`.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ impl:DeprecationWarning")


@pytest.fixture(autouse=True)
def lenient():
    """Other libraries promote dtypes and ranks as they like."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def batches(rng):
    return (0.7 + 1.9 * rng.normal(size=(8, 7, C))).astype(np.float32)


def random_layer(rng, scale=True, bias=True, count=3) -> Any:
    case = random_case(rng, (1, C))._asdict()
    case = {name: jnp.asarray(a, jnp.float32) for name, a in case.items()}
    params = jaxbn.BatchNormParams(
        case["scale"] if scale else None, case["bias"] if bias else None
    )
    return params, jaxbn.BatchNormState(case["mean"], case["var"], jnp.int32(count))


def assert_near(actual, expected, tolerance=1e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, tolerance, tolerance),
        actual,
        expected,
    )


def expected_y(layer, x, epsilon):
    """Inference by the oracle."""
    params, state = layer
    case = random_case(np.random.default_rng(0), x.shape)._replace(
        x=x,
        scale=np.ones(C) if params.scale is None else params.scale,
        bias=np.zeros(C) if params.bias is None else params.bias,
        mean=state.mean,
        var=state.var,
    )
    return inference(case, epsilon=epsilon).y


def step(peer, layer, x, count):
    """`layer` after the step that the peer would take."""
    params, state = layer
    options = {"momentum": peer.momentum(count), "unbiased": peer.unbiased}
    plain = jaxbn.BatchNormParams(None, None)  # without a say in it: one compilation
    _, state = jaxbn.batch_norm(plain, state, x, True, **options)
    return params, state


PARTS = [(True, True), (False, False)]
CASES = [(name, *parts) for name in PEERS for parts in PARTS]
CASES += [("Keras", True, False), ("Haiku", False, True), ("Torch", True, False)]
LAYERS = pytest.mark.parametrize(("name", "scale", "bias"), CASES)


@LAYERS
def test_a_trained_layer_comes_to_us(name, scale, bias, rng, batches):
    peer = PEERS[name](scale=scale, bias=bias)
    peer.train(batches[0])
    _, state = peer.read()
    params, _ = random_layer(rng, scale, bias)  # the way back has a test of its own
    peer.write(params, state._replace(count=jnp.int32(1)))
    for x in batches[1:3]:
        peer.train(x)
    layer = peer.read()
    assert int(layer[1].count) == (3 if peer.counts else 0)
    x = batches[-1]
    assert_near(peer.infer(x), expected_y(layer, x, peer.epsilon))
    layer = step(peer, layer, x, 3)
    peer.train(x)
    assert_near(peer.read()[1][:2], layer[1][:2])
    assert_near(peer.infer(x), expected_y(layer, x, peer.epsilon))


@LAYERS
def test_our_layer_goes_to_them_and_comes_back(name, scale, bias, rng, batches):
    peer = PEERS[name](scale=scale, bias=bias)
    layer = random_layer(rng, scale, bias)
    peer.write(*layer)
    x = batches[0]
    assert_near(peer.infer(x), expected_y(layer, x, peer.epsilon))
    params, state = peer.read()
    counted = layer[1]._replace(count=jnp.int32(3 if peer.counts else 0))
    assert_near((params, state), (layer[0], counted), 1e-6)
    peer.train(x)
    after = step(peer, layer, x, 3)
    assert_near(peer.read()[1][:2], after[1][:2])


def test_copies_share_no_memory(rng):
    """PyTorch writes its buffers in place."""
    arrays = convert.to_torch(*random_layer(rng))
    before = {key: array.copy() for key, array in arrays.items()}
    layer = convert.from_torch(arrays)
    for array in arrays.values():
        array += 1
    jax.tree.map(np.testing.assert_array_equal, dict(before), convert.to_torch(*layer))


# Whole models.


class Linen(nn.Module):
    momentum: Any = DECAY
    epsilon: float = 1e-5
    unbiased: bool = False

    @nn.compact
    def __call__(self, x, train):
        for i in range(2):
            x = nn.tanh(x) if i else x
            x = jaxbn.linen.BatchNorm(
                not train,
                momentum=self.momentum,
                epsilon=self.epsilon,
                unbiased=self.unbiased,
            )(x)
        return nn.Dense(2)(x) if self.is_initializing() else x


class Nnx(nnx.Module):
    def __init__(self, **options):
        rngs = nnx.Rngs(0)
        self.BatchNorm_0 = jaxbn.nnx.BatchNorm(C, rngs=rngs, **options)
        self.blocks = nnx.List([jaxbn.nnx.BatchNorm(C, rngs=rngs, **options)])
        self.dense = nnx.Linear(C, 2, rngs=rngs)

    def __call__(self, x):
        return self.blocks[0](jnp.tanh(self.BatchNorm_0(x)))


def linen_variables(rng, **options):
    variables = Linen(**options).init(jax.random.key(0), jnp.zeros((1, C)), False)
    layers = {f"BatchNorm_{i}": random_layer(rng) for i in range(2)}
    return convert.replace_layers(variables, layers)


TREES = pytest.mark.parametrize("name", [n for n in PEERS if n != "EquinoxEma"])


@TREES
def test_a_whole_model_to_linen_and_back(name, rng, batches):
    peer = PEERS[name](depth=2)
    options = {"epsilon": peer.epsilon, "unbiased": peer.unbiased}
    written: Any = linen_variables(rng)
    peer.write_tree(written, 3)
    x = batches[0]
    model = Linen(**options)
    assert_near(peer.infer(x), model.apply(written, x, False))
    peer.train(x)
    momentum = peer.momentum(3)
    _, updates = Linen(momentum=momentum, **options).apply(
        written, x, True, mutable=["batch_stats"]
    )
    other = linen_variables(rng)
    read = peer.read_tree(other)
    assert_near(read["batch_stats"], updates["batch_stats"])
    assert_near(peer.infer(x), model.apply(read, x, False))
    assert jax.tree.structure(read) == jax.tree.structure(other)
    assert read["params"]["Dense_0"] == other["params"]["Dense_0"]


@TREES
def test_a_whole_model_to_nnx(name, rng, batches):
    peer = PEERS[name](depth=2)
    written = linen_variables(rng)
    peer.write_tree(written, 3)
    peer.names = dict(zip(peer.names, ["BatchNorm_0", "blocks/0"], strict=True))
    model = Nnx(epsilon=peer.epsilon)
    dense = model.dense.kernel
    nnx.update(model, peer.read_tree(nnx.state(model)))
    model.eval()
    assert_near(model(batches[0]), peer.infer(batches[0]))
    assert model.dense.kernel is dense
    layers = convert.layers_of(nnx.state(model))
    expected = convert.layers_of(written)
    assert_near(layers["blocks/0"], expected["BatchNorm_1"], 1e-6)


def test_a_count_goes_where_one_is_kept(rng):
    variables = linen_variables(rng, momentum=None)
    assert {int(s.count) for _, s in convert.layers_of(variables).values()} == {3}
    state = nnx.state(Nnx(momentum=None))
    layers = {"blocks/0": random_layer(rng, count=5)}
    new = convert.layers_of(convert.replace_layers(state, layers))
    assert int(new["blocks/0"][1].count) == 5
    assert int(new["BatchNorm_0"][1].count) == 0


def test_the_tree_keeps_its_dtypes_boxes_and_kinds_of_array(rng):
    norm = nn.BatchNorm(
        True,
        param_dtype=jnp.bfloat16,
        scale_init=nn.with_partitioning(nn.initializers.ones, ("model",)),
    )
    variables = norm.init(jax.random.key(0), jnp.zeros((1, C)))
    layer = random_layer(rng)
    new: Any = convert.replace_layers(variables, {"": layer})
    assert jax.tree.structure(new) == jax.tree.structure(variables)
    scale = new["params"]["scale"].value
    assert scale.dtype == jnp.bfloat16
    assert_near(scale, layer[0].scale.astype(jnp.bfloat16), 0)
    assert new["batch_stats"]["mean"].dtype == jnp.float32
    arrays = jax.tree.map(lambda a: np.zeros(a.shape), nn.unbox(variables))
    new = convert.replace_layers(arrays, {"": layer})
    assert isinstance(new["params"]["scale"], np.ndarray)
    assert new["params"]["scale"].dtype == np.float64
    read: Any = convert.layers_of(jax.tree.map(jnp.bfloat16, nn.unbox(variables)))[""]
    assert read[0].scale.dtype == jnp.bfloat16
    assert read[1].var.dtype == jnp.float32


def test_float64_stays(x64):
    arrays = {"running_mean": np.full(2, 1 / 3), "running_var": np.full(2, 2 / 3)}
    _, state = convert.from_torch(arrays)
    assert state.mean.dtype == jnp.float64
    np.testing.assert_array_equal(state.var, arrays["running_var"])


def test_haiku_has_the_features_anywhere(rng):
    layer = random_layer(rng)
    params, state = convert.to_haiku(*layer, decay=DECAY, ndim=4, axis=1)
    assert params["scale"].shape == (1, C, 1, 1)
    assert state["~/var_ema"]["hidden"].shape == (1, C, 1, 1)
    assert_near(convert.from_haiku(params, state), layer, 1e-6)


@pytest.mark.parametrize("ours", [0.9, 1.0, 0.0, None])
def test_momentum_there_and_back(ours):
    theirs = convert.torch_momentum(ours)
    back = convert.torch_momentum(theirs)
    if ours is None:
        assert theirs is back is None
    else:
        assert (theirs, back) == pytest.approx((1 - ours, ours))


def test_debiased_averages_step_by_step(rng):
    values, hidden, average = rng.normal(size=20), 0.0, 0.0
    for count, value in enumerate(values):
        hidden = DECAY * hidden + (1 - DECAY) * value
        momentum = convert.debiased_momentum(DECAY, count)
        average = momentum * average + (1 - momentum) * value
        assert average == pytest.approx(hidden / (1 - DECAY ** (count + 1)))
    assert convert.debiased_momentum(DECAY, 1000) == pytest.approx(DECAY)


# What is refused, with the model as it was.

ONES = np.ones(C, np.float32)
STATE_DICT = {
    f"{name}.{key}": np.float32(i + 1) * ONES
    for i, name in enumerate(("a", "b"))
    for key in ("weight", "bias", "running_mean", "running_var")
}
NAMES = {"a": "BatchNorm_0", "b": "BatchNorm_1"}


def changed(**arrays):
    return STATE_DICT | {k.replace("__", ".", 1): v for k, v in arrays.items()}


def without(*keys):
    return {k: v for k, v in STATE_DICT.items() if k not in keys}


TREE_ERRORS: dict[str, Any] = {
    "not in the source": (
        STATE_DICT,
        NAMES | {"c": "BatchNorm_2"},
        r"keys of names must be batch norm layers of the other library's model; got "
        r"'c', and there are 'a', 'b'",
    ),
    "not in the target": (
        STATE_DICT,
        NAMES | {"b": "Dense_0"},
        r"values of names .* of our variables; got 'Dense_0', and there are 'BatchN",
    ),
    "left out": (STATE_DICT, {"a": "BatchNorm_0"}, r"keys leave out 'b' of the other"),
    "left out of ours": (
        without(*(k for k in STATE_DICT if k[0] == "b")),
        {"a": "BatchNorm_0"},
        r"values leave out 'BatchNorm_1' of our variables",
    ),
    "doubled": (
        STATE_DICT,
        NAMES | {"b": "BatchNorm_0"},
        r"give each layer once; got \{'BatchNorm_0': \['a', 'b'\]\}",
    ),
    "features": (
        STATE_DICT | {k: np.ones(4) for k in STATE_DICT if k[0] == "b"},
        NAMES,
        r"layer 'BatchNorm_1' must fit .* got .*'mean': \(4,\).* for .*'mean': \(3,\)",
    ),
    "no bias": (without("b.bias"), NAMES, r"must fit .* scale and bias on both sides"),
    "half": (without("b.running_var"), NAMES, r"layer 'b' must have .* got no var"),
    "shapes": (changed(a__bias=np.ones(1)), NAMES, r"'a' must have one shape.*\(1,\)"),
    "negative": (
        changed(b__running_var=np.array([1.0, 2.0, -0.5])),
        NAMES,
        r"var of layer 'b' must not be negative or NaN; got -0.5 at \(2,\), and 1 such",
    ),
    "nan": (changed(b__running_var=np.nan * ONES), NAMES, r"got nan at \(0,\), and 3"),
}
DTYPE_ERRORS: dict[str, Any] = {
    "integer": (np.ones(C, np.int32), r"mean of layer 'a' .* got int32. Cast"),
    "bool": (np.ones(C, bool), r"got bool"),
    "complex": (np.ones(C, np.complex64), r"got complex64"),
    "object": (np.array([None, 1.0, 2.0]), r"must be floating; got object"),
    "text": (np.array(["1", "2", "3"]), r"must be floating; got <U1"),
}


def refused(error, match, state_dict, names: dict[str, str], rng):
    """Both kinds of trees, in and out, and none of them changes."""
    variables = linen_variables(rng)
    before = jax.tree.map(np.array, (variables, state_dict))
    with pytest.raises(error, match=match):
        convert.from_torch_tree(state_dict, names, variables)
    model = Nnx()
    moved = {"BatchNorm_1": "blocks/0"}
    with pytest.raises(error, match=match.replace("BatchNorm_1", "blocks/0")):
        convert.from_torch_tree(
            state_dict,
            {k: moved.get(v, v) for k, v in names.items()},
            nnx.state(model),
        )
    jax.tree.map(np.testing.assert_array_equal, before, (variables, state_dict))


@pytest.mark.parametrize("case", TREE_ERRORS)
def test_value_errors_of_trees(case, rng):
    state_dict, names, match = TREE_ERRORS[case]
    refused(ValueError, match, state_dict, names, rng)


@pytest.mark.parametrize("case", DTYPE_ERRORS)
def test_type_errors_of_trees(case, rng):
    value, match = DTYPE_ERRORS[case]
    refused(TypeError, match, changed(a__running_mean=value), NAMES, rng)


@pytest.mark.parametrize(
    ("names", "match"),
    [
        ({"a": "BatchNorm_0"}, "keys leave out 'b' of the other"),
        (NAMES | {"b": "BatchNorm_0"}, "give each layer once"),
        (NAMES | {"b": "elsewhere"}, "got 'elsewhere'"),
    ],
)
def test_the_way_back_refuses_the_same_maps(names, match, rng):
    with pytest.raises(ValueError, match=match):
        convert.to_torch_tree(linen_variables(rng), names, STATE_DICT)


def test_the_way_back_refuses_other_features_and_keeps_the_rest(rng):
    variables = linen_variables(rng)
    other = {k: np.ones(4) for k in STATE_DICT if k[0] == "b"}
    with pytest.raises(ValueError, match="layer 'b' must fit its target"):
        convert.to_torch_tree(variables, NAMES, STATE_DICT | other)
    linear = {"fc.weight": np.ones((2, 2))}
    new = convert.to_torch_tree(variables, NAMES, STATE_DICT | linear)
    assert new["fc.weight"] is linear["fc.weight"]
    assert_near(new["b.weight"], variables["params"]["BatchNorm_1"]["scale"], 0)


def test_an_unknown_path_is_refused(rng):
    with pytest.raises(ValueError, match="got 'nowhere', and there are 'BatchNorm_0'"):
        convert.replace_layers(linen_variables(rng), {"nowhere": random_layer(rng)})
    with pytest.raises(ValueError, match="got 'nowhere', and there are none"):
        convert.replace_layers({"params": {}}, {"nowhere": random_layer(rng)})


def test_a_layer_is_one_layer(rng):
    with pytest.raises(ValueError, match=r"got 2: 'a', 'b'.* ends in _tree"):
        convert.from_torch(STATE_DICT)
    untracked = {"weight": ONES, "bias": ONES}
    with pytest.raises(ValueError, match=r"got 0: none.*track_running_stats=False"):
        convert.from_torch(untracked)


def test_a_list_of_weights_is_as_long_as_the_options_say():
    with pytest.raises(ValueError, match=r"got 3 arrays\. Pass scale=False, center"):
        convert.from_keras([ONES] * 3)


def test_what_numpy_cannot_read_is_told_apart():
    class Tensor:
        def __array__(self, *args, **kwargs):
            raise TypeError("Got unsupported ScalarType BFloat16")

    arrays = {"running_mean": Tensor(), "running_var": ONES}
    with pytest.raises(TypeError, match=r"got Tensor: Got unsupp.*\.float\(\)\.cpu\("):
        convert.from_torch(arrays)


@pytest.mark.parametrize("name", ["Haiku", "Equinox"])
def test_debiased_averages_need_a_count(name, rng):
    peer = PEERS[name]()
    with pytest.raises(ValueError, match=r"must have absorbed a batch.*got count=0"):
        peer.write(*random_layer(rng, count=0))
    peer = PEERS[name](depth=2)
    with pytest.raises(ValueError, match=r"'.*' must have absorbed a batch"):
        peer.write_tree(linen_variables(rng), None)


def test_equinox_has_no_statistics_before_the_first_batch():
    with pytest.raises(ValueError, match="'layers/0' must have seen a batch"):
        PEERS["EquinoxEma"](depth=2).read_tree({})


def test_haiku_layers_of_several_feature_axes_are_refused():
    peer = Haiku()
    peer.params = {"norm_0": {"scale": np.ones((1, 2, 3)), "offset": np.ones((1, 3))}}
    with pytest.raises(
        ValueError, match=r"scale of layer 'norm_0' .* shape \(1, 2, 3\)"
    ):
        peer.read()


def test_long_lists_of_names_are_cut(rng):
    names = NAMES | {f"extra{i}": f"ours{i}" for i in range(20)}
    with pytest.raises(ValueError, match="'extra15' and 12 more, and there are"):
        convert.from_torch_tree(STATE_DICT, names, linen_variables(rng))


def test_every_public_name_says_what_it_is():
    functions = [v for v in vars(convert).values() if isfunction(v)]
    assert len(functions) == 20
    assert all(len(function.__doc__ or "") > 60 for function in functions)
