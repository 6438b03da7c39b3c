"""Test that merged states are the statistics of the union."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_near

import jaxbn

C = 3


def states_of(parts):
    """Return the population statistics of each part, with the biased variance."""
    return [
        jaxbn.BatchNormState(
            *(jnp.asarray(a, jnp.float32) for a in (p.mean(0), p.var(0), i))
        )
        for i, p in enumerate(parts)
    ]


def test_weights_of_examples_give_the_statistics_of_the_union(rng):
    parts = [
        rng.normal(m, s, size=(n, C))
        for n, m, s in ((5, 9, 1), (50, -3, 4), (20, 0, 2))
    ]
    union = np.concatenate(parts)
    for scale in (1, 1e-3):
        merged = jaxbn.merge_states(states_of(parts), [scale * len(p) for p in parts])
        assert_near(tuple(merged), (union.mean(0), union.var(0), np.asarray(0 + 1 + 2)))


def test_equal_weights_are_the_default(rng):
    parts = [rng.normal(m, s, size=(30, C)) for m, s in ((9, 1), (-3, 4))]
    union = np.concatenate(parts)
    merged = jaxbn.merge_states(states_of(parts))
    assert_near(tuple(merged[:2]), (union.mean(0), union.var(0)))


def test_state_of_weight_zero_is_left_out(rng):
    good, bad = states_of([rng.normal(size=(9, C)), np.full((9, C), np.nan)])
    merged = jaxbn.merge_states([bad, good], [0, 2])
    assert_near(tuple(merged[:2]), tuple(good[:2]))


def test_equal_states_stay_as_they_are(rng):
    (state,) = states_of([1e3 + rng.normal(size=(9, C))])
    merged = jaxbn.merge_states([state] * 7)
    assert_near(tuple(merged[:2]), tuple(state[:2]), 1e-6)


def test_one_state_is_returned(rng):
    (state,) = states_of([rng.normal(size=(9, C))])
    assert_near(tuple(jaxbn.merge_states([state], [5])), tuple(state))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_states_are_merged_in_float32(dtype):
    states = [
        jaxbn.BatchNormState(
            jnp.array([mean], dtype), jnp.ones(1, dtype), jnp.float32(1)
        )
        for mean in (1000, 1004)
    ]
    merged = jaxbn.merge_states(states, [70_000, 70_000])  # more than float16 holds
    assert [a.dtype for a in merged] == [dtype, dtype, jnp.float32]
    # 1002 lies between two values of bfloat16.
    np.testing.assert_array_equal(merged.mean, jnp.array([1002], dtype))
    np.testing.assert_array_equal(merged.var, jnp.array([5], dtype))


def test_dtypes_are_promoted_where_they_differ(rng):
    (state,) = states_of([rng.normal(size=(9, C))])
    narrow = jaxbn.BatchNormState(
        state.mean.astype(jnp.bfloat16), state.var.astype(jnp.bfloat16), jnp.int32(2)
    )
    for states, dtype in (([narrow, narrow], jnp.bfloat16), ([narrow, state], "f4")):
        merged = jaxbn.merge_states(states)
        assert [a.dtype for a in merged[:2]] == [dtype, dtype]
    assert jaxbn.merge_states([narrow, narrow]).count.dtype == jnp.int32


def test_one_complex_mean_makes_the_merged_mean_complex():
    real, imaginary = (
        jaxbn.BatchNormState(jnp.array([mean]), jnp.ones(1), jnp.float32(1))
        for mean in (1.0, 1 + 2j)
    )
    for states in ([real, imaginary], [imaginary, real]):
        merged = jaxbn.merge_states(states)
        assert_near(tuple(merged[:2]), (np.array([1 + 1j]), np.array([2.0])))
        assert merged.var.dtype == jnp.float32


def test_states_may_be_a_generator(rng):
    states = states_of([rng.normal(m, 2, size=(9, C)) for m in (1, 5)])
    merged = jaxbn.merge_states(state for state in states)
    assert_near(tuple(merged), tuple(jaxbn.merge_states(states)))


def test_complex_means(rng):
    parts = [
        rng.normal(size=(30, C)) + 1j * rng.normal(m, 2, size=(30, C)) for m in (1, 5)
    ]
    union = np.concatenate(parts)
    states = [
        jaxbn.BatchNormState(
            jnp.asarray(p.mean(0), jnp.complex64),
            jnp.asarray(p.var(0), jnp.float32),
            jnp.float32(1),
        )
        for p in parts
    ]
    assert_near(tuple(jaxbn.merge_states(states)[:2]), (union.mean(0), union.var(0)))


def test_weights_may_be_traced(rng):
    parts = [rng.normal(m, 2, size=(n, C)) for n, m in ((10, 1), (30, 5))]
    union = np.concatenate(parts)
    merged = jax.jit(jaxbn.merge_states)(states_of(parts), jnp.asarray([10.0, 30.0]))
    assert_near(tuple(merged[:2]), (union.mean(0), union.var(0)))


TRACED = [(scale, True) for scale in (1e-43, 1e-39, 1e37)]  # what float32 holds
KNOWN = [(scale, False) for scale in (1e-300, 1e-43, 1e38, 1e300)]


@pytest.mark.parametrize(("scale", "traced"), TRACED + KNOWN)
def test_weights_have_no_scale(scale, traced, rng):
    parts = [rng.normal(m, 2, size=(n, C)) for n, m in ((10, 1), (30, 5))]
    union = np.concatenate(parts)
    merge = jax.jit(jaxbn.merge_states) if traced else jaxbn.merge_states
    weights = np.array([0.25, 0.75]) * scale * 4
    weights = weights.astype(np.float32) if traced else weights
    exact = weights / np.float64(weights.max())
    merged = merge(states_of(parts), weights)
    mean = sum(w * part.mean(0) for w, part in zip(exact, parts, strict=True))
    mean = mean / exact.sum()
    assert_near(merged.mean, mean)
    if scale != 1e-43:  # which rounds the weights to few bits
        assert_near(tuple(merged[:2]), (union.mean(0), union.var(0)))


@pytest.mark.parametrize(
    ("weights", "share"),
    [([0, 0], 0.5), ([-1.0, 3.0], 1.0), ([0.0, 2.0], 1.0), ([np.nan, 1.0], np.nan)],
    ids=str,
)
def test_traced_weights_that_are_refused_where_they_are_known(weights, share, rng):
    parts = [rng.normal(m, 2, size=(20, C)) for m in (1, 5)]
    merged = jax.jit(jaxbn.merge_states)(states_of(parts), jnp.asarray(weights))
    means = [part.mean(0) for part in parts]
    expected = (1 - share) * means[0] + share * means[1]
    np.testing.assert_allclose(merged.mean, expected, rtol=1e-5)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("states", "weights", "error", "message"),
    [
        ([], None, ValueError, "at least one BatchNormState; got none"),
        (iter([]), None, ValueError, "at least one BatchNormState; got none"),
        (jaxbn.init(C)[1], None, ValueError, "got one state alone"),
        ([jaxbn.init(C)], None, TypeError, "each of states must be a BatchNormState"),
        ([jaxbn.init(C)[1], jaxbn.init(4)[1]], None, ValueError, "the same features"),
        ([jaxbn.init(C)[1]] * 2, [1, 2, 3], ValueError, r"each of 2 states; .*\(3,\)"),
        ([jaxbn.init(C)[1]] * 2, [1, -2], ValueError, r"not negative.*\[1.0, -2.0\]"),
        ([jaxbn.init(C)[1]] * 2, [0, 0], ValueError, "not all 0"),
        ([jaxbn.init(C)[1]] * 2, [1, np.inf], ValueError, "must be finite"),
        ([jaxbn.init(C)[1]] * 2, [1, np.nan], ValueError, "must be finite"),
    ],
)
def test_errors(states, weights, error, message):
    with pytest.raises(error, match=message):
        jaxbn.merge_states(states, weights)
