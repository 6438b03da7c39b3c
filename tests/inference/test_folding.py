"""Test inference as an affine map and its folding into layers and models."""

from itertools import cycle
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax_helpers import assert_same, randomize
from helpers import assert_near
from jax import lax
from jax.test_util import check_grads

import jaxbn
from jaxbn import BatchNormParams, BatchNormState
from jaxbn.linen import skip_folded

EPSILON = 1e-3
BIAS = (False, True)  # alternated, because each test compiles its layer


def batch_norm_variables(rng, features, dtype: Any = np.float64):
    """Draw random variables with positive and negative scales."""
    scale, bias, mean = rng.normal(size=(3, *features)).astype(dtype)
    var = rng.uniform(0.1, 3.0, size=features).astype(dtype)
    return BatchNormParams(scale, bias), BatchNormState(mean, var, jnp.int32(7))


def normalized(y, params, state):
    """Return the inference of y, with features last, in NumPy float64."""
    y, mean, var = (np.asarray(a, np.float64) for a in (y, state.mean, state.var))
    scale = 1 if params.scale is None else np.asarray(params.scale, np.float64)
    bias = 0 if params.bias is None else np.asarray(params.bias, np.float64)
    return scale * (y - mean) / np.sqrt(var + EPSILON) + bias


# The function.


class Layer(NamedTuple):
    """Describe a linear layer of plain JAX; `axis` is where the kernel has C = 4."""

    apply: Any
    x: tuple[int, ...]
    kernel: tuple[int, ...]
    axis: Any = -1


def conv(**options):
    def apply(x, kernel):
        spatial = "DHW"[-(x.ndim - 2) :]
        dimensions = (f"N{spatial}C", f"{spatial}IO", f"N{spatial}C")
        options.setdefault("window_strides", (1,) * len(spatial))
        options.setdefault("padding", "SAME")
        return lax.conv_general_dilated(
            x, kernel, dimension_numbers=dimensions, **options
        )

    return apply


def conv_transpose(transpose_kernel):
    def apply(x, kernel):
        return lax.conv_transpose(
            x, kernel, (2, 2), "SAME", transpose_kernel=transpose_kernel
        )

    return apply


LAYERS = {
    "dense": Layer(jnp.matmul, (2, 3), (3, 4)),
    "conv 1d": Layer(conv(rhs_dilation=(2,)), (2, 5, 3), (3, 3, 4)),
    "conv 2d": Layer(conv(window_strides=(2, 1)), (2, 5, 6, 3), (3, 3, 3, 4)),
    "conv 3d": Layer(conv(padding="VALID"), (2, 4, 3, 3, 3), (2, 2, 2, 3, 4)),
    "grouped": Layer(conv(feature_group_count=2), (2, 5, 5, 6), (3, 3, 3, 4)),
    "depthwise": Layer(conv(feature_group_count=4), (2, 5, 5, 4), (3, 3, 1, 4)),
    "transposed": Layer(conv_transpose(False), (2, 3, 3, 3), (3, 3, 3, 4)),
    "transposed, its kernel too": Layer(
        conv_transpose(True), (2, 3, 3, 3), (3, 3, 4, 3), -2
    ),
    "two feature axes": Layer(
        lambda x, k: jnp.einsum("ni,iab->nab", x, k), (2, 3), (3, 5, 4), (-2, -1)
    ),
    "the last of two": Layer(
        lambda x, k: jnp.einsum("ni,iab->nab", x, k), (2, 3), (3, 5, 4)
    ),
    "stacked, as by vmap": Layer(
        lambda x, k: jnp.einsum("nbi,bio->nbo", x, k), (2, 5, 3), (5, 3, 4), (0, -1)
    ),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.usefixtures("x64")
def test_folded_layer_includes_the_batch_norm(name, rng):
    layer = LAYERS[name]
    x, kernel = (jnp.asarray(rng.normal(size=s)) for s in (layer.x, layer.kernel))
    features = tuple(np.take(layer.kernel, np.atleast_1d(layer.axis)))
    params, state = batch_norm_variables(rng, features)
    for bias in (None, rng.normal(size=features)):
        y = np.asarray(layer.apply(x, kernel)) + (0 if bias is None else bias)
        new_kernel, new_bias = jaxbn.fold(
            kernel, bias, params, state, epsilon=EPSILON, axis=layer.axis
        )
        assert new_kernel.dtype == new_bias.dtype == np.float64
        assert new_bias.shape == features
        folded = np.asarray(layer.apply(x, new_kernel)) + np.asarray(new_bias)
        assert_near(folded, normalized(y, params, state), 1e-13)


@pytest.mark.usefixtures("x64")
def test_fold_keeps_the_shape_of_a_bias_per_position(rng):
    """ConvLocal and DenseGeneral with batch dimensions have such a bias."""
    params, state = batch_norm_variables(rng, (4,))
    bias = rng.normal(size=(5, 6, 4))
    _, folded = jaxbn.fold(np.ones((3, 4)), bias, params, state, epsilon=EPSILON)
    assert_near(folded, normalized(bias, params, state), 1e-13)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "bfloat16", "float16", "float32"])
