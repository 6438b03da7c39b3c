"""Test the values, edge cases and accuracy of batch and running statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, rounded, run
from oracle import random_case, train_step

import jaxbn

C = 3


def batches(rng, sizes=(8, 5, 2, 11)):
    return [(4 + 3 * rng.normal(size=(n, C))).astype(np.float32) for n in sizes]


def train_on(xs, **options):
    params, state = jaxbn.init(C)
    for x in xs:
        _, state = jaxbn.batch_norm(params, state, x, train=True, **options)
    return state


def statistics_of(xs, ddof):
    xs = [np.asarray(x, np.float64) for x in xs]
    return [x.mean(0) for x in xs], [x.var(0, ddof=ddof) for x in xs]


@pytest.mark.parametrize(("unbiased", "ddof"), [(True, 1), (False, 0)])
def test_momentum_weights_the_old_statistics(unbiased, ddof, rng):
    xs = batches(rng)
    state = train_on(xs, momentum=0.8, unbiased=unbiased)
    mean, var = np.zeros(C), np.ones(C)
    for m, v in zip(*statistics_of(xs, ddof), strict=True):
        mean, var = 0.8 * mean + 0.2 * m, 0.8 * var + 0.2 * v
    np.testing.assert_allclose(state.mean, mean, rtol=1e-5)
    np.testing.assert_allclose(state.var, var, rtol=1e-5)
    assert state.count == len(xs)


@pytest.mark.parametrize("number", [1, 2, 100])
def test_momentum_none_averages_batches_equally(number, rng):
    """Algorithm 2 of the paper is E[μ_B] and m/(m-1) E[σ²_B]."""
    xs = batches(rng, sizes=(6,) * number)
    state = train_on(xs, momentum=None)
    means, variances = statistics_of(xs, ddof=1)
    np.testing.assert_allclose(state.mean, np.mean(means, 0), rtol=1e-5)
    np.testing.assert_allclose(state.var, np.mean(variances, 0), rtol=1e-5)
    assert state.count == number


def test_first_equal_weight_batch_replaces_the_initial_state(rng):
    x = 1e-6 * rng.normal(size=(50, C)).astype(np.float32)
    state = train_on([x], momentum=None)
    np.testing.assert_allclose(
        state.var, x.astype(np.float64).var(0, ddof=1), rtol=1e-5
    )


def test_inference_returns_the_state_unchanged(rng):
    params, state = jaxbn.init(C)
    state = train_on(batches(rng))
    y, same = jaxbn.batch_norm(params, state, batches(rng)[0], train=False)
    assert same is state
    assert y.shape == (8, C)


EMPTY = {
    "no elements": (np.zeros((0, C), np.float32), None),
    "all masked": (np.full((4, C), 7, np.float32), np.zeros((4, 1), bool)),
    "NaN behind the mask": (np.full((4, C), np.nan, np.float32), np.float32(0)),
}


@pytest.mark.parametrize("x_and_mask", EMPTY.values(), ids=EMPTY.keys())
@pytest.mark.parametrize("momentum", [0.9, None])
def test_empty_batch_is_normalized_by_running_statistics(x_and_mask, momentum, rng):
    x, mask = x_and_mask
    state = train_on(batches(rng))
    params = jaxbn.BatchNormParams(*map(jnp.asarray, rng.normal(size=(2, C))))
    y, new = jaxbn.batch_norm(params, state, x, True, mask=mask, momentum=momentum)
    expected, _ = jaxbn.batch_norm(params, state, x, False)
    np.testing.assert_allclose(y, expected, rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, state, new)


@pytest.mark.parametrize("autodiff", ["custom_vjp", "jax"])
@pytest.mark.parametrize("epsilon", [1e-5, 0.0])
@pytest.mark.parametrize("n", [0, 1])
def test_gradients_are_finite_for_zero_and_one_element(n, epsilon, autodiff, rng):
    case = rounded(random_case(rng, (4, C)), "float32")
    mask = np.arange(4)[:, None] < n
    result = run(case, mask=mask, epsilon=epsilon, autodiff=autodiff)
    for name in result._fields[:8]:
        assert np.all(np.isfinite(getattr(result, name))), name
    np.testing.assert_array_equal(result.mean, case.mean)
    np.testing.assert_array_equal(result.var, case.var)


@pytest.mark.parametrize("mask", [None, np.arange(4)[:, None] == 2])
def test_one_element_returns_the_bias_and_keeps_the_state(mask, rng):
    x = 1e3 + rng.normal(size=(1 if mask is None else 4, C)).astype(np.float32)
    state = train_on(batches(rng))
    params = jaxbn.BatchNormParams(*map(jnp.asarray, rng.normal(size=(2, C))))
    y, new = jaxbn.batch_norm(params, state, x, True, mask=mask)
    np.testing.assert_array_equal(y[0 if mask is None else 2], params.bias)
    jax.tree.map(np.testing.assert_array_equal, state, new)


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_one_element_updates_the_state_with_biased_variance(weight, rng):
    """Without Bessel's correction, any positive weight updates the statistics."""
    x = 1e3 + rng.normal(size=(1, C)).astype(np.float32)
    options = {"momentum": 0.9, "unbiased": False, "mask": np.full((1, 1), weight)}
    state = train_on([x], **options)
    np.testing.assert_allclose(state.mean, 0.1 * x[0], rtol=1e-6)
    np.testing.assert_allclose(state.var, np.full(C, 0.9), rtol=1e-6)
    assert state.count == 1


