"""Test that N devices compute the statistics of one device with the whole batch."""

import math
import os
import sys
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    TOLERANCE,
    assert_close,
    assert_near,
    collectives,
    rounded,
    run_script,
)
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle import Result, random_case, train_step

import jaxbn
from jaxbn._core import sync

DEVICES, SHARD, C = 4, 6, 3  # SHARD examples on each device
SHAPE = (DEVICES * SHARD, 2, C)
MASKS = {
    "none": lambda rng: np.ones((DEVICES * SHARD, 1, 1)),
    "uneven": lambda rng: rng.random((DEVICES * SHARD, 1, 1)) < 0.6,
    "one shard empty": lambda rng: np.arange(DEVICES * SHARD)[:, None, None] >= SHARD,
    "one example left": lambda rng: np.arange(DEVICES * SHARD)[:, None, None] == 7,
    "all empty": lambda rng: np.zeros((DEVICES * SHARD, 2, 1)),
    "weights": lambda rng: rng.uniform(0, 3, size=(DEVICES * SHARD, 2, C)),
}


def mesh(*axis_types, sizes=(DEVICES,), names=("data",)):
    kinds = axis_types or (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(sizes, names, axis_types=kinds)


def loss_terms(arguments, shared, axis_name, autodiff):
    """Return the part of a loss on this shard, y and the new statistics."""
    x, dy, mask = arguments
    scale, bias, mean, var = shared
    y, new = jaxbn.batch_norm(
        jaxbn.BatchNormParams(scale, bias),
        jaxbn.BatchNormState(mean, var, jnp.int32(3)),
        x,
        True,
        mask=mask,
        axis_name=axis_name,
        autodiff=autodiff,
    )
    return jnp.vdot(dy, y.astype(jnp.float32)), y, new


def by_shard_map(check_vma, names=("data",), sizes=(DEVICES,)):
    axis_name = names[0] if len(names) == 1 else names

    def way(arguments, shared, autodiff):
        def part(arguments, shared):
            loss, y, new = loss_terms(arguments, shared, axis_name, autodiff)
            return loss[None], y, new

        mapped = jax.shard_map(
            part,
            mesh=mesh(sizes=sizes, names=names),
            in_specs=(P(axis_name), P()),
            out_specs=(P(axis_name), P(axis_name), P()),
            check_vma=check_vma,
        )
        return mapped(arguments, shared)

    return way


def by_vmap(arguments, shared, autodiff):
    split = [a.reshape(DEVICES, -1, *a.shape[1:]) for a in arguments]
    part = lambda arguments: loss_terms(arguments, shared, "data", autodiff)  # noqa: E731
    losses, y, new = jax.vmap(part, axis_name="data")(split)
    return losses, y.reshape(SHAPE), jax.tree.map(lambda a: a[1], new)  # same on all


def by_jit(arguments, shared, autodiff):
    where = NamedSharding(mesh(), P("data"))
    arguments = jax.tree.map(lambda a: jax.device_put(a, where), arguments)
    return loss_terms(arguments, shared, None, autodiff)


WAYS = {
    "shard_map": by_shard_map(True),
    "shard_map unchecked": by_shard_map(False),
    "shard_map two axes": by_shard_map(True, names=("a", "b"), sizes=(2, 2)),
    "vmap": by_vmap,
    "jit": by_jit,
}


def run_sharded(case, way, mask, autodiff="custom_vjp") -> Result:
    """Compute every result and gradient of the case, with grad outside the mapping."""
    arguments = tuple(map(jnp.asarray, (case.x, case.dy.astype(np.float32), mask)))
    shared = tuple(map(jnp.asarray, (case.scale, case.bias, case.mean, case.var)))
    (_, (y, new)), (dx, (dscale, dbias, dmean, dvar)) = results_and_gradients(
        way, autodiff, arguments, shared, (case.dmean, case.dvar)
    )
    return Result(y, new.mean, new.var, dx, dscale, dbias, dmean, dvar)


@partial(jax.jit, static_argnums=(0, 1))  # masks of one shape share a program
def results_and_gradients(way, autodiff, arguments, shared, cotangents):
    x, *others = arguments
    dmean, dvar = cotangents

    def loss(x, shared):
        losses, y, new = way((x, *others), shared, autodiff)
        return jnp.sum(losses) + dmean @ new.mean + dvar @ new.var, (y, new)

    return jax.value_and_grad(loss, (0, 1), has_aux=True)(x, shared)


@pytest.fixture
def gather_limit_of_3(monkeypatch):
    """Let 4 devices use the program of more than 64 devices."""
    jax.clear_caches()  # jit does not see the change
    monkeypatch.setattr(sync, "MAX_GATHERED_DEVICES", 3)
    yield
    jax.clear_caches()


@pytest.mark.usefixtures("gather_limit_of_3")
@pytest.mark.parametrize("way", [way for way in WAYS if way != "jit"])
def test_devices_beyond_the_gather_limit_match_oracle(way, rng):
    for mask in MASKS:
        test_devices_match_oracle(way, mask, rng)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("way", WAYS)
def test_devices_match_oracle(way, mask, rng):
    case = rounded(random_case(rng, SHAPE), "float32")
    weights = np.asarray(MASKS[mask](rng), np.float32)
    weights = np.broadcast_to(weights, (SHAPE[0], 2, weights.shape[2]))
    actual = run_sharded(case, WAYS[way], weights)
    assert_close(actual, train_step(case, mask=weights), TOLERANCE["float32"])


@pytest.mark.parametrize(
    ("dtype", "autodiff"), [("bfloat16", "custom_vjp"), ("float32", "jax")]
)
@pytest.mark.parametrize("mask", ["uneven", "one shard empty", "weights"])
@pytest.mark.parametrize("way", WAYS)
def test_bfloat16_and_plain_autodiff_match_oracle(way, mask, dtype, autodiff, rng):
    case = rounded(random_case(rng, SHAPE), dtype)
    mask = MASKS[mask](rng).astype(np.float32)
    actual = run_sharded(case, WAYS[way], mask, autodiff)
    assert_close(actual, train_step(case, mask=mask), TOLERANCE[dtype])


def test_a_fully_masked_shard_leaves_huge_means_alone(rng):
    """Its own mean is 0: at a distance from the mean whose square overflows."""
    x = (3e19 + 1e15 * rng.normal(size=(2, 8, C))).astype(np.float32)
    mask = np.array([False, True])[:, None, None] & np.ones((2, 8, 1), bool)

    @partial(jax.vmap, axis_name="data", out_axes=(0, None))
    def step(x, mask):
        return jaxbn.batch_norm(
            *jaxbn.init(C), x, True, momentum=0.0, axis_name="data", mask=mask
        )

    y, new = step(x, mask)
    exact = x[1].astype(np.float64)
    np.testing.assert_allclose(new.mean, exact.mean(0), rtol=1e-6)
    np.testing.assert_allclose(new.var, exact.var(0, ddof=1), rtol=1e-4)
    want = (exact - exact.mean(0)) / exact.std(0)
    np.testing.assert_allclose(y[1], want, atol=1e-2)


@pytest.mark.parametrize("shape", [SHAPE, (64, C), (64, 3, 3, C)], ids=str)
def test_explicit_sharding_matches_oracle(shape, rng):
    case = rounded(random_case(rng, shape), "float32")
    where = mesh(AxisType.Explicit)
    params = jaxbn.BatchNormParams(jnp.asarray(case.scale), jnp.asarray(case.bias))
    state = jaxbn.BatchNormState(*map(jnp.asarray, (case.mean, case.var, 3)))
    with jax.set_mesh(where):
        put = lambda a: jax.device_put(a, NamedSharding(where, P("data")))  # noqa: E731
        x, dy = put(case.x), put(case.dy)

        @jax.jit
        def step(params, x):
            y, vjp, new = jax.vjp(
                lambda p, x: jaxbn.batch_norm(p, state, x, True),
                params,
                x,
                has_aux=True,
            )
            return y, new, vjp(dy)

        y, new, (dparams, dx) = step(params, x)
    case = case._replace(dmean=0 * case.dmean, dvar=0 * case.dvar)
    want = train_step(case)
    gradients = (dx, dparams.scale, dparams.bias, want.dmean, want.dvar)
    actual = Result(y, new.mean, new.var, *gradients)
    assert_close(actual, want, TOLERANCE["float32"])


SPECS = [P("d", "m"), P("d", None), P(None, "m"), P(None, None), P(("d", "m"), None)]


@pytest.mark.parametrize(
    ("spec", "vectors", "masked"),
    [  # each spec with both kinds of vectors, and both with and without a mask
        (spec, vectors, P(None, None) if (i + j) % 2 else None)
        for i, spec in enumerate(SPECS)
        for j, vectors in enumerate([P(None), P("m")])
    ],
    ids=str,
)
def test_explicit_shardings_may_differ_between_arguments(spec, vectors, masked, rng):
    """Parameters, statistics and mask keep their shardings, which differ from x."""
    case = rounded(random_case(rng, (16, 8)), "float32")
    mask = None if masked is None else (rng.random((16, 1)) < 0.6).astype(np.float32)
    with jax.set_mesh(mesh(*2 * [AxisType.Explicit], sizes=(2, 4), names=("d", "m"))):
        x, dy = (jax.device_put(a, spec) for a in (case.x, case.dy))
        shared = jax.device_put((case.scale, case.bias, case.mean, case.var), vectors)
        weights = None if mask is None else jax.device_put(mask, masked)

        @jax.jit
        def step(x, shared):
            def run(x, shared):
                scale, bias, mean, var = shared
                params = jaxbn.BatchNormParams(scale, bias)
                state = jaxbn.BatchNormState(mean, var, jnp.int32(3))
                y, new = jaxbn.batch_norm(params, state, x, True, mask=weights)
                return y, new.mean, new.var

            outputs, vjp = jax.vjp(run, x, shared)
            dmean, dvar = (jnp.asarray(a) for a in (case.dmean, case.dvar))
            cotangents = (dy, *(jax.reshard(a, vectors) for a in (dmean, dvar)))
            return outputs, vjp(cotangents)

        (y, mean, var), (dx, (dscale, dbias, *dstats)) = step(x, shared)
    actual = Result(y, mean, var, dx, dscale, dbias, *dstats)
    assert_close(actual, train_step(case, mask=mask), TOLERANCE["float32"])
    assert (y.sharding.spec, mean.sharding.spec) == (spec, vectors)


@cache
def grad_inside(way, autodiff):
    """Return a program of y, dx, dscale, dbias and new statistics of the whole batch.

    Each device differentiates the loss of its own shard. The transpose of the psum adds
    to dx the derivatives of the other losses through the statistics, so that dx equals
    the gradient of the sum of all losses.
    """

    def part(arguments, shared):
        def loss(x, shared):
            own = (x, *arguments[1:])
            total, y, new = loss_terms(own, shared, "data", autodiff)
            return total, (y, new)

        grad = jax.grad(loss, (0, 1), has_aux=True)
        (dx, gradients), (y, new) = grad(arguments[0], shared)
        dparams = gradients[:2]
        if way != "shard_map":  # with check_vma, the transpose adds this psum itself
            dparams = jax.lax.psum(dparams, "data")
        return (y, dx), (*dparams, new.mean, new.var)

    if way.startswith("shard_map"):
        mapped = jax.shard_map(
            part,
            mesh=mesh(),
            in_specs=(P("data"), P()),
            out_specs=(P("data"), P()),
            check_vma=way == "shard_map",
        )
        return jax.jit(mapped)
    options: Any = {"in_axes": (0, None), "axis_name": "data"}
    if way == "pmap":
        mapped = jax.pmap(part, devices=jax.devices()[:DEVICES], **options)
    else:
        mapped = jax.jit(jax.vmap(part, **options))

    def split_and_merge(arguments, shared):
        split = [a.reshape(DEVICES, -1, *a.shape[1:]) for a in arguments]
        sharded, shared = mapped(split, shared)
        return [a.reshape(SHAPE) for a in sharded], [a[1] for a in shared]

    return split_and_merge


@pytest.mark.filterwarnings("ignore:.*pmap.*:DeprecationWarning")
@pytest.mark.parametrize(
    ("mask", "dtype", "autodiff"),
    [
        *((mask, "float32", "custom_vjp") for mask in MASKS),
        ("uneven", "float32", "jax"),
        ("uneven", "bfloat16", "custom_vjp"),
        ("one shard empty", "bfloat16", "custom_vjp"),
    ],
)
@pytest.mark.parametrize("way", ["shard_map", "shard_map unchecked", "pmap", "vmap"])
def test_grad_inside_the_mapping_matches_oracle(way, mask, dtype, autodiff, rng):
    case = rounded(random_case(rng, SHAPE), dtype)
    case = case._replace(dmean=0 * case.dmean, dvar=0 * case.dvar)
    mask = np.asarray(MASKS[mask](rng), np.float32)
    mask = np.broadcast_to(mask, (SHAPE[0], 2, mask.shape[2]))
    arguments = tuple(map(jnp.asarray, (case.x, case.dy.astype(np.float32), mask)))
    shared = tuple(map(jnp.asarray, (case.scale, case.bias, case.mean, case.var)))
    want = train_step(case, mask=mask)
    (y, dx), vectors = grad_inside(way, autodiff)(arguments, shared)
    dscale, dbias, mean, var = vectors
    actual = Result(y, mean, var, dx, dscale, dbias, want.dmean, want.dvar)
    assert_close(actual, want, TOLERANCE[dtype])


@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint], ids=["", "remat"])
@pytest.mark.parametrize("check_vma", [True, False])
def test_scan_over_layers_matches_one_device(check_vma, wrap, rng):
    """Outputs, statistics and gradients of three layers in a scan are compared."""
    vectors = [rng.uniform(0.5, 1.5, size=(3, C)).astype(np.float32) for _ in range(4)]
    params = jaxbn.BatchNormParams(jnp.asarray(vectors[0]), jnp.asarray(vectors[1]))
    mean, var = map(jnp.asarray, vectors[2:])
    x, dy = (jnp.asarray(rng.normal(size=SHAPE), jnp.float32) for _ in range(2))

    def layers(variables, x, axis_name):
        def layer(x, variables):
            params, mean, var = variables
            state = jaxbn.BatchNormState(mean, var, jnp.int32(0))
            y, new = jaxbn.batch_norm(params, state, x, True, axis_name=axis_name)
            return jnp.tanh(y), (new.mean, new.var)

        return jax.lax.scan(wrap(layer), x, variables)

    mapped = jax.shard_map(
        partial(layers, axis_name="data"),
        mesh=mesh(),
        in_specs=(P(), P("data")),
        out_specs=(P("data"), P()),
        check_vma=check_vma,
    )

    def loss(apply, variables, x):
        y, stats = apply(variables, x)
        return jnp.vdot(dy, y) + sum(map(jnp.sum, stats)), (y, stats)

    actual, expected = (
        jax.jit(jax.grad(partial(loss, apply), (0, 1), has_aux=True))(
            (params, mean, var), x
        )
        for apply in (mapped, partial(layers, axis_name=None))
    )
    assert_near(actual, expected, 2e-5)


