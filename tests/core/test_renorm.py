"""Test batch renormalization against NumPy and Keras."""

from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TOLERANCE, assert_close, assert_near, rounded, run
from jax.sharding import PartitionSpec as P
from oracle import inference, random_case, renorm_step

import jaxbn

SHAPE, C = (6, 4, 5, 3), 3


@pytest.mark.parametrize("autodiff", ["custom_vjp", "jax"])
@pytest.mark.parametrize("std", [0.3, 1.9])  # r below and above 1
@pytest.mark.parametrize("limits", [(3.0, 5.0), (1.2, 0.1), (1.0, 0.5), (2.0, 0.0)])
@pytest.mark.parametrize(
    ("axis", "masked"), [(-1, False), (1, False), ((3, 1), False), (-1, True)]
)
def test_matches_oracle(axis, masked, limits, std, autodiff, rng):
    case = rounded(random_case(rng, SHAPE, axis, loc=0.2, std=std), "float32")
    options: dict[str, Any] = {"r_max": limits[0], "d_max": limits[1], "axis": axis}
    if masked:
        options["mask"] = rng.random((6, 4, 5, 1)) < 0.6
    actual = run(case, function=jaxbn.batch_renorm, autodiff=autodiff, **options)
    assert_close(actual, renorm_step(case, **options), TOLERANCE["float32"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_matches_oracle_in_each_dtype(dtype, rng):
    with jax.enable_x64(dtype == "float64"):
        case = rounded(random_case(rng, SHAPE), dtype)
        actual = run(case, function=jaxbn.batch_renorm, r_max=1.5, d_max=0.5)
    assert_close(actual, renorm_step(case, r_max=1.5, d_max=0.5), TOLERANCE[dtype])
    assert actual.y.dtype == dtype


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("momentum", [0.9, None])
def test_limits_of_one_and_zero_are_batch_norm_to_the_bit(dtype, masked, momentum, rng):
    case = rounded(random_case(rng, SHAPE), dtype)
    mask = rng.random((6, 4, 5, 1)) < 0.6 if masked else None
    options = {"mask": mask, "momentum": momentum}
    plain = run(case, **options)
    renorm = run(case, function=jaxbn.batch_renorm, r_max=1, d_max=0, **options)
    for name in ("y", "mean", "var", "dx", "dbias", "dscale", "dmean", "dvar"):
        np.testing.assert_array_equal(getattr(renorm, name), getattr(plain, name))


def test_wide_limits_normalize_by_running_statistics(rng):
    case = rounded(random_case(rng, SHAPE), "float32")
    y = run(case, function=jaxbn.batch_renorm, r_max=1e6, d_max=1e6).y
    assert_near(y, inference(case).y)


def test_inference_is_that_of_batch_norm(rng):
    case = rounded(random_case(rng, SHAPE), "float32")
    actual = run(case, train=False, function=jaxbn.batch_renorm)
    assert_close(actual, inference(case), TOLERANCE["float32"])
    params, state = jaxbn.init(C)
    assert jaxbn.batch_renorm(params, state, case.x, False)[1] is state


def test_missing_parameters_are_one_and_zero(rng):
    case = rounded(random_case(rng, SHAPE), "float32")
    state = jaxbn.BatchNormState(*map(jnp.asarray, (case.mean, case.var, 3.0)))
    full = case._replace(scale=np.ones(C), bias=np.zeros(C))
    want = renorm_step(full, r_max=1.5, d_max=0.5).y
    vectors = jnp.ones(C), jnp.zeros(C)
    for scale in (None, vectors[0]):
        for bias in (None, vectors[1]):
            params = jaxbn.BatchNormParams(scale, bias)
            y, _ = jaxbn.batch_renorm(params, state, case.x, True, r_max=1.5, d_max=0.5)
            assert_near(y, want)


def test_limits_may_be_traced(rng):
    """One program serves every step of a schedule."""
    case = rounded(random_case(rng, SHAPE), "float32")
    params, state = jaxbn.init(C)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(x, r, d):
        return jaxbn.batch_renorm(params, state, x, True, r_max=r, d_max=d)[0]

    for limits in ((1.0, 0.0), (2.0, 1.0)):
        options: dict[str, Any] = {"r_max": limits[0], "d_max": limits[1]}
        fresh = case._replace(
            mean=np.zeros(C), var=np.ones(C), scale=np.ones(C), bias=np.zeros(C)
        )
        assert_near(step(case.x, *limits), renorm_step(fresh, **options).y)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit])
@pytest.mark.parametrize("r_max", [1 - 2**-24, 0.5])
def test_arrays_below_the_limits_count_as_one_and_zero(r_max, transform, rng):
    """Rounding leaves the first value of a schedule below 1, at any r."""
    params, state = jaxbn.init(C)
    for std in (0.3, 1.9):  # r below and above 1
        x = jnp.asarray(std * rng.normal(size=SHAPE), jnp.float32)

        def step(r_max, d_max, x=x):
            options: dict[str, Any] = {"r_max": r_max, "d_max": d_max}
            return jaxbn.batch_renorm(params, state, x, True, **options)[0]

        y = transform(step)(jnp.float32(r_max), jnp.float32(-1e-7))
        np.testing.assert_array_equal(y, transform(step)(1.0, 0.0))


def test_wholly_masked_batch_is_inference(rng):
    case = rounded(random_case(rng, SHAPE), "float32")
    mask = np.zeros(SHAPE, bool)
    actual = run(case, function=jaxbn.batch_renorm, mask=mask)
    assert_close(actual, inference(case), TOLERANCE["float32"])