def test_masked_feature_keeps_its_statistics(rng):
    x = batches(rng)[0]
    state = train_on(batches(rng))
    mask = np.array([[True, False, True]])
    params, _ = jaxbn.init(C)
    _, new = jaxbn.batch_norm(params, state, x, True, mask=mask)
    assert new.count == state.count + 1
    assert (new.mean[1], new.var[1]) == (state.mean[1], state.var[1])
    x64 = x.astype(np.float64)
    want = 0.99 * np.asarray(state.mean) + 0.01 * x64.mean(0)
    np.testing.assert_allclose(new.mean[::2], want[::2], rtol=1e-6)


def test_moments_ignore_masked_nan_and_inf(rng):
    x = batches(rng)[0]
    dirty = np.concatenate([x, [[np.nan] * C, [np.inf] * C]]).astype(np.float32)
    mask = np.arange(10)[:, None] < 8
    params, state = jaxbn.init(C)
    y, new = jaxbn.batch_norm(params, state, dirty, True, mask=mask)
    clean_y, clean_new = jaxbn.batch_norm(params, state, x, True)
    np.testing.assert_allclose(y[:8], clean_y, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(new.mean, clean_new.mean, rtol=1e-6)
    np.testing.assert_allclose(new.var, clean_new.var, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("state_dtype", ["float32", "float64"])
@pytest.mark.parametrize("momentum", [0.9, None])
def test_scan_carries_the_state(dtype, state_dtype, momentum, rng, x64):
    params, state = jaxbn.init(C, param_dtype=state_dtype)
    xs = jnp.asarray(rng.normal(size=(5, 6, C)), dtype)

    def step(state, x):
        y, state = jaxbn.batch_norm(params, state, x, True, momentum=momentum)
        return state, y

    carried, ys = jax.lax.scan(step, state, xs)
    assert ys.dtype == dtype
    assert [a.dtype for a in carried] == [state_dtype, state_dtype, "float32"]
    looped = state
    for x in xs:
        _, looped = jaxbn.batch_norm(params, looped, x, True, momentum=momentum)
    np.testing.assert_allclose(carried.mean, looped.mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(carried.var, looped.var, rtol=1e-5)
    assert carried.count == 5


@pytest.mark.parametrize("momentum", [0.0, None])
def test_weight_of_1_replaces_nan_and_inf(momentum, rng):
    """Momentum 0, and `None` at count 0, forget the old statistics."""
    x = batches(rng)[0]
    params, state = jaxbn.init(C)
    state = state._replace(
        mean=jnp.array([jnp.nan, jnp.inf, 0.0]), var=jnp.array([jnp.nan, 1.0, jnp.inf])
    )
    _, new = jaxbn.batch_norm(params, state, x, True, momentum=momentum)
    np.testing.assert_allclose(new.mean, x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(new.var, x.var(0, ddof=1), rtol=1e-5)


def test_other_weights_keep_nan(rng):
    x = batches(rng)[0]
    params, state = jaxbn.init(C)
    state = state._replace(mean=state.mean.at[0].set(jnp.nan))
    _, new = jaxbn.batch_norm(params, state, x, True, momentum=0.5)
    assert np.isnan(new.mean[0])
    np.testing.assert_allclose(new.mean[1:], 0.5 * x.mean(0)[1:], rtol=1e-5)


def test_difference_of_huge_means_does_not_overflow():
    params, state = jaxbn.init(1)
    for value in (3e38, -3e38, 3e38):
        x = jnp.full((4, 1), value)
        _, state = jaxbn.batch_norm(params, state, x, True, momentum=0.5)
        assert np.all(np.isfinite(state.mean))
        assert np.all(np.isfinite(state.var))


@pytest.mark.parametrize(
    ("mean", "momentum", "bound"),
    [(1e3, 0.9999, 1e-3), (1e3, 0.999, 5e-4), (3e4, 0.999, 4e-3), (3e4, 0.9, 4e-3)],
)
def test_running_mean_does_not_drift(mean, momentum, bound, rng):
    """Bounds are in deviations; Flax's form is off by 0.17 in the first case."""
    x = (mean + rng.normal(size=(256, 1))).astype(np.float32)
    params, state = jaxbn.init(1)
    true = np.float64(x).mean(0)
    state = state._replace(mean=jnp.asarray(true, jnp.float32))
    steps = round(3 / (1 - momentum))

    def step(state, _):
        _, state = jaxbn.batch_norm(params, state, x, True, momentum=momentum)
        return state, None

    state, _ = jax.jit(lambda s: jax.lax.scan(step, s, None, steps))(state)
    np.testing.assert_allclose(state.mean, true, rtol=0, atol=bound)


# The state as a tree


def tree_average(*states):
    return jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *states)


def test_average_of_states_keeps_dtypes(rng):
    states = [train_on(batches(rng)[:n]) for n in (1, 2)]
    average = tree_average(*states)
    assert [a.dtype for a in average] == [a.dtype for a in states[0]]
    assert average.count == 1.5
    np.testing.assert_allclose(average.mean, (states[0].mean + states[1].mean) / 2)


def test_cond_and_scan_carry_an_average_of_states(rng):
    params, state = jaxbn.init(C)
    xs = jnp.asarray(rng.normal(size=(4, 6, C)), jnp.float32)

    def step(carry, x):
        state, ema = carry
        _, state = jaxbn.batch_norm(params, state, x, True, momentum=0.5)
        ema = optax.incremental_update(state, ema, 0.25)
        state = jax.lax.cond(
            x[0, 0] > 0, lambda: tree_average(state, ema), lambda: state
        )
        return (state, ema), state.mean

    (carried, _), means = jax.lax.scan(step, (state, state), xs)
    assert [a.dtype for a in carried] == ["float32"] * 3
    state = ema = state
    for x, mean in zip(np.asarray(xs, np.float64), means, strict=True):
        state = state._replace(mean=0.5 * (state.mean + x.mean(0)))
        ema = ema._replace(mean=0.75 * ema.mean + 0.25 * state.mean)
        if x[0, 0] > 0:
            state = tree_average(state, ema)
        np.testing.assert_allclose(mean, state.mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("momentum", [0.9, None])
def test_gradient_over_params_and_state_reaches_the_old_statistics(momentum, rng):
    params, state = jaxbn.init(C)
    state = state._replace(count=jnp.float32(3))
    x = jnp.asarray(rng.normal(size=(6, C)), jnp.float32)

    def loss(params, state):
        _, new = jaxbn.batch_norm(params, state, x, True, momentum=momentum)
        return jnp.sum(new.mean)

    _, dstate = jax.grad(loss, (0, 1))(params, state)
    keep = 0.75 if momentum is None else momentum
    np.testing.assert_allclose(dstate.mean, np.full(C, keep), rtol=1e-6)
    dcount = 0.0 if momentum else -(x.mean(0) - state.mean).sum() / 16
    np.testing.assert_allclose(dstate.count, dcount, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", ["int32", "float32"])
def test_count_keeps_its_dtype(dtype, rng):
    params, state = jaxbn.init(C)
    state = state._replace(count=jnp.asarray(2, dtype))
    _, new = jaxbn.batch_norm(params, state, batches(rng)[0], True)
    assert (new.count, new.count.dtype) == (3, dtype)


# Accuracy


@pytest.mark.parametrize(("n", "safe"), [(100, 0.12), (10_000, 0.9)])
def test_deviations_up_to_the_overflow_bound_are_normalized(n, safe, rng):
    """Σ(x-s)² of float32 overflows beyond a deviation of 1.8e19 / √n, where s is the
    mean; the mean s of a sample lowers the bound, by a factor of 8 at most.
    """
    x = rng.normal(size=(n, 1))
    params, state = jaxbn.init(1)
    for factor, fits in ((safe, True), (1.1, False)):
        values = (factor * 1.8446e19 / np.sqrt(n) * x / x.std()).astype(np.float32)
        y, new = jaxbn.batch_norm(params, state, values, True, momentum=0.0)
        assert np.all(np.isfinite(y))
        assert new.count == int(fits)
        np.testing.assert_allclose(np.std(y), 1 if fits else 0, rtol=1e-4)


@pytest.mark.parametrize("rows", [64, 4096])  # small and large for a CPU
@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])
def test_squares_of_the_mean_may_overflow(rows, masked, rng):
    """Σ(x-s)² overflows for s = 0, and is far from that for s near the mean."""
    x = (1e18 + 1e14 * rng.normal(size=(rows, 128))).astype(np.float32)
    mask = np.ones((rows, 1), bool) if masked else None
    y, new = jaxbn.batch_norm(*jaxbn.init(128), x, True, momentum=0.0, mask=mask)
    exact = x.astype(np.float64)
    np.testing.assert_allclose(new.mean, exact.mean(0), rtol=1e-6)
    np.testing.assert_allclose(new.var, exact.var(0, ddof=1), rtol=1e-5)
    y_exact = (exact - exact.mean(0)) / exact.std(0)
    np.testing.assert_allclose(y, y_exact, atol=1e-2)  # x has steps of 7e10


def batch_statistics(x, **options):
    """Return mean and biased variance of one batch, by the public API."""
    params, state = jaxbn.init(x.shape[-1])
    options = {"momentum": 0.0, "unbiased": False, **options}
    _, new = jaxbn.batch_norm(params, state, x, True, **options)
    return np.asarray(new.mean, np.float64), np.asarray(new.var, np.float64)


OUTLIERS = {
    "none": lambda x: x,
    "first at 0": lambda x: np.concatenate([0 * x[:1], x[1:]]),
    "first far": lambda x: np.concatenate([x[:1] + 1e6, x[1:]]),
    "first 64th far": lambda x: x + 1e5 * (np.arange(len(x)) < len(x) // 64)[:, None],
    "last far": lambda x: np.concatenate([x[:-1], x[-1:] - 1e5]),
}


@pytest.mark.parametrize("outlier", OUTLIERS)
@pytest.mark.parametrize("mean", [0.0, 1e2, 1e4, -1e4])
@pytest.mark.parametrize("n", [64, 30_000])
def test_variance_is_accurate_at_a_mean_of_1e4_deviations(outlier, mean, n, rng):
    x = OUTLIERS[outlier](mean + rng.normal(size=(n, 2))).astype(np.float32)
    _, var = batch_statistics(x)
    np.testing.assert_allclose(var, x.astype(np.float64).var(0), rtol=1e-4)


@pytest.mark.parametrize("mean", [0.0, 1e4])
@pytest.mark.parametrize("mask", ["ragged", "first half", "weights"])
def test_masked_variance_is_accurate_at_a_large_mean(mean, mask, rng):
    x = (mean + rng.normal(size=(40, 50, 2))).astype(np.float32)
    x[0] = 0  # masked below
    w = {
        "ragged": np.arange(50)[None, :, None] < rng.integers(1, 50, (40, 1, 1)),
        "first half": np.broadcast_to(np.arange(40)[:, None, None] >= 20, (40, 50, 1)),
        "weights": rng.uniform(size=(40, 50, 1)),
    }[mask] * (np.arange(40)[:, None, None] > 0)
    _, var = batch_statistics(x, mask=w)
    x64, w = x.astype(np.float64), np.broadcast_to(w, x.shape)
    mu = (w * x64).sum((0, 1)) / w.sum((0, 1))
    expected = (w * (x64 - mu) ** 2).sum((0, 1)) / w.sum((0, 1))
    np.testing.assert_allclose(var, expected, rtol=1e-4)


def test_output_has_unit_deviation_at_a_large_mean(rng):
    """The default formula of Flax gives a deviation of 319 here."""
    x = (1e4 + rng.normal(size=(4096, 2))).astype(np.float32)
    params, state = jaxbn.init(2)
    y, _ = jaxbn.batch_norm(params, state, x, train=True)
    np.testing.assert_allclose(np.std(np.asarray(y, np.float64), 0), 1, rtol=1e-3)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e4 + 0.1, -3e7, 1e15])
def test_constant_feature_variance_is_not_negative(value):
    x = np.full((1001, 2), value, np.float32)
    mean, var = batch_statistics(x)
    np.testing.assert_allclose(mean, x[0], rtol=1e-7)
    assert np.all(var >= 0)
    assert np.all(var <= (1e-7 * abs(value)) ** 2)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e4 + 0.1, -3e7])