def test_fold_computes_in_float32_for_narrow_dtypes(dtype, rng):
    kernel, bias = (
        jnp.asarray(rng.normal(size=s), jnp.float32).astype(dtype)
        for s in ((3, 3, 4), (4,))
    )
    params, state = batch_norm_variables(rng, (4,), np.float32)
    params = BatchNormParams(*(jnp.asarray(p).astype(dtype) for p in params))
    folded = jaxbn.fold(kernel, bias, params, state, epsilon=EPSILON)
    assert folded[0].dtype == folded[1].dtype == jnp.float32
    exact = np.asarray(params.scale, np.float64) / np.sqrt(state.var + EPSILON)
    assert_near(folded[0], np.asarray(kernel, np.float64) * exact, 2e-7)
    assert_near(folded[1], normalized(bias, params, state), 2e-7)


@pytest.mark.parametrize("used", [(True, True), (True, False), (False, True)])
def test_inference_affine_works_without_scale_or_bias(used, rng):
    params, state = batch_norm_variables(rng, (5, 2), np.float32)
    params = BatchNormParams(
        *(p if u else None for p, u in zip(params, used, strict=True))
    )
    scale, offset = jaxbn.inference_affine(params, state, EPSILON)
    assert scale.dtype == offset.dtype == jnp.float32
    x = rng.normal(size=(7, 5, 2))
    y = x * np.asarray(scale, np.float64) + np.asarray(offset, np.float64)
    assert_near(y, normalized(x, params, state), 1e-6)


def test_inference_affine_matches_batch_norm(rng):
    params, state = batch_norm_variables(rng, (5,), np.float32)
    x = jnp.asarray(rng.normal(size=(7, 5)), jnp.float32)
    scale, offset = (v[None] for v in jaxbn.inference_affine(params, state))
    y, _ = jaxbn.batch_norm(params, state, x, train=False)
    assert_near(x * scale + offset, y, 1e-6)


def test_inference_affine_is_less_accurate_at_a_large_mean(rng):
    params, state = batch_norm_variables(rng, (5,), np.float32)
    state = state._replace(mean=1e4 + state.mean, var=0.5 + 0 * state.var)
    x = jnp.asarray(state.mean + rng.normal(size=(1000, 5)), jnp.float32)
    scale, offset = (v[None] for v in jaxbn.inference_affine(params, state, EPSILON))
    y, _ = jaxbn.batch_norm(params, state, x, train=False, epsilon=EPSILON)
    expected = normalized(x, params, state)
    errors = [
        np.abs(np.asarray(a, np.float64) - expected).max()
        for a in (x * scale + offset, y)
    ]
    size = np.abs(np.asarray(params.scale)).max() / 0.5**0.5
    assert errors[0] < 2 * 1e-7 * 1e4 * size
    assert errors[1] < 1e-2 * errors[0]


def test_fold_of_a_constant_feature_without_epsilon_is_its_bias():
    params = BatchNormParams(jnp.full(2, 3.0), jnp.array([5.0, 7.0]))
    state = BatchNormState(jnp.full(2, 2.0), jnp.zeros(2), jnp.int32(1))
    kernel, bias = jaxbn.fold(jnp.ones((3, 2)), None, params, state, epsilon=0.0)
    np.testing.assert_array_equal(kernel, 0)
    np.testing.assert_array_equal(bias, params.bias)


