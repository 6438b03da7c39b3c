"""Statistics over a mapped axis: N devices equal one device with the whole batch."""

import math
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TOLERANCE, assert_close, rounded
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle import Result, random_case, train_step

import jaxbn
from jaxbn._core import sync

DEVICES, ROWS, C = 4, 6, 3
SHAPE = (DEVICES * ROWS, 2, C)
MASKS = {
    "none": lambda rng: np.ones((DEVICES * ROWS, 1, 1)),
    "uneven": lambda rng: rng.random((DEVICES * ROWS, 1, 1)) < 0.6,
    "one shard empty": lambda rng: np.arange(DEVICES * ROWS)[:, None, None] >= ROWS,
    "one row left": lambda rng: np.arange(DEVICES * ROWS)[:, None, None] == 7,
    "all empty": lambda rng: np.zeros((DEVICES * ROWS, 2, 1)),
    "weights": lambda rng: rng.uniform(0, 3, size=(DEVICES * ROWS, 2, C)),
}


def mesh(*axis_types, sizes=(DEVICES,), names=("data",)):
    kinds = axis_types or (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(sizes, names, axis_types=kinds)


def loss_terms(arguments, shared, axis_name, autodiff):
    """This shard's part of a loss, and the new statistics, all of a shard's inputs."""
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
    """All that jaxbn computes for the case, with grad outside of the mapping."""
    x, dy, mask = map(jnp.asarray, (case.x, case.dy.astype(np.float32), mask))
    shared = tuple(map(jnp.asarray, (case.scale, case.bias, case.mean, case.var)))

    def loss(x, shared):
        losses, y, new = way((x, dy, mask), shared, autodiff)
        return jnp.sum(losses) + case.dmean @ new.mean + case.dvar @ new.var, (y, new)

    grad = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    (_, (y, new)), (dx, (dscale, dbias, dmean, dvar)) = grad(x, shared)
    return Result(y, new.mean, new.var, dx, dscale, dbias, dmean, dvar)


@pytest.fixture
def few_slots(monkeypatch):
    """4 devices are many: what is done over more than 64 of them."""
    jax.clear_caches()  # they do not know the constant
    monkeypatch.setattr(sync, "MAX_GATHERED_DEVICES", 3)
    yield
    jax.clear_caches()


@pytest.mark.usefixtures("few_slots")
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("way", [way for way in WAYS if way != "jit"])
def test_many_devices_equal_one(way, mask, rng):
    test_n_devices_equal_one(way, mask, rng)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("way", WAYS)
def test_n_devices_equal_one(way, mask, rng):
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
def test_bfloat16_and_plain_autodiff(way, mask, dtype, autodiff, rng):
    case = rounded(random_case(rng, SHAPE), dtype)
    mask = MASKS[mask](rng).astype(np.float32)
    actual = run_sharded(case, WAYS[way], mask, autodiff)
    assert_close(actual, train_step(case, mask=mask), TOLERANCE[dtype])


@pytest.mark.parametrize("shape", [SHAPE, (64, C), (64, 3, 3, C)], ids=str)
def test_jit_with_explicit_axes(shape, rng):
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


@pytest.mark.parametrize("masked", [P(None, None), None], ids=str)
@pytest.mark.parametrize("vectors", [P(None), P("m")])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_explicit_axes_need_not_agree(spec, vectors, masked, rng):
    """Parameters, statistics and mask lie elsewhere than x; all stay where they are."""
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


def grad_inside(way, arguments, shared, autodiff):
    """y, dx, and of the whole batch dscale, dbias and the new statistics.

    Each device differentiates the loss of its own rows. The transpose of the psum adds
    to dx what the other devices' losses owe it through the statistics, so that it
    equals the gradient of the sum of all losses.
    """

    def part(arguments, shared):
        def loss(x, shared):
            own = (x, *arguments[1:])
            total, y, new = loss_terms(own, shared, "data", autodiff)
            return total, (y, new)

        grad = jax.grad(loss, (0, 1), has_aux=True)
        (dx, gradients), (y, new) = grad(arguments[0], shared)
        dparams = gradients[:2]
        if way != "shard_map":  # which alone knows that each holds a part of the sum
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
        rows, shared = jax.jit(mapped)(arguments, shared)
        return *rows, *shared
    devices = {"devices": jax.devices()[:DEVICES]} if way == "pmap" else {}
    mapped = getattr(jax, way)(part, in_axes=(0, None), axis_name="data", **devices)
    split = [a.reshape(DEVICES, -1, *a.shape[1:]) for a in arguments]
    rows, shared = mapped(split, shared)
    return *(a.reshape(SHAPE) for a in rows), *(a[1] for a in shared)


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
def test_grad_inside(way, mask, dtype, autodiff, rng):
    case = rounded(random_case(rng, SHAPE), dtype)
    case = case._replace(dmean=0 * case.dmean, dvar=0 * case.dvar)
    mask = np.asarray(MASKS[mask](rng), np.float32)
    mask = np.broadcast_to(mask, (SHAPE[0], 2, mask.shape[2]))
    arguments = tuple(map(jnp.asarray, (case.x, case.dy.astype(np.float32), mask)))
    shared = tuple(map(jnp.asarray, (case.scale, case.bias, case.mean, case.var)))
    want = train_step(case, mask=mask)
    y, dx, dscale, dbias, mean, var = grad_inside(way, arguments, shared, autodiff)
    actual = Result(y, mean, var, dx, dscale, dbias, want.dmean, want.dvar)
    assert_close(actual, want, TOLERANCE[dtype])


@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint], ids=["", "remat"])
@pytest.mark.parametrize("check_vma", [True, False])
def test_scan_over_layers_inside(check_vma, wrap, rng):
    """Three layers in a scan, over devices and on one: everything and its gradient."""
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

    ours, one = (
        jax.jit(jax.grad(partial(loss, apply), (0, 1), has_aux=True))(
            (params, mean, var), x
        )
        for apply in (mapped, partial(layers, axis_name=None))
    )
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * np.abs(b).max())


