"""Compare converted convolutions, dense layers, norms and embeddings with Flax's."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convert_helpers import (
    ONES,
    STATE_DICT,
    EquinoxLayer,
    HaikuLayer,
    KerasLayer,
    TorchLayer,
    random_like,
)
from flax import linen as nn
from flax import nnx
from helpers import assert_near

from jaxbn import convert

# Other libraries promote dtypes and ranks; Keras's arrays warn.
pytestmark = [
    pytest.mark.usefixtures("standard_promotion", "any_rank"),
    pytest.mark.filterwarnings("ignore:__array__ impl:DeprecationWarning"),
]

LIBRARIES: dict[str, Any] = {
    "torch": TorchLayer,
    "keras": KerasLayer,
    "haiku": HaikuLayer,
    "equinox": EquinoxLayer,
}


class Case(NamedTuple):
    """Hold one layer in Flax and in the libraries that have it."""

    shape: tuple[int, ...]  # of x, features last
    flax: nn.Module
    torch: Any
    keras: Any = None
    haiku: Any = None
    equinox: Any = None


CASES = {
    "conv 1-D": Case(
        (2, 7, 4),
        nn.Conv(6, (3,), padding="VALID"),
        lambda t: t.Conv1d(4, 6, 3),
        lambda k: k.Conv1D(6, 3),
        lambda h: h.Conv1D(6, 3, padding="VALID", name="layer"),
        lambda e, key: e.Conv1d(4, 6, 3, key=key),
    ),
    "conv 2-D": Case(
        (2, 5, 6, 4),
        nn.Conv(6, (3, 2), padding="VALID"),
        lambda t: t.Conv2d(4, 6, (3, 2)),
        lambda k: k.Conv2D(6, (3, 2)),
        lambda h: h.Conv2D(6, (3, 2), padding="VALID", name="layer"),
        lambda e, key: e.Conv2d(4, 6, (3, 2), key=key),
    ),
    "square conv without bias": Case(
        (2, 5, 6, 3),
        nn.Conv(3, (3, 3), padding="VALID", use_bias=False),
        lambda t: t.Conv2d(3, 3, 3, bias=False),
        lambda k: k.Conv2D(3, 3, use_bias=False),
        lambda h: h.Conv2D(3, 3, padding="VALID", with_bias=False, name="layer"),
        lambda e, key: e.Conv2d(3, 3, 3, use_bias=False, key=key),
    ),
    "conv 3-D": Case(
        (2, 4, 3, 5, 4),
        nn.Conv(6, (3, 2, 1), padding="VALID"),
        lambda t: t.Conv3d(4, 6, (3, 2, 1)),
        lambda k: k.Conv3D(6, (3, 2, 1)),
        lambda h: h.Conv3D(6, (3, 2, 1), padding="VALID", name="layer"),
        lambda e, key: e.Conv3d(4, 6, (3, 2, 1), key=key),
    ),
    "grouped conv": Case(
        (2, 5, 6, 4),
        nn.Conv(6, (3, 2), padding="VALID", feature_group_count=2),
        lambda t: t.Conv2d(4, 6, (3, 2), groups=2),
        lambda k: k.Conv2D(6, (3, 2), groups=2),
        lambda h: h.Conv2D(
            6, (3, 2), padding="VALID", feature_group_count=2, name="layer"
        ),
        lambda e, key: e.Conv2d(4, 6, (3, 2), groups=2, key=key),
    ),
    "depthwise conv": Case(
        (2, 5, 6, 4),
        nn.Conv(8, (3, 2), padding="VALID", feature_group_count=4),
        lambda t: t.Conv2d(4, 8, (3, 2), groups=4),
        lambda k: k.DepthwiseConv2D((3, 2), depth_multiplier=2),
        lambda h: h.DepthwiseConv2D(2, (3, 2), padding="VALID", name="layer"),
        lambda e, key: e.Conv2d(4, 8, (3, 2), groups=4, key=key),
    ),
    "depthwise conv 1-D": Case(
        (2, 7, 4),
        nn.Conv(4, (3,), padding="VALID", feature_group_count=4),
        lambda t: t.Conv1d(4, 4, 3, groups=4),
        lambda k: k.DepthwiseConv1D(3),
        lambda h: h.DepthwiseConv1D(1, 3, padding="VALID", name="layer"),
        lambda e, key: e.Conv1d(4, 4, 3, groups=4, key=key),
    ),
    "transposed conv": Case(
        (2, 5, 6, 4),
        nn.ConvTranspose(6, (3, 2), (2, 2), padding="VALID", transpose_kernel=True),
        lambda t: t.ConvTranspose2d(4, 6, (3, 2), 2),
        lambda k: k.Conv2DTranspose(6, (3, 2), 2),
    ),
    "transposed conv, not flipped": Case(
        (2, 5, 6, 4),
        nn.ConvTranspose(6, (3, 2), (2, 2), padding="VALID"),
        None,
        None,
        None,
        lambda e, key: e.ConvTranspose2d(4, 6, (3, 2), 2, key=key),
    ),
    "dense": Case(
        (3, 4),
        nn.Dense(6),
        lambda t: t.Linear(4, 6),
        lambda k: k.Dense(6),
        lambda h: h.Linear(6, name="layer"),
        lambda e, key: e.Linear(4, 6, key=key),
    ),
    "square dense without bias": Case(
        (3, 4),
        nn.Dense(4, use_bias=False),
        lambda t: t.Linear(4, 4, bias=False),
        lambda k: k.Dense(4, use_bias=False),
        lambda h: h.Linear(4, with_bias=False, name="layer"),
        lambda e, key: e.Linear(4, 4, use_bias=False, key=key),
    ),
    "layer norm": Case(
        (3, 4),
        nn.LayerNorm(1e-5),
        lambda t: t.LayerNorm(4),
        lambda k: k.LayerNormalization(epsilon=1e-5),
        lambda h: h.LayerNorm(-1, True, True, name="layer"),
        lambda e, key: e.LayerNorm(4),
    ),
    "layer norm without bias": Case(
        (3, 4),
        nn.LayerNorm(1e-5, use_bias=False),
        lambda t: t.LayerNorm(4, bias=False),
        lambda k: k.LayerNormalization(epsilon=1e-5, center=False),
        lambda h: h.LayerNorm(-1, True, False, name="layer"),
        lambda e, key: e.LayerNorm(4, use_bias=False),
    ),
    "layer norm without scale": Case(
        (3, 4),
        nn.LayerNorm(1e-5, use_scale=False),
        None,
        lambda k: k.LayerNormalization(epsilon=1e-5, scale=False),
        lambda h: h.LayerNorm(-1, False, True, name="layer"),
        lambda e, key: e.LayerNorm(4, use_weight=False),
    ),
    "group norm": Case(
        (2, 5, 6, 4),
        nn.GroupNorm(2, epsilon=1e-5),
        lambda t: t.GroupNorm(2, 4),
        lambda k: k.GroupNormalization(2, epsilon=1e-5),
        lambda h: h.GroupNorm(2, name="layer"),
        lambda e, key: e.GroupNorm(2, 4),
    ),
    "instance norm": Case(
        (2, 5, 6, 4),
        nn.InstanceNorm(epsilon=1e-5),
        lambda t: t.InstanceNorm2d(4, affine=True),
    ),
    "batch norm without running statistics": Case(
        (1, 5, 6, 4),
        nn.InstanceNorm(epsilon=1e-5),  # the same, for one image
        lambda t: t.BatchNorm2d(4, track_running_stats=False),
    ),
    "embedding": Case(
        (3,),
        nn.Embed(7, 4),
        lambda t: t.Embedding(7, 4),
        lambda k: k.Embedding(7, 4),
        lambda h: h.Embed(7, 4, name="layer"),
        lambda e, key: e.Embedding(7, 4, key=key),
    ),
}
PAIRS = [
    (library, name)
    for name, case in CASES.items()
    for library in LIBRARIES
    if getattr(case, library)
]


@pytest.mark.parametrize(("library", "name"), PAIRS)
def test_layer_gives_the_same_output_in_flax_and_converts_back(library, name, rng):
    case = CASES[name]
    x = rng.normal(size=case.shape).astype(np.float32)
    x = x if len(case.shape) > 1 else np.array([0, 3, 6], np.int32)
    layer = LIBRARIES[library](getattr(case, library), rng, x)
    model, names = nn.Sequential([case.flax]), {layer.name: "layers_0"}
    variables = random_like(rng, model.init(jax.random.key(0), x))
    converted = layer.read(names, variables)
    assert jax.tree.structure(converted) == jax.tree.structure(variables)
    assert_near(model.apply(converted, x), layer.infer(x))
    weights = layer.weights()
    layer.randomize(rng)
    layer.write(converted, names)
    jax.tree.map(np.testing.assert_array_equal, layer.weights(), weights)


# Trees.


def source(rng, dtype: Any = np.float32) -> Any:
    """Return a `state_dict` of PyTorch with a convolution and a linear layer."""
    shapes = {"conv.weight": (6, 4, 3, 2), "conv.bias": (6,), "fc.weight": (5, 6)}
    return {k: rng.normal(size=shape).astype(dtype) for k, shape in shapes.items()}


def target(array=jnp.zeros) -> Any:
    """Return linen variables for it."""
    conv = {"kernel": array((3, 2, 4, 6)), "bias": array(6)}
    return {"params": {"Conv_0": conv, "Dense_0": {"kernel": array((6, 5))}}}


NAMES = {"conv": "Conv_0", "fc": "Dense_0"}


def test_kernels_are_indexed_by_space_input_and_output(rng):
    arrays = source(rng)
    params = convert.from_torch_tree(arrays, NAMES, target())["params"]
    for h, w, i, o in np.ndindex(3, 2, 4, 6):
        got = params["Conv_0"]["kernel"][h, w, i, o]
        assert got == arrays["conv.weight"][o, i, h, w]
    for i, o in np.ndindex(6, 5):
        assert params["Dense_0"]["kernel"][i, o] == arrays["fc.weight"][o, i]


def test_layers_that_are_not_named_are_kept(rng):
    arrays, variables = source(rng), target()
    new = convert.from_torch_tree(arrays, {"fc": "Dense_0"}, variables)
    assert new["params"]["Conv_0"]["kernel"] is variables["params"]["Conv_0"]["kernel"]
    assert_near(new["params"]["Dense_0"]["kernel"], arrays["fc.weight"].T, 0)
    zeros = {key: 0 * array for key, array in arrays.items()}
    back = convert.to_torch_tree(new, {"fc": "Dense_0"}, zeros)
    assert back["conv.weight"] is zeros["conv.weight"]
    np.testing.assert_array_equal(back["fc.weight"], arrays["fc.weight"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_kernels_keep_the_targets_dtype_and_kind_of_array(dtype, rng, x64):
    dtype = jnp.dtype(dtype)
    arrays = source(rng, np.float64)
    for kind, array in ((jax.Array, jnp.zeros), (np.ndarray, np.zeros)):
        variables = target(lambda shape, array=array: array(shape, dtype))
        new = convert.from_torch_tree(arrays, NAMES, variables)
        kernel = new["params"]["Dense_0"]["kernel"]
        assert isinstance(kernel, kind)
        assert kernel.dtype == dtype
        expected = arrays["fc.weight"].T.astype(dtype)
        np.testing.assert_array_equal(kernel, expected)


def test_narrow_kernels_convert_to_wider_ones_and_back(rng):
    arrays = source(rng, jnp.bfloat16)
    new = convert.from_torch_tree(arrays, NAMES, target())
    zeros = {key: 0 * array for key, array in arrays.items()}
    back = convert.to_torch_tree(new, NAMES, zeros)
    jax.tree.map(np.testing.assert_array_equal, back, arrays)
    assert back["conv.weight"].dtype == jnp.bfloat16


def test_numpy_kernels_are_contiguous_copies(rng):
    """A safetensors file takes contiguous arrays alone."""
    arrays = source(rng)
    kept = arrays["fc.weight"].T.copy()
    new = convert.from_torch_tree(arrays, NAMES, target(np.zeros))
    back = convert.to_torch_tree(new, NAMES, arrays)
    for array in arrays.values():
        array += 1
    np.testing.assert_array_equal(new["params"]["Dense_0"]["kernel"], kept)
    np.testing.assert_array_equal(back["fc.weight"], kept.T)
    for array in jax.tree.leaves((new, back)):
        assert array.flags.c_contiguous


def test_shapes_are_targets_in_both_directions(rng):
    arrays = source(rng)
    shapes = target(lambda shape: jax.ShapeDtypeStruct(np.zeros(shape).shape, "f4"))
    new = convert.from_torch_tree(arrays, NAMES, shapes)
    structs = {k: jax.ShapeDtypeStruct(a.shape, a.dtype) for k, a in arrays.items()}
    back = convert.to_torch_tree(new, NAMES, structs)
    jax.tree.map(np.testing.assert_array_equal, back, arrays)


def test_boxed_kernels_stay_boxed(rng):
    init = nn.with_partitioning(nn.initializers.ones, ("in", "out"))
    model = nn.Sequential([nn.Dense(5, use_bias=False, kernel_init=init)])
    variables: Any = model.init(jax.random.key(0), jnp.zeros((1, 6)))
    arrays = source(rng)
    new: Any = convert.from_torch_tree(arrays, {"fc": "layers_0"}, variables)
    assert jax.tree.structure(new) == jax.tree.structure(variables)
    kernel = new["params"]["layers_0"]["kernel"]
    assert_near(kernel.value, arrays["fc.weight"].T, 0)


class NnxNet(nnx.Module):
    """Hold a convolution, a batch norm, dropout and a linear layer."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        conv = nnx.Conv(4, 6, (3, 2), rngs=rngs)
        norms = [nnx.BatchNorm(3, rngs=rngs) for _ in "ab"]
        dropout = nnx.Dropout(0.5, rngs=rngs)
        self.blocks = nnx.List([conv, *norms, dropout])
        self.fc = nnx.Linear(6, 5, use_bias=False, rngs=rngs)