@pytest.mark.usefixtures("x64")
def test_fold_is_differentiable_and_supports_vmap(rng):
    params, state = batch_norm_variables(rng, (4,))
    kernel, bias = rng.normal(size=(3, 4)), rng.normal(size=4)

    def loss(kernel, params):
        kernel, new_bias = jaxbn.fold(kernel, bias, params, state, epsilon=EPSILON)
        return (kernel**2).sum() + (new_bias**3).sum()

    check_grads(jax.jit(loss), (kernel, params), order=1, modes=["rev"])
    stacked = jax.tree.map(lambda a: jnp.stack([jnp.asarray(a)] * 2), (kernel, params))
    both = jax.vmap(loss)(*stacked)
    np.testing.assert_allclose(both, loss(kernel, params), rtol=1e-12)


# Errors.


def fold_with(kernel=(3, 4), bias=None, features=(4,), axis: Any = -1, **changes):
    """Call `fold` with one wrong argument."""
    rng = np.random.default_rng(0)
    params, state = batch_norm_variables(rng, features, np.float32)
    for name, value in changes.items():
        if hasattr(params, name):
            params = params._replace(**{name: value})
        else:
            state = state._replace(**{name: value})
    kernel = jnp.ones(kernel) if isinstance(kernel, tuple) else kernel
    return jaxbn.fold(kernel, bias, params, state, axis=axis)


@pytest.mark.parametrize(
    ("wrong", "error", "match"),
    [
        ({"features": (5,)}, ValueError, "features of the layer before it; .*5.*3, 4"),
        ({"kernel": (3, 5, 4), "features": (5, 4)}, ValueError, r"\(4,\) along axis"),
        ({"bias": jnp.ones(3)}, ValueError, "bias must end in the features' shape"),
        ({"kernel": jnp.ones((3, 4), int)}, TypeError, "kernel must be .*quantize"),
        ({"bias": jnp.ones(4, bool)}, TypeError, "bias must be floating or complex"),
        ({"mean": jnp.ones(4, int)}, TypeError, "state.mean must be floating"),
        ({"var": jnp.ones(5)}, ValueError, r"one shape, .*state.var \(5,\)"),
        ({"scale": jnp.ones(2)}, ValueError, r"one shape, .*params.scale \(2,\)"),
        ({"var": -jnp.ones(4)}, ValueError, "running variance must not be negative"),
        ({"var": jnp.full(4, jnp.nan)}, ValueError, "negative or NaN; .*nan"),
        ({"axis": 2}, ValueError, "axis must name feature axes of the kernel"),
        ({"axis": (1, -1)}, ValueError, "each feature axis once; .*for the kernel"),
    ],
)
def test_fold_rejects_wrong_arguments(wrong, error, match):
    with pytest.raises(error, match=match):
        fold_with(**wrong)


def test_inference_affine_rejects_wrong_arguments(rng):
    params, state = batch_norm_variables(rng, (4,), np.float32)
    with pytest.raises(ValueError, match="epsilon must not be negative"):
        jaxbn.inference_affine(params, state, -1.0)
    damaged = state._replace(var=-state.var)
    with pytest.raises(ValueError, match="running variance must not be negative"):
        jaxbn.inference_affine(params, damaged)
    jax.jit(jaxbn.inference_affine)(params, damaged)  # traced values are not checked


# linen.

LINEN = {
    "DenseGeneral": (nn.DenseGeneral((5, 4)), (2, 3)),
    "Dense": (nn.Dense(4), (2, 3)),
    "DenseGeneral, batched": (nn.DenseGeneral(4, batch_dims=(0,)), (2, 6, 3)),
    "Conv 1d": (nn.Conv(4, (3,), padding="CIRCULAR"), (2, 5, 3)),
    "Conv 2d": (nn.Conv(4, (3, 3), (2, 2)), (2, 5, 5, 3)),
    "Conv 3d": (nn.Conv(4, (2, 2, 2)), (2, 3, 3, 3, 3)),
    "Conv, grouped": (nn.Conv(4, (3, 3), feature_group_count=2), (2, 5, 5, 6)),
    "ConvLocal": (nn.ConvLocal(4, (3, 3)), (2, 4, 4, 3)),
    "ConvTranspose": (nn.ConvTranspose(4, (3, 3), (2, 2)), (2, 3, 3, 3)),
    "ConvTranspose, its kernel too": (
        nn.ConvTranspose(4, (3, 3), (2, 2), transpose_kernel=True), (2, 3, 3, 3)
    ),
}  # fmt: skip
# The bias of these layers has more axes than the features of the norm.
WIDE_BIAS = {"DenseGeneral", "DenseGeneral, batched", "ConvLocal"}
LINEN_NORMS = (nn.BatchNorm, jaxbn.linen.BatchNorm)