def test_variance_over_devices_at_a_large_mean(rng):
    x = jnp.asarray(1e4 + rng.normal(size=(DEVICES, 500, C)), jnp.float32)
    params, state = jaxbn.init(C)

    def part(x):
        options = {"momentum": 0.0, "unbiased": False, "axis_name": "data"}
        return jaxbn.batch_norm(params, state, x, True, **options)[1].var

    var = jax.vmap(part, axis_name="data")(x)[0]
    expected = np.asarray(x, np.float64).var((0, 1))
    np.testing.assert_allclose(var, expected, rtol=1e-4)


def test_two_shards_with_4_and_1_valid_rows_give_the_true_mean(rng):
    """flax.linen takes the mean of the two means: google/flax#2417."""
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


def test_the_axis_is_ignored_at_inference(rng):
    params, state = jaxbn.init(C)
    x = jnp.asarray(rng.normal(size=(5, C)), jnp.float32)
    y, _ = jaxbn.batch_norm(params, state, x, False, axis_name="nowhere")
    np.testing.assert_allclose(y, np.asarray(x) / np.sqrt(1 + 1e-5), rtol=1e-6)


GROUPS = [[0, 2], [1, 3]]


def grouped(x, axis_index_groups=GROUPS):
    params, state = jaxbn.init(C)
    options = {"axis_name": "data", "axis_index_groups": axis_index_groups}
    y, new = jaxbn.batch_norm(params, state, x, True, momentum=0.0, **options)
    return y, new.mean


