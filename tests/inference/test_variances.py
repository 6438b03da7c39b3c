"""Test running variances that no training step leaves: one rule, by var + ε.

Below 0 or NaN shows as NaN, or is an error where values are known; 0 gives the bias.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax_helpers import randomize
from helpers import assert_near

import jaxbn
from jaxbn import BatchNormParams, BatchNormState

EPSILON = 2.0**-16  # each sum is exact
VARIANCES = {
    "NaN": np.nan,
    "negative": -1.0,
    "just below": -1.5 * EPSILON,
    "sum of 0": -EPSILON,
    "Caffe's": -0.5 * EPSILON,
    "zero": 0.0,
    "infinite": np.inf,
    "usual": 4.0,
}
SHOWN = np.array([name in ("NaN", "negative", "just below") for name in VARIANCES])
VAR = np.array([*VARIANCES.values()])
C = len(VAR)


class Case:
    """Hold random arrays, and y and the gradients of Σ dy · y in float64."""

    def __init__(self, rng, dtype: Any = np.float32):
        def draw(*shape):
            return np.asarray(jnp.asarray(rng.normal(size=shape), dtype))

        self.x, self.dy = draw(6, C), draw(6, C)
        wide = np.promote_types(dtype, np.float32)
        self.scale, self.bias, self.mean = draw(3, C).astype(wide)
        self.var = VAR.astype(wide)

    @property
    def params(self):
        return BatchNormParams(jnp.asarray(self.scale), jnp.asarray(self.bias))

    @property
    def state(self):
        mean, var = jnp.asarray(self.mean), jnp.asarray(self.var)
        return BatchNormState(mean, var, jnp.float32(7))

    def expected(self, epsilon=EPSILON):
        x, dy, scale, bias, mean, var = (
            np.asarray(a, np.float64)
            for a in (self.x, self.dy, self.scale, self.bias, self.mean, self.var)
        )
        total = var + epsilon
        with np.errstate(divide="ignore", invalid="ignore"):
            inv_std = np.where(total == 0, 0, 1 / np.sqrt(total))
        centred = (dy * (x - mean)).sum(0)
        y = (x - mean) * inv_std * scale + bias
        return y, {
            "x": dy * inv_std * scale,
            "scale": centred * inv_std,
            "bias": dy.sum(0),
            "mean": -dy.sum(0) * inv_std * scale,
            "var": -0.5 * centred * scale * inv_std**3,
        }


def assert_features_near(actual, expected, tolerance):
    """Compare to `tolerance` of each feature's largest entry, NaN and inf too."""
    actual, expected = (np.asarray(a, np.float64) for a in (actual, expected))
    size = np.abs(expected).reshape(-1, C).max(0) + 1e-30
    np.testing.assert_allclose(actual / size, expected / size, rtol=0, atol=tolerance)


def batch_norm(params, state, x, **options):
    return jaxbn.batch_norm(params, state, x, False, epsilon=EPSILON, **options)[0]


def batch_renorm(params, state, x, **options):
    return jaxbn.batch_renorm(params, state, x, False, epsilon=EPSILON, **options)[0]


def normalize(params, state, x, **options):
    given = params, state.mean, state.var, x
    return jaxbn.normalize(*given, epsilon=EPSILON, **options)


def train_without_rows(params, state, x, **options):
    mask = jnp.zeros((), bool)
    options |= {"mask": mask, "epsilon": EPSILON}
    return jaxbn.batch_norm(params, state, x, True, **options)[0]


def linen(params, state, x, **options):
    layer = jaxbn.linen.BatchNorm(True, epsilon=EPSILON, dtype=x.dtype, **options)
    stats = {"mean": state.mean, "var": state.var}
    variables = {"params": params._asdict(), "batch_stats": stats}
    y: Any = layer.apply(variables, x)
    return y