def random_variables(rng, model, x):
    return randomize(rng, jax.eval_shape(model.init, jax.random.key(0), x))


class Unfolded(nn.Module):
    layer: Any
    norm: Any

    @nn.compact
    def __call__(self, x):
        return self.norm(True, epsilon=EPSILON, name="norm")(self.layer(x))


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(("name", "use_bias"), [*zip(LINEN, cycle(BIAS))])
def test_linen_fold_supports_each_layer(name, use_bias, rng):
    layer, shape = LINEN[name]
    layer = layer.clone(use_bias=use_bias, parent=None)
    x = jnp.asarray(rng.normal(size=shape), jnp.float32)
    norm = LINEN_NORMS[use_bias]  # alternated too
    model = Unfolded(layer, norm)
    variables = random_variables(rng, model, x)
    expected = jax.jit(model.apply)(variables, x)
    folded = jaxbn.linen.fold(model, variables, x)
    assert folded.keys() == {"params", "batch_stats"}
    assert folded["batch_stats"] == {}
    assert folded["params"].keys() == {"layer"}
    with skip_folded():
        assert_near(jax.jit(model.apply)(folded, x), expected)
        assert "sqrt" not in str(jax.make_jaxpr(model.apply)(folded, x))
    assert "sqrt" in str(jax.make_jaxpr(model.apply)(variables, x))
    if use_bias or name not in WIDE_BIAS:
        alone = layer.clone(use_bias=True)
        params = folded["params"]["layer"]
        assert_near(jax.jit(alone.apply)({"params": params}, x), expected)


class Block(nn.Module):
    """Nest layers as models do: after an activation and in a residual block."""

    dtype: Any = None

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(not train, name="input_norm")(x)
        y = nn.Conv(3, (3, 3), use_bias=False, dtype=self.dtype)(x)
        y = nn.relu(jaxbn.linen.BatchNorm(not train, use_scale=False)(y))
        y = nn.Conv(3, (1, 1), dtype=self.dtype, param_dtype=jnp.bfloat16)(y)
        y = nn.BatchNorm(not train, use_bias=False)(y)
        return x + y


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(5)(Block()(Block()(x, train), train))


PAIRS = {
    f"Block_{block}/Conv_{i}": f"Block_{block}/BatchNorm_{i}"
    for block in range(2)
    for i in range(2)
}


@pytest.fixture
def net(rng, standard_promotion):
    """Return variables and an input of a linen model."""
    x = jnp.asarray(rng.normal(size=(2, 5, 5, 3)), jnp.float32)
    return random_variables(rng, Net(), x), x


def test_linen_fold_takes_paths_of_nested_layers(net):
    variables, x = net
    before = jax.tree.map(jnp.copy, variables)
    pairs = dict(list(PAIRS.items())[:2]) | {
        tuple(a.split("/")): tuple(b.split("/")) for a, b in list(PAIRS.items())[2:]
    }
    folded = jaxbn.linen.fold(Net(), variables, x, pairs=pairs)
    assert_same(variables, before, 0)
    assert folded["batch_stats"].keys() == {"Block_0", "Block_1"}
    for name in ("params", "batch_stats"):
        same = folded[name]["Block_1"]["input_norm"]
        assert_same(same, variables[name]["Block_1"]["input_norm"], 0)
    block = folded["params"]["Block_0"]
    assert block.keys() == {"Conv_0", "Conv_1", "input_norm"}
    assert block["Conv_1"]["kernel"].dtype == jnp.float32  # was bfloat16
    apply = jax.jit(Net().apply)
    expected = apply(variables, x)
    with skip_folded():
        assert_near(apply(folded, x), expected)
        assert_same(apply(variables, x), expected, 1e-6)  # unfolded norms still apply
        initial = jax.eval_shape(Net().init, jax.random.key(0), x)
        chex.assert_trees_all_equal_shapes_and_dtypes(initial, before)


