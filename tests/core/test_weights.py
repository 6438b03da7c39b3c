"""Test that a floating mask holds weights without a scale, and that others count."""

from functools import partial
from typing import Any

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
SCALES = [1e-38, 1e-30, 1e-6, 0.1, 3.0, 1e6, 1e30, 1.6e38]


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


def weighted_statistics(x, weights):
    """Return mean and unbiased variance; n - 1 from the pairs of different elements."""
    x, w = (np.asarray(a, np.float64) for a in (x, weights))
    mean = (w * x).sum(0) / w.sum(0)
    var = (w * (x - mean) ** 2).sum(0) / w.sum(0)
    pairs = sum((w * np.roll(w, k, 0)).sum(0) for k in range(1, len(w)))
    dof = pairs / (w**2).sum(0)
    return mean, var * (1 + dof) / dof


@jax.jit
def new_statistics(x, mask):
    """Return the statistics of one batch; its running ones are 0 and 1."""
    params, state = jaxbn.init(x.shape[-1])
    y, new = jaxbn.batch_norm(params, state, x, True, mask=mask, momentum=0.0)
    return y, new


# Denormal numbers, which a CPU takes for 0, and both ends of the normal ones.
@pytest.mark.parametrize("scale", [1e-43, 1e-39, 8e-39, 2e-38, 9e37, 3.4e38])
@pytest.mark.parametrize("jit", [True, False])
def test_weights_reach_the_ends_of_their_range(scale, jit, rng):
    x = rng.normal(3, 2, size=(10, C)).astype(np.float32)
    weights = np.asarray(scale * rng.uniform(0.2, 1, size=(10, 1)), np.float32)
    # The oracle weights by multiples of the smallest denormal number.
    expected = weighted_statistics(x, weights.astype(np.float64) / 2.0**-149)
    with jax.disable_jit(not jit):
        _, new = new_statistics(x, weights)
    assert_near((new.mean, new.var), expected, 1e-6)
    assert new.count == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scale", [1e-300, 1e200])
def test_float64_weights_keep_their_range(scale, dtype, rng, x64):
    x = jnp.asarray(rng.normal(3, 2, size=(10, C)), dtype)
    weights = scale * rng.uniform(0.2, 1, size=(10, 1))
    expected = weighted_statistics(x, weights / scale)
    _, new = new_statistics(x, weights)
    assert_near((new.mean, new.var), expected, 1e-6)


@pytest.mark.parametrize("small", [1e-3, 1e-6, 1e-7, 1e-10])
@pytest.mark.parametrize("copies", [1, 3])
def test_one_dominant_weight_has_an_accurate_variance(small, copies, rng):
    """n - 1 is the sum of the small weights, twice; in n it is rounded."""
    x = rng.normal(3, 2, size=(10, 5, C)).astype(np.float32)[:, :copies]
    weights = np.full((10, 1, 1), small, np.float32)
    weights[3] = 1
    each = np.broadcast_to(weights, (10, copies, 1)).reshape(-1, 1)
    expected = weighted_statistics(x.reshape(-1, C), each)
    _, new = new_statistics(x, weights)
    np.testing.assert_allclose(new.mean, expected[0], rtol=1e-6)
    np.testing.assert_allclose(new.var, expected[1], rtol=1e-5)


NOT_POSITIVE = {
    "negative": [[0.0], [-1e9]],
    "all negative": [[-1.0], [-1.0]],
    "sum 0": [[-1.0], [1.0]],
    "integers": [[-1], [-1]],
    "infinite": [[np.inf], [1.0]],
}


@pytest.mark.parametrize("mask", NOT_POSITIVE.values(), ids=NOT_POSITIVE)
@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("function", [jaxbn.batch_norm, jaxbn.batch_renorm])
def test_sum_of_weights_that_is_not_positive_is_an_empty_batch(
    mask, unbiased, function, rng
):
    x = jnp.asarray(rng.normal(3, 2, size=(2, C)), jnp.float32)
    params, _ = jaxbn.init(C)
    mean, var = jnp.asarray(rng.uniform(1, 2, size=(2, C)), jnp.float32)
    state = jaxbn.BatchNormState(mean, var, jnp.float32(3))
    options = {"mask": jnp.asarray(mask), "unbiased": unbiased, "momentum": 0.0}
    y, new = function(params, state, x, True, **options)
    x, mean, var = (np.asarray(a, np.float64) for a in (x, mean, var))
    assert_near(y, (x - mean) / np.sqrt(var + 1e-5), 1e-6)
    jax.tree.map(np.testing.assert_array_equal, new, state)


