"""Every form of the sums, with every axis of x divided over the devices of a mesh.

Under plain `jit` XLA's partitioner divides the program, and it can lose rows. With rows
divided over 4 devices (jaxlib 0.10.2 to 0.12.0.1), a slice with a stride that leaves
one row is wrong where the stride is the whole axis:

    mesh = jax.make_mesh((4,), ("rows",))
    x = jax.device_put(jnp.arange(1.0, 9.0), NamedSharding(mesh, P("rows")))
    jax.jit(lambda x: sum(jax.lax.slice_in_dim(x, i, None, 8) for i in range(8)))(x)

It returns less than 36. `every_kth` takes such a row without a stride.

`pytest tests/core/sums/test_sharded.py --every-row` takes all rows from 1 to 64.
"""

import itertools
from contextlib import nullcontext
from functools import reduce

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, forced_form, outputs_and_gradients, rounded
from jax.sharding import AxisType, NamedSharding
from oracle import Result, random_case, train_step

import jaxbn
from jaxbn._core.axes import every_kth

P = jax.P
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
FORMS = ["cpu", "cuda", "tpu", "default", "cpu small"]
MESHES = [(2,), (4,), (8,), (2, 2), (2, 4), (4, 2)]
KINDS = {"auto": [AUTO] * 2, "explicit": [EXPLICIT] * 2, "mixed": [EXPLICIT, AUTO]}