def test_complex_values_bound_the_modulus_of_d(rng):
    x = 9 * (rng.normal(size=(50, C)) + 2 + 1j * rng.normal(size=(50, C)))
    params, state = jaxbn.init(C, param_dtype=jnp.complex64)
    y, _ = jaxbn.batch_renorm(
        params, state, jnp.asarray(x, jnp.complex64), True, r_max=2.0, d_max=0.5
    )
    mean, var = x.mean(0), x.var(0)
    d = mean / np.sqrt(1 + 1e-5)
    d = d * np.minimum(1, 0.5 / np.abs(d))
    assert_near(y, (x - mean) / np.sqrt(var + 1e-5) * 2 + d)


@pytest.mark.parametrize("check_vma", [True, False])
def test_devices_share_the_correction(check_vma, rng):
    case = rounded(random_case(rng, (8, 5, C)), "float32")
    params = jaxbn.BatchNormParams(jnp.asarray(case.scale), jnp.asarray(case.bias))
    state = jaxbn.BatchNormState(*map(jnp.asarray, (case.mean, case.var, 3.0)))
    options: dict[str, Any] = {"r_max": 1.5, "d_max": 0.3}
    mapped = jax.shard_map(
        lambda x: jaxbn.batch_renorm(
            params, state, x, True, axis_name="data", **options
        ),
        mesh=jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)),
        in_specs=P("data"),
        out_specs=(P("data"), P()),
        check_vma=check_vma,
    )
    y, new = jax.jit(mapped)(case.x)
    want = renorm_step(case, **options)
    assert_near((y, new.mean, new.var), (want.y, want.mean, want.var))


def test_matches_keras(rng):
    """Keras keeps averages of its own, whose deviation is √σ² without ε."""
    from libraries import keras  # slow to import

    limits = {"rmin": 1 / 1.5, "rmax": 1.5, "dmax": 0.4}
    layer: Any = keras.layers.BatchNormalization(
        epsilon=1e-7, momentum=0.9, renorm=True, renorm_clipping=limits
    )
    case = rounded(random_case(rng, SHAPE), "float32")
    layer.build(SHAPE)
    layer.gamma.assign(case.scale)
    layer.beta.assign(case.bias)
    layer.renorm_mean.assign(case.mean)
    layer.renorm_stddev.assign(np.sqrt(case.var))
    expected = np.asarray(layer(case.x, training=True))
    actual = run(
        case, function=jaxbn.batch_renorm, r_max=1.5, d_max=0.4, epsilon=1e-7
    ).y
    assert_near(actual, expected)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"r_max": 0.9}, ValueError, "r_max must be at least 1; got 0.9"),
        ({"d_max": -1.0}, ValueError, "d_max must be at least 0; got -1.0"),
        ({"d_max": float("nan")}, ValueError, "d_max must be at least 0; got nan"),
        ({"r_max": jnp.float32("nan")}, ValueError, "r_max must be at least 1; got n"),
        ({"r_max": jnp.ones(1)}, TypeError, "r_max must be a Python number or a tra"),
        ({"r_max": "wide"}, TypeError, "r_max must be a Python number or a traced"),
        ({"train": None}, TypeError, "train must be a Python bool"),
    ],
    ids=str,
)
def test_errors(options, error, message):
    params, state = jaxbn.init(C)
    options = {"train": True} | options
    with pytest.raises(error, match=message):
        jaxbn.batch_renorm(params, state, jnp.ones((4, C)), **options)


as_float = partial(np.array, dtype=np.float32)
as_complex = partial(np.array, dtype=np.complex64)


def step_from(mean, var, x, **options):
    """Return y of a step without scale and bias, from this state."""
    state = jaxbn.BatchNormState(jnp.asarray(mean), jnp.asarray(var), jnp.float32(3))
    params = jaxbn.BatchNormParams(None, None)
    return jaxbn.batch_renorm(params, state, jnp.asarray(x), True, **options)[0]


def test_running_variance_of_0_is_beyond_the_limits(rng):
    """With ε = 0 the limits of σ_B/σ and (μ_B-μ)/σ are infinite, and 0 of 0."""
    x = as_float([[1, 1, 1, 5], [3, 3, 3, 5]]) + np.float32(1e-3)
    mean, batch_mean = as_float([9, -9, 0, 0]), x.mean(0)
    mean[2] = batch_mean[2]
    y = step_from(mean, np.zeros(4, np.float32), x, r_max=1.5, d_max=0.25, epsilon=0.0)
    x_hat = as_float([[-1, -1, -1, 0], [1, 1, 1, 0]])
    assert_near(y, 1.5 * x_hat + as_float([-0.25, 0.25, 0, 0.25]))


def test_complex_variance_of_0_keeps_the_direction_of_d(rng):
    x = as_complex([[1 + 2j, 2], [3 + 2j, 4]])
    state = as_complex([2 - 1j, 3]), np.zeros(2, np.float32)  # μ_B - μ = (3j, 0)
    y = step_from(*state, x, r_max=1.5, d_max=0.25, epsilon=0.0)
    assert_near(y, as_complex([[-1.5 + 0.25j, -1.5], [1.5 + 0.25j, 1.5]]))


@pytest.mark.parametrize("autodiff", ["custom_vjp", "jax"])
def test_running_variances_that_are_none_show(autodiff, rng):
    x = rng.normal(size=(6, 4)).astype(np.float32)
    var = as_float([np.nan, -1, np.inf, 1])
    y = step_from(np.zeros(4, np.float32), var, x, r_max=1.5, autodiff=autodiff)
    np.testing.assert_array_equal(np.isnan(y).all(0), [True, True, False, False])
    x_hat = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
    assert_near(y[:, 2], x_hat[:, 2] / 1.5)
