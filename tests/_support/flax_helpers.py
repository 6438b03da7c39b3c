"""Randomize models, compare trees of arrays, and differentiate all inputs."""

import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from helpers import assert_near


def randomize(rng, tree):
    """Return positive random numbers of the same shapes: some are variances."""
    return jax.tree.map(
        lambda a: jnp.asarray(rng.uniform(0.5, 1.5, a.shape), a.dtype), tree
    )


def randomize_for_inference(rng, model):
    """Randomize the parameters and statistics of an nnx model, in place."""
    nnx.update(model, randomize(rng, nnx.state(model, (nnx.Param, nnx.BatchStat))))
    model.eval()


def with_warnings(function, *args, **kwargs):
    """Call a function, and return its result and its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        return function(*args, **kwargs), caught


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