@pytest.mark.parametrize("way", ["shard_map", "pmap"])
@pytest.mark.filterwarnings("ignore:.*pmap.*:DeprecationWarning")
def test_groups_share_statistics_among_themselves(way, rng):
    x = jnp.asarray(rng.normal(size=(DEVICES, ROWS, C)), jnp.float32)
    if way == "pmap":
        mapped = jax.pmap(grouped, axis_name="data", devices=jax.devices()[:DEVICES])
    else:
        specs: Any = {"in_specs": P("data"), "out_specs": P("data")}
        specs["check_vma"] = False
        each = lambda x: jax.tree.map(lambda a: a[None], grouped(x[0]))  # noqa: E731
        mapped = jax.jit(jax.shard_map(each, mesh=mesh(), **specs))
    y, mean = mapped(x)
    for group in GROUPS:
        together = np.asarray(x, np.float64)[group]
        mu, sigma2 = together.mean((0, 1)), together.var((0, 1))
        for device in group:
            np.testing.assert_allclose(mean[device], mu, rtol=1e-4, atol=1e-6)
            expected = (np.asarray(x[device]) - mu) / np.sqrt(sigma2 + 1e-5)
            np.testing.assert_allclose(y[device], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", ["vmap", "shard_map checked"])
def test_groups_where_jax_refuses_them(way):
    x = jnp.ones((DEVICES, ROWS, C))
    mapped = jax.vmap(grouped, axis_name="data")
    if way != "vmap":
        mapped = jax.shard_map(
            lambda x: grouped(x[0]),
            mesh=mesh(),
            in_specs=P("data"),
            out_specs=P("data"),
        )
    with pytest.raises(ValueError, match=r"refused by JAX here.*split the mapped axis"):
        mapped(x)


def collectives(function, *arguments):
    """Kind and number of floats of each collective in the compiled program."""
    text = str(jax.jit(function).lower(*arguments).compile().as_text())
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    found = re.findall(rf"= (\(.*?\)|\S+) ({kinds})(?:-start)?\(", text)
    return [(kind, floats(shapes)) for shapes, kind in found]


def floats(shapes):
    """Of (f32[2,3]{1,0}, f32[4]{0}): 10."""
    sizes = re.findall(r"f32\[([\d,]*)\]", shapes)
    return sum(math.prod(map(int, filter(None, size.split(",")))) for size in sizes)


def mapped_step(devices, check_vma, grad, channels=16):
    """A training step over `devices`, and arguments for it."""
    where = mesh(sizes=(devices,))
    params, state = jaxbn.init(channels)
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
    x = jnp.ones((2 * devices, 3, channels))
    return {"none": apply, "outside": outside, "inside": within}[grad], params, x


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("grad", ["none", "outside", "inside"])
@pytest.mark.parametrize("devices", [2, 8])
def test_one_collective_forward_and_one_backward(devices, grad, check_vma):
    """In the compiled program, with bytes that do not grow with the batch.

    Forward n, μ and m2 of each device; backward the cotangents of μ, σ², scale and
    bias, or, where shard_map keeps no account, those of the slots, scale and bias.
    """
    found = collectives(*mapped_step(devices, check_vma, grad))
    forward = ("all-reduce", 3 * devices * 16)
    backward = ("all-reduce", (4 if check_vma else 3 * devices + 2) * 16)
    assert found == ([forward] if grad == "none" else [forward, backward])


def test_one_collective_up_to_64_devices_and_two_small_ones_beyond():
    """The two do not grow with the devices."""
    script = """
import jax
jax.config.update("jax_num_cpu_devices", 65)
from test_sync import collectives, mapped_step
for devices in (64, 65):
    print([n for _, n in collectives(*mapped_step(devices, True, "outside"))])
"""
    run = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parent,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.splitlines() == [
        str([3 * 64 * 16, 4 * 16]),
        str([16, 16, 4 * 16, 16]),
    ]


@pytest.mark.parametrize(
    ("shape", "all_reduces"),
    [
        ((64, 8, 8, 16), [16, 32, 32]),  # of which one for sums about 0, else all
        ((512, 16), [16, 32]),
        ((8, 16), [16, 32]),
    ],
    ids=str,
)
def test_sharded_jit_does_not_gather_x(shape, all_reduces):
    """Two all-reduces, of the shift and of the sums about it.

    Where the sample for the shift lies on one device its rows may be dealt out.
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
