"""Test that a floating mask holds weights without a scale, and that others count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TOLERANCE, assert_close, assert_near, rounded, run
from hypothesis import given
from hypothesis import strategies as st
from oracle import random_case, train_step

import jaxbn

C = 3
SCALES = [1e-30, 1e-6, 0.1, 3.0, 1e6, 1e30]


def softmax(logits):
    return np.exp(logits) / np.exp(logits).sum(0)


def test_weights_that_add_up_to_1_are_ten_elements():
    x = jnp.arange(10.0)[:, None]
    mask = jnp.full((10, 1), 0.1)
    _, new = jaxbn.batch_norm(*jaxbn.init(1), x, True, momentum=0.9, mask=mask)
    np.testing.assert_allclose(new.var, [0.9 + 0.1 * 55 / 6], rtol=1e-6)
    np.testing.assert_allclose(new.mean, [0.1 * 4.5], rtol=1e-6)
    assert new.count == 1


@pytest.mark.parametrize("autodiff", ["custom_vjp", "jax"])
@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("sharpness", [0.1, 1.0, 4.0])
def test_softmax_weights_match_oracle(sharpness, unbiased, autodiff, rng):
    case = rounded(random_case(rng, (20, C)), "float32")
    mask = softmax(sharpness * rng.normal(size=(20, C))).astype(np.float32)
    options = {"mask": mask, "unbiased": unbiased, "momentum": 0.7}
    actual = run(case, autodiff=autodiff, **options)
    assert_close(actual, train_step(case, **options), TOLERANCE["float32"])


@jax.jit
def results_and_gradients(arguments, cotangents, mask):
    def step(scale, bias, mean, var, x):
        params = jaxbn.BatchNormParams(scale, bias)
        state = jaxbn.BatchNormState(mean, var, jnp.float32(3))
        y, new = jaxbn.batch_norm(params, state, x, True, mask=mask)
        return y, new.mean, new.var

    results, vjp = jax.vjp(step, *arguments)
    return results, vjp(cotangents)


@given(seed=st.integers(0, 2**32 - 1), exponent=st.floats(-6, 6), zeros=st.booleans())
def test_scale_of_weights_changes_nothing(seed, exponent, zeros):
    rng = np.random.default_rng(seed)
    case = rounded(random_case(rng, (6, C)), "float32")
    kept = rng.random((6, C)) < (0.5 if zeros else 1)
    mask = (rng.uniform(0.1, 2, size=(6, C)) * kept).astype(np.float32)
    arguments = (case.scale, case.bias, case.mean, case.var, case.x)
    cotangents = (case.dy, case.dmean, case.dvar)
    expected = results_and_gradients(arguments, cotangents, mask)
    scaled = np.asarray(mask.astype(np.float64) * 10**exponent, np.float32)
    actual = results_and_gradients(arguments, cotangents, scaled)
    sizes = train_step(case, mask=mask).sizes
    assert_near(actual, expected, TOLERANCE["float32"], size=max(sizes.values()))


@pytest.mark.parametrize("scale", SCALES)
def test_scaled_0_and_1_select_elements_exactly(scale, rng):
    """A floating mask of one value and zeros is a bool mask, to the bit."""
    case = rounded(random_case(rng, (64, C)), "float32")
    mask = rng.random((64, 1)) < 0.6
    weights = np.asarray(scale, np.float32) * mask
    arguments = (case.scale, case.bias, case.mean, case.var, case.x)
    results, expected = (
        results_and_gradients(arguments, (case.dy, case.dmean, case.dvar), m)
        for m in (weights, mask)
    )
    jax.tree.map(np.testing.assert_array_equal, results, expected)


@pytest.mark.parametrize("scale", SCALES)
def test_single_weight_is_one_element(scale, rng):
    """Its unbiased variance is unknown, whatever the weight."""
    case = rounded(random_case(rng, (200, C)), "float32")
    weights = np.asarray(scale * rng.uniform(0.5, 2, size=(200, C)), np.float32)
    masks = np.eye(200, dtype=np.float32)[:, :, None] * weights
    scale, bias, mean, var = map(jnp.asarray, case[1:5])
    params = jaxbn.BatchNormParams(scale, bias)
    state = jaxbn.BatchNormState(mean, var, jnp.float32(2))
    update = lambda mask: jaxbn.batch_norm(params, state, case.x, True, mask=mask)[1]  # noqa: E731
    for got, old in zip(jax.vmap(update)(masks), state, strict=True):
        np.testing.assert_array_equal(got, np.broadcast_to(old, got.shape))


@pytest.mark.parametrize("size", [1e-12, 1e12])
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_weights_do_not_overflow_with_large_values(size, scale, rng):
    x = (size * rng.normal(size=(1000, C))).astype(np.float32)
    weights = (scale * rng.uniform(0.1, 1, size=(1000, 1))).astype(np.float32)
    options = {"momentum": 0.0, "mask": weights}
    _, new = jaxbn.batch_norm(*jaxbn.init(C), x, True, **options)
    x64, w = x.astype(np.float64), weights.astype(np.float64)
    mean = (w * x64).sum(0) / w.sum(0)
    n = w.sum() ** 2 / (w**2).sum()
    var = n / (n - 1) * (w * (x64 - mean) ** 2).sum(0) / w.sum(0)
    assert_near((new.mean, new.var), (mean, var), 1e-5)


@pytest.mark.parametrize("kind", ["bool", "int8", "int32"])
def test_integer_masks_count(kind, rng):
    """Two is twice: n is the sum, not the effective size."""
    case = rounded(random_case(rng, (12, C)), "float32")
    mask = rng.integers(0, 4, size=(12, 1)).astype(kind)
    expected = train_step(case, mask=mask.astype(np.int32))
    assert_close(run(case, mask=mask), expected, TOLERANCE["float32"])


def test_half_precision_weights_match_oracle(rng):
    case = rounded(random_case(rng, (16, C)), "bfloat16")
    mask = jnp.asarray(1e-3 * rng.uniform(0.5, 2, size=(16, 1)), jnp.bfloat16)
    expected = train_step(case, mask=np.asarray(mask, np.float64))
    assert_close(run(case, mask=mask), expected, TOLERANCE["bfloat16"])


@pytest.mark.parametrize("n", [5, 50, 200])
def test_variance_of_weighted_constants_is_not_negative(n, rng):
    """Rounding leaves a difference of either sign in many of the features."""
    x = np.repeat(100 * rng.normal(size=(1, 4096)), n, axis=0).astype(np.float32)
    weights = rng.uniform(0.1, 2, size=(n, 1)).astype(np.float32)
    options = {"mask": weights, "momentum": 0.0, "unbiased": False}
    _, new = jaxbn.batch_norm(*jaxbn.init(4096), x, True, **options)
    assert np.all(np.asarray(new.var) >= 0)
    assert np.all(np.asarray(new.var) < 1e-9)
