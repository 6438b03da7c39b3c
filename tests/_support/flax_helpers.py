"""Compare trees of arrays, ours with Flax's, and differentiate all there is."""

import jax
import jax.numpy as jnp
import numpy as np


def randomize(rng, tree):
    """Positive numbers, for there are variances among them."""
    return jax.tree.map(
        lambda a: jnp.asarray(rng.uniform(0.5, 1.5, a.shape), a.dtype), tree
    )


def everything(step, *arguments):
    """The outputs and the gradients of everything, for the same random cotangents."""
    rng = np.random.default_rng(3)
    outputs, vjp = jax.vjp(step, *arguments)
    cotangents = jax.tree.map(
        lambda a: jnp.asarray(rng.normal(size=a.shape), a.dtype), outputs
    )
    return outputs, vjp(cotangents)


def assert_same(ours, theirs, tolerance):
    """Structure and dtypes alike, values to `tolerance` of the largest entry."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        wide = np.complex128 if jnp.iscomplexobj(b) else np.float64
        a, b = np.asarray(a, wide), np.asarray(b, wide)
        atol = tolerance * max(np.abs(b).max(initial=0), 1e-2)
        np.testing.assert_allclose(a, b, rtol=0, atol=atol)