def replaced_linen(params, state, x, **options: Any):
    layer = nn.BatchNorm(True, epsilon=EPSILON, dtype=x.dtype)
    stats = {"mean": state.mean, "var": state.var}
    variables = {"params": params._asdict(), "batch_stats": stats}
    with jaxbn.linen.replace_batch_norm(**options):
        y: Any = layer.apply(variables, x)
    return y


def nnx_layer(params, state, x, **options):
    layer = jaxbn.nnx.BatchNorm(
        C, epsilon=EPSILON, dtype=x.dtype, rngs=nnx.Rngs(0), **options
    )
    layer.scale, layer.bias = nnx.Param(params.scale), nnx.Param(params.bias)
    layer.mean, layer.var = nnx.BatchStat(state.mean), nnx.BatchStat(state.var)
    return layer(x, use_running_average=True)


FUNCTIONS = (batch_norm, batch_renorm, normalize, train_without_rows)
LAYERS = (linen, replaced_linen, nnx_layer)


@pytest.mark.parametrize("autodiff", ["custom_vjp", "jax"])
@pytest.mark.parametrize("function", FUNCTIONS + LAYERS)
@pytest.mark.usefixtures("standard_promotion")
def test_inference_shows_variances_that_are_none(function, autodiff, rng):
    case = Case(rng)

    def loss(x, scale, bias, mean, var):
        params = BatchNormParams(scale, bias)
        state = case.state._replace(mean=mean, var=var)
        y = function(params, state, x, autodiff=autodiff)
        return jnp.vdot(y, case.dy), y

    arrays = map(jnp.asarray, (case.x, case.scale, case.bias, case.mean, case.var))
    compute = jax.jit(jax.value_and_grad(loss, range(5), has_aux=True))
    (_, y), gradients = compute(*arrays)
    want, want_gradients = case.expected()
    np.testing.assert_array_equal(np.isnan(y).all(0), SHOWN)
    assert_features_near(y, want, 1e-5)
    for got, (name, gradient) in zip(gradients, want_gradients.items(), strict=True):
        if function is train_without_rows and name in ("mean", "var"):
            continue  # in this step they lead to y alone, as above
        assert_features_near(got, gradient, 1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_each_dtype_shows_variances_that_are_none(dtype, rng):
    with jax.enable_x64(dtype == "float64"):
        case = Case(rng, jnp.dtype(dtype))
        y = batch_norm(case.params, case.state, case.x)
        scale, offset = jax.jit(jaxbn.inference_affine)(case.params, case.state)
    tolerance = {"bfloat16": 1e-2, "float16": 2e-3, "float64": 1e-12}[dtype]
    assert_features_near(y, case.expected()[0], tolerance)
    assert y.dtype == dtype
    assert np.isnan(scale[SHOWN]).all()
    assert np.isnan(offset[SHOWN]).all()


def test_epsilon_of_0_gives_the_bias_for_a_variance_of_0_alone(rng):
    case = Case(rng)
    case.var = np.array([0, -0.0, -1e-30, np.nan, 1e-30, 1e30, np.inf, 1], np.float32)
    y, _ = jaxbn.batch_norm(case.params, case.state, case.x, False, epsilon=0.0)
    assert_features_near(y, case.expected(0.0)[0], 1e-5)
    np.testing.assert_array_equal(y[:, :2], np.tile(case.bias[:2], (6, 1)))


# fold, inference_affine.


def fold(kernel, params, state, epsilon=EPSILON):
    return jaxbn.fold(kernel, None, params, state, epsilon=epsilon)


def fold_before(kernel, params, state, epsilon=EPSILON):
    return jaxbn.fold(kernel.T, None, params, state, epsilon=epsilon, input_axis=-2)


def inference_affine(kernel, params, state, epsilon=EPSILON):
    del kernel
    return jaxbn.inference_affine(params, state, epsilon)


FOLDS = (fold, fold_before, inference_affine)


def test_traced_variances_show_in_the_folded_layer(rng):
    case = Case(rng)
    kernel = rng.normal(size=(5, C)).astype(np.float32)
    want = case.expected()[1]["mean"] / -case.dy.sum(0, dtype=np.float64)
    folded, bias = jax.jit(fold)(kernel, case.params, case.state)
    assert_features_near(folded, kernel * want, 1e-5)
    assert_features_near(bias, case.bias - case.mean * want, 1e-5)
    scale, offset = jax.jit(inference_affine)(None, case.params, case.state)
    assert_features_near(scale, want, 1e-5)
    assert_features_near(offset, case.bias - case.mean * want, 1e-5)
    before, _ = jax.jit(fold_before)(kernel, case.params, case.state)
    assert_features_near(before.T, kernel * want, 1e-5)


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("transform", ["none", "jit", "vmap", "jit of grad", "shape"])
@pytest.mark.parametrize("function", FOLDS)
def test_known_variances_are_checked_in_every_transformation(
    function, transform, kind, rng
):
    """`jit` traces comparisons of known arrays too."""
    case = Case(rng)
    kernel = jnp.ones((2, 5, C) if transform == "vmap" else (5, C))
    transforms: dict[str, Any] = {
        "none": lambda f: f,
        "jit": jax.jit,
        "vmap": jax.vmap,
        "jit of grad": lambda f: jax.jit(jax.grad(lambda k: sum(map(jnp.sum, f(k))))),
        "shape": lambda f: lambda k: jax.eval_shape(f, k),
    }

    def run(var):
        state = case.state._replace(mean=kind(case.mean), var=kind(np.float32(var)))
        transforms[transform](lambda k: function(k, case.params, state))(kernel)

    run(np.where(SHOWN, 1, VAR))
    for value in VAR[SHOWN]:
        with pytest.raises(ValueError, match=f"negative or NaN; got {value + EPSILON}"):
            run(np.where(np.arange(C) == 3, value, 1))


def test_a_variance_of_which_epsilon_is_traced_is_not_checked(rng):
    case = Case(rng)
    scale, _ = jax.jit(lambda e: inference_affine(None, case.params, case.state, e))(
        EPSILON
    )
    np.testing.assert_array_equal(np.isnan(scale), SHOWN)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=True)(nn.Dense(C)(x))


