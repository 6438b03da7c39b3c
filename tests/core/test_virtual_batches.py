"""Test ghost batch norm: groups of a batch, each with its own statistics."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TOLERANCE, assert_close, assert_near, collectives, rounded, run
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle import Result, inference, random_case, train_step, virtual_step

import jaxbn

C = 3
SHAPE = (12, 4, 12, 12)  # each axis can be the features and the batch
MASKS = {
    "bool": lambda rng, shape: rng.random((*shape[:-1], 1)) < 0.6,
    "counts": lambda rng, shape: rng.integers(0, 3, size=(shape[0], 1, 1, 1)),
    "weights": lambda rng, shape: rng.uniform(size=shape).astype(np.float32),
    "one group": lambda rng, shape: np.arange(shape[0]).reshape(-1, 1, 1, 1) >= 4,
    "all groups alike": lambda rng, shape: rng.random((1, *shape[1:])) < 0.6,
    "nothing": lambda rng, shape: np.zeros((1, 1, 1, 1), bool),
    "one value each": lambda rng, shape: (
        np.arange(np.prod(shape[:-1])).reshape(*shape[:-1], 1)
        % np.prod((4, *shape[1:-1]))
        == 0
    ),
}


@pytest.mark.parametrize("autodiff", ["custom_vjp", "jax"])
@pytest.mark.parametrize("size", [1, 3, 4, 12])
@pytest.mark.parametrize("axis", [-1, 1, 0, (3, 1), (0, 2)], ids=str)
def test_matches_oracle(axis, size, autodiff, rng):
    case = rounded(
        random_case(rng, (12, 4, 2, 3) if axis == -1 else SHAPE, axis), "float32"
    )
    options = {"axis": axis, "momentum": 0.8}
    if case.x.shape[0 if 0 not in np.atleast_1d(axis) else 1] % size:
        size = 2
    actual = run(case, virtual_batch_size=size, autodiff=autodiff, **options)
    assert_close(actual, virtual_step(case, size, **options), TOLERANCE["float32"])


@pytest.mark.parametrize("momentum", [0.9, None])
@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("mask", MASKS)
def test_masked_groups_match_oracle(mask, unbiased, momentum, rng):
    case = rounded(random_case(rng, (12, 2, 2, C)), "float32")
    options = {"unbiased": unbiased, "momentum": momentum}
    options["mask"] = MASKS[mask](rng, case.x.shape)
    actual = run(case, virtual_batch_size=4, **options)
    assert_close(actual, virtual_step(case, 4, **options), TOLERANCE["float32"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_matches_oracle_in_each_dtype(dtype, rng):
    with jax.enable_x64(dtype == "float64"):
        case = rounded(random_case(rng, (12, 2, 2, C)), dtype)
        actual = run(case, virtual_batch_size=4)
    assert_close(actual, virtual_step(case, 4), TOLERANCE[dtype])
    assert actual.y.dtype == dtype


def test_group_of_the_whole_batch_is_batch_norm(rng):
    case = rounded(random_case(rng, (12, 4, C)), "float32")
    actual = run(case, virtual_batch_size=12)
    assert_close(actual, train_step(case), TOLERANCE["float32"])


def test_means_far_from_zero_keep_their_accuracy(rng):
    case = rounded(random_case(rng, (64, 8, C), loc=300.0, std=2.0), "float32")
    actual = run(case, virtual_batch_size=16)
    assert_close(actual, virtual_step(case, 16), TOLERANCE["float32"])


def test_inference_ignores_the_size(rng):
    case = rounded(random_case(rng, (7, C)), "float32")
    actual = run(case, train=False, virtual_batch_size=4)
    assert_close(actual, inference(case), TOLERANCE["float32"])


def mesh(kind=AxisType.Auto, devices=4):
    return jax.make_mesh((devices,), ("data",), axis_types=(kind,))


def step_of(case, axis_name, size):
    """Return a function of (x, dy) that returns y, new statistics and gradients."""
    params = jaxbn.BatchNormParams(jnp.asarray(case.scale), jnp.asarray(case.bias))
    state = jaxbn.BatchNormState(*map(jnp.asarray, (case.mean, case.var, 3.0)))

    def step(x, dy):
        def apply(params, x):
            options = {"axis_name": axis_name, "virtual_batch_size": size}
            return jaxbn.batch_norm(params, state, x, True, **options)

        y, vjp, new = jax.vjp(apply, params, x, has_aux=True)
        return (y, vjp(dy)[1]), new[:2]

    return step


def by_shard_map(check_vma):
    def transform(step):
        return jax.jit(
            jax.shard_map(
                step,
                mesh=mesh(),
                in_specs=P("data"),
                out_specs=(P("data"), P()),
                check_vma=check_vma,
            )
        )

    return transform


def by_split(mapping, **options):
    def transform(step):
        def run(x, dy):
            split = [a.reshape(4, -1, *a.shape[1:]) for a in (x, dy)]
            sharded, new = mapping(step, axis_name="data", **options)(*split)
            merged = [a.reshape(x.shape) for a in sharded]
            return merged, [a[1] for a in new]  # the same on all

        return run

    return transform


def by_jit(kind):
    def transform(step):
        def run(x, dy):
            with jax.set_mesh(mesh(kind)):
                where = NamedSharding(mesh(kind), P("data"))
                return jax.jit(step)(*jax.device_put((x, dy), where))

        return run

    return transform


WAYS = {
    "shard_map": by_shard_map(True),
    "shard_map unchecked": by_shard_map(False),
    "vmap": by_split(jax.vmap),
    "pmap": by_split(jax.pmap, devices=jax.devices()[:4]),
    "jit": by_jit(AxisType.Auto),
    "jit explicit": by_jit(AxisType.Explicit),
}


@pytest.mark.filterwarnings("ignore:.*pmap.*:DeprecationWarning")
@pytest.mark.parametrize("size", [2, 6, 12, 24])  # of 6 examples on each device
@pytest.mark.parametrize("way", WAYS)
def test_sizes_are_those_of_the_whole_batch(way, size, rng):
    if way == "jit explicit" and size == 12:
        pytest.skip("an error, tested below")
    case = rounded(random_case(rng, (24, 2, C)), "float32")
    step = step_of(case, None if "jit" in way else "data", size)
    (y, dx), (mean, var) = WAYS[way](step)(*map(jnp.asarray, (case.x, case.dy)))
    case = case._replace(dmean=0 * case.dmean, dvar=0 * case.dvar)
    want = virtual_step(case, size)
    actual = Result(y, mean, var, dx, *want[4:8])
    assert_close(actual, want, TOLERANCE["float32"])


def step_by_66_devices(size, x):
    """Train a step on more devices than JAX takes groups of under vmap."""
    options = {"axis_name": "data", "virtual_batch_size": size}
    variables = jaxbn.init(C)
    y, state = jax.vmap(
        lambda x: jaxbn.batch_norm(*variables, x, True, **options),
        axis_name="data",
        out_axes=(0, None),
    )(x.reshape(66, -1, *x.shape[1:]))
    return y.reshape(x.shape), state


@pytest.mark.parametrize("size", [1, 2, 132])
def test_many_devices_share_all_examples_or_none(size, rng):
    x = jnp.asarray(5 + rng.normal(size=(132, 2, C)), jnp.float32)
    options = {"virtual_batch_size": size}
    want = jaxbn.batch_norm(*jaxbn.init(C), x, True, **options)
    assert_near(step_by_66_devices(size, x), want)


def test_error_of_groups_of_many_devices():
    message = r"virtual_batch_size=4 spans a part.*more than 64 devices.*pass a size"
    with pytest.raises(ValueError, match=message):
        step_by_66_devices(4, jnp.ones((132, 2, C)))


@pytest.mark.parametrize("size", [2, 6])
def test_groups_inside_a_device_gather_nothing(size, rng):
    """jit of sharded x sums the vectors that leave the step, and nothing else."""
    case = rounded(random_case(rng, (24, 2, C)), "float32")
    where = NamedSharding(mesh(), P("data"))
    x = jax.ShapeDtypeStruct(case.x.shape, jnp.float32, sharding=where)
    step = step_of(case, None, size)
    found = collectives(step, x, x)
    assert {kind for kind, _ in found} == {"all-reduce"}
    assert sum(floats for _, floats in found) <= 3 * C


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"virtual_batch_size": 5}, ValueError, r"divide the 12 .*: 1, 2, 3, 4, 6, 12"),
        ({"virtual_batch_size": 24}, ValueError, "got 24"),
        ({"virtual_batch_size": 0}, ValueError, "must be at least 1; got 0"),
        ({"virtual_batch_size": 2.5}, TypeError, "must be an int.*got 2.5"),
        ({"virtual_batch_size": 2, "axis": (0, 1, 2)}, ValueError, "all features"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("unchecked_types")
def test_errors(options, error, message):
    x = jnp.ones((12, 2, C))
    features = x.shape if "axis" in options else C
    with pytest.raises(error, match=message):
        jaxbn.batch_norm(*jaxbn.init(features), x, True, **options)


def test_error_names_the_sizes_that_devices_can_share():
    x = jnp.ones((4, 6, C))
    message = "6 examples of x on each of 4 devices.*got 18.*1, 2, 3, 6, 12, 24"
    with pytest.raises(ValueError, match=message):
        jax.vmap(
            lambda x: jaxbn.batch_norm(
                *jaxbn.init(C), x, True, axis_name="data", virtual_batch_size=18
            ),
            axis_name="data",
        )(x)


def test_error_of_groups_across_the_shards_of_an_explicit_mesh():
    with jax.set_mesh(mesh(AxisType.Explicit)):
        x = jax.device_put(jnp.ones((24, C)), P("data"))
        with pytest.raises(ValueError, match="divide the 6 examples of each of 4 shar"):
            jaxbn.batch_norm(*jaxbn.init(C), x, True, virtual_batch_size=12)


def test_error_of_groups_and_sizes():
    message = re.escape("virtual_batch_size and axis_index_groups both choose")
    with pytest.raises(ValueError, match=message):
        jax.vmap(
            lambda x: jaxbn.batch_norm(
                *jaxbn.init(C),
                x,
                True,
                axis_name="data",
                axis_index_groups=[[0, 1], [2, 3]],
                virtual_batch_size=2,
            ),
            axis_name="data",
        )(jnp.ones((4, 6, C)))


def test_groups_under_remat_and_scan(rng):
    case = rounded(random_case(rng, (4, 12, 2, C)), "float32")
    params, state = jaxbn.init(C)

    @jax.checkpoint
    def step(state, x):
        y, state = jaxbn.batch_norm(params, state, x, True, virtual_batch_size=3)
        return state, y

    new, ys = jax.lax.scan(step, state, case.x)
    mean, var = np.zeros(C), np.ones(C)
    for y, x in zip(ys, case.x.astype(np.float64), strict=True):
        groups = x.reshape(4, -1, C)
        mean = 0.99 * mean + 0.01 * groups.mean(1).mean(0)
        var = 0.99 * var + 0.01 * groups.var(1, ddof=1).mean(0)
        want = (groups - groups.mean(1, keepdims=True)) / np.sqrt(
            groups.var(1, keepdims=True) + 1e-5
        )
        assert_near(y, want.reshape(x.shape))
    assert_near(tuple(new), (mean, var, np.asarray(4)))