@pytest.mark.parametrize("separator", ["/", "."])
def test_nnx_state_with_integer_keys(separator, rng):
    arrays = source(rng) | STATE_DICT
    state = nnx.state(NnxNet())
    paths = {"conv": "blocks/0", "a": "blocks/1", "b": "blocks/2", "fc": "fc"}
    names = {name: path.replace("/", separator) for name, path in paths.items()}
    new = convert.from_torch_tree(arrays, names, state)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    zeros = {key: 0 * array for key, array in arrays.items()}
    back = convert.to_torch_tree(new, names, zeros)
    jax.tree.map(np.testing.assert_array_equal, back, arrays)


# Errors.


def with_norms(variables) -> Any:
    """Return the variables with two batch norms."""
    params = {f"BatchNorm_{i}": {"scale": ONES, "bias": ONES} for i in range(2)}
    stats = {f"BatchNorm_{i}": {"mean": ONES, "var": ONES} for i in range(2)}
    return {"params": variables["params"] | params, "batch_stats": stats}


ALL = NAMES | {"a": "BatchNorm_0", "b": "BatchNorm_1"}
ERRORS: dict[str, Any] = {
    "name not in the source": (
        {},
        ALL | {"cnov": "Conv_1"},
        r"keys of names must .* got 'cnov', and .* their kind; there are 'conv', 'fc'",
    ),
    "name not in the target": (
        {},
        ALL | {"conv": "Conv_9"},
        r"must be mapped to .* got \{'conv': 'Conv_9'\}, and there are 'Conv_0', 'De",
    ),
    "norm left out": (
        {},
        NAMES,
        r"must map every batch norm layer; its keys leave out 'a', 'b'",
    ),
    "two names of one path": (
        {},
        ALL | {"fc": "Conv_0"},
        r"give each layer once; got \{'Conv_0': \['conv', 'fc'\]\}",
    ),
    "norm to a convolution": (
        {},
        {"a": "Conv_0", "b": "BatchNorm_1"},
        r"values of names must be batch norm layers of our variables; got 'Conv_0'",
    ),
    "convolution to a norm": (
        {"a.running_mean": None, "a.running_var": None},
        ALL | {"a": "Dense_0", "fc": "BatchNorm_0"},
        r"a layer that is not a batch norm must be .* got \{'fc': 'BatchNorm_0'\}",
    ),
    "layer without statistics to a norm": (
        {"a.running_mean": None, "a.running_var": None},
        ALL,
        r"a layer that is not a batch norm must be .* got \{'a': 'BatchNorm_0'\}",
    ),
    "norm and convolution to a norm": (
        {},
        ALL | {"conv": "BatchNorm_0"},
        r"give each layer once; got \{'BatchNorm_0': \['conv', 'a'\]\}",
    ),
    "other kind of layer": (
        {},
        ALL | {"conv": "Dense_0", "fc": "Conv_0"},
        r"layer 'Dense_0' must fit .* got \{'bias': \(6,\), 'kernel': \(3, 2, 4, 6\)\} "
        r"for \{'kernel': \(6, 5\)\}",
    ),
    "other features": (
        {"fc.weight": np.ones((6, 5))},
        ALL,
        r"layer 'Dense_0' must fit .* got \{'kernel': \(5, 6\)\} for \{'kernel': "
        r"\(6, 5\)\}, in Flax's names and layout",
    ),
    "bias in the source alone": (
        {"fc.bias": np.ones(5)},
        ALL,
        r"'Dense_0' must fit .* bias on both sides .* got \{'bias': \(5,\), 'ker",
    ),
    "bias in the target alone": (
        {"conv.bias": None},
        ALL,
        r"'Conv_0' must fit .* got \{'kernel': .* for \{'bias': \(6,\), 'ker",
    ),
    "no weight": (
        {"fc.weight": None, "fc.bias": np.ones(5)},
        ALL,
        r"'Dense_0' must fit .* got \{'bias': \(5,\)\} for \{'kernel'",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_from_torch_tree_rejects_invalid_maps_and_weights(case, rng):
    changes, names, match = ERRORS[case]
    arrays = source(rng) | STATE_DICT | changes
    arrays = {key: array for key, array in arrays.items() if array is not None}
    variables = with_norms(target(np.zeros))
    before = jax.tree.map(np.array, (arrays, variables))
    with pytest.raises(ValueError, match=match):
        convert.from_torch_tree(arrays, names, variables)
    jax.tree.map(np.testing.assert_array_equal, before, (arrays, variables))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"fc.weight": np.ones((6, 5))}, r"layer 'fc' must fit .*\(6, 5\).*\(5, 6\)"),
        ({"fc.bias": np.ones(5)}, r"layer 'fc' must fit .* bias on both sides"),
        ({"conv.bias": None}, r"layer 'conv' must fit .* bias on both sides"),
    ],
)
def test_to_torch_tree_rejects_targets_that_do_not_fit(changes, match, rng):
    arrays = source(rng) | changes
    arrays = {key: array for key, array in arrays.items() if array is not None}
    with pytest.raises(ValueError, match=match):
        convert.to_torch_tree(target(), NAMES, arrays)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(
    ("flax", "shape"), [(nn.Dense(5), r"\(4, 5\)"), (nn.LayerNorm(), r"\(4,\)")]
)
def test_dense_layer_must_fit_in_every_library(library, flax, shape, rng):
    x = np.zeros((3, 4), np.float32)
    layer = LIBRARIES[library](getattr(CASES["dense"], library), rng, x)
    variables, names = flax.init(jax.random.key(0), x), {layer.name: ""}
    dense = r"\((4, 6|6, 4)\)"  # transposed if it is a kernel in Flax
    with pytest.raises(ValueError, match=rf"must fit .* got .*{dense}.* for .*{shape}"):
        layer.read(names, variables)
    with pytest.raises(ValueError, match=rf"must fit .* got .*{shape}.* for .*{dense}"):
        layer.write(variables, names)


def test_layers_of_no_known_kind_are_rejected(rng):
    weights = {"embed.weight": np.ones((7, 4)), "embed.bias": np.ones(4)}
    embed = {"embedding": np.ones((7, 4)), "bias": np.ones(4)}
    variables = {"params": {"Embed_0": embed}}
    names = {"embed": "Embed_0"}
    with pytest.raises(ValueError, match=r"'Embed_0' must fit .* 'unknown bias'"):
        convert.from_torch_tree(weights, names, variables)
    with pytest.raises(ValueError, match=r"'embed' must fit .* 'unknown bias'"):
        convert.to_torch_tree(variables, names, weights)


def test_integer_kernels_are_rejected_in_both_directions(rng):
    arrays = source(rng)
    quantized = arrays | {"fc.weight": np.ones((5, 6), np.int8)}
    with pytest.raises(TypeError, match="weight of layer 'fc' must be floating; got i"):
        convert.from_torch_tree(quantized, NAMES, target())
    variables = target(lambda shape: np.ones(shape, np.int8))
    with pytest.raises(TypeError, match="layer 'Conv_0' must be floating; got int8"):
        convert.to_torch_tree(variables, NAMES, arrays)
