"""Sums over runs of rows: values, the runs, and sharded programs."""

from typing import Any

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
from jax.sharding import AxisType, NamedSharding
from oracle import random_case, train_step

from jaxbn._core.sums.cpu import sum_over_runs

# Shape, reduction axes, and the shape of the sums of runs, or None for one step.
RUNS = [
    ((2, 56, 3, 5), (0, 1, 2), (2, 4, 3, 5)),
    ((2, 17, 3, 5), (0, 1, 2), (2, 1, 3, 5)),
    ((2, 40, 3, 5), (0, 1, 2), (2, 2, 3, 5)),  # runs of 20, not of 40
    ((3, 4, 4, 5), (0, 1, 2), (3, 1, 4, 5)),
    ((2, 1, 16, 5), (0, 1, 2), (2, 1, 1, 5)),
    ((2, 5, 14, 3), (0, 2, 3), (2, 5, 1, 3)),
    ((3, 2, 14, 5), (0, 2), (3, 2, 1, 5)),  # two feature axes
    ((3, 3, 14, 5), (0, 1, 2), None),
    ((3, 46, 3, 5), (0, 1, 2), None),
    ((256, 6), (0,), (16, 6)),
    ((128, 1, 1, 6), (0, 1, 2), (16, 1, 1, 6)),
    ((1000, 6), (0,), (200, 6)),  # 10 devices have 100 rows each, 8 have 125
    ((32, 6), (0,), None),  # 16 devices have 2 rows each
    ((240, 6), (0,), None),  # 15 devices have 16 rows each, and 16 have 15
    ((16, 3, 14), (0, 2), None),  # rows
    ((0, 14, 6), (0, 1), None),
    ((4, 6), (), None),
]


def products(x, vector, mask, dy):
    assert mask is None
    return dy * (x - vector)


def barriers(function, *arrays) -> list[tuple[int, ...]]:
    """Return the shape of each array that XLA is kept from fusing."""
    trace = jax.make_jaxpr(function)(*arrays)
    equations: list[Any] = trace.eqns
    return [
        equation.outvars[0].aval.shape
        for equation in equations
        if equation.primitive.name == "optimization_barrier"
    ]


@pytest.mark.parametrize(("shape", "axes", "first"), RUNS, ids=str)
def test_products_are_summed_over_runs_first(shape, axes, first, rng):
    """Sums of small integers are exact in every order."""
    dy, x = rng.integers(-9, 10, (2, *shape)).astype(np.float32)
    stats = [1 if axis in axes else n for axis, n in enumerate(shape)]
    vector = rng.integers(-9, 10, stats).astype(np.float32)

    def sums(x, vector, dy):
        return sum_over_runs(products, axes, x, vector, None, dy)

    expected = (dy * (x - vector)).sum(axes, keepdims=True)
    np.testing.assert_array_equal(jax.jit(sums)(x, vector, dy), expected)
    assert barriers(sums, x, vector, dy) == ([] if first is None else [first])


def test_single_array_is_summed_in_one_step(rng):
    x = rng.integers(-9, 10, (2, 14, 3, 5)).astype(np.float32)

    def squares(x):
        return sum_over_runs(lambda x, mask: x * x, (0, 1, 2), x, None)

    np.testing.assert_array_equal(
        jax.jit(squares)(x), (x * x).sum((0, 1, 2), keepdims=True)
    )
    assert barriers(squares, x) == []


def test_symbolic_rows_are_summed_in_one_step():
    (n,) = jax.export.symbolic_shape("n")
    x = jax.ShapeDtypeStruct((n, 14, 14, 8), jnp.float32)
    assert barriers(lambda x: sum_over_runs(jnp.multiply, (0, 1, 2), x, x), x) == []


@pytest.mark.parametrize(
    ("spec", "is_cut"), [(jax.P("data"), True), (jax.P(None, "data"), False)], ids=str
)
def test_explicitly_sharded_rows_stay_whole(spec, is_cut, rng):
    """JAX does not slice an explicitly sharded axis."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    dy, x = rng.integers(-9, 10, (2, 4, 14, 3, 5)).astype(np.float32)
    expected = (dy * x).sum((0, 1, 2), keepdims=True)

    def sums(dy, x):
        return sum_over_runs(jnp.multiply, (0, 1, 2), dy, x)

    with jax.set_mesh(mesh):
        dy, x = jax.device_put((dy, x), NamedSharding(mesh, spec))
        assert bool(barriers(sums, dy, x)) == is_cut
        np.testing.assert_array_equal(jax.jit(sums)(dy, x), expected)


@pytest.fixture
def cpu_form():
    with forced_form("cpu"):
        yield


# Shapes of masks for x of (6, 14, 3, 5): one that varies along the runs, others not.
MASKS = [(6, 14, 3, 1), (6, 1, 1, 1), (14, 3, 5), (14, 1, 1)]


@pytest.mark.usefixtures("cpu_form")
@pytest.mark.parametrize(
    ("shape", "axis"),
    [((6, 14, 3, 5), -1), ((6, 5, 14, 3), 1), ((256, 5), -1), ((5, 2, 14, 3), (1, 3))],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_steps_match_oracle(shape, axis, dtype, rng):
    for loc in (0.0, 50.0):
        case = rounded(random_case(rng, shape, axis, loc=loc), dtype)
        expected = train_step(case, axis=axis)
        assert_close(run(case, axis=axis), expected, TOLERANCE[dtype])


@pytest.mark.usefixtures("cpu_form")
@pytest.mark.parametrize("shape", MASKS, ids=str)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masked_steps_match_oracle(shape, kind, rng):
    mask = rng.random(shape) * (rng.random(shape) > 0.3)
    mask = mask > 0 if kind == "bool" else mask
    for loc in (0.0, 50.0):
        case = rounded(random_case(rng, (6, 14, 3, 5), loc=loc), "float32")
        assert_close(run(case, mask=mask), train_step(case, mask=mask), 2e-5)


@pytest.mark.program
@pytest.mark.parametrize(
    ("shape", "devices"),
    [
        *(((4096, 256), n) for n in (2, 4, 8)),
        *(((24, 14, 14, 64), n) for n in (2, 4, 6, 8)),
        ((480, 1024), 6),
        ((6000, 64), 6),
        ((64, 8192), 8),
    ],
    ids=str,
)
def test_no_row_moves_between_devices(shape, devices):
    """XLA may join the sums of one direction: three vectors at the most."""
    found = collectives(*sharded_step(shape, devices))
    assert {kind for kind, _ in found} == {"all-reduce"}
    assert max(floats for _, floats in found) <= 3 * shape[-1]
