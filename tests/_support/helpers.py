"""Run jaxbn on a `Case` and compare with the oracle, in one way everywhere."""

import jax
import jax.numpy as jnp
import numpy as np
from oracle import Case, Result

import jaxbn

# Relative to the largest entry of each array: sums of float32 rows round at the size
# of the sum. Half precision rounds x, dy, y and dx once each.
TOLERANCE = {"float64": 1e-11, "float32": 2e-5, "bfloat16": 2e-2, "float16": 3e-3}


def rounded(case: Case, dtype) -> Case:
    """The case as jaxbn gets it: x and dy in `dtype`, vectors in its wide dtype."""
    wide = np.float64 if dtype == "float64" else np.float32
    low = {
        name: np.asarray(jnp.asarray(getattr(case, name), dtype))
        for name in ("x", "dy")
    }
    high = {
        name: np.asarray(getattr(case, name), wide)
        for name in ("scale", "bias", "mean", "var", "dmean", "dvar")
    }
    return case._replace(**low, **high)


def run(case: Case, train=True, transform=jax.jit, **options) -> Result:
    """All that jaxbn computes for the case: y, new statistics, every gradient."""
    wide = jnp.asarray(case.mean).dtype

    def step(scale, bias, mean, var, x):
        params = jaxbn.BatchNormParams(scale, bias)
        state = jaxbn.BatchNormState(mean, var, jnp.int32(case.batches))
        y, new = jaxbn.batch_norm(params, state, x, train, **options)
        return y, new.mean, new.var

    def everything(arguments, cotangents):
        outputs, vjp = jax.vjp(step, *arguments)
        return outputs, vjp(cotangents)

    inputs = (case.scale, case.bias, case.mean, case.var, case.x)
    dy = jnp.asarray(case.dy).astype(options.get("dtype") or case.x.dtype)
    cotangents = (dy, jnp.asarray(case.dmean, wide), jnp.asarray(case.dvar, wide))
    outputs, gradients = transform(everything)(
        tuple(map(jnp.asarray, inputs)), cotangents
    )
    dscale, dbias, dmean, dvar, dx = gradients
    y, mean, var = outputs
    return Result(y, mean, var, dx, dscale, dbias, dmean, dvar)


def assert_close(actual, expected, tolerance):
    """Each array of `expected` to `tolerance` of its own largest entry (or term)."""
    for name in set(expected._fields) - {"sizes"}:
        got, want = getattr(actual, name), getattr(expected, name)
        assert got.shape == want.shape, name
        got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
        size = np.abs(want).max(initial=(expected.sizes or {}).get(name, 0))
        np.testing.assert_allclose(
            got, want, rtol=0, atol=tolerance * max(size, 1e-30), err_msg=name
        )