def test_synced_variance_is_accurate_at_a_large_mean(rng):
    x = jnp.asarray(1e4 + rng.normal(size=(DEVICES, 500, C)), jnp.float32)
    params, state = jaxbn.init(C)

    def part(x):
        options = {"momentum": 0.0, "unbiased": False, "axis_name": "data"}
        return jaxbn.batch_norm(params, state, x, True, **options)[1].var

    var = jax.vmap(part, axis_name="data")(x)[0]
    expected = np.asarray(x, np.float64).var((0, 1))
    np.testing.assert_allclose(var, expected, rtol=1e-4)


def test_synced_mean_weights_shards_by_element_count(rng):
    """Flax takes the mean of both means (google/flax#2417), for 4 and 1 elements."""
    x = rng.normal(size=(2, 4, C)).astype(np.float32)
    mask = np.array([[1, 1, 1, 1], [1, 0, 0, 0]])[..., None]
    params, state = jaxbn.init(C)

    def part(x, mask):
        options = {"mask": mask, "axis_name": "data", "momentum": 0.0}
        return jaxbn.batch_norm(params, state, x, True, **options)[1]

    new = jax.vmap(part, axis_name="data")(x, mask)
    valid = np.concatenate([x[0], x[1, :1]]).astype(np.float64)
    np.testing.assert_allclose(new.mean[0], valid.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(new.var[0], valid.var(0, ddof=1), rtol=1e-5)


def test_inference_ignores_axis_name(rng):
    params, state = jaxbn.init(C)
    x = jnp.asarray(rng.normal(size=(5, C)), jnp.float32)
    y, _ = jaxbn.batch_norm(params, state, x, False, axis_name="nowhere")
    np.testing.assert_allclose(y, np.asarray(x) / np.sqrt(1 + 1e-5), rtol=1e-6)


GROUPS = [[0, 2], [1, 3]]


def grouped(x, mask, dy, dmean):
    """Return y, the running mean, and the gradient of a loss on both."""

    def loss(x):
        options = {"axis_name": "data", "axis_index_groups": GROUPS, "mask": mask}
        y, new = jaxbn.batch_norm(*jaxbn.init(C), x, True, momentum=0.0, **options)
        return jnp.vdot(dy, y) + dmean @ new.mean, (y, new.mean)

    dx, (y, mean) = jax.grad(loss, has_aux=True)(x)
    return y, mean, dx


@cache
def grouped_by(way):
    if way == "pmap":
        return jax.pmap(grouped, axis_name="data", devices=jax.devices()[:DEVICES])
    if way == "vmap":
        return jax.jit(jax.vmap(grouped, axis_name="data"))
    each = lambda *a: jax.tree.map(lambda a: a[None], grouped(*(b[0] for b in a)))  # noqa: E731
    specs: Any = {"in_specs": P("data"), "out_specs": P("data")}
    mapped = jax.shard_map(each, mesh=mesh(), check_vma=way == "checked", **specs)
    return jax.jit(mapped)


@pytest.mark.parametrize("way", ["checked", "unchecked", "pmap", "vmap"])
@pytest.mark.parametrize("kind", ["none", "uneven", "weights"])
@pytest.mark.filterwarnings("ignore:.*pmap.*:DeprecationWarning")
def test_axis_index_groups_share_statistics_within_each_group(way, kind, rng):
    shape = (DEVICES, SHARD, C)
    masks = {
        "none": np.ones((DEVICES, SHARD, 1)),
        "uneven": rng.random((DEVICES, SHARD, 1)) < 0.6,
        "weights": rng.uniform(0.1, 3, (DEVICES, SHARD, 1)).astype(np.float32),
    }
    x, dy = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
    dmean = rng.normal(size=(DEVICES, C)).astype(np.float32)
    results = grouped_by(way)(*map(jnp.asarray, (x, masks[kind], dy, dmean)))
    for group in GROUPS:
        # The oracle's running mean has one cotangent: the sum over the group's devices.
        case = random_case(rng, (2 * SHARD, C))
        case = case._replace(
            x=x[group].reshape(-1, C),
            dy=dy[group].reshape(-1, C),
            dmean=dmean[group].sum(0),
            dvar=np.zeros(C),
            scale=np.ones(C),
            bias=np.zeros(C),
        )
        mask = masks[kind][group].reshape(-1, 1)
        expected = train_step(case, mask=mask, momentum=0.0)
        y, mean, dx = (np.asarray(a)[group] for a in results)
        assert_near(y.reshape(-1, C), expected.y, 2e-5)
        for own in mean:
            assert_near(own, expected.mean, 2e-5)
        assert_near(dx.reshape(-1, C), expected.dx, 2e-5, size=1.0)


def test_nan_stays_in_its_group():
    x = jnp.ones((DEVICES, SHARD, C)).at[0, 0, 0].set(jnp.nan)
    options = jnp.ones((DEVICES, SHARD, 1)), jnp.zeros_like(x), jnp.zeros((DEVICES, C))
    y, *_ = grouped_by("vmap")(x, *options)
    assert np.all(np.isfinite(y[jnp.array(GROUPS[1])]))
    assert np.all(np.isnan(y[jnp.array(GROUPS[0])][..., 0]))


@pytest.mark.usefixtures("gather_limit_of_3")
@pytest.mark.parametrize("way", ["vmap", "checked"])
def test_groups_of_many_devices_are_rejected_where_jax_cannot_sum_them(way):
    x = jnp.ones((DEVICES, SHARD, C))
    others = jnp.ones((DEVICES, SHARD, 1)), x, jnp.ones((DEVICES, C))
    with pytest.raises(ValueError, match=r"refused by JAX here.*split the mapped axis"):
        grouped_by(way)(x, *others)


def mapped_step(devices, check_vma, grad, features=16):
    """Return a training step over `devices` and its arguments."""
    where = mesh(sizes=(devices,))
    params, state = jaxbn.init(features)
    specs: Any = {"mesh": where, "check_vma": check_vma}

    def forward(params, x):
        return jaxbn.batch_norm(params, state, x, True, axis_name="data")

    def loss(params, x, apply=forward):
        y, new = apply(params, x)
        return jnp.vdot(jnp.cos(x), y), new

    def inside(params, x):
        (dparams, dx), new = jax.grad(loss, (0, 1), has_aux=True)(params, x)
        return (dparams if check_vma else jax.lax.psum(dparams, "data")), dx, new

    apply = jax.shard_map(
        forward, in_specs=(P(), P("data")), out_specs=(P("data"), P()), **specs
    )
    outside = jax.grad(partial(loss, apply=apply), (0, 1), has_aux=True)
    within = jax.shard_map(
        inside, in_specs=(P(), P("data")), out_specs=(P(), P("data"), P()), **specs
    )
    x = jnp.ones((2 * devices, 3, features))
    return {"none": apply, "outside": outside, "inside": within}[grad], params, x


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("grad", ["none", "outside", "inside"])
@pytest.mark.parametrize("devices", [2, 8])
def test_step_has_one_collective_forward_and_one_backward(devices, grad, check_vma):
    """The size of each collective does not grow with the batch.

    The forward pass sends n, μ and m2 of each device. The backward pass sends the
    cotangents of μ, σ², scale and bias; without check_vma, it sends the cotangents of
    n, μ and m2 of each device and of scale and bias.
    """
    found = collectives(*mapped_step(devices, check_vma, grad))
    forward = ("all-reduce", 3 * devices * 16)
    backward = ("all-reduce", (4 if check_vma else 3 * devices + 2) * 16)
    assert found == ([forward] if grad == "none" else [forward, backward])


def test_collectives_stop_growing_beyond_64_devices():
    """Beyond the limit, two small collectives replace the one that grows."""
    script = """
import jax
jax.config.update("jax_num_cpu_devices", 65)
from helpers import collectives
from test_sync import mapped_step
for devices in (64, 65):
    print([n for _, n in collectives(*mapped_step(devices, True, "outside"))])
"""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    output = run_script(script, cwd=Path(__file__).parent, env=env)
    assert output.splitlines() == [
        str([3 * 64 * 16, 4 * 16]),
        str([16, 16, 4 * 16, 16]),
    ]


@pytest.mark.program
@pytest.mark.parametrize(
    ("shape", "all_reduces"),
    [
        ((64, 32, 16, 16), [32, 32]),  # sums about 0, and about the mean in a branch
        ((512, 16), [16, 32]),
        ((8, 16), [16, 32]),
    ],
    ids=str,
)
def test_sharded_jit_does_not_gather_x(shape, all_reduces):
    """The two all-reduces are of the shift and of the sums about the shift.

    If the sample for the shift lies on one device, JAX may permute it.
    """
    where = NamedSharding(mesh(), P("data"))
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where)
    params, state = jaxbn.init(16)
    found = collectives(lambda x: jaxbn.batch_norm(params, state, x, True), x)
    sizes = [floats for kind, floats in found if kind == "all-reduce"]
    others = [(kind, floats) for kind, floats in found if kind != "all-reduce"]
    assert sorted(sizes) == all_reduces
    assert {kind for kind, _ in others} <= {"collective-permute"}
    assert sum(floats for _, floats in others) <= max(math.prod(shape) / 64, 16)