def test_folded_linen_model_fails_outside_skip_folded(net):
    variables, x = net
    with pytest.raises(Exception, match='"mean" for collection "batch_stats"'):
        Net().apply(jaxbn.linen.fold(Net(), variables, x, pairs=PAIRS), x)


def test_linen_fold_of_single_pairs_equals_fold_of_all(net):
    variables, x = net
    folded = variables
    for layer, norm in PAIRS.items():
        folded = jaxbn.linen.fold(Net(), folded, x, pairs={layer: norm})
    assert_same(folded, jaxbn.linen.fold(Net(), variables, x, pairs=PAIRS), 0)


def test_folded_bfloat16_layer_matches_the_model(net):
    variables, x = net
    block = {name: tree["Block_0"] for name, tree in variables.items()}
    pairs = {"Conv_0": "BatchNorm_0", "Conv_1": "BatchNorm_1"}
    expected = jax.jit(Block().apply)(block, x)
    folded = jaxbn.linen.fold(Block(), block, x, pairs=pairs)
    with skip_folded():
        y = jax.jit(Block(jnp.bfloat16).apply)(folded, x.astype(jnp.bfloat16))
    assert_near(y, expected, 2e-2)


class WithOptions(nn.Module):
    norm: Any

    @nn.compact
    def __call__(self, x, **options):
        return self.norm(True)(nn.Dense(4)(x), **options)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(
    "options", [{"update_statistics": False}, {"mask": np.ones((2, 1), bool)}]
)
@pytest.mark.parametrize("norm", [jaxbn.linen.BatchNorm, jaxbn.linen.BatchRenorm])
def test_skip_folded_takes_the_options_of_a_call(norm, options, rng):
    model, x = WithOptions(norm), jnp.asarray(rng.normal(size=(2, 3)), jnp.float32)
    variables = random_variables(rng, model, x)
    folded = jaxbn.linen.fold(model, variables, x, **options)
    with skip_folded():
        actual = model.apply(folded, x, **options)
    assert_near(actual, model.apply(variables, x, **options))


class Scaled(nn.BatchNorm):
    """Extend the layer of Flax, as user code may."""

    @nn.compact
    def __call__(self, x, use_running_average=None, *, mask=None):
        return 2 * super().__call__(x=x)


@pytest.mark.usefixtures("standard_promotion")
def test_skip_folded_keeps_the_code_of_subclasses(rng):
    x = jnp.asarray(rng.normal(size=(6, 3)), jnp.float32)
    model = nn.Sequential([nn.Dense(4, use_bias=False), Scaled(True)])
    variables = random_variables(rng, model, x)
    expected = model.apply(variables, x)
    folded = jaxbn.linen.fold(model, variables, x)
    apply = skip_folded()(model.apply)  # as a decorator
    assert_near(apply(folded, x), expected)
    with skip_folded(), jaxbn.linen.replace_batch_norm():
        assert_near(model.apply(folded, x), expected)


@pytest.mark.usefixtures("standard_promotion")
def test_linen_fold_keeps_partitioning_boxes(rng):
    x = jnp.asarray(rng.normal(size=(6, 3)), jnp.float32)
    kernel_init = nn.with_partitioning(nn.initializers.normal(), (None, "model"))
    scale_init = nn.with_partitioning(nn.initializers.normal(), ("model",))
    model = nn.Sequential(
        [
            nn.Dense(4, kernel_init=kernel_init),
            nn.BatchNorm(True, scale_init=scale_init),
        ]
    )
    variables = nn.FrozenDict(random_variables(rng, model, x))
    folded = jaxbn.linen.fold(model, variables, x)
    assert folded["params"]["layers_0"]["kernel"].names == (None, "model")
    assert type(folded) is nn.FrozenDict
    with skip_folded():
        assert_near(model.apply(folded, x), model.apply(variables, x))


