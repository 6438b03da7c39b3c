"""Compare y, state and all gradients with the float64 oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TOLERANCE, assert_close, rounded, run
from oracle import Result, inference, random_case, train_step

import jaxbn

AXES = [
    ((7, 5), -1),
    ((7, 5), 0),
    ((4, 3, 5, 6), -1),
    ((4, 6, 3, 5), 1),
    ((4, 3, 5), 1),
    ((4, 3, 5), (0, 2)),
    ((4, 3, 5), (-1, 1)),
    ((2, 3, 4, 2, 3), (3, -5)),
    ((2, 2, 3, 1, 2, 2, 3, 4), -1),  # XLA:CPU once crashed on sums of rank >= 7
    ((5,), 0),
    ((9, 1), -1),
    ((1, 6), -1),
]
MASKS = {
    "bool batch": lambda rng: rng.random((6, 1, 1)) < 0.6,
    "int positions": lambda rng: rng.integers(0, 3, size=(6, 5, 1)),
    "uint8 features": lambda rng: rng.integers(0, 2, (6, 5, 3)).astype(np.uint8),
    "float weights": lambda rng: rng.uniform(0.2, 2.0, size=(5, 1)),
    "float and zeros": lambda rng: np.maximum(rng.normal(size=(6, 1, 3)), 0),
    "scalar": lambda rng: np.float32(0.5),
    "half": lambda rng: rng.random((6, 1, 1)).astype(np.float16),
}
OPTIONS = [
    {},
    {"momentum": None},
    {"momentum": 0.0},
    {"momentum": 1.0},
    {"unbiased": False},
    {"epsilon": 0.3},
    {"momentum": None, "unbiased": False, "epsilon": 1e-3},
]
GRADIENTS = Result._fields[3:8]


@pytest.mark.parametrize(("shape", "axis"), AXES, ids=str)
@pytest.mark.parametrize("autodiff", ["custom_vjp", "jax"])
def test_training_matches_oracle_for_any_feature_axes(shape, axis, autodiff, rng):
    case = rounded(random_case(rng, shape, axis), "float32")
    actual = run(case, axis=axis, autodiff=autodiff)
    assert_close(actual, train_step(case, axis=axis), TOLERANCE["float32"])


@pytest.mark.parametrize(("shape", "axis"), AXES, ids=str)
def test_inference_matches_oracle_for_any_feature_axes(shape, axis, rng):
    case = rounded(random_case(rng, shape, axis), "float32")
    actual = run(case, train=False, axis=axis)
    assert_close(actual, inference(case, axis=axis), TOLERANCE["float32"])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
def test_dtypes_match_oracle(dtype, train, jit, rng, x64):
    case = rounded(random_case(rng, (32, 4, 5)), dtype)
    actual = run(case, train, jit)
    assert actual.y.dtype == actual.dx.dtype == dtype
    vector_dtype = "float64" if dtype == "float64" else "float32"
    assert {str(a.dtype) for a in actual[1:3] + actual[4:8]} == {vector_dtype}
    expected = train_step(case) if train else inference(case)
    assert_close(actual, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("autodiff", ["custom_vjp", "jax"])
def test_masks_match_oracle(dtype, mask, autodiff, rng):
    case = rounded(random_case(rng, (6, 5, 3)), dtype)
    weights = MASKS[mask](rng)
    actual = run(case, mask=weights, autodiff=autodiff)
    assert_close(actual, train_step(case, mask=weights), TOLERANCE[dtype])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_match_oracle(options, rng):
    case = rounded(random_case(rng, (8, 3, 4)), "float32")
    expected = train_step(case, **options)
    assert_close(run(case, **options), expected, TOLERANCE["float32"])


@pytest.mark.parametrize("n", [1, 2, 3, 32_769])
@pytest.mark.parametrize("features", [1, 3])
@pytest.mark.parametrize("unbiased", [True, False])
def test_odd_shapes_match_oracle(n, features, unbiased, rng):
    case = rounded(random_case(rng, (n, features)), "float32")
    expected = train_step(case, unbiased=unbiased)
    assert_close(run(case, unbiased=unbiased), expected, 2e-5)


COTANGENTS = {
    "zero": lambda dy: 0 * dy,
    "constant": lambda dy: 0 * dy + 0.37,
    "partly zero": lambda dy: dy * (np.arange(len(dy)) < 3)[:, None, None],
    "one entry": lambda dy: dy * (np.arange(dy.size) == 11).reshape(dy.shape),
}


@pytest.mark.parametrize("cotangent", COTANGENTS)
@pytest.mark.parametrize("statistics", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gradients_match_oracle_for_plain_cotangents(cotangent, statistics, dtype, rng):
    case = random_case(rng, (9, 4, 3))
    case = case._replace(dy=COTANGENTS[cotangent](case.dy))
    if not statistics:
        case = case._replace(dmean=0 * case.dmean, dvar=0 * case.dvar)
    case = rounded(case, dtype)
    if statistics or cotangent != "zero":
        assert_close(run(case), train_step(case), TOLERANCE[dtype])
    else:
        actual = run(case)
        assert not any(np.any(getattr(actual, name)) for name in GRADIENTS)


@pytest.mark.parametrize("x_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("train", [True, False])
def test_dtype_option_changes_only_the_output_dtype(x_dtype, dtype, train, rng):
    case = rounded(random_case(rng, (8, 4), loc=3.0), x_dtype)
    dy = case.dy.astype(dtype).astype(x_dtype)
    case = case._replace(dy=dy)
    actual = run(case, train, dtype=dtype)
    assert actual.y.dtype == dtype
    assert actual.dx.dtype == x_dtype
    assert actual.mean.dtype == np.float32
    expected = train_step(case) if train else inference(case)
    coarsest = max(TOLERANCE[dtype], TOLERANCE[x_dtype])
    assert_close(actual, expected, coarsest)
    statistics = {name: getattr(expected, name) for name in ("mean", "var")}
    for name, want in statistics.items():
        np.testing.assert_allclose(getattr(actual, name), want, rtol=1e-5)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("use_scale", [True, False])
@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("autodiff", ["custom_vjp", "jax"])
def test_batch_norm_works_without_scale_or_bias(
    train, use_scale, use_bias, autodiff, rng
):
    case = rounded(random_case(rng, (6, 5, 3)), "float32")
    if not use_scale:
        case = case._replace(scale=np.ones_like(case.scale))
    if not use_bias:
        case = case._replace(bias=np.zeros_like(case.bias))
    params = jaxbn.BatchNormParams(
        jnp.asarray(case.scale) if use_scale else None,
        jnp.asarray(case.bias) if use_bias else None,
    )
    state = jaxbn.BatchNormState(*map(jnp.asarray, (case.mean, case.var, case.batches)))

    def apply(params, x):
        return jaxbn.batch_norm(params, state, x, train, autodiff=autodiff)[0]

    y, vjp = jax.vjp(apply, params, jnp.asarray(case.x))
    dparams, dx = vjp(jnp.asarray(case.dy))
    expected = train_step(case._replace(dmean=0 * case.dmean, dvar=0 * case.dvar))
    if not train:
        expected = inference(case)
    np.testing.assert_allclose(y, expected.y, rtol=0, atol=2e-5)
    np.testing.assert_allclose(dx, expected.dx, rtol=0, atol=2e-5)
    for used, got, want in (
        (use_scale, dparams.scale, expected.dscale),
        (use_bias, dparams.bias, expected.dbias),
    ):
        if used:
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-5)
        else:
            assert got is None


def test_wider_variables_are_not_rounded(rng, x64):
    """Inference subtracts a float64 mean from float32 x without rounding it."""
    params, state = jaxbn.init(3, param_dtype=jnp.float64)
    assert {a.dtype for a in (*params, *state[:2]) if a is not None} == {
        jnp.dtype("f8")
    }
    mean = 1e4 + rng.normal(size=3)
    state = state._replace(mean=jnp.asarray(mean))
    x = jnp.asarray(mean + 1e-3 * rng.normal(size=(5, 3)), jnp.float32)
    y, _ = jaxbn.batch_norm(params, state, x, train=False)
    assert y.dtype == np.float32
    exact = (np.asarray(x, np.float64) - mean) / np.sqrt(1 + 1e-5)
    np.testing.assert_allclose(y, exact, rtol=1e-6)
    _, new = jaxbn.batch_norm(params, state, x, train=True)
    assert new.mean.dtype == new.var.dtype == np.float64


def test_bfloat16_gradient_is_rounded_once(rng):
    """The terms of dx are added in float32, so the error is half an ulp at most."""
    case = rounded(random_case(rng, (64, 8)), "bfloat16")
    dx = np.asarray(run(case).dx, np.float64)
    exact = train_step(case).dx
    half_ulp = 2.0 ** (np.floor(np.log2(np.abs(exact))) - 8)
    assert np.all(np.abs(dx - exact) <= half_ulp * 1.001 + 1e-6 * np.abs(exact).max())