def by_vmap_sync(x, mask, **options):
    """Return y and the state of the whole batch, computed in DEVICES parts."""
    split = [a.reshape(DEVICES, -1, *a.shape[1:]) for a in (x, mask)]

    @partial(jax.vmap, axis_name="data", out_axes=(0, None))
    def step(x, mask):
        options_of_all = {"mask": mask, "axis_name": "data", "momentum": 0.0}
        return jaxbn.batch_norm(*jaxbn.init(C), x, True, **options_of_all, **options)

    y, new = jax.jit(step)(*split)
    return y.reshape(x.shape), new


# Every weight of one example but one, of one device but one, or of both ends.
WEIGHTS = {
    "dominant": [1, *[1e-6] * (DEVICES * SHARD - 1)],
    "dominant device": np.repeat([1, 1e-7, 1e-7, 2e-7], SHARD),
    "denormal": np.linspace(1e-40, 9e-39, DEVICES * SHARD),
    "large": np.linspace(1e37, 3e38, DEVICES * SHARD),
    "both ends": np.repeat([1e-40, 1e-38, 1e37, 3e38], SHARD),
}


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("limit", [64, 3])
def test_weights_of_any_scale_on_many_devices(weights, limit, rng, monkeypatch):
    monkeypatch.setattr(sync, "MAX_GATHERED_DEVICES", limit)
    jax.clear_caches()
    x = rng.normal(3, 2, size=(DEVICES * SHARD, C)).astype(np.float32)
    mask = np.asarray(weights, np.float32)[:, None]
    _, new = by_vmap_sync(x, mask)
    jax.clear_caches()
    # Multiples of the smallest denormal number, whose squares stay in range.
    w, x = mask.astype(np.float64) / 2.0**-149, x.astype(np.float64)
    mean = (w * x).sum(0) / w.sum(0)
    var = (w * (x - mean) ** 2).sum(0) / w.sum(0)
    pairs = sum((w * np.roll(w, k, 0)).sum(0) for k in range(1, len(w)))
    dof = pairs / (w**2).sum(0)
    np.testing.assert_allclose(new.mean, mean, rtol=2e-6)
    np.testing.assert_allclose(new.var, var * (1 + dof) / dof, rtol=2e-5)