@pytest.mark.parametrize(
    ("pairs", "match"),
    [
        ({}, "found no layer with a batch norm to fold"),
        (
            {"Block_0/Conv_7": "Block_0/BatchNorm_0"},
            "kernel .*Conv_7.*'Block_1/Conv_1'",
        ),
        ({"Dense_0": "BatchNorm_0"}, "batch norms .*got 'BatchNorm_0'.*input_norm"),
        ({"Dense_0": "Block_0/BatchNorm_0"}, "directly before it is 'Block_0/Conv_0'"),
    ],
)
def test_linen_fold_rejects_wrong_pairs(pairs, match, net):
    variables, x = net
    before = jax.tree.map(jnp.copy, variables)
    with pytest.raises(ValueError, match=match):
        jaxbn.linen.fold(Net(), variables, x, pairs=pairs)
    assert_same(variables, before, 0)


def test_linen_fold_error_names_the_damaged_pair(net):
    variables, x = net
    damaged = jax.tree.map(jnp.copy, variables)
    stats = damaged["batch_stats"]["Block_1"]["BatchNorm_0"]
    stats["var"] = stats["var"].at[1].set(-0.1)
    before = jax.tree.map(jnp.copy, damaged)
    with pytest.raises(ValueError, match="must not be negative") as caught:
        jaxbn.linen.fold(Net(), damaged, x, pairs=PAIRS)
    assert "'Block_1/BatchNorm_0' into 'Block_1/Conv_0'" in caught.value.__notes__[0]
    assert_same(damaged, before, 0)


def test_linen_fold_rejects_variables_without_batch_norm(net):
    variables, x = net
    params = {"params": variables["params"]}
    with pytest.raises(ValueError, match="There are: none"):
        jaxbn.linen.fold(Net(), params, x, pairs=PAIRS)
    with pytest.raises(ValueError, match="'batch_stats'; found none"):
        jaxbn.linen.fold(Net(), params, x)
    with pytest.raises(TypeError, match="model"):
        jaxbn.linen.fold(variables, PAIRS)  # pyright: ignore[reportArgumentType]


# nnx.


NNX = {
    "Linear": (nnx.Linear, (3, 4), {}, (2, 3)),
    "LinearGeneral": (nnx.LinearGeneral, (3, (5, 4)), {}, (2, 3)),
    "LinearGeneral, batched": (
        nnx.LinearGeneral, (3, (5, 4)), {"batch_axis": {0: 2}}, (2, 6, 3)
    ),
    "Conv 1d": (nnx.Conv, (3, 4, 3), {"padding": "CAUSAL"}, (2, 5, 3)),
    "Conv 2d": (nnx.Conv, (3, 4, (3, 3), 2), {}, (2, 5, 5, 3)),
    "Conv 3d": (nnx.Conv, (3, 4, (2, 2, 2)), {}, (2, 3, 3, 3, 3)),
    "depthwise": (nnx.Conv, (4, 4, (3, 3)), {"feature_group_count": 4}, (2, 5, 5, 4)),
    "ConvTranspose": (nnx.ConvTranspose, (3, 4, (3, 3), 2), {}, (2, 3, 3, 3)),
    "ConvTranspose, its kernel too": (
        nnx.ConvTranspose, (3, 4, (3, 3), 2), {"transpose_kernel": True}, (2, 3, 3, 3)
    ),
}  # fmt: skip
NNX_NORMS = (nnx.BatchNorm, jaxbn.nnx.BatchNorm)


def randomized(rng, model):
    nnx.update(model, randomize(rng, nnx.state(model)))
    model.eval()
    return model


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(("name", "use_bias"), [*zip(NNX, cycle(BIAS))])
def test_nnx_fold_supports_each_layer(name, use_bias, rng):
    kind, args, options, shape = NNX[name]

    def build(use_bias):
        layer = kind(*args, **options, use_bias=use_bias, rngs=nnx.Rngs(0))
        norm = NNX_NORMS[use_bias](4, epsilon=EPSILON, rngs=nnx.Rngs(0))
        return nnx.Sequential(layer, norm, nnx.relu)

    model = randomized(rng, nnx.eval_shape(lambda: build(use_bias)))
    x = jnp.asarray(rng.normal(size=shape), jnp.float32)
    apply = nnx.jit(lambda model: model(x))
    before, expected = nnx.to_pure_dict(nnx.state(model)), apply(model)
    folded = jaxbn.nnx.fold(model, x)
    assert_near(apply(folded), expected)
    assert_same(nnx.to_pure_dict(nnx.state(model)), before, 0)
    assert_same(apply(model), expected, 0)
    with_bias = nnx.eval_shape(lambda: build(True)).layers[0]
    chex.assert_trees_all_equal_shapes_and_dtypes(
        *(nnx.to_pure_dict(nnx.state(m)) for m in (folded.layers[0], with_bias))
    )