@pytest.mark.parametrize("mask", [None, np.arange(1001)[:, None] % 3 == 1])
def test_constant_feature_returns_the_bias(value, mask, rng):
    """The factor 1/√ε would magnify an error of the mean 316 times."""
    x = np.full((1001, 2), value, np.float32)
    scale, bias = jnp.asarray(rng.normal(size=(2, 2)))
    params, state = jaxbn.BatchNormParams(scale, bias), jaxbn.init(2)[1]
    y, _ = jaxbn.batch_norm(params, state, x, True, mask=mask)
    np.testing.assert_allclose(y, np.broadcast_to(bias, y.shape), rtol=1e-6)


@pytest.mark.parametrize("autodiff", ["custom_vjp", "jax"])
@pytest.mark.parametrize("std", [1e15, 1e-15])
def test_very_large_and_very_small_values_match_oracle(std, autodiff, rng):
    case = rounded(random_case(rng, (500, C), loc=std / 9, std=std), "float32")
    actual = run(case, autodiff=autodiff, epsilon=0.0, momentum=1.0)
    assert_close(actual, train_step(case, epsilon=0.0, momentum=1.0), 2e-5)


@pytest.mark.parametrize("autodiff", ["custom_vjp", "jax"])
@pytest.mark.parametrize("momentum", [0.0, 0.9, 1.0, None])
def test_state_stays_finite_for_extreme_finite_input(momentum, autodiff, rng):
    largest = np.finfo(np.float32).max
    x = largest * np.where(rng.random((100, C)) < 0.5, -1, 1).astype(np.float32)
    params, state = jaxbn.init(C)
    for batch in (x, np.abs(x), x[:1], x[:0], 1e-45 * np.sign(x), x[:2] / 1e19):
        batch = batch.astype(np.float32)
        _, state = jaxbn.batch_norm(
            params, state, batch, True, momentum=momentum, autodiff=autodiff
        )
        assert np.all(np.isfinite(state.mean))
        assert np.all(np.isfinite(state.var))
    assert state.count == 2  # overflowing, empty and one-element batches do not count


@pytest.mark.parametrize("momentum", [0.0, 0.9, None])
@pytest.mark.parametrize(("dtype", "size"), [("float16", 1e4), ("float32", 1e30)])
def test_narrow_state_does_not_overflow(dtype, size, momentum, rng, x64):
    """The variance of the batch fits float64 but not the dtype of the state."""
    state = jaxbn.BatchNormState(
        jnp.zeros(2, dtype), jnp.ones(2, dtype), jnp.zeros((), jnp.int32)
    )
    params = jaxbn.BatchNormParams(None, None)
    x = jnp.asarray(size * rng.normal(size=(8, 2)))
    for _ in range(2):
        y, state = jaxbn.batch_norm(params, state, x, True, momentum=momentum)
        assert np.all(np.isfinite(y))
    np.testing.assert_array_equal(state.mean, np.zeros(2))
    np.testing.assert_array_equal(state.var, np.ones(2))
