"""Test the public parts of batch norm, alone and composed."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TOLERANCE, assert_close, assert_near, rounded, run
from jax.sharding import PartitionSpec as P
from oracle import batch_moments, effective_size, inference, random_case, train_step

import jaxbn

SHAPE, C = (6, 4, 5, 3), 3
MASKS = {
    "none": lambda rng: None,
    "bool": lambda rng: rng.random((6, 4, 5, 1)) < 0.6,
    "counts": lambda rng: rng.integers(0, 3, size=(6, 1, 5, 1)),
    "weights": lambda rng: 1e-3 * rng.uniform(size=(6, 4, 5, 3)).astype(np.float32),
}


def composed(
    params,
    state,
    x,
    train,
    *,
    momentum=0.99,
    unbiased=True,
    epsilon=1e-5,
    dtype=None,
    **options,
):
    """Return batch norm of its public parts."""
    rest = {k: options[k] for k in ("axis", "autodiff") if k in options}
    rest |= {"epsilon": epsilon, "dtype": dtype}
    if not train:
        return jaxbn.normalize(params, state.mean, state.var, x, **rest), state
    batch = jaxbn.batch_statistics(x, **options)
    new_state = jaxbn.update_running_stats(
        state, batch, momentum=momentum, unbiased=unbiased
    )
    return jaxbn.normalize(params, batch.mean, batch.var, x, **rest), new_state


@pytest.mark.parametrize("autodiff", ["custom_vjp", "jax"])
@pytest.mark.parametrize(
    ("axis", "mask", "momentum", "unbiased"),
    [
        (-1, "none", 0.9, True),
        (1, "none", None, False),
        ((3, 1), "none", 0.5, True),
        (-1, "bool", 0.9, True),
        (-1, "counts", None, True),
        (-1, "weights", 0.9, False),
    ],
    ids=str,
)
def test_parts_compose_to_batch_norm(axis, mask, momentum, unbiased, autodiff, rng):
    case = rounded(random_case(rng, SHAPE, axis), "float32")
    options = {"mask": MASKS[mask](rng), "momentum": momentum, "unbiased": unbiased}
    actual = run(case, function=composed, axis=axis, autodiff=autodiff, **options)
    expected = train_step(case, axis=axis, **options)
    assert_close(actual, expected, TOLERANCE["float32"])
    same = run(case, axis=axis, autodiff=autodiff, **options)
    for name in ("y", "mean", "var"):
        np.testing.assert_array_equal(getattr(actual, name), getattr(same, name))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_parts_compose_in_each_dtype(dtype, rng):
    with jax.enable_x64(dtype == "float64"):
        case = rounded(random_case(rng, SHAPE), dtype)
        actual = run(case, function=composed)
    assert_close(actual, train_step(case), TOLERANCE[dtype])
    assert actual.y.dtype == dtype


@pytest.mark.parametrize("axis", [-1, 1, (1, 3)])
def test_normalize_by_running_statistics_is_inference(axis, rng):
    case = rounded(random_case(rng, SHAPE, axis), "float32")
    actual = run(case, train=False, function=composed, axis=axis)
    assert_close(actual, inference(case, axis=axis), TOLERANCE["float32"])


@pytest.mark.parametrize("mask", MASKS)
def test_statistics_are_mean_biased_variance_and_n(mask, rng):
    case, mask = random_case(rng, SHAPE), MASKS[mask](rng)
    actual = jaxbn.batch_statistics(case.x.astype(np.float32), mask=mask)
    w = np.broadcast_to(np.ones(1, int) if mask is None else mask, SHAPE)
    w = w.astype(np.float64 if w.dtype.kind == "f" else int).reshape(-1, C)
    n = effective_size(w) if w.dtype.kind == "f" else w.sum(0)
    assert_near(tuple(actual), (*batch_moments(case, mask=mask), n))
    assert {a.dtype for a in actual} == {jnp.dtype("float32")}


def test_statistics_of_no_element_are_zero(rng):
    x = rng.normal(size=(4, C)).astype(np.float32)
    for statistics in (
        jaxbn.batch_statistics(x, mask=np.zeros((4, 1), bool)),
        jaxbn.batch_statistics(x[:0]),
    ):
        np.testing.assert_array_equal(np.stack(statistics), np.zeros((3, C)))


def test_statistics_of_half_precision_are_float32(rng):
    x = jnp.asarray(3 + rng.normal(size=(512, C)), jnp.bfloat16)
    mean, var, n = jaxbn.batch_statistics(x)
    exact = np.asarray(x, np.float64)
    assert_near((mean, var), (exact.mean(0), exact.var(0)), 1e-6)
    assert mean.dtype == var.dtype == n.dtype == jnp.float32


def test_statistics_of_complex_values(rng):
    x = (rng.normal(size=(50, C)) + 1j * rng.normal(size=(50, C))).astype(np.complex64)
    batch = jaxbn.batch_statistics(x)
    _, state = jaxbn.init(C)
    new = jaxbn.update_running_stats(state, batch, momentum=0.0)
    exact = x.astype(np.complex128)
    assert_near(tuple(new[:2]), (exact.mean(0), exact.var(0, ddof=1)))
    y = jaxbn.normalize(jaxbn.init(C)[0], batch.mean, batch.var, x)
    assert_near(y, (exact - exact.mean(0)) / np.sqrt(exact.var(0) + 1e-5))


@pytest.mark.parametrize("check_vma", [True, False])
def test_statistics_of_all_devices(check_vma, rng):
    """The gradient of a loss on the statistics, taken inside the mapping."""
    x = rng.normal(2, 3, size=(8, 5, C)).astype(np.float32)
    mask = rng.random((8, 5, 1)) < 0.6
    weights = rng.normal(size=(2, C)).astype(np.float32)

    def loss(x, mask, axis_name=None):
        batch = jaxbn.batch_statistics(x, mask=mask, axis_name=axis_name)
        return jnp.sum(weights * jnp.stack(batch[:2])), batch

    def device(x, mask):
        (_, batch), dx = jax.value_and_grad(loss, has_aux=True)(x, mask, "data")
        return batch, dx

    mapped = jax.shard_map(
        device,
        mesh=jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)),
        in_specs=P("data"),
        out_specs=(P(), P("data")),
        check_vma=check_vma,
    )
    batch, dx = jax.jit(mapped)(x, mask)
    n = mask.sum()
    mean, var = (
        a.reshape(-1)
        for a in batch_moments(random_case(rng, (1, C))._replace(x=x), mask=mask)
    )
    assert_near(tuple(batch), (mean, var, np.full(C, n)))
    want = mask * (weights[0] + 2 * weights[1] * (x - mean)) / n
    # Unchecked, the transpose of the psum adds the losses of the four devices.
    assert_near(dx, want * (1 if check_vma else 4))


@pytest.mark.parametrize("axis_index_groups", [[[0, 1], [2, 3]]])
def test_statistics_of_groups_of_devices(axis_index_groups, rng):
    x = rng.normal(size=(4, 6, C)).astype(np.float32)
    batch = jax.vmap(
        lambda x: jaxbn.batch_statistics(
            x, axis_name="data", axis_index_groups=axis_index_groups
        ),
        axis_name="data",
    )(x)
    for devices in axis_index_groups:
        exact = x[devices].reshape(-1, C).astype(np.float64)
        for device in devices:
            got = (batch.mean[device], batch.var[device])
            assert_near(got, (exact.mean(0), exact.var(0)))


def test_statistics_support_forward_mode(rng):
    x, dx = (rng.normal(size=(20, C)).astype(np.float32) for _ in range(2))
    statistics = lambda x: jaxbn.batch_statistics(x, autodiff="jax")[:2]  # noqa: E731
    _, (dmean, dvar) = jax.jvp(statistics, (x,), (dx,))
    centred = x.astype(np.float64) - x.mean(0, dtype=np.float64)
    assert_near((dmean, dvar), (dx.mean(0), 2 * (centred * dx).mean(0)))
    with pytest.raises(TypeError) as raised:
        jax.jvp(jaxbn.batch_statistics, (x,), (dx,))
    assert 'autodiff="jax"' in "".join(raised.value.__notes__)


@pytest.mark.parametrize(("unbiased", "least"), [(True, 2), (False, 1)])
def test_update_needs_more_elements_than_ddof(unbiased, least, rng):
    _, state = jaxbn.init(C)
    mean, var = rng.normal(size=(2, C)).astype(np.float32) ** 2
    n = jnp.asarray([least - 1, least, 9], jnp.float32)
    batch = jaxbn.BatchStatistics(jnp.asarray(mean), jnp.asarray(var), n)
    new = jaxbn.update_running_stats(state, batch, momentum=0.9, unbiased=unbiased)
    factor = np.asarray([0, least / (least - 1), 9 / 8]) if unbiased else np.ones(C)
    want_mean = np.where([0, 1, 1], 0.1 * mean, 0)
    want_var = np.where([0, 1, 1], 0.9 + 0.1 * factor * var, 1)
    assert_near(tuple(new), (want_mean, want_var, np.asarray(1)))


def test_update_takes_traced_momentum_and_scans(rng):
    xs = rng.normal(size=(5, 8, C)).astype(np.float32)
    _, state = jaxbn.init(C)

    def step(state, inputs):
        momentum, x = inputs
        batch = jaxbn.batch_statistics(x)
        return jaxbn.update_running_stats(state, batch, momentum=momentum), None

    momenta = np.linspace(0.1, 0.9, 5, dtype=np.float32)
    new, _ = jax.lax.scan(step, state, (momenta, xs))
    mean = np.zeros(C)
    for momentum, x in zip(momenta.astype(float), xs.astype(float), strict=True):
        mean = momentum * mean + (1 - momentum) * x.mean(0)
    assert_near(new.mean, mean)


class TestErrors:
    pytestmark = pytest.mark.usefixtures("unchecked_types")

    def test_order_of_update(self):
        _, state = jaxbn.init(C)
        batch = jaxbn.batch_statistics(jnp.ones((4, C)))
        update: Callable = jaxbn.update_running_stats
        with pytest.raises(TypeError, match="state must be a BatchNormState; got Bat"):
            update(batch, state)
        with pytest.raises(TypeError, match="batch must be a BatchStatistics; got Arr"):
            update(state, jnp.ones((4, C)))

    def test_features_of_update(self):
        _, state = jaxbn.init(4)
        batch = jaxbn.batch_statistics(jnp.ones((4, C)))
        with pytest.raises(ValueError, match=r"same features; got .*\(4,\).*\(3,\)"):
            jaxbn.update_running_stats(state, batch)

    def test_arguments_of_normalize(self):
        params, state = jaxbn.init(C)
        x = jnp.ones((4, C))
        normalize: Callable = jaxbn.normalize
        with pytest.raises(TypeError, match="params must be a BatchNormParams; got B"):
            normalize(state, state.mean, state.var, x)
        with pytest.raises(ValueError, match=r"mean must have the shape .* got \(2,\)"):
            jaxbn.normalize(params, jnp.ones(2), state.var, x)
        with pytest.raises(ValueError, match=r"var must have the shape .* got \(4,\)"):
            jaxbn.normalize(params, state.mean, jnp.ones(4), x)
        with pytest.raises(ValueError, match="epsilon must not be negative"):
            jaxbn.normalize(params, state.mean, state.var, x, epsilon=-1.0)

    def test_arguments_of_statistics(self):
        with pytest.raises(TypeError, match="x must be floating or complex; got int32"):
            jaxbn.batch_statistics(jnp.ones((4, C), int))
        with pytest.raises(ValueError, match="mask must broadcast to x"):
            jaxbn.batch_statistics(jnp.ones((4, C)), mask=jnp.ones(5))
        with pytest.raises(ValueError, match="axis_index_groups needs an axis_name"):
            jaxbn.batch_statistics(jnp.ones((4, C)), axis_index_groups=[[0]])