@pytest.mark.parametrize("jit", [True, False])
def test_nan_in_a_mask_shows_in_y(jit, rng):
    x = rng.normal(size=(4, C)).astype(np.float32)
    mask = np.ones((4, C), np.float32)
    mask[1, 0] = np.nan
    with jax.disable_jit(not jit):
        y, new = new_statistics(x, mask)
    np.testing.assert_array_equal(
        np.isnan(y), np.isnan(mask[1:2]) & np.full(x.shape, 1)
    )
    assert np.isfinite(new.mean).all()
    assert np.isfinite(new.var).all()
    assert new.mean[0] == 0


# 2^31 elements and more: no int32 holds their number. (Nothing is computed.)
LARGE = {
    "rows": ((2**31, 2), None),
    "images": ((65536, 224, 224, 2), None),
    "constant mask": ((2**31, 2), (1, 2)),
    "mask": ((2**31, 2), (2**31, 1)),
}


@pytest.mark.parametrize(("shape", "mask_shape"), LARGE.values(), ids=LARGE)
@pytest.mark.parametrize(
    ("dtype", "autodiff"), [("bool", "custom_vjp"), ("float32", "jax")]
)
def test_more_elements_than_int32_holds_are_traced(shape, mask_shape, dtype, autodiff):
    params, state = jaxbn.init(2)
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    mask = None if mask_shape is None else jax.ShapeDtypeStruct(mask_shape, dtype)

    def loss(x, mask, function, **options):
        y, new = function(
            *(params, state, x, True), mask=mask, autodiff=autodiff, **options
        )
        return jnp.sum(y.astype(jnp.float32)) + jnp.sum(new.var)

    for function, options in (
        (jaxbn.batch_norm, {}),
        (jaxbn.batch_norm, {"virtual_batch_size": shape[0] // 2}),
        (jaxbn.batch_norm, {"virtual_batch_size": 16}),
        (jaxbn.batch_renorm, {}),
    ):
        step = jax.grad(partial(loss, function=function, **options))
        assert jax.eval_shape(step, x, mask).shape == shape
    statistics = partial(jaxbn.batch_statistics, autodiff=autodiff)
    assert jax.eval_shape(lambda x, mask: statistics(x, mask=mask), x, mask).n.shape


@pytest.mark.usefixtures("unchecked_types")  # jaxtyping compares no symbols
@pytest.mark.parametrize("masked", [False, True])
def test_symbols_are_multiplied_without_overflow(masked):
    """Of 2^31 elements n alone is computed."""
    (b,) = jax.export.symbolic_shape("b")
    _, state = jaxbn.init(1)
    one = jnp.ones(1)

    @jax.jit
    def step(x, mask):
        x = jnp.broadcast_to(x, (*x.shape[:1], 65536, 1))
        n = jaxbn.batch_statistics(x, mask=mask if masked else None).n
        batch = jaxbn.BatchStatistics(one, one, n)
        return n, jaxbn.update_running_stats(state, batch, momentum=0.0)

    x = jax.ShapeDtypeStruct((b, 1, 1), jnp.float32)
    exported = jax.export.export(step)(x, jax.ShapeDtypeStruct((b, 1, 1), bool))
    for batch in (4, 32768, 65538):
        ones = np.ones((batch, 1, 1))
        results: Any = exported.call(ones.astype(np.float32), ones.astype(bool))
        n, new = results
        exact = batch * 65536
        np.testing.assert_allclose(n, [exact], rtol=1e-7)
        np.testing.assert_allclose(new.var, [exact / (exact - 1)], rtol=1e-6)
        assert new.count == 1
