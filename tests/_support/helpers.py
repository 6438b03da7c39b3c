"""Run jaxbn on a `Case`, compare arrays, and inspect programs."""

import math
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from oracle import Case, Result

import jaxbn
from jaxbn._core.sums import cpu

# Relative to the largest entry of each array, because sums of float32 elements round at
# the size of the sum. Half precision rounds x, dy, y and dx once each.
TOLERANCE = {"float64": 1e-11, "float32": 2e-5, "bfloat16": 2e-2, "float16": 3e-3}


def rounded(case: Case, dtype) -> Case:
    """Round x and dy of the case to `dtype`, and the vectors to float32 or float64."""
    vector_dtype = np.float64 if dtype == "float64" else np.float32
    arrays = {
        name: np.asarray(jnp.asarray(getattr(case, name), dtype))
        for name in ("x", "dy")
    }
    vectors = {
        name: np.asarray(getattr(case, name), vector_dtype)
        for name in ("scale", "bias", "mean", "var", "dmean", "dvar")
    }
    return case._replace(**arrays, **vectors)


def run(
    case: Case, train=True, jit=True, mask=None, function=jaxbn.batch_norm, **options
) -> Result:
    """Compute y, the new statistics and every gradient of the case by `function`.

    Cases that differ in values alone share one compiled program.
    """
    vector_dtype = jnp.asarray(case.mean).dtype
    inputs = (case.scale, case.bias, case.mean, case.var, case.x)
    dy = jnp.asarray(case.dy).astype(options.get("dtype") or case.x.dtype)
    dmean, dvar = (jnp.asarray(a, vector_dtype) for a in (case.dmean, case.dvar))
    compute: Any = jitted_outputs_and_gradients if jit else outputs_and_gradients
    outputs, gradients = compute(
        tuple(map(jnp.asarray, inputs)),
        (dy, dmean, dvar),
        jnp.int32(case.batches),
        mask,
        function,
        (("train", train), *options.items()),
    )
    dscale, dbias, dmean, dvar, dx = gradients
    y, mean, var = outputs
    return Result(y, mean, var, dx, dscale, dbias, dmean, dvar)


def outputs_and_gradients(arguments, cotangents, count, mask, function, options):
    def step(scale, bias, mean, var, x):
        params = jaxbn.BatchNormParams(scale, bias)
        state = jaxbn.BatchNormState(mean, var, count)
        y, new = function(params, state, x, mask=mask, **dict(options))
        return y, new.mean, new.var

    outputs, vjp = jax.vjp(step, *arguments)
    return outputs, vjp(cotangents)


jitted_outputs_and_gradients = jax.jit(outputs_and_gradients, static_argnums=(4, 5))


def assert_near(actual, expected, tolerance=1e-5, size=0.0, err_msg=""):
    """Compare trees of arrays to `tolerance` of the largest entry in each array.

    `size` is used if it is larger than the largest entry.
    """
    chex.assert_trees_all_equal_shapes(actual, expected)

    def compare(got, want):
        is_complex = np.iscomplexobj(got) or np.iscomplexobj(want)
        dtype = np.complex128 if is_complex else np.float64
        got, want = np.asarray(got, dtype), np.asarray(want, dtype)
        atol = tolerance * max(np.abs(want).max(initial=size), 1e-30)
        np.testing.assert_allclose(got, want, rtol=0, atol=atol, err_msg=err_msg)

    jax.tree.map(compare, actual, expected)


def assert_close(actual: Result, expected: Result, tolerance):
    """Compare each field to `tolerance` of its largest entry or of `expected.sizes`."""
    sizes = expected.sizes or {}
    for name in set(expected._fields) - {"sizes"}:
        got, want = getattr(actual, name), getattr(expected, name)
        assert_near(got, want, tolerance, sizes.get(name, 0.0), err_msg=name)


@contextmanager
def forced_form(platform: str) -> Iterator[None]:
    """Run one platform's form of the sums anywhere; "cpu small" is that of small x."""
    platform, *small = platform.split()

    def choose(*arrays, **forms):
        return forms.get(platform, forms["default"])(*arrays)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.lax, "platform_dependent", choose)
        min_size = math.inf if small else 0
        patch.setattr(cpu, "MIN_SIZE_FOR_CPU_FORMS", min_size)
        jax.clear_caches()  # jit does not see the change
        yield
    jax.clear_caches()


def saved_residuals(function, *primals) -> list[jax.Array]:
    """Return the distinct arrays that the backward pass of `function` keeps."""
    _, vjp = jax.vjp(function, *primals)
    return list({id(a): a for a in jax.tree.leaves(vjp)}.values())


def saved_bytes(function, *primals) -> int:
    """Return the memory that the backward pass of `function` keeps."""
    return sum(a.nbytes for a in saved_residuals(function, *primals))


def run_script(script: str, **options) -> str:
    """Run Python code in a new process and return its standard output."""
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, **options
    )
    return done.stdout


def collectives(function, *arguments, branches=True) -> list[tuple[str, int]]:
    """Return kind and number of floats of each collective in the compiled program.

    Without `branches`, those inside conditionals are left out.
    """
    text = str(jax.jit(function).lower(*arguments).compile().as_text())
    if not branches:
        text = text[text.index("\nENTRY ") :]
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    found = re.findall(rf"= (\(.*?\)|\S+) ({kinds})(?:-start)?\(", text)
    return [(kind, count_floats(shapes)) for shapes, kind in found]


def sharded_step(shape: tuple[int, ...], devices: int) -> tuple:
    """Return a training step, and its arguments with rows on several devices."""
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
    where = NamedSharding(mesh, PartitionSpec("data"))
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where)
    params, state = jaxbn.init(shape[-1])

    def step(x, dy):
        def apply(params, x):
            return jaxbn.batch_norm(params, state, x, True)

        y, vjp, new = jax.vjp(apply, params, x, has_aux=True)
        y, dy = jax.lax.optimization_barrier((y, dy))
        return y, new, vjp(dy)

    return step, x, x


def count_floats(shapes: str) -> int:
    """Return the number of floats in HLO shapes: 10 for (f32[2,3]{1,0}, f32[4]{0}).

    A complex number is two floats.
    """
    sizes = re.findall(r"(f32|c64)\[([\d,]*)\]", shapes)
    return sum(
        math.prod(map(int, filter(None, size.split(",")))) * (1 + (dtype == "c64"))
        for dtype, size in sizes
    )
