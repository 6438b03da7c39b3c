"""Run the form of the sums for each platform; each is plain JAX and runs anywhere."""

import re
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    TOLERANCE,
    assert_close,
    collectives,
    forced_form,
    rounded,
    run,
    sharded_step,
)
from oracle import random_case, train_step

import jaxbn
from jaxbn._core.sums import tpu
from jaxbn._core.sums.shift import MAX_SQUARED_OFFSET_TO_VAR

FORMS = ["cpu", "cpu small", "cuda", "tpu", "default"]
MASKS = {
    "none": lambda rng: None,
    "bool": lambda rng: rng.random((6, 1, 1)) < 0.6,
    "float": lambda rng: np.maximum(rng.normal(size=(6, 5, 3)), 0),
}


@pytest.fixture(params=FORMS)
def form(request):
    """Run the form of one platform on any platform."""
    with forced_form(request.param):
        yield request.param


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_sums_match_oracle_near_and_far_from_zero(form, dtype, rng, x64):
    assert_sums_match_oracle(dtype, rng)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_sums_of_plain_autodiff_match_oracle(dtype, rng, x64):
    """They have one form for all platforms."""
    assert_sums_match_oracle(dtype, rng, autodiff="jax")


def assert_sums_match_oracle(dtype, rng, **options):
    for loc in (0.0, 3.0, 50.0):  # |μ|/σ about 0, 1.6 and 26
        case = rounded(random_case(rng, (64, 4, 5), loc=loc), dtype)
        assert_close(run(case, **options), train_step(case), TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("shape", "axis"), [((4, 6, 3, 5), 1), ((4, 3, 5), (0, 2)), ((9, 1), -1)], ids=str
)
def test_sums_match_oracle_for_feature_axes(form, shape, axis, rng):
    case = rounded(random_case(rng, shape, axis), "float32")
    assert_close(run(case, axis=axis), train_step(case, axis=axis), 2e-5)


@pytest.mark.parametrize("mask", MASKS)
def test_sums_match_oracle_with_masks(form, mask, rng):
    for loc in (0.0, 50.0):
        case = rounded(random_case(rng, (6, 5, 3), loc=loc), "float32")
        weights = MASKS[mask](rng)
        assert_close(run(case, mask=weights), train_step(case, mask=weights), 2e-5)


def test_far_feature_leaves_near_features_accurate(form, rng):
    """One form is chosen for all features at once and must suit each of them."""
    case = random_case(rng, (512, 4))
    case = rounded(case._replace(x=case.x + np.array([0, 0, 1e4, 0])), "float32")
    actual, expected = run(case), train_step(case)
    np.testing.assert_allclose(actual.var, expected.var, rtol=1e-4)
    near = [0, 1, 3]
    for name in ("dscale", "dbias", "mean"):
        got, want = (np.asarray(getattr(r, name))[near] for r in (actual, expected))
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


def test_variance_is_accurate_at_4_deviations(form, rng):
    """At |μ| = 4σ, the limit for sums about 0 on a CPU, the variance has 6 digits."""
    x = (rng.normal(size=(20_000, 3)) + 3.99).astype(np.float32)
    _, state = jaxbn.batch_norm(*jaxbn.init(3), x, True, momentum=0.0)
    exact = x.astype(np.float64).var(0, ddof=1)
    np.testing.assert_allclose(state.var, exact, rtol=5e-6)


@jax.jit
def train(params, state, x, mask=None):
    """Return y and the statistics of this batch alone."""
    return jaxbn.batch_norm(params, state, x, True, mask=mask, momentum=0.0)


def test_constant_features_return_the_bias(form, rng):
    params, state = jaxbn.init(3)
    bias = rng.normal(size=3).astype(np.float32)
    params = params._replace(bias=jnp.asarray(bias))
    for value in (0.0, 1e4 + 0.1, -3e7):
        y, new = train(params, state, jnp.full((500, 3), value))
        np.testing.assert_array_equal(y, np.tile(bias, (500, 1)))
        assert np.all(np.asarray(new.var) >= 0)


def test_very_small_and_very_large_values_stay_finite(form, rng):
    case = random_case(rng, (40, 3), loc=0.0, std=1.0)
    for size in (1e-30, 1e15, 1e18):
        scaled = (case.x * size).astype(np.float32)
        y, state = train(*jaxbn.init(3), scaled)
        assert np.isfinite(y).all()
        assert np.isfinite(state.var).all()