@pytest.mark.parametrize("bad", [np.nan, -1.0, np.inf])
@pytest.mark.parametrize("limit", [64, 3])
def test_devices_with_weights_that_have_no_positive_sum(bad, limit, rng, monkeypatch):
    """A negative sum is left out like an empty one, an infinite one leaves out all."""
    monkeypatch.setattr(sync, "MAX_GATHERED_DEVICES", limit)
    jax.clear_caches()
    x = rng.normal(3, 2, size=(DEVICES * SHARD, C)).astype(np.float32)
    mask = np.ones((DEVICES * SHARD, 1), np.float32)
    mask[:SHARD] = bad
    y, new = by_vmap_sync(x, mask)
    jax.clear_caches()
    if bad != -1:
        expected = x / np.sqrt(1 + 1e-5) if np.isinf(bad) else np.full_like(x, np.nan)
        np.testing.assert_allclose(y, expected, rtol=1e-6)
        np.testing.assert_array_equal(new.mean, np.zeros(C))
        np.testing.assert_array_equal(new.var, np.ones(C))
        assert new.count == 0
    else:
        kept = x[SHARD:].astype(np.float64)
        np.testing.assert_allclose(new.mean, kept.mean(0), rtol=1e-6)
        np.testing.assert_allclose(new.var, kept.var(0, ddof=1), rtol=1e-5)
        assert np.isfinite(y).all()


