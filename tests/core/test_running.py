"""The update of running statistics: dtypes that cannot hold it, mesh axes, count."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_near
from jax.sharding import AxisType, NamedSharding
from oracle import random_case, train_step

import jaxbn

P = jax.P
C, SHAPE = 6, (8, 4, 6)
AXES = ("data", "t")  # the second is a letter of the first


def mesh(kind):
    return jax.make_mesh((2, 2), AXES, axis_types=(kind,) * 2)


def random_state(rng):
    mean, var = rng.uniform(1, 2, size=(2, C)).astype(np.float32)
    return jaxbn.BatchNormState(jnp.asarray(mean), jnp.asarray(var), jnp.float32(3))


def random_x(rng, loc=3.0):
    return jnp.asarray(rng.normal(loc, 2, size=SHAPE), jnp.float32)


@pytest.mark.parametrize("momentum", [0.99, 0.5])
def test_half_precision_state_takes_no_mean_beyond_its_range(momentum, rng):
    """The average, 1000 at momentum 0.99, would fit; but it stands for 1e5."""
    params, state = jaxbn.init(2)
    state = jax.tree.map(lambda v: v.astype(jnp.float16), state)
    x = jnp.asarray(rng.normal(size=(8, 2)) + np.array([1e5, 3.0]), jnp.float32)
    _, new = jaxbn.batch_norm(params, state, x, True, momentum=momentum)
    np.testing.assert_array_equal(new.mean[0], state.mean[0])
    np.testing.assert_array_equal(new.var[0], state.var[0])
    expected = (1 - momentum) * np.asarray(x, np.float64)[:, 1].mean()
    np.testing.assert_allclose(new.mean[1], expected, rtol=1e-3)
    assert new.count == 1


SPECS = [(P("t"), P("data")), (P("t"), P()), (P(), P("data"))]


@pytest.mark.parametrize(("of_mean", "of_var"), SPECS, ids=str)
@pytest.mark.parametrize("of_x", [P("data"), P(None, None, "t")], ids=str)
@pytest.mark.parametrize("jit", [True, False])
def test_mean_and_var_may_lie_on_different_explicit_axes(
    of_mean, of_var, of_x, jit, rng
):
    x, state, (params, _) = random_x(rng), random_state(rng), jaxbn.init(C)
    explicit = mesh(AxisType.Explicit)

    def step(function, x, state):
        y, new = function(params, state, x, True)
        return y, new, jaxbn.update_running_stats(state, jaxbn.batch_statistics(x))

    for function in (jaxbn.batch_norm, jaxbn.batch_renorm):
        expected = step(function, x, state)
        with jax.set_mesh(explicit):
            place = lambda v, spec: jax.device_put(v, NamedSharding(explicit, spec))  # noqa: E731
            placed = state._replace(
                mean=place(state.mean, of_mean), var=place(state.var, of_var)
            )
            run = partial(step, function)
            actual = (jax.jit(run) if jit else run)(place(x, of_x), placed)
            assert jax.typeof(actual[1].mean).sharding.spec[0] == (*of_mean, None)[0]
            assert jax.typeof(actual[1].var).sharding.spec[0] == (*of_var, None)[0]
        assert_near(actual, expected, 1e-6)


STATE_SPEC = jaxbn.BatchNormState._make((P("t"), P("t"), P()))


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("masked", ["no", "by shard", "all"])
@pytest.mark.parametrize("function", [jaxbn.batch_norm, jaxbn.batch_renorm])
def test_devices_that_divide_the_features_count_alike(check_vma, masked, function, rng):
    """`count` stays replicated, also where one device's features are all masked."""
    x, state, (params, _) = random_x(rng), random_state(rng), jaxbn.init(C)
    kept = {"no": C, "by shard": C // 2, "all": 0}[masked]
    mask = np.broadcast_to(np.arange(C) < kept, SHAPE)
    expected = function(params, state, x, True, mask=mask)

    @partial(
        jax.shard_map,
        mesh=mesh(AxisType.Auto),
        in_specs=(P("t"), STATE_SPEC, *[P("data", None, "t")] * 2),
        out_specs=(P("data", None, "t"), STATE_SPEC),
        check_vma=check_vma,
    )
    def step(params, state, x, mask):
        return function(params, state, x, True, mask=mask, axis_name="data")

    y, new = jax.jit(step)(params, state, x, mask)
    assert_near((y, new), expected, 1e-5)
    counts = {float(shard.data) for shard in new.count.addressable_shards}
    assert counts == {3.0 + (kept > 0)}


@pytest.mark.parametrize("check_vma", [True, False])
def test_features_of_each_device_need_no_collective_without_an_axis_name(check_vma):
    params, state = jaxbn.init(C)
    each = lambda tree: jax.tree.map(lambda v: jnp.stack([v] * 4), tree)  # noqa: E731

    def step(params, state, x):
        drop = lambda tree: jax.tree.map(lambda v: v[0], tree)  # noqa: E731
        y, new = jaxbn.batch_norm(drop(params), drop(state), x, True)
        return y, jax.tree.map(lambda v: v[None], new)

    spec = P(AXES)
    mapped = jax.shard_map(
        step,
        mesh=mesh(AxisType.Auto),
        in_specs=spec,
        out_specs=spec,
        check_vma=check_vma,
    )
    program = str(jax.make_jaxpr(mapped)(each(params), each(state), jnp.ones(SHAPE)))
    assert "psum" not in program
    assert "pmax" not in program


def test_count_does_not_vary_with_gathered_statistics(rng):
    """Of an all_gather shard_map says that it varies; the batch's statistics do not."""
    x, state, (params, _) = random_x(rng), random_state(rng), jaxbn.init(C)
    divided = jaxbn.BatchNormState._make((P("data"), P("data"), P()))

    @partial(
        jax.shard_map,
        mesh=mesh(AxisType.Auto),
        in_specs=(divided, P("data")),
        out_specs=(P("data"), divided),
    )
    def step(state, x):
        mean, var = (
            jax.lax.all_gather(v, "data", tiled=True) for v in (state.mean, state.var)
        )
        whole = state._replace(mean=mean, var=var)
        y, new = jaxbn.batch_norm(params, whole, x, True, axis_name="data")
        return y, new

    y, new = jax.jit(step)(state, x)
    expected_y, expected = jaxbn.batch_norm(params, state, x, True)
    assert_near(y, expected_y, 1e-5)
    # Each of two devices returns all features.
    assert_near(new.mean, np.tile(expected.mean, 2), 1e-6)
    assert_near(new.var, np.tile(expected.var, 2), 1e-6)
    assert new.count == expected.count


@pytest.mark.parametrize("unbiased", [True, False])
def test_steps_on_many_states_match_oracle(unbiased, rng):
    """vmap over states, with random cotangents of nothing but the statistics."""
    cases = [random_case(rng, (5, 3)) for _ in range(3)]
    x, mean, var = (
        jnp.asarray(np.stack([getattr(case, name) for case in cases]), jnp.float32)
        for name in ("x", "mean", "var")
    )

    def update(x, mean, var):
        state = jaxbn.BatchNormState(mean, var, jnp.float32(0))
        batch = jaxbn.batch_statistics(x)
        return jaxbn.update_running_stats(state, batch, unbiased=unbiased)

    new = jax.vmap(update)(x, mean, var)
    for i, case in enumerate(cases):
        expected = train_step(case, unbiased=unbiased)
        assert_near(new.mean[i], expected.mean, 1e-5)
        assert_near(new.var[i], expected.var, 1e-5)
