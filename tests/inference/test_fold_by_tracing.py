"""Folding finds the pairs in one abstract call of a model, and no wrong ones."""

import warnings
from collections import OrderedDict
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax_helpers import assert_same, randomize, randomize_for_inference, with_warnings
from helpers import assert_near
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn
from jaxbn._fold.linear import describe_functions
from jaxbn.linen import skip_folded

pytestmark = pytest.mark.usefixtures("standard_promotion")
NORMS = (nn.BatchNorm, jaxbn.linen.BatchNorm)


def linen_case(rng, model, *shape, dtype=jnp.float32):
    x = jnp.asarray(rng.normal(size=shape), dtype)
    return randomize(rng, jax.eval_shape(model.init, jax.random.key(0), x)), x


def fold_linen(model, variables, x, **kwargs):
    """Fold, compare the outputs, and return the variables and the reasons."""
    folded, caught = with_warnings(jaxbn.linen.fold, model, variables, x, **kwargs)
    kwargs.pop("pairs", None)
    expected = jax.jit(lambda v: model.apply(v, x, **kwargs))(variables)
    with skip_folded():
        actual = jax.jit(lambda v: model.apply(v, x, **kwargs))(folded)
    assert_near(actual, expected, 1e-5)
    assert all(w.category is UserWarning for w in caught)
    return folded, "\n".join(str(w.message) for w in caught)


def fold_nnx(rng, model, *shape):
    randomize_for_inference(rng, model)
    x = jnp.asarray(rng.normal(size=shape), jnp.float32)
    expected = nnx.jit(lambda model: model(x))(model)
    folded, caught = with_warnings(jaxbn.nnx.fold, model, x)
    assert_near(nnx.jit(lambda model: model(x))(folded), expected, 1e-5)
    return folded, "\n".join(str(w.message) for w in caught)


def norms_in(model):
    nodes = nnx.iter_graph(model, graph=True)
    return sum(isinstance(node, nnx.BatchNorm) for _, node in nodes)


def norm_of(x, params, stats, epsilon=1e-5):
    """Return the inference of a batch norm in NumPy float64."""
    scale, bias, mean, var = (
        np.asarray(a, np.float64)
        for a in (params["scale"], params["bias"], stats["mean"], stats["var"])
    )
    return (np.asarray(x, np.float64) - mean) / np.sqrt(var + epsilon) * scale + bias


# The function, for a batch norm before the layer.


def conv(x, kernel, groups=1):
    spatial = "HW"[: x.ndim - 2]
    dimensions = f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"
    return lax.conv_general_dilated(
        x,
        kernel,
        (1,) * len(spatial),
        "VALID",
        dimension_numbers=dimensions,
        feature_group_count=groups,
    )


