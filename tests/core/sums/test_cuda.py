"""Sums of columns in two steps: values, the cut, and sharded programs."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, collectives, forced_form, rounded, run, sharded_step
from jax.sharding import AxisType, NamedSharding
from oracle import random_case, train_step

from jaxbn._core.sums.cuda import sum_columns

# Shape, reduction axes, and the shape of the first step's sums, or None for one step.
CUTS = [
    ((4096, 256), (0,), (32, 256)),
    ((4096, 64), (0,), (64, 64)),  # too few columns to fill the GPU: the shortest runs
    ((256, 1024), (0,), (4, 1024)),
    ((128, 8192), (0,), None),  # enough columns for a single step
    ((64, 64), (0,), None),
    ((480, 1024), (0,), None),  # 6 devices share 480 rows, but no runs of 64
    ((8192, 64), (0,), None),  # XLA cuts it
    ((32, 28, 28, 512), (0, 1, 2), (32, 1, 1, 512)),
    ((8, 16, 16, 512), (0, 1, 2), (8, 2, 1, 512)),
    ((32, 7, 7, 64), (0, 1, 2), (32, 1, 1, 64)),
    ((32, 4, 4, 64), (0, 1, 2), None),  # the batch stays whole
    ((32, 56, 56, 64), (0, 1, 2), None),
    ((8, 512, 768), (0, 1), (8, 2, 768)),
    ((4096, 1, 1, 256), (0, 1, 2), (32, 1, 1, 256)),
    ((512, 4, 1024), (0,), (2, 4, 1024)),  # two feature axes
    ((6, 1024, 256), (1,), (6, 8, 256)),  # and around the reduction axis
    ((32, 64, 14, 14), (0, 2, 3), None),  # rows
    ((64, 4096), (1,), None),
    ((0, 64), (0,), None),
    ((4, 64), (), None),
]


@pytest.mark.parametrize(("shape", "axes", "first"), CUTS, ids=str)
def test_first_step_sums_runs_of_rows(shape, axes, first):
    jaxpr = jax.make_jaxpr(lambda x: sum_columns(x, axes))(np.zeros(shape, "f4"))
    barriers: list[Any] = [
        e for e in jaxpr.eqns if e.primitive.name == "optimization_barrier"
    ]
    assert [e.outvars[0].aval.shape for e in barriers] == (
        [] if first is None else [first]
    )


@pytest.mark.parametrize(("shape", "axes", "_first"), CUTS, ids=str)
def test_sum_columns_matches_numpy(shape, axes, _first, rng):
    """Sums of small integers are exact in every order."""
    x = rng.integers(-9, 10, shape) + 1j * rng.integers(-9, 10, shape)
    expected = x.sum(axes, keepdims=True)
    summed = jax.jit(sum_columns, static_argnums=1)
    np.testing.assert_array_equal(summed(x.astype("c8"), axes), expected)
    np.testing.assert_array_equal(summed(x.real.astype("f4"), axes), expected.real)


def test_sum_columns_of_symbolic_shape_takes_one_step():
    (n,) = jax.export.symbolic_shape("n")
    x = jax.ShapeDtypeStruct((n, 256), jnp.float32)
    jaxpr = jax.make_jaxpr(lambda x: sum_columns(x, (0,)))(x)
    assert "optimization_barrier" not in str(jaxpr)


@pytest.mark.parametrize(
    ("shape", "spec", "is_cut"),
    [
        ((4096, 256), jax.P("data"), False),
        ((4096, 256), jax.P(None, "data"), True),
        ((8, 512, 768), jax.P("data"), True),
        ((8, 512, 768), jax.P(None, "data"), False),
        ((32, 28, 28, 512), jax.P("data"), True),
        ((32, 28, 28, 512), jax.P(None, "data"), False),
    ],
    ids=str,
)
def test_sum_columns_leaves_explicitly_sharded_rows_whole(shape, spec, is_cut):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    axes = tuple(range(len(shape) - 1))
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.ones(shape), NamedSharding(mesh, spec))
        program = str(jax.make_jaxpr(lambda x: sum_columns(x, axes))(x))
        sums = sum_columns(x, axes)
    assert ("optimization_barrier" in program) == is_cut
    np.testing.assert_array_equal(sums, np.full_like(sums, np.prod(shape[:-1])))


@pytest.fixture
def cuda_form():
    with forced_form("cuda"):
        yield


@pytest.mark.usefixtures("cuda_form")
@pytest.mark.parametrize(
    "shape", [(1024, 256), (128, 64), (192, 8), (8, 16, 16, 64), (5, 7, 7, 8)], ids=str
)
def test_cut_sums_match_oracle(shape, rng):
    case = rounded(random_case(rng, shape, loc=30.0), "float32")
    assert_close(run(case), train_step(case), 2e-5)


@pytest.mark.usefixtures("cuda_form")
@pytest.mark.parametrize(
    ("shape", "devices"),
    [
        *(((4096, 256), n) for n in (2, 4, 8)),
        *(((24, 16, 16, 64), n) for n in (2, 4, 6, 8)),
        *(((48, 7, 7, 512), n) for n in (2, 4, 6, 8)),
        ((3072, 256), 6),
    ],
    ids=str,
)
def test_sharded_cut_sums_need_three_small_collectives(shape, devices):
    """They are of the sample's mean, the forward sums and the backward sums."""
    features = shape[-1]
    expected = [("all-reduce", features * k) for k in (1, 2, 2)]
    assert sorted(collectives(*sharded_step(shape, devices))) == expected


@pytest.mark.usefixtures("cuda_form")
def test_sharded_rows_that_no_run_divides_are_not_gathered():
    """80 rows a device: only the sample of every 64th row moves to its neighbours."""
    found = collectives(*sharded_step((480, 1024), 6))
    assert [kind for kind, _ in found].count("all-reduce") == 3
    assert {kind for kind, _ in found} <= {"all-reduce", "collective-permute"}
    assert len(found) <= 5