class NnxNet(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.dense = nnx.Linear(3, C, rngs=rngs)
        self.norm = nnx.BatchNorm(C, use_running_average=True, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.dense(x))


@pytest.mark.usefixtures("standard_promotion", "any_rank")
def test_linen_models_fold_within_jit(rng):
    x = jnp.asarray(rng.normal(size=(6, 3)), jnp.float32)
    model = Net()
    variables: Any = randomize(rng, model.init(jax.random.key(0), x))
    want = jax.jit(model.apply)(variables, x)

    @jax.jit
    def folded(x):
        new = jaxbn.linen.fold(model, variables, x)
        with jaxbn.linen.skip_folded():
            return model.apply(new, x)

    assert_near(folded(x), want)
    variables["batch_stats"]["BatchNorm_0"]["var"] = jnp.float32(VAR)
    with pytest.raises(ValueError, match="must not be negative or NaN; got nan"):
        jax.eval_shape(lambda x: jaxbn.linen.fold(model, variables, x), x)


@pytest.mark.usefixtures("standard_promotion", "any_rank")
def test_nnx_models_fold_within_jit(rng):
    x = jnp.asarray(rng.normal(size=(6, 3)), jnp.float32)
    model = NnxNet()
    nnx.update(model, randomize(rng, nnx.state(model)))
    assert_near(jax.jit(lambda x: jaxbn.nnx.fold(model, x)(x))(x), model(x))
    model.norm.var[...] = jnp.asarray(VAR, jnp.float32)
    with pytest.raises(ValueError, match="must not be negative or NaN; got nan"):
        jax.jit(lambda x: jaxbn.nnx.fold(model, x)(x))(x)