BEFORE = {  # the layer, the shapes of x and of the kernel, axis, input_axis
    "dense": (jnp.matmul, (2, 3), (3, 4), -1, -2),
    "conv 1d": (conv, (2, 5, 3), (3, 3, 4), -1, -2),
    "conv 2d": (conv, (2, 5, 4, 3), (3, 2, 3, 4), -1, -2),
    "grouped": (lambda x, k: conv(x, k, 2), (2, 5, 5, 6), (3, 3, 3, 4), -1, -2),
    "depthwise": (lambda x, k: conv(x, k, 3), (2, 5, 5, 3), (3, 3, 1, 6), -1, -2),
    "one of two input axes": (
        lambda x, k: jnp.einsum("nji,jiab->nab", x, k),
        (2, 5, 3), (5, 3, 4, 6), (-2, -1), 1,
    ),
    "two input axes": (
        lambda x, k: jnp.einsum("nij,jia->na", x, k), (2, 5, 3), (3, 5, 4), -1, (1, 0)
    ),
    "transposed kernel": (lambda x, k: x @ k.T, (2, 3), (4, 3), 0, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", BEFORE)
@pytest.mark.usefixtures("x64")
def test_folded_layer_includes_the_batch_norm_before_it(name, rng):
    apply, x_shape, kernel_shape, axis, input_axis = BEFORE[name]
    x, kernel = rng.normal(size=x_shape), rng.normal(size=kernel_shape)
    features = x_shape[1:] if np.ndim(input_axis) else x_shape[-1:]
    scale, shift, mean = rng.normal(size=(3, *features))
    var = rng.uniform(0.1, 3.0, size=features)
    params = jaxbn.BatchNormParams(jnp.asarray(scale), jnp.asarray(shift))
    state = jaxbn.BatchNormState(jnp.asarray(mean), jnp.asarray(var), jnp.float32(1))
    normalized = (x - mean) / np.sqrt(var + 1e-3) * scale + shift
    outputs = tuple(np.take(kernel_shape, np.atleast_1d(axis)))
    for bias in (None, rng.normal(size=outputs)):
        expected = np.asarray(apply(normalized, kernel)) + (0 if bias is None else bias)
        new_kernel, new_bias = jaxbn.fold(
            kernel, bias, params, state, epsilon=1e-3, axis=axis, input_axis=input_axis
        )
        assert new_kernel.dtype == new_bias.dtype == np.float64
        assert new_bias.shape == outputs
        folded = np.asarray(apply(x, new_kernel)) + np.asarray(new_bias)
        assert_near(folded, expected, 1e-13)


@pytest.mark.parametrize("features", ["after", 4, 8, 16])
@pytest.mark.parametrize("spec", [P(), P(None, None, "m"), P(None, "m", None)])
def test_fold_takes_sharded_arrays(spec, features, rng):
    mesh = Mesh(np.array(jax.devices()[:2]), "m", axis_types=(AxisType.Explicit,))
    input_axis = None if features == "after" else -2
    kernel, bias = rng.normal(size=(3, 4, 8)), rng.normal(size=8)
    vectors = rng.uniform(0.1, 3.0, size=(4, 8 if features == "after" else features))

    def fold(place):
        params, state = jaxbn.init(vectors.shape[1])
        scale, shift, mean, var = (place(a, P("m")) for a in vectors)
        params = params._replace(scale=scale, bias=shift)
        state = state._replace(mean=mean, var=var)
        layer = place(kernel, spec), place(bias, P("m"))
        with_bias = jaxbn.fold(*layer, params, state, input_axis=input_axis)
        return with_bias, jaxbn.fold(
            layer[0], None, params, state, input_axis=input_axis
        )

    expected = fold(lambda a, spec: jnp.float32(a))
    with jax.set_mesh(mesh):
        actual = fold(
            lambda a, spec: jax.device_put(jnp.float32(a), NamedSharding(mesh, spec))
        )
        assert actual[0][0].sharding.is_equivalent_to(NamedSharding(mesh, spec), 3)
    assert_same(jax.device_get(actual), expected, 1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_fold_before_a_layer_computes_in_float32(dtype, rng):
    kernel = jnp.asarray(rng.normal(size=(3, 4)), dtype)
    params, state = jaxbn.init(3)
    state = state._replace(mean=jnp.arange(3.0), var=jnp.arange(1.0, 4.0))
    new_kernel, bias = jaxbn.fold(kernel, None, params, state, input_axis=-2)
    assert new_kernel.dtype == bias.dtype == jnp.float32
    scale = 1 / np.sqrt(np.arange(1.0, 4.0) + 1e-5)
    exact = np.asarray(kernel, np.float64) * scale[:, None]
    assert_near(new_kernel, exact, 2e-7)
    assert_near(bias, -(np.arange(3.0)[:, None] * exact).sum(0), 5e-7)


@pytest.mark.parametrize(
    ("features", "options", "match"),
    [
        (5, {}, r"features of the layer after it; .*\(5,\), and \(3,\) along input"),
        (9, {}, "number of groups, which divides"),
        (3, {"input_axis": -1}, "must name other axes of the kernel than axis"),
        (3, {"input_axis": 2}, "axis must name feature axes of the kernel"),
        (3, {"bias": jnp.ones(3)}, "bias must end in the features' shape"),
    ],
)
def test_fold_before_a_layer_rejects_wrong_arguments(features, options, match):
    arguments = {"input_axis": -2, "bias": None, **options}
    with pytest.raises(ValueError, match=match):
        jaxbn.fold(
            jnp.ones((3, 4)),
            arguments["bias"],
            *jaxbn.init(features),
            input_axis=arguments["input_axis"],
        )


# Norms that can be folded.


class Critic(nn.Module):
    """Normalize before each layer, as CrossQ does; `norm` may lack scale or bias."""

    norm: Any = nn.BatchNorm
    layers: Any = (nn.Dense(4), nn.Dense(3, use_bias=False))
    options: Any = None

    @nn.compact
    def __call__(self, x, train=False):
        for layer in self.layers:
            x = self.norm(not train, **(self.options or {}))(x)
            x = nn.relu(layer(x))
        return x


BEFORE_LAYERS = {
    "Dense": (nn.Dense(4), (5, 3)),
    "DenseGeneral": (nn.DenseGeneral((2, 4), axis=(-2, -1)), (5, 2, 3)),
    "Conv": (nn.Conv(4, (3, 3), padding="VALID"), (2, 5, 5, 3)),
    "Conv, zero padding": (nn.Conv(4, (3, 2), padding=((0, 0), 0)), (2, 5, 5, 3)),
    "Conv, 1x1": (nn.Conv(4, (1, 1), 2), (2, 5, 5, 3)),
    "Conv, circular": (nn.Conv(4, (3,), padding="CIRCULAR"), (2, 5, 3)),
    "Conv, grouped": (
        nn.Conv(4, (3, 3), padding="VALID", feature_group_count=2), (2, 5, 5, 6)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BEFORE_LAYERS)
def test_linen_fold_takes_norms_before_layers(name, rng):
    layer, shape = BEFORE_LAYERS[name]
    index = [*BEFORE_LAYERS].index(name)
    options = ({}, {"use_scale": False}, {"use_bias": False, "epsilon": 1e-2})[
        index % 3
    ]
    layer = layer.clone(use_bias=index % 2 == 0)
    model = Critic(NORMS[index % 2], (layer,), options)
    folded, reasons = fold_linen(model, *linen_case(rng, model, *shape))
    assert not reasons
    assert folded["batch_stats"] == {}


def test_linen_fold_of_norms_before_layers_matches_numpy(rng):
    model = Critic()
    variables, x = linen_case(rng, model, 6, 3)
    folded, _ = fold_linen(model, variables, x)
    params, y = variables["params"], np.asarray(x, np.float64)
    for i in range(2):
        norm = f"BatchNorm_{i}"
        y = norm_of(y, params[norm], variables["batch_stats"][norm])
        y = y @ np.asarray(params[f"layers_{i}"]["kernel"], np.float64)
        y = np.maximum(y + np.asarray(params[f"layers_{i}"].get("bias", 0)), 0)
    with skip_folded():
        assert_near(model.apply(folded, x), y, 1e-6)


@pytest.mark.parametrize(
    ("layer", "shape", "reason"),
    [
        (nn.Conv(4, (3, 3)), (2, 5, 5, 3), r"pads .* with zeros \(padding='SAME'\)"),
        (nn.Conv(4, (3,), padding="CAUSAL"), (2, 5, 3), "padding='CAUSAL'"),
        (nn.Conv(4, (3,), padding=1), (2, 5, 3), "padding=1"),
        (nn.Conv(4, (1,), padding=0, input_dilation=2), (2, 5, 3), "zeros betwe"),
        (nn.Conv(4, (1,), mask=jnp.ones((1, 3, 4))), (2, 5, 3), "has a mask"),
        (nn.ConvTranspose(4, (3,), padding="VALID"), (2, 5, 3), "puts zeros around"),
        (nn.ConvLocal(4, (3,), padding="VALID"), (2, 5, 3), "for each position"),
        (nn.DenseGeneral(4, batch_dims=(0,)), (2, 5, 3), "has batch dimensions"),
        (nn.DenseGeneral(4, axis=-2), (2, 5, 3), "not the input features"),
    ],
)
def test_linen_fold_leaves_norms_before_layers_that_pad(layer, shape, reason, rng):
    model = Critic(layers=(layer,))
    _, reasons = fold_linen(model, *linen_case(rng, model, *shape))
    assert reasons.startswith("fold left batch norms as they are:\n  BatchNorm_0: ")
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(reasons)


def quantized_dot(x, kernel, *args, **kwargs):
    return lax.dot_general(x, jnp.sign(kernel), *args, **kwargs)


def quantized_conv(x, kernel, *args, **kwargs):
    return lax.conv_general_dilated(x, jnp.sign(kernel), *args, **kwargs)


def quantized_dtype(*args, dtype=None, inexact=True):
    x, kernel, bias = args
    return [x, jnp.sign(kernel), bias]


class QuantizedDense(nn.Dense):
    dot_general: Any = quantized_dot


CUSTOM: list[tuple[nn.Module, str]] = [
    (nn.Dense(3, dot_general=quantized_dot), "dot_general"),
    (nn.DenseGeneral(3, dot_general_cls=lambda: quantized_dot), "dot_general_cls"),
    (nn.Conv(3, (1,), conv_general_dilated=quantized_conv), "conv_general_dilated"),
    (
        nn.Conv(3, (1,), conv_general_dilated_cls=lambda: quantized_conv),
        "conv_general_dilated_cls",
    ),
    (nn.Conv(3, (1,), promote_dtype=quantized_dtype), "promote_dtype"),
    (QuantizedDense(3), "dot_general"),
]


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(("layer", "option"), CUSTOM)
def test_linen_fold_leaves_layers_that_may_not_be_linear(layer, option, after, rng):
    layer, norm = layer.clone(parent=None), nn.BatchNorm(True)
    model = nn.Sequential([layer, norm] if after else [norm, layer])
    variables, x = linen_case(rng, model, 2, 5, 3)
    folded, reasons = fold_linen(model, variables, x)
    assert_same(folded, variables, 0)
    assert f"has a {option} of its own, which may not be linear" in reasons


def test_describe_functions_knows_them_by_name_and_package():
    quantizing = nn.Dense(3, dot_general_cls=nn.fp8_ops.Fp8DotGeneralOp)
    assert describe_functions(quantizing).startswith("has a dot_general_cls of its")
    assert describe_functions(nn.Dense(3)) == ""

    def dot_general(x, kernel, *args, **kwargs):
        return quantized_dot(x, kernel, *args, **kwargs)

    assert describe_functions(nn.Dense(3, dot_general=dot_general))


def test_linen_fold_takes_the_usual_functions(rng):
    model = nn.Sequential(
        [
            nn.Dense(3, dot_general=lax.dot_general),
            nn.BatchNorm(True),
            nn.Conv(3, (1,), conv_general_dilated=lax.conv_general_dilated),
            nn.BatchNorm(True),
        ]
    )
    _, reasons = fold_linen(model, *linen_case(rng, model, 2, 5, 3))
    assert not reasons


class Attention(nn.Module):
    """Feed one norm to three layers, and fold a layer from both sides."""

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(True, name="shared")(x)
        q, k, v = (nn.DenseGeneral((2, 3), name=name)(x) for name in "qkv")
        axis: Any = (-2, -1)
        v = nn.BatchNorm(True, axis=axis, name="after")(v)
        return q * k + v


def test_linen_fold_takes_one_norm_before_several_layers(rng):
    model = Attention()
    variables, x = linen_case(rng, model, 5, 3)
    folded, reasons = fold_linen(model, variables, x)
    assert not reasons
    assert folded["params"].keys() == set("qkv")
    pairs: Any = dict.fromkeys("qkv", "shared")
    half, _ = fold_linen(model, variables, x, pairs=pairs)
    assert half["batch_stats"].keys() == {"after"}
    with pytest.raises(ValueError, match="directly after it is 'k', 'q', 'v'"):
        jaxbn.linen.fold(model, variables, x, pairs={"q": "shared"})


def test_linen_fold_prefers_the_layer_before(rng):
    model = nn.Sequential([nn.Dense(4), nn.BatchNorm(True), nn.Dense(2)])
    variables, x = linen_case(rng, model, 5, 3)
    folded, _ = fold_linen(model, variables, x)
    same = folded["params"]["layers_2"]["kernel"]
    np.testing.assert_array_equal(same, variables["params"]["layers_2"]["kernel"])
    folded, _ = fold_linen(model, variables, x, pairs={"layers_2": "layers_1"})
    same = folded["params"]["layers_0"]["kernel"]
    np.testing.assert_array_equal(same, variables["params"]["layers_0"]["kernel"])


def test_linen_fold_takes_both_sides_of_a_layer_one_after_the_other(rng):
    layers = nn.BatchNorm(True), nn.Dense(4, use_bias=False), nn.BatchNorm(True)
    model = nn.Sequential(layers)
    variables, x = linen_case(rng, model, 5, 3)
    at_once, _ = fold_linen(model, variables, x)
    pairs = {"layers_1": "layers_0"}, {"layers_1": "layers_2"}
    for first, second in (pairs, pairs[::-1]):
        half, _ = fold_linen(model, variables, x, pairs=first)
        for context in (nullcontext(), skip_folded()):
            with context:
                folded = jaxbn.linen.fold(model, half, x, pairs=second)
            assert_same(folded, at_once, 1e-6)


def test_linen_fold_sees_through_jit_remat_and_other_dtypes(rng):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.jit(nn.Dense)(4)(x)
            x = nn.relu(nn.remat(jaxbn.linen.BatchNorm)(True)(x))
            x = nn.Dropout(0.5, deterministic=True)(nn.Dense(3)(x))
            x.mean()  # not used
            return nn.BatchNorm(True, epsilon=1e-3)(x)

    model = Model()
    folded, reasons = fold_linen(model, *linen_case(rng, model, 5, 3))
    assert not reasons
    assert folded["batch_stats"] == {}


def test_linen_fold_works_inside_replace_batch_norm_and_vmap(rng):
    model = nn.Sequential([nn.Dense(4), nn.BatchNorm(True)])
    variables, x = linen_case(rng, model, 5, 3)
    seeds = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), variables)
    expected = jax.vmap(model.apply, (0, None))(seeds, x)
    with jaxbn.linen.replace_batch_norm():
        folded = jax.vmap(lambda v: jaxbn.linen.fold(model, v, x))(seeds)
    with skip_folded():
        assert_near(jax.vmap(model.apply, (0, None))(folded, x), expected)


def test_linen_fold_takes_shapes_and_bfloat16(rng):
    layers = nn.Dense(4, dtype=jnp.bfloat16), nn.BatchNorm(True, dtype=jnp.bfloat16)
    model = nn.Sequential(layers)
    variables, x = linen_case(rng, model, 5, 3, dtype=jnp.bfloat16)
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    folded = jaxbn.linen.fold(model, variables, shape)
    with skip_folded():
        assert_near(model.apply(folded, x), model.apply(variables, x), 2e-2)


def test_linen_fold_returns_the_containers_that_came(rng):
    model = nn.Sequential([nn.Dense(4), nn.BatchNorm(True)])
    variables, x = linen_case(rng, model, 5, 3)
    params: Any = nn.FrozenDict(variables["params"])
    stats = variables["batch_stats"]
    given = OrderedDict(extra={}, params=params, batch_stats=stats)
    folded, _ = fold_linen(model, given, x)
    assert type(folded) is OrderedDict
    assert type(folded["params"]) is nn.FrozenDict
    assert folded["batch_stats"] == folded["extra"] == {}


# Norms that cannot.


class Wrong(nn.Module):
    """Hold layers in an order that a name selects."""

    order: str

    @nn.compact
    def __call__(self, x, train=False):
        epsilon = 1e-3 + 0 * jnp.sum(x) if self.order == "epsilon" else 1e-5
        options: Any = {"axis": 1 if self.order == "axis" else -1, "epsilon": epsilon}
        norm = nn.BatchNorm(not train, name="norm", **options)
        dense = nn.Dense(3, name="dense")
        if self.order == "skip":
            h = dense(x)
            return h + norm(h)
        if self.order == "activation":
            return norm(nn.relu(dense(x)))
        if self.order == "returned":
            h = dense(x)
            return norm(h), h
        if self.order == "twice":
            return norm(dense(x)) + dense(x + 1)
        if self.order == "norm twice":
            return norm(dense(x)) + norm(x)
        if self.order == "axis":
            return norm(dense(x[:, None]))
        if self.order == "epsilon":
            return norm(dense(x))
        if self.order == "weights":
            layer = nn.WeightNorm(dense)
            return norm(layer(x))
        if self.order == "tied":
            y = norm(dense(x))
            return y @ dense.variables["params"]["kernel"].T
        if self.order == "uncalled":
            return norm(dense(x)) if self.is_initializing() else x
        return dense(nn.relu(norm(x)))


REASONS = {
    "skip": "the output of 'dense', .* has another use",
    "activation": "its input is not the output of a linear layer itself",
    "returned": "the output of 'dense', .* has another use",
    "twice": "the output of 'dense', .* has another use",
    "norm twice": "its input is not the output",
    "axis": "its axis is not the output features of 'dense'",
    "epsilon": "its epsilon is computed in the call",
    "weights": "the kernel of 'dense' is computed in the call",
    "tied": "the kernel of 'dense' is used outside of its calls",
    "uncalled": "the model does not call it",
    "after relu": "its output is not the input of a linear layer alone",
}


@pytest.mark.parametrize("path", REASONS)
def test_linen_fold_says_why_a_norm_stays(path, rng):
    model = Wrong(path)
    variables, x = linen_case(rng, model, 4, 3)
    before = jax.tree.map(jnp.copy, variables)
    with pytest.warns(UserWarning, match=f"norm: .*{REASONS[path]}"):
        folded = jaxbn.linen.fold(model, variables, x)
    jax.tree.map(np.testing.assert_array_equal, folded, before)
    fold_linen(model, variables, x)
    with pytest.raises(ValueError, match=f"cannot be folded: .*{REASONS[path]}"):
        jaxbn.linen.fold(model, variables, x, pairs={"dense": "norm"})


RETURNED = {  # what the model returns, of a weight
    "itself": lambda a: a,
    "transposed": lambda a: a.T,
    "reversed": lambda a: a[::-1],
    "in jit": jax.jit(lambda a: a),
    "in cond": lambda a: lax.cond(True, lambda: a, lambda: jnp.zeros_like(a)),
    "in both branches": lambda a: lax.cond(True, lambda: a, lambda: a),
    "in scan": lambda a: lax.scan(lambda c, _: (c, a), 0, length=2)[1],
    "in scan over it": lambda a: lax.scan(lambda c, a: (c, a), 0, a)[1],
    "as a carry": lambda a: lax.scan(lambda c, _: (c, 0), a, length=2)[0],
    "as a carry that changes": lambda a: lax.scan(lambda c, _: (2 * c, 0), a, length=2)[
        0
    ],
    "into a carry": lambda a: lax.scan(
        lambda c, _: (a, 0), jnp.zeros_like(a), length=2
    )[0],
    "in a reversed scan": lambda a: lax.scan(lambda c, a: (c, a), 0, jnp.flip(a))[1],
    "in while": lambda a: lax.while_loop(lambda a: False, lambda a: a, a),
}
USES = [("dense", "kernel", how) for how in RETURNED]
USES += [("dense", "bias", "itself"), ("norm", "mean", "itself")]
USES += [("norm", "scale", "transposed")]


class Returning(nn.Module):
    """Return a weight of one of two layers, next to the output."""

    layer: str = ""
    weight: str = ""
    how: Any = None
    store: bool = False

    @nn.compact
    def __call__(self, x):
        layers = {"dense": nn.Dense(3), "norm": nn.BatchNorm(True)}
        y = layers["norm"](layers["dense"](x))
        if self.how is None or self.is_initializing():
            return y
        found = layers[self.layer].variables
        weights = {**found["params"], **found.get("batch_stats", {})}
        if self.store:
            self.sow("intermediates", "stored", self.how(weights[self.weight]))
            return y
        return y, self.how(weights[self.weight])


@pytest.mark.parametrize(("layer", "weight", "how"), USES)
def test_linen_fold_leaves_layers_whose_weights_are_returned(layer, weight, how, rng):
    model = Returning(layer, weight, RETURNED[how])
    _, reasons = fold_linen(model, *linen_case(rng, model, 4, 3))
    path = {"dense": "Dense_0", "norm": "BatchNorm_0"}[layer]
    assert f"the {weight} of {path!r} is used outside of its calls" in reasons


@pytest.mark.parametrize("mutable", [[], ["batch_stats"], ["params", "batch_stats"]])
def test_linen_fold_does_not_count_the_state_as_a_use(mutable, rng):
    model = Returning()
    variables, x = linen_case(rng, model, 4, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folded = jaxbn.linen.fold(model, variables, x, mutable=mutable)
    assert folded["batch_stats"] == {}


def test_linen_fold_leaves_layers_whose_weights_are_stored(rng):
    model = Returning("dense", "kernel", RETURNED["itself"], store=True)
    variables, x = linen_case(rng, model, 4, 3)
    with pytest.warns(UserWarning, match="kernel of 'Dense_0' is used outside"):
        jaxbn.linen.fold(model, variables, x, mutable=["intermediates"])


def test_linen_fold_needs_a_call_at_inference(rng):
    model = Wrong("activation")
    variables, x = linen_case(rng, model, 4, 3)
    options: Any = {"train": True, "mutable": ["batch_stats"]}
    with pytest.warns(UserWarning, match="normalizes by the batch in this call"):
        jaxbn.linen.fold(model, variables, x, **options)
    with pytest.raises(Exception, match="immutable") as caught:
        jaxbn.linen.fold(model, variables, x, train=True)
    assert "such as train=False" in caught.value.__notes__[-1]


def test_linen_fold_rejects_pairs_of_equal_width(rng):
    model = nn.Sequential(
        [nn.Dense(3), nn.BatchNorm(True), nn.Dense(3), nn.BatchNorm(True)]
    )
    variables, x = linen_case(rng, model, 4, 3)
    with pytest.raises(ValueError, match=r"'layers_3' with 'layers_0'.*is 'layers_2'"):
        jaxbn.linen.fold(model, variables, x, pairs={"layers_0": "layers_3"})


# Stacks.


class Block(nn.Module):
    norm: Any = nn.BatchNorm

    @nn.compact
    def __call__(self, x, _=None):
        y = nn.Dense(x.shape[-1], use_bias=False)(x)
        y = self.norm(True, epsilon=1e-3)(y)
        return nn.relu(nn.Dense(x.shape[-1])(self.norm(True)(nn.relu(y)))) + x, None


class Stack(nn.Module):
    """Apply 3 blocks, their weights stacked along `axis`."""

    lift: str = "scan"
    axis: int = 0

    @nn.compact
    def __call__(self, x):
        axes = {"params": self.axis, "batch_stats": 0}
        options: Any = {"variable_axes": axes, "split_rngs": {"params": True}}
        nothing: Any = None
        if self.lift == "scan":
            return nn.scan(Block, length=3, **options)()(x, None)[0]
        if self.lift == "vmap":
            return nn.vmap(Block, axis_size=3, in_axes=nothing, **options)()(x)[0]
        inner = Stack("scan", self.axis)
        return nn.vmap(
            lambda inner, x: inner(x), axis_size=3, in_axes=nothing, **options
        )(inner, x)


@pytest.mark.parametrize("width", [3, 4])  # 3: the shape does not show the axis
@pytest.mark.parametrize("lift", ["scan", "vmap"])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_linen_fold_takes_stacked_layers(lift, axis, width, rng):
    model = Stack(lift, axis)
    folded, reasons = fold_linen(model, *linen_case(rng, model, 5, width))
    assert not reasons
    assert folded["batch_stats"] == {}


def test_linen_fold_leaves_nested_stacks(rng):
    model = Stack("both")
    folded, reasons = fold_linen(model, *linen_case(rng, model, 5, 3))
    assert reasons.count("is in nested stacks, which are not folded") == 2
    assert len(jax.tree.leaves(folded["batch_stats"])) == 4


def test_linen_fold_leaves_a_layer_shared_by_stacked_norms(rng):
    class Shared(nn.Module):
        @nn.compact
        def __call__(self, x):
            axes: Any = {
                "variable_broadcast": "params",
                "split_rngs": {"params": False},
            }
            block = nn.scan(Block, variable_axes={"batch_stats": 0}, length=3, **axes)
            return block()(x, None)[0]

    model = Shared()
    _, reasons = fold_linen(model, *linen_case(rng, model, 5, 4))
    assert "is not stacked along the same axes as" in reasons


def test_linen_fold_names_a_damaged_stack(rng):
    model = Stack()
    variables, x = linen_case(rng, model, 5, 4)
    damaged = jax.tree.map(jnp.negative, variables)
    with pytest.raises(ValueError, match="must not be negative"):
        jaxbn.linen.fold(model, damaged, x)


# Whole models.


def test_linen_fold_finds_all_pairs_of_a_resnet_50(rng):
    from benchmarks._resnet import ResNet

    class Inference(nn.BatchNorm):
        """Pass over `use_running_average=False`, which the model names."""

        @nn.compact
        def __call__(self, x, use_running_average=None, *, mask=None):
            layer = nn.BatchNorm(True, name="norm")
            return layer(x, mask=mask)

    model = ResNet(Inference, jnp.float32)
    shape = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), shape)
    variables = randomize(rng, shapes)
    folded = jaxbn.linen.fold(model, variables, shape)
    assert len(jax.tree.leaves(variables["batch_stats"])) == 2 * 53
    assert folded["batch_stats"] == {}
    x = jnp.asarray(rng.normal(size=shape.shape), jnp.float32)
    expected = jax.jit(model.apply)(variables, x)
    with skip_folded():
        assert_near(jax.jit(model.apply)(folded, x), expected, 1e-5)


# nnx.


class NNXBlock(nnx.Module):
    def __init__(self, width, rngs):
        self.first = nnx.Linear(width, width, use_bias=False, rngs=rngs)
        self.after = nnx.BatchNorm(width, epsilon=1e-3, rngs=rngs)
        self.before = jaxbn.nnx.BatchNorm(width, use_scale=False, rngs=rngs)
        self.last = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, x):
        y = nnx.relu(self.after(self.first(x)))
        return nnx.relu(self.last(self.before(y))) + x