class Residual(nnx.Module):
    """Hold layers as attributes and others in a Sequential."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(3, 3, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(3, use_scale=False, rngs=rngs)
        conv = nnx.Conv(3, 3, (1, 1), param_dtype=jnp.bfloat16, rngs=rngs)
        norm = jaxbn.nnx.BatchNorm(3, use_bias=False, rngs=rngs)
        self.rest = nnx.Sequential(nnx.BatchNorm(3, rngs=rngs), conv, norm)

    def __call__(self, x, use_running_average=None):
        y = nnx.relu(self.norm(self.conv(x), use_running_average, mask=None))
        return x + self.rest(y)


class Tower(nnx.Module):
    """Hold blocks in a list, one of them twice."""

    def __init__(self, rngs: nnx.Rngs):
        self.blocks = nnx.List([Residual(rngs), Residual(rngs)])
        self.blocks.append(self.blocks[0])
        head = [nnx.Linear(3, 5, rngs=rngs), nnx.BatchNorm(5, rngs=rngs)]
        self.heads = nnx.data({"main": head})

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        linear, norm = self.heads["main"]
        return norm(linear(x))


@pytest.fixture
def tower(rng, standard_promotion):
    x = jnp.asarray(rng.normal(size=(2, 5, 5, 3)), jnp.float32)
    return randomized(rng, nnx.eval_shape(lambda: Tower(nnx.Rngs(0)))), x


def norms_in(model):
    nodes = nnx.iter_graph(model, graph=True)
    return sum(isinstance(node, nnx.BatchNorm) for _, node in nodes)


def test_nnx_fold_takes_paths_of_nested_layers(tower):
    model, x = tower
    apply = nnx.jit(lambda model: model(x))
    expected = apply(model)
    pairs = {
        "blocks.0.conv": "blocks.0.norm",
        ("blocks", 1, "conv"): ("blocks", 1, "norm"),
        "heads.main.0": "heads.main.1",
    }
    half = jaxbn.nnx.fold(model, x, pairs=pairs)
    assert (norms_in(model), norms_in(half)) == (7, 4)
    assert half.blocks[0] is half.blocks[2]
    assert_near(apply(half), expected)
    folded = jaxbn.nnx.fold(half, x)
    assert norms_in(folded) == 0
    assert_near(apply(folded), expected)
    assert_near(apply(nnx.view(folded, use_running_average=True)), expected)
    assert_same(apply(model), expected, 0)


CALLS = [
    {"update_statistics": False},
    {"use_running_average": True, "mask": np.ones((2, 1), bool)},
]


class NNXWithOptions(nnx.Module):
    def __init__(self, norm):
        self.dense = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
        self.norm = norm(4, rngs=nnx.Rngs(0))

    def __call__(self, x, **options):
        return self.norm(self.dense(x), **options)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("options", CALLS)
@pytest.mark.parametrize("norm", [jaxbn.nnx.BatchNorm, jaxbn.nnx.BatchRenorm])
def test_folded_nnx_norm_takes_the_options_of_a_call(norm, options, rng):
    model = randomized(rng, NNXWithOptions(norm))
    x = jnp.asarray(rng.normal(size=(2, 3)), jnp.float32)
    folded = jaxbn.nnx.fold(model, x, **options)
    assert_near(folded(x, **options), model(x, **options))


class Held(nnx.Module):
    """Call the layers of a Sequential again by other attributes."""

    def __init__(self, rngs: nnx.Rngs):
        self.linear, self.norm = (
            nnx.Linear(3, 3, rngs=rngs),
            nnx.BatchNorm(3, rngs=rngs),
        )
        self.both = nnx.Sequential(self.linear, self.norm)

    def __call__(self, x, again=True):
        y = self.both(x)
        return y + self.linear(x) if again else self.norm(self.linear(y))


@pytest.mark.usefixtures("standard_promotion")
def test_nnx_fold_leaves_layers_that_are_called_elsewhere(rng):
    model = randomized(rng, nnx.eval_shape(lambda: Held(nnx.Rngs(0))))
    x = jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)
    with pytest.warns(UserWarning, match="both/layers/1: .*/0', .* has another use"):
        folded = jaxbn.nnx.fold(model, x)
    assert norms_in(folded) == 1
    assert_near(folded(x), model(x))
    folded = jaxbn.nnx.fold(model, x, again=False)
    assert folded.norm is folded.both.layers[1]
    assert_near(folded(x, again=False), model(x, again=False))


@pytest.mark.usefixtures("standard_promotion")
def test_nnx_fold_supports_one_norm_after_two_layers(rng):
    layers = [nnx.Linear(3, 3, rngs=nnx.Rngs(i)) for i in range(2)]
    norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    model = randomized(rng, nnx.Sequential(layers[0], norm, nnx.relu, layers[1], norm))
    x = jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)
    folded = jaxbn.nnx.fold(model, x)
    assert norms_in(folded) == 0
    assert_near(folded(x), model(x))
    with pytest.raises(ValueError, match="it is 'layers/0', 'layers/3'"):
        jaxbn.nnx.fold(model, x, pairs={"layers/0": "layers/1"})


class TwoTimes(nnx.BatchNorm):
    def __call__(self, *args, **kwargs):
        return 2 * super().__call__(*args, **kwargs)


class Reversed(nnx.Sequential):
    def __call__(self, x):
        for layer in reversed([*self.layers]):
            x = layer(x)
        return x


def sequential(norm: Any = nnx.BatchNorm, kind=nnx.Sequential, **options):
    rngs = nnx.Rngs(0)
    return kind(nnx.Linear(3, 3, rngs=rngs), norm(3, **options, rngs=rngs))


@pytest.mark.parametrize(
    ("model", "pairs", "error", "match"),
    [
        (nnx.Linear(3, 3, rngs=nnx.Rngs(0)), None, ValueError, "found no layer with"),
        (sequential(), {}, ValueError, "found no layer with a batch norm"),
        (sequential(nnx.LayerNorm), None, ValueError, "found no layer with"),
        (sequential(TwoTimes), None, ValueError, "found no layer with"),
        (sequential(), {"layers.0": "layers.9"}, ValueError, "got 'layers.9', which"),
        (sequential(), {"linear": "norm"}, ValueError, "this Sequential does not have"),
        (sequential(), {"layers.1": "layers.1"}, TypeError, "only Linear, .*BatchNorm"),
        (sequential(TwoTimes), {"layers.0": "layers.1"}, TypeError, "got TwoTimes"),
    ],
)
def test_nnx_fold_rejects_wrong_models(model, pairs, error, match):
    with pytest.raises(error, match=match):
        jaxbn.nnx.fold(model, jnp.ones((2, 3)), pairs=pairs)


def test_nnx_fold_rejects_what_it_cannot_call():
    with pytest.raises(TypeError, match="fold calls the model"):
        jaxbn.nnx.fold(nnx.List([sequential()]), jnp.ones((2, 3)))


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("options", [{"axis": 1}, {"kind": Reversed}])
def test_nnx_fold_takes_axis_and_order_from_the_call(options, rng):
    model = randomized(rng, sequential(**options))
    x = jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)
    folded = jaxbn.nnx.fold(model, x)
    assert norms_in(folded) == 0
    assert_near(folded(x), model(x))


def test_nnx_fold_error_names_the_damaged_pair(tower):
    model, x = tower
    model.blocks[1].rest.layers[2].var[...] *= -1
    before = nnx.to_pure_dict(nnx.state(model))
    with pytest.raises(ValueError, match="must not be negative") as caught:
        jaxbn.nnx.fold(model, x)
    where = "'blocks/1/rest/layers/2' into 'blocks/1/rest/layers/1'"
    assert where in caught.value.__notes__[0]
    assert norms_in(model) == 7
    assert_same(nnx.to_pure_dict(nnx.state(model)), before, 0)