def make_mesh(sizes, kinds):
    names = ("a", "b")[: len(sizes)]
    return jax.make_mesh(sizes, names, axis_types=tuple(kinds[-len(sizes) :]))


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_every_kth_row_of_a_sharded_axis(devices):
    """The reproduction above, for runs that are one row, two rows or three."""
    where = NamedSharding(make_mesh((devices,), [AUTO]), P("a"))

    def add(rows):
        return jnp.sum(reduce(jnp.add, rows))

    @jax.jit
    def sums(arrays):
        arrays = jax.lax.with_sharding_constraint(arrays, where)
        return [
            [add(every_kth(x, k, 0, i) for i in range(k)) for k in strides(x)]
            for x in arrays
        ]

    def strides(x):
        return [len(x) // runs for runs in (1, 2, 3) if len(x) % runs == 0]

    arrays = [np.arange(1, n + 1, dtype=np.float32) for n in range(3, 31)]
    for x, found in zip(arrays, sums(arrays), strict=True):
        assert found == [x.sum()] * len(strides(x)), len(x)


def draw_spec(rng, axis, sizes):
    """Return a spec that divides this axis of x, and sometimes a second one."""
    spec: list = [None] * 4
    spec[axis] = "a"
    if len(sizes) == 2:
        other = rng.integers(4)
        spec[other] = "b"
        spec[axis] = ("a", "b") if other == axis else "a"
    return P(*spec)


def draw_case(rng, spec, mesh, feature, rows):
    """Return a case with about `rows` rows along each divided axis.

    An explicit axis is divided equally, and so are features.
    """
    shape = [3, 2, 3, 2]
    shape[feature] = 4
    for axis, names in enumerate(spec):
        devices = int(np.prod([mesh.shape[name] for name in names or ()]))
        if names is not None and axis == feature:
            shape[axis] = 8
        elif names is not None:
            is_explicit = EXPLICIT in mesh.axis_types
            shape[axis] = -(-rows // devices) * devices if is_explicit else rows
    loc = rng.choice([0.0, 3.0, 50.0])
    return rounded(random_case(rng, tuple(shape), feature, loc=loc), "float32")


def draw_mask(rng, shape, feature):
    """Return a mask that varies over some of the reduced axes."""
    varies = rng.random(4) < 0.7
    varies[feature] = False
    mask = rng.random(np.where(varies, shape, 1)) < 0.7
    mask.flat[:2] = True
    return mask


def compute(cases, masks, specs, mesh, feature):
    """Return the results of all cases, computed by one program."""
    is_auto = EXPLICIT not in mesh.axis_types
    wheres = [NamedSharding(mesh, spec) for spec in specs]
    options = (("train", True), ("axis", feature), ("unbiased", False))

    def step(case, mask, where):
        x, dy = case.x, case.dy
        if is_auto:
            x, dy = jax.lax.with_sharding_constraint((x, dy), where)
        outputs, gradients = outputs_and_gradients(
            (case.scale, case.bias, case.mean, case.var, x),
            (dy, case.dmean, case.dvar),
            *(jnp.int32(3), mask, jaxbn.batch_norm, options),
        )
        dscale, dbias, dmean, dvar, dx = gradients
        return Result(*outputs, dx, dscale, dbias, dmean, dvar)

    @jax.jit
    def steps(cases, masks):
        return [*map(step, cases, masks, wheres)]

    if not is_auto:
        # All on the mesh, as cotangents are.
        cases = jax.device_put(cases, NamedSharding(mesh, P()))
        cases = [
            case._replace(**jax.device_put({"x": case.x, "dy": case.dy}, where))
            for case, where in zip(cases, wheres, strict=True)
        ]
    with jax.set_mesh(mesh) if not is_auto else nullcontext():
        return steps(cases, masks)


def draw_rows(rng, devices):
    """Return a number of rows from 1 to 64, often one that the partitioner lost."""
    multiples = [n for n in range(devices, 21, devices) if n >= 4]
    return int(rng.choice(multiples if rng.random() < 0.5 else range(1, 65)))


def check_steps(rng, mesh, sizes, feature, axes_and_rows):
    """Compare one step for each axis and number of rows with the oracle."""
    specs = [draw_spec(rng, axis, sizes) for axis, _ in axes_and_rows]
    cases = [
        draw_case(rng, spec, mesh, feature, rows)
        for spec, (_, rows) in zip(specs, axes_and_rows, strict=True)
    ]
    masks = [
        draw_mask(rng, case.x.shape, feature) if rng.random() < 0.5 else None
        for case in cases
    ]
    results = compute(cases, masks, specs, mesh, feature)
    for case, mask, result in zip(cases, masks, results, strict=True):
        options = {"mask": mask, "axis": feature, "unbiased": False}
        assert_close(result, train_step(case, **options), 1e-4)


# Each form on each mesh, and each kind of mesh axes with each form.
TABLE = [
    (form, sizes, [*KINDS][(i + j) % (2 if len(sizes) == 1 else 3)])
    for i, form in enumerate(FORMS)
    for j, sizes in enumerate(MESHES)
]


def draw_axes_and_rows(rng, form, sizes):
    """Return axes and numbers of rows: all axes in the form of a CPU, the test's."""
    axes = range(4) if form == "cpu" else rng.permutation(4)[:2]
    return [(int(axis), draw_rows(rng, max(sizes))) for axis in axes]


@pytest.mark.parametrize(("form", "sizes", "kind"), TABLE, ids=str)
def test_steps_match_oracle(form, sizes, kind, rng):
    mesh, feature = make_mesh(sizes, KINDS[kind]), int(rng.choice([1, 3]))
    with forced_form(form):
        check_steps(rng, mesh, sizes, feature, draw_axes_and_rows(rng, form, sizes))


@pytest.mark.parametrize("form", FORMS)
def test_every_row_matches_oracle(form, rng, request):
    if not request.config.getoption("--every-row"):
        pytest.skip("takes hours; see --every-row")
    meshes = [make_mesh(sizes, KINDS[kind]) for sizes in MESHES for kind in KINDS]
    with forced_form(form):
        for mesh, feature in itertools.product(meshes, (3, 1)):
            sizes = tuple(mesh.shape.values())
            for axis, start in itertools.product(range(4), range(1, 65, 16)):
                rows = range(start, start + 16)
                check_steps(rng, mesh, sizes, feature, [(axis, n) for n in rows])