class NNXStack(nnx.Module):
    """Apply 3 blocks, their parameters stacked along `axis`."""

    def __init__(self, lift, axis, width):
        self.lift = lift
        self.axes = nnx.StateAxes({nnx.Param: axis, ...: 0})

        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=self.axes)
        def make(rngs):
            return NNXBlock(width, rngs)

        self.blocks = make(nnx.Rngs(0))

    def __call__(self, x):
        if self.lift == "vmap":
            apply = nnx.vmap(lambda x, block: block(x), in_axes=(None, self.axes))
            return apply(x, self.blocks)
        axes = nnx.Carry, self.axes
        call = nnx.remat if self.lift == "scan of remat" else lambda call: call
        body = call(lambda x, block: block(x))
        return nnx.scan(body, in_axes=axes, out_axes=nnx.Carry)(x, self.blocks)


@pytest.mark.parametrize("width", [3, 4])
@pytest.mark.parametrize("lift", ["scan", "scan of remat", "vmap"])
@pytest.mark.parametrize("axis", [0, 1])
def test_nnx_fold_takes_stacked_layers(lift, axis, width, rng):
    folded, reasons = fold_nnx(rng, NNXStack(lift, axis, width), 5, width)
    assert not reasons
    assert norms_in(folded) == 0


class NNXWrong(nnx.Module):
    """Add the input of a norm to its output; hold an unhashable attribute."""

    def __init__(self, rngs):
        self.config = {"widths": [4]}
        self.dense = nnx.Linear(3, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.block = NNXBlock(3, rngs)
        self.seen = nnx.Intermediate(jnp.zeros((5, 3)))
        self.padded = nnx.Conv(3, 3, (3,), rngs=rngs)
        self.before = nnx.BatchNorm(3, rngs=rngs)

    def __call__(self, x, store=False):
        h = self.dense(x)
        if store:
            self.seen.set_value(h)
            return self.norm(h)
        h = self.block(h + self.norm(h))
        return self.padded(self.before(nnx.relu(h)))


def test_nnx_fold_says_why_norms_stay(rng):
    model = NNXWrong(nnx.Rngs(0))
    folded, reasons = fold_nnx(rng, model, 5, 3)
    assert norms_in(folded) == 2
    assert "before: its input is not" in reasons
    assert "'padded', the layer after it, pads its input with zeros" in reasons
    assert "norm: the output of 'dense', the layer before it, has another" in reasons
    with pytest.warns(UserWarning, match=r"norm: the output of 'dense'"):
        jaxbn.nnx.fold(model, jnp.ones((5, 3)), store=True)
    with pytest.raises(ValueError, match="cannot be folded: the output of 'dense'"):
        jaxbn.nnx.fold(model, jnp.ones((5, 3)), pairs={"dense": "norm"})


def test_nnx_fold_needs_a_call_at_inference():
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(3, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs))
    with pytest.warns(UserWarning, match="normalizes by the batch in this call"):
        jaxbn.nnx.fold(model, jnp.ones((5, 3)))