def test_vmap_matches_single_calls_near_and_far(form, rng):
    """A far member takes the near members with it, and all stay accurate."""
    cases = [random_case(rng, (32, 4), loc=loc) for loc in (0.0, 80.0)]
    xs = np.stack([case.x for case in cases]).astype(np.float32)
    params, state = jaxbn.init(4)

    def loss(x):
        y, new = jaxbn.batch_norm(params, state, x, True)
        return jnp.sum(jnp.sin(y)) + jnp.sum(new.var)

    together = jax.jit(jax.vmap(jax.value_and_grad(loss)))(xs)
    alone = [*map(jax.jit(jax.value_and_grad(loss)), xs)]
    expected = jax.tree.map(lambda *leaves: np.stack(leaves), *alone)
    chex.assert_trees_all_close(together, expected, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("wrap", [jax.checkpoint, jax.jit], ids=["remat", "jit"])
def test_hessian_vector_product_matches_plain_autodiff(form, wrap, rng, x64):
    """The closed form and plain autodiff agree to second order."""
    params, state = jaxbn.init(2, param_dtype=jnp.float64)
    x, v = rng.normal(size=(2, 7, 2))

    def product(autodiff):
        @wrap
        def loss(x):
            y, _ = jaxbn.batch_norm(params, state, x, True, autodiff=autodiff)
            return jnp.sum(jnp.sin(y) * jnp.arange(14.0).reshape(7, 2))

        return jax.jit(lambda: jax.jvp(jax.grad(loss), (x,), (v,))[1])()

    np.testing.assert_allclose(product("custom_vjp"), product("jax"), rtol=1e-9)


def lowered(platform, shape, dtype=jnp.float32):
    """Return the program of a training step on a platform, before XLA's passes."""
    params, state = jaxbn.init(shape[-1])

    def loss(params, x):
        y, new = jaxbn.batch_norm(params, state, x, True)
        return jnp.sum(jnp.sin(y)), new

    step = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    trace = step.trace(params, jax.ShapeDtypeStruct(shape, dtype))
    return trace.lower(lowering_platforms=(platform,)).as_text()


@pytest.fixture
def tpu_form():
    with forced_form("tpu"):
        yield


# Of the running statistics, which a TPU takes for a guess; x has standard deviation 1.
GUESSES = {
    "cold": lambda loc: (0.0, 1.0),
    "warm": lambda loc: (loc + 0.01, 1.0),
    "stale": lambda loc: (-3 * loc - 1, 1e-3),
    "dead": lambda loc: (1e-20, 1e-10),
    "huge": lambda loc: (1e30, 1.0),
    "infinite": lambda loc: (np.inf, 1.0),
    "NaN": lambda loc: (np.nan, np.nan),
}


def state_guessing(guess, loc, features):
    mean, var = (jnp.full(features, v, jnp.float32) for v in GUESSES[guess](loc))
    return jaxbn.BatchNormState(mean, var, jnp.float32(1))


@pytest.mark.usefixtures("tpu_form")
@pytest.mark.parametrize("loc", [0.0, 3.0, 100.0, 1e4])
def test_variance_is_accurate_for_any_running_statistics(loc, rng):
    x = (rng.normal(size=(20_000, 3)) + loc).astype(np.float32)
    params, _ = jaxbn.init(3)
    exact = x.astype(np.float64)
    expected = (exact - exact.mean(0)) / np.sqrt(exact.var(0) + 1e-5)
    for guess in GUESSES:
        y, new = train(params, state_guessing(guess, loc, 3), x)
        close = partial(np.testing.assert_allclose, err_msg=guess)
        close(new.var, exact.var(0, ddof=1), rtol=5e-6)
        close(new.mean, exact.mean(0), rtol=1e-6, atol=2e-6)
        close(y, expected, rtol=0, atol=2e-5 + 1e-6 * loc)


@pytest.mark.usefixtures("tpu_form")
@pytest.mark.parametrize("function", [jaxbn.batch_norm, jaxbn.batch_renorm])
def test_steps_hand_the_running_statistics_on_as_the_guess(function, rng, monkeypatch):
    """About a warm guess the sums do not cancel, and the sample's are not taken."""

    def fail(x, *_):
        return (jnp.full((1, 3), jnp.nan),) * 3

    monkeypatch.setattr(tpu, "sums_shifted_by_sample", fail)
    x = jnp.asarray(rng.normal(size=(200, 3)) + 100, jnp.float32)
    params, _ = jaxbn.init(3)
    for guess, is_near in (("warm", True), ("cold", False)):
        y, _ = function(params, state_guessing(guess, 100.0, 3), x, True)
        assert bool(np.isfinite(y).all()) == is_near


@pytest.mark.usefixtures("tpu_form")
def test_second_derivative_does_not_depend_on_running_statistics(rng):
    """A select between two sums must not multiply the infinite ones by 0."""
    params, _ = jaxbn.init(2)
    x = jnp.asarray(rng.normal(size=(16, 2)) + 50, jnp.float32)
    weights = jnp.asarray(rng.normal(size=(16, 2)), jnp.float32)

    def squared_gradient(x, state):
        def loss(x):
            y, _ = jaxbn.batch_norm(params, state, x, True)
            return jnp.sum(jnp.sin(y) * weights)

        return jnp.sum(jax.grad(loss)(x) ** 2)

    derivative = jax.jit(jax.grad(squared_gradient))
    expected = derivative(x, jaxbn.init(2)[1])
    for guess in GUESSES:
        actual = derivative(x, state_guessing(guess, 50.0, 2))
        close = {"rtol": 0, "atol": 1e-3, "err_msg": guess}
        np.testing.assert_allclose(actual, expected, **close)


@pytest.mark.usefixtures("tpu_form")
@pytest.mark.parametrize("mask", ["bool", "float"])
def test_masked_moments_do_not_depend_on_running_statistics(mask, rng):
    case = rounded(random_case(rng, (6, 5, 3), loc=50.0), "float32")
    weights = MASKS[mask](rng)
    expected = train_step(case, mask=weights, momentum=0.0)
    for guess in GUESSES:
        state = state_guessing(guess, 50.0, 3)
        _, new = train(jaxbn.init(3)[0], state, case.x, weights)
        close = partial(np.testing.assert_allclose, err_msg=guess)
        close(new.mean, expected.mean, rtol=1e-6)
        close(new.var, expected.var, rtol=1e-4)


@pytest.mark.usefixtures("tpu_form")
@pytest.mark.parametrize("shape", [(4096, 256), (24, 16, 16, 64), (40, 8)], ids=str)
def test_sharded_tpu_form_needs_two_all_reduces_while_its_sums_are_accurate(shape):
    """One in each direction, of two vectors, as Flax's. A branch holds the others."""
    step = sharded_step(shape, 8)
    assert collectives(*step, branches=False) == [("all-reduce", 2 * shape[-1])] * 2
    kinds = {kind for kind, _ in collectives(*step)}
    assert kinds <= {"all-reduce", "collective-permute"}


@pytest.mark.parametrize(
    ("guess", "loc", "shift"),
    [
        ("cold", 3.0, 0.0),
        ("warm", 3.0, 0.0),
        ("dead", 0.0, 0.0),
        ("warm", 100.0, 100.01),
        ("cold", 100.0, 100.0),
        ("stale", 100.0, 100.0),
        ("NaN", 3.0, 0.0),
    ],
)
def test_tpu_form_shifts_by_the_guess_unless_its_sums_cancel(guess, loc, shift, rng):
    """The last resort is the mean of a sample, here within 0.3 of the mean."""
    x = jnp.asarray(rng.normal(size=(20_000, 3)) + loc, jnp.float32)
    mean, var, _ = state_guessing(guess, loc, (1, 3))
    chosen, *_ = tpu.sums_shifted_by_guess_if_safe(
        x, None, (mean, var), (0,), jnp.float32
    )
    is_sampled = guess in ("cold", "stale") and loc == 100
    np.testing.assert_allclose(chosen, np.full((1, 3), shift), atol=0.3 * is_sampled)


@pytest.mark.program
@pytest.mark.parametrize(
    ("platform", "barriers"), [("cuda", 2), ("rocm", 0), ("tpu", 0)]
)
def test_accelerator_programs_contain_their_own_form_alone(platform, barriers):
    """CUDA cuts the sums of both directions; a TPU tests whether sums cancel."""
    program = lowered(platform, (4096, 64))
    assert program.count("stablehlo.optimization_barrier") == barriers
    limit = f"dense<{MAX_SQUARED_OFFSET_TO_VAR:.6e}>"
    assert (limit in program) == (platform == "tpu")
    assert ("complex" in program) == (platform == "cuda")


@pytest.mark.program
@pytest.mark.parametrize(("n", "conditionals"), [(128, 0), (4096, 1)])
def test_cpu_program_has_one_conditional_if_x_is_large(n, conditionals):
    program = lowered("cpu", (n, 64))
    assert program.count(f"dense<{MAX_SQUARED_OFFSET_TO_VAR:.6e}>") == conditionals
    assert "complex" not in program


LARGE = (64, 16, 16, 16)  # enough elements for the CPU's conditional


def members(rng, count, loc):
    """Return inputs of an ensemble; those of the last member have mean `loc`."""
    xs = rng.normal(size=(count, *LARGE))
    xs[-1] += loc
    return xs.astype(np.float32)


def results_and_gradients(x):
    params, state = jaxbn.init(LARGE[-1])

    def loss(x):
        y, new = jaxbn.batch_norm(params, state, x, True)
        return jnp.sum(jnp.sin(y)) + jnp.sum(new.var), (y, new)

    return jax.grad(loss, has_aux=True)(x)


def assert_equal_to_single_calls(results, xs):
    alone = [*map(jax.jit(results_and_gradients), xs)]
    expected = jax.tree.map(lambda *leaves: np.stack(leaves), *alone)
    chex.assert_trees_all_close(results, expected, rtol=2e-4, atol=2e-5)


@pytest.mark.program
@pytest.mark.parametrize("loc", [0.0, 80.0])
def test_vmap_keeps_one_conditional(loc, rng):
    xs = members(rng, 3, loc)
    ensemble = jax.jit(jax.vmap(results_and_gradients)).lower(xs).compile()
    assert len(re.findall(r" conditional\(", ensemble.as_text() or "")) == 1
    assert_equal_to_single_calls(ensemble(xs), xs)


@pytest.mark.program
def test_nested_vmap_keeps_one_conditional(rng):
    xs = members(rng, 4, 80.0)
    ensemble = jax.jit(jax.vmap(jax.vmap(results_and_gradients)))
    nested = xs.reshape(2, 2, *LARGE)
    program = ensemble.lower(nested).compile().as_text() or ""
    assert len(re.findall(r" conditional\(", program)) == 1
    flat = jax.tree.map(lambda a: a.reshape(4, *a.shape[2:]), ensemble(nested))
    assert_equal_to_single_calls(flat, xs)


@pytest.mark.parametrize("check_vma", [True, False])
def test_vmap_inside_shard_map_matches_single_calls(check_vma, rng):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    xs, spec = members(rng, 4, 80.0), jax.P("data")
    ensemble = jax.shard_map(
        jax.vmap(results_and_gradients),
        mesh=mesh,
        in_specs=spec,
        out_specs=spec,
        check_vma=check_vma,
    )
    assert_equal_to_single_calls(jax.jit(ensemble)(xs), xs)


def test_second_derivatives_pass_through_vmap(rng):
    xs = (rng.normal(size=(2, *LARGE)) + 1).astype(np.float32)

    def squared_gradient(x):
        return jnp.sum(results_and_gradients(x)[0] ** 2)

    gradient = jax.grad(squared_gradient)
    together = jax.jit(jax.vmap(gradient))(xs)
    expected = np.stack([*map(jax.jit(gradient), xs)])
    np.testing.assert_allclose(together, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.program
def test_sums_do_not_materialize_a_cast_of_x():
    """Casts of bfloat16 stay inside the sums on a CPU, which writes only y and dx."""
    shape = (64, 16, 16, 64)
    params, state = jaxbn.init(64)
    x = jnp.zeros(shape, jnp.bfloat16)

    def apply(params, x):
        return jaxbn.batch_norm(params, state, x, True)

    def forward(params, x):
        return jax.vjp(apply, params, x, has_aux=True)

    _, vjp, _ = forward(params, x)
    step = jax.jit(forward).lower(params, x).compile().as_text()
    back = jax.jit(lambda vjp, dy: vjp(dy)).lower(vjp, x).compile().as_text()
    for program in (step or "", back or ""):
        entry = program[program.index("ENTRY") :]
        assert not re.search(r"= f32\[64,16,16,64\]", entry)