def test_x64_and_strict_promotion_take_an_axis_name(rng, x64):
    x = rng.normal(3, 2, size=SHAPE).astype(np.float32)
    y, new = by_vmap_sync(x, np.ones((SHAPE[0], 1, 1), bool))
    wide = x.astype(np.float64)
    mean, var = wide.mean((0, 1)), wide.var((0, 1))
    expected = (wide - mean) / np.sqrt(var + 1e-5)
    assert_near(y, expected, TOLERANCE["float32"])
    n = wide[..., 0].size
    actual = (new.mean, new.var)
    assert_near(actual, (mean, n / (n - 1) * var), TOLERANCE["float32"])


@pytest.mark.parametrize("names", [("b", "data"), ("data", "b"), ("b",)], ids=str)
def test_vmap_inside_shard_map_needs_check_vma_false(names, rng):
    """JAX has no collective over an axis of vmap where it checks mesh axes."""
    x = jnp.asarray(rng.normal(3, 2, size=(DEVICES, SHARD, C)), jnp.float32)
    params, state = jaxbn.init(C)

    def step(check_vma):
        def example(x):
            return jaxbn.batch_norm(params, state, x, True, axis_name=names)

        return jax.shard_map(
            jax.vmap(example, axis_name="b", out_axes=(0, None)),
            mesh=mesh(sizes=(2,)),
            in_specs=P("data"),
            out_specs=(P("data"), P("data") if names == ("b",) else P()),
            check_vma=check_vma,
        )

    if len(names) == 2:
        expected = jaxbn.batch_norm(params, state, x, True)
        assert_near(step(False)(x), expected, 1e-5)
    message = r"must name mesh axes inside shard_map.*'b' of a vmap.*check_vma=False"
    with pytest.raises(ValueError, match=message):
        step(True)(x)


@pytest.mark.parametrize(("limit", "number"), [(64, 1), (3, 4)])
def test_floating_masks_need_few_collectives(limit, number, monkeypatch):
    monkeypatch.setattr(sync, "MAX_GATHERED_DEVICES", limit)
    jax.clear_caches()
    params, state = jaxbn.init(C)

    def step(x, mask):
        options = {"axis_name": "data", "mask": mask}
        return jaxbn.batch_norm(params, state, x, True, **options)

    mapped = jax.shard_map(
        step,
        mesh=mesh(),
        in_specs=P("data"),
        out_specs=(P("data"), P()),
    )
    x, mask = np.ones(SHAPE, np.float32), np.ones((SHAPE[0], 1, 1), np.float32)
    found = collectives(mapped, x, mask)
    jax.clear_caches()
    assert [kind for kind, _ in found] == ["all-reduce"] * number
    if number == 1:
        assert found[0][1] == 7 * DEVICES * C
