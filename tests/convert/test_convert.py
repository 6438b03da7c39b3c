"""Compare converted layers and models with the libraries themselves."""

from inspect import isfunction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convert_helpers import LinenNet, NnxNet, linen_variables, random_layer
from flax import linen as nn
from flax import nnx
from helpers import assert_near
from libraries import DECAY, LIBRARIES, C
from oracle import inference, random_case

import jaxbn
from jaxbn import convert

# Other libraries promote dtypes and ranks; Keras warns in `get_weights`.
pytestmark = [
    pytest.mark.usefixtures("standard_promotion", "any_rank"),
    pytest.mark.filterwarnings("ignore:__array__ impl:DeprecationWarning"),
]


@pytest.fixture
def batches(rng):
    return (0.7 + 1.9 * rng.normal(size=(8, 7, C))).astype(np.float32)


def expected_y(layer, x, epsilon):
    """Return the oracle's inference."""
    params, state = layer
    case = random_case(np.random.default_rng(0), x.shape)._replace(
        x=x,
        scale=np.ones(C) if params.scale is None else params.scale,
        bias=np.zeros(C) if params.bias is None else params.bias,
        mean=state.mean,
        var=state.var,
    )
    return inference(case, epsilon=epsilon).y


def step(library, layer, x, count):
    """Return the layer after jaxbn's equivalent of the library's training step."""
    params, state = layer
    options = {"momentum": library.momentum(count), "unbiased": library.unbiased}
    plain = jaxbn.BatchNormParams(None, None)  # for all layers, to compile once
    _, state = jaxbn.batch_norm(plain, state, x, True, **options)
    return params, state


# One layer.

PARTS = [(True, True), (False, False)]
CASES = [(name, *parts) for name in LIBRARIES for parts in PARTS]
CASES += [("Keras", True, False), ("Haiku", False, True), ("Torch", True, False)]
LAYERS = pytest.mark.parametrize(("name", "scale", "bias"), CASES)


@LAYERS
def test_trained_layer_infers_and_trains_alike_in_jaxbn(
    name, scale, bias, rng, batches
):
    library = LIBRARIES[name](scale=scale, bias=bias)
    library.train(batches[0])
    _, state = library.read()
    params, _ = random_layer(rng, scale, bias)
    library.write(params, state._replace(count=jnp.int32(1)))
    for x in batches[1:3]:
        library.train(x)
    layer = library.read()
    assert int(layer[1].count) == (3 if library.counts else 0)
    x = batches[-1]
    assert_near(library.infer(x), expected_y(layer, x, library.epsilon))
    layer = step(library, layer, x, 3)
    library.train(x)
    assert_near(library.read()[1][:2], layer[1][:2])
    assert_near(library.infer(x), expected_y(layer, x, library.epsilon))


@LAYERS
def test_jaxbn_layer_infers_and_trains_alike_in_library(
    name, scale, bias, rng, batches
):
    library = LIBRARIES[name](scale=scale, bias=bias)
    layer = random_layer(rng, scale, bias)
    library.write(*layer)
    x = batches[0]
    assert_near(library.infer(x), expected_y(layer, x, library.epsilon))
    counted = layer[1]._replace(count=jnp.int32(3 if library.counts else 0))
    assert_near(library.read(), (layer[0], counted), 1e-6)
    library.train(x)
    assert_near(library.read()[1][:2], step(library, layer, x, 3)[1][:2])


def test_from_torch_and_to_torch_copy_arrays(rng):
    """PyTorch updates its buffers in place."""
    arrays = convert.to_torch(*random_layer(rng))
    before = {key: array.copy() for key, array in arrays.items()}
    layer = convert.from_torch(arrays)
    for array in arrays.values():
        array += 1
    jax.tree.map(np.testing.assert_array_equal, before, convert.to_torch(*layer))