def test_nnx_fold_copies_shared_weights(rng):
    rngs = nnx.Rngs(0)
    first, second = nnx.Linear(3, 3, rngs=rngs), nnx.Linear(3, 3, rngs=rngs)
    second.kernel = first.kernel
    norm = nnx.BatchNorm(3, rngs=rngs)
    model = nnx.Sequential(first, norm, nnx.relu, second)
    folded, reasons = fold_nnx(rng, model, 5, 3)
    assert not reasons
    kernels = [layer.kernel for layer in folded.layers if isinstance(layer, nnx.Linear)]
    assert kernels[0] is not kernels[1]


class NNXReturning(nnx.Module):
    """Return or store a weight of one of two layers."""

    def __init__(self, layer, weight, how, store, rngs):
        self.dense = nnx.Linear(3, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.layer, self.weight, self.how = layer, weight, how
        if store:
            self.stored = nnx.Intermediate(jnp.zeros(()))

    def __call__(self, x):
        y = self.norm(self.dense(x))
        weight = self.how(getattr(getattr(self, self.layer), self.weight)[...])
        if not hasattr(self, "stored"):
            return y, weight
        self.stored.set_value(weight)
        return y


@pytest.mark.parametrize(
    ("layer", "weight", "how", "store"),
    [*((*use, False) for use in USES), ("dense", "kernel", "itself", True)],
)
def test_nnx_fold_leaves_layers_whose_weights_are_returned(
    layer, weight, how, store, rng
):
    model = NNXReturning(layer, weight, RETURNED[how], store, nnx.Rngs(0))
    _, reasons = fold_nnx(rng, model, 4, 3)
    assert f"the {weight} of {layer!r} is used outside of its calls" in reasons


def test_nnx_fold_leaves_stacked_layers_whose_weights_are_returned(rng):
    class Model(NNXStack):
        def __call__(self, x):
            return super().__call__(x), self.blocks.first.kernel[...]

    folded, reasons = fold_nnx(rng, Model("scan", 0, 4), 5, 4)
    assert "the kernel of 'blocks/first' is used outside of its calls" in reasons
    assert norms_in(folded) == 1


def test_nnx_fold_does_not_count_the_state_as_a_use(rng):
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.block = NNXBlock(3, rngs)

        def __call__(self, x):
            apply = nnx.jit(lambda block, x: block(x))
            return nnx.cond(x.sum() > 0, apply, apply, self.block, x)

    folded, reasons = fold_nnx(rng, Model(nnx.Rngs(0)), 5, 3)
    assert not reasons
    assert norms_in(folded) == 0


def quantized_nnx_dtype(arrays, **kwargs):
    x, kernel, bias = arrays
    return x, jnp.sign(kernel), bias


NNX_CUSTOM = [
    (nnx.Linear, (3, 3), {"dot_general": quantized_dot}),
    (nnx.LinearGeneral, (3, 3), {"dot_general_cls": lambda: quantized_dot}),
    (nnx.Conv, (3, 3, (1,)), {"conv_general_dilated": quantized_conv}),
    (nnx.Conv, (3, 3, (1,)), {"promote_dtype": quantized_nnx_dtype}),
]


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(("kind", "args", "options"), NNX_CUSTOM)
def test_nnx_fold_leaves_layers_that_may_not_be_linear(kind, args, options, after, rng):
    (option,) = options
    rngs = nnx.Rngs(0)
    parts = kind(*args, **options, rngs=rngs), nnx.BatchNorm(3, rngs=rngs)
    model = nnx.Sequential(*(parts if after else parts[::-1]))
    folded, reasons = fold_nnx(rng, model, 2, 5, 3)
    assert f"has a {option} of its own, which may not be linear" in reasons
    assert norms_in(folded) == 1


@pytest.mark.parametrize("kind", [nnx.BatchNorm, jaxbn.nnx.BatchNorm])
def test_nnx_fold_leaves_norms_that_may_not_be_linear(kind, rng):
    def promote(arrays, **kwargs):
        return jnp.sign(arrays[0]), *arrays[1:]

    rngs = nnx.Rngs(0)
    norm = kind(3, promote_dtype=promote, rngs=rngs)
    model = nnx.Sequential(nnx.Linear(3, 3, rngs=rngs), norm)
    _, reasons = fold_nnx(rng, model, 2, 3)
    assert "'layers/1' has a promote_dtype of its own, which may not be" in reasons
