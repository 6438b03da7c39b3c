"""Compare trees of arrays, jaxbn's with Flax's, and differentiate all inputs."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from helpers import assert_near


def randomize(rng, tree):
    """Return positive random numbers of the same shapes: some are variances."""
    return jax.tree.map(
        lambda a: jnp.asarray(rng.uniform(0.5, 1.5, a.shape), a.dtype), tree
    )


def everything(step, *arguments):
    """Return the outputs and all gradients, for the same random cotangents."""
    rng = np.random.default_rng(3)
    outputs, vjp = jax.vjp(step, *arguments)
    cotangents = jax.tree.map(
        lambda a: jnp.asarray(rng.normal(size=a.shape), a.dtype), outputs
    )
    return outputs, vjp(cotangents)


def assert_same(actual, expected, tolerance):
    """Compare structure and dtypes, and values to `tolerance` of the largest entry."""
    chex.assert_trees_all_equal_structs(actual, expected)
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    assert_near(actual, expected, tolerance, size=1e-2)