def test_from_torch_keeps_float64(x64):
    arrays = {"running_mean": np.full(2, 1 / 3), "running_var": np.full(2, 2 / 3)}
    _, state = convert.from_torch(arrays)
    assert state.mean.dtype == jnp.float64
    np.testing.assert_array_equal(state.var, arrays["running_var"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_to_torch_is_read_by_from_numpy_without_loss(dtype, rng):
    torch = pytest.importorskip("torch")
    params, state = random_layer(rng)
    params = jax.tree.map(lambda a: a.astype(dtype), params)
    arrays = convert.to_torch(params, state)
    tensors = {k: torch.from_numpy(v) for k, v in arrays.items()}
    layer = torch.nn.BatchNorm1d(C, dtype=getattr(torch, dtype))
    layer.load_state_dict(tensors)
    for name, value in (("weight", params.scale), ("bias", params.bias)):
        stored = getattr(layer, name).detach()
        assert stored.dtype == getattr(torch, dtype)
        np.testing.assert_array_equal(stored.float(), value.astype(jnp.float32))


def test_to_haiku_expands_vectors_along_axis(rng):
    layer = random_layer(rng)
    params, state = convert.to_haiku(*layer, decay=DECAY, ndim=4, axis=1)
    assert params["scale"].shape == (1, C, 1, 1)
    assert state["~/var_ema"]["hidden"].shape == (1, C, 1, 1)
    assert_near(convert.from_haiku(params, state), layer, 1e-6)


# Momentum.


@pytest.mark.parametrize("momentum", [0.9, 1.0, 0.0])
def test_torch_momentum_is_its_own_inverse(momentum):
    translated = convert.torch_momentum(momentum)
    assert translated == pytest.approx(1 - momentum)
    assert convert.torch_momentum(translated) == pytest.approx(momentum)


def test_torch_momentum_keeps_none():
    assert convert.torch_momentum(None) is None


def test_debiased_momentum_continues_debiased_average(rng):
    values, hidden, average = rng.normal(size=20), 0.0, 0.0
    for count, value in enumerate(values):
        hidden = DECAY * hidden + (1 - DECAY) * value
        momentum = convert.debiased_momentum(DECAY, count)
        average = momentum * average + (1 - momentum) * value
        assert average == pytest.approx(hidden / (1 - DECAY ** (count + 1)))


def test_debiased_momentum_tends_to_decay():
    assert convert.debiased_momentum(DECAY, 1000) == pytest.approx(DECAY)


# Whole models.

TREES = pytest.mark.parametrize("name", [n for n in LIBRARIES if n != "EquinoxEma"])


@TREES
def test_model_converts_to_linen_and_back(name, rng, batches):
    library = LIBRARIES[name](depth=2)
    options = {"epsilon": library.epsilon, "unbiased": library.unbiased}
    written = linen_variables(rng)
    library.write_tree(written, 3)
    x = batches[0]
    model = LinenNet(**options)
    assert_near(library.infer(x), model.apply(written, x, False))
    library.train(x)
    momentum = library.momentum(3)
    _, updates = LinenNet(momentum=momentum, **options).apply(
        written, x, True, mutable=["batch_stats"]
    )
    other = linen_variables(rng)
    read = library.read_tree(other)
    assert_near(read["batch_stats"], updates["batch_stats"])
    assert_near(library.infer(x), model.apply(read, x, False))
    assert jax.tree.structure(read) == jax.tree.structure(other)
    assert read["params"]["Dense_0"] == other["params"]["Dense_0"]


@TREES
def test_model_converts_to_nnx(name, rng, batches):
    library = LIBRARIES[name](depth=2)
    written = linen_variables(rng)
    library.write_tree(written, 3)
    library.names = dict(zip(library.names, ["BatchNorm_0", "blocks/0"], strict=True))
    model = NnxNet(epsilon=library.epsilon)
    dense = model.dense.kernel
    nnx.update(model, library.read_tree(nnx.state(model)))
    model.eval()
    assert_near(model(batches[0]), library.infer(batches[0]))
    assert model.dense.kernel is dense
    layers = convert.layers_of(nnx.state(model))
    expected = convert.layers_of(written)
    assert_near(layers["blocks/0"], expected["BatchNorm_1"], 1e-6)


# Trees.


def test_layers_of_reads_count_of_equal_weight_average(rng):
    variables = linen_variables(rng, momentum=None)
    assert {int(s.count) for _, s in convert.layers_of(variables).values()} == {3}


def test_replace_layers_writes_count_of_equal_weight_average(rng):
    state = nnx.state(NnxNet(momentum=None))
    layers = {"blocks/0": random_layer(rng, count=5)}
    new = convert.layers_of(convert.replace_layers(state, layers))
    assert int(new["blocks/0"][1].count) == 5
    assert int(new["BatchNorm_0"][1].count) == 0


def boxed_variables() -> Any:
    """Return the variables of a layer with a boxed bfloat16 scale."""
    norm = nn.BatchNorm(
        True,
        param_dtype=jnp.bfloat16,
        scale_init=nn.with_partitioning(nn.initializers.ones, ("model",)),
    )
    return norm.init(jax.random.key(0), jnp.zeros((1, C)))


def test_replace_layers_keeps_dtypes_and_boxes(rng):
    variables = boxed_variables()
    layer = random_layer(rng)
    new: Any = convert.replace_layers(variables, {"": layer})
    assert jax.tree.structure(new) == jax.tree.structure(variables)
    scale = new["params"]["scale"].value
    assert scale.dtype == jnp.bfloat16
    assert_near(scale, layer[0].scale.astype(jnp.bfloat16), 0)
    assert new["batch_stats"]["mean"].dtype == jnp.float32


def test_replace_layers_keeps_numpy_arrays(rng):
    arrays = jax.tree.map(lambda a: np.zeros(a.shape), nn.unbox(boxed_variables()))
    new: Any = convert.replace_layers(arrays, {"": random_layer(rng)})
    assert isinstance(new["params"]["scale"], np.ndarray)
    assert new["params"]["scale"].dtype == np.float64


def test_layers_of_widens_statistics_alone():
    variables = jax.tree.map(jnp.bfloat16, nn.unbox(boxed_variables()))
    params, state = convert.layers_of(variables)[""]
    assert params.scale is not None
    assert params.scale.dtype == jnp.bfloat16
    assert state.var.dtype == jnp.float32


def test_public_functions_have_docstrings():
    functions = [v for v in vars(convert).values() if isfunction(v)]
    assert len(functions) == 20
    assert all(len(function.__doc__ or "") > 60 for function in functions)
