"""Search with hypothesis for any shape, mask or option that breaks an invariant."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TOLERANCE, assert_close, rounded, run
from hypothesis import given
from hypothesis import strategies as st
from oracle import random_case, train_step

import jaxbn

OPTIONS = st.fixed_dictionaries(
    {
        "momentum": st.sampled_from([None, 0.0, 0.3, 0.99, 1.0]),
        "unbiased": st.booleans(),
        "epsilon": st.sampled_from([1e-5, 1e-2, 1.0]),
    }
)


@st.composite
def shapes_and_axes(draw):
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=5)))
    ndim = len(shape)
    axes = draw(st.permutations(range(ndim)))[: draw(st.integers(1, ndim))]
    axes = tuple(a - ndim if draw(st.booleans()) else a for a in axes)
    return shape, axes[0] if len(axes) == 1 and draw(st.booleans()) else axes


@st.composite
def masks(draw, shape, rng):
    kept = [n if draw(st.booleans()) else 1 for n in shape]
    kept = kept[draw(st.integers(0, len(kept))) :]
    kind = draw(st.sampled_from(["bool", "int", "float", "sparse", "sparse float"]))
    scale = np.float32(10 ** draw(st.floats(-12, 12)))
    return {
        "bool": lambda: rng.random(kept) < 0.5,
        "int": lambda: rng.integers(0, 4, kept),
        "float": lambda: scale * rng.uniform(0.1, 3.0, kept).astype(np.float32),
        "sparse": lambda: rng.random(kept) < 0.1,
        "sparse float": lambda: scale * (rng.random(kept) < 0.3).astype(np.float32),
    }[kind]()


# float16 ends at 65,504, and squares of float32 at 1.8e19.
EXPONENTS = {"float64": 12, "float32": 12, "bfloat16": 12, "float16": 3}


@given(
    data=st.data(),
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from([*EXPONENTS]),
    options=OPTIONS,
)
def test_batch_norm_matches_oracle_for_any_input(data, seed, dtype, options):
    """Any shape, axis, mask, option and dtype, and magnitudes from 1e-12 to 1e12."""
    rng = np.random.default_rng(seed)
    shape, axis = data.draw(shapes_and_axes())
    largest = EXPONENTS[dtype]
    size = 10 ** data.draw(st.floats(-12, largest))
    loc = data.draw(st.sampled_from([0.0, 0.7, 3.0]))
    with jax.enable_x64(dtype == "float64"):
        drawn = random_case(rng, shape, axis, loc * size, size)
        case = rounded(drawn, dtype)
        mask = data.draw(st.none() | masks(shape, rng))
        actual = run(case, axis=axis, mask=mask, **options)
    expected = train_step(case, axis=axis, mask=mask, **options)
    assert np.all(np.isfinite(actual.mean))
    assert np.all(np.isfinite(actual.var))
    assert_close(actual, expected, TOLERANCE[dtype])


@given(
    data=st.data(),
    shape=st.tuples(st.integers(0, 6), st.integers(1, 3)),
    momentum=st.sampled_from([None, 0.0, 0.9, 1.0]),
)
def test_state_is_finite_for_finite_input(data, shape, momentum):
    """x may hold any finite float32, with huge and masked values among them."""
    floats = st.floats(allow_nan=False, allow_infinity=False, width=32)
    size = shape[0] * shape[1]
    x = data.draw(st.lists(floats, min_size=size, max_size=size))
    w = data.draw(st.lists(st.floats(0, 2, width=32), min_size=size, max_size=size))
    x = jnp.asarray(x, jnp.float32).reshape(shape)
    mask = data.draw(
        st.sampled_from([None, jnp.asarray(w, jnp.float32).reshape(shape)])
    )
    params, state = jaxbn.init(shape[1])
    _, new = jaxbn.batch_norm(params, state, x, True, mask=mask, momentum=momentum)
    assert np.all(np.isfinite(new.mean))
    assert np.all(np.isfinite(new.var))
    assert np.all(np.asarray(new.var) >= 0)


@given(seed=st.integers(0, 2**32 - 1), copies=st.integers(1, 4))
def test_integer_weight_equals_repetition(seed, copies):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(5, 2)), jnp.float32)
    params, state = jaxbn.init(2)
    weight = np.array([1, 1, copies, 1, 1])[:, None]
    _, weighted = jaxbn.batch_norm(params, state, x, True, mask=weight, momentum=None)
    repeated = jnp.repeat(x, weight[:, 0], axis=0)
    _, plain = jaxbn.batch_norm(params, state, repeated, True, momentum=None)
    chex.assert_trees_all_close(weighted, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", range(20))
def test_variance_of_one_element_counted_three_times_is_zero(seed):
    """Three times x, divided by 3, is not exactly x, and rounding is left."""
    rng = np.random.default_rng(seed)
    case = rounded(random_case(rng, (1, 1)), "float32")
    options = {"momentum": 0.0, "unbiased": False, "mask": np.full((1, 1), 3)}
    assert_close(run(case, **options), train_step(case, **options), 2e-5)


@pytest.mark.parametrize("seed", range(20))
def test_one_element_of_large_weight_matches_oracle(seed, x64):
    """Its variance is 0; rows without weight are 1e10 away, epsilon's root 0.003."""
    shape = (4, 3, 1)
    case = rounded(
        random_case(np.random.default_rng(seed), shape, 0, 0, 1e10), "float64"
    )
    mask = np.array([[1e8], [0], [0]], np.float32)
    options = {"axis": 0, "momentum": None, "unbiased": False, "mask": mask}
    assert_close(run(case, **options), train_step(case, **options), 1e-11)
