"""Per-feature vectors, laid out so that they broadcast against x.

A room of its own so that all the others can speak of "the statistics" as arrays of
x's rank with length 1 along the reduced axes, wherever the feature axes are.
"""

import jax.numpy as jnp
from jax import Array

Axes = tuple[int, ...]


def reduced_axes(feature_axes: Axes, ndim: int) -> Axes:
    """All axes of x but the feature axes, ascending."""
    return tuple(a for a in range(ndim) if a not in feature_axes)


def spread(vector: Array, feature_axes: Axes, ndim: int) -> Array:
    """Features' shape -> x's rank: (C,) becomes (1, 1, 1, C) for NHWC."""
    ascending = jnp.transpose(vector, _ascending(feature_axes))
    return jnp.expand_dims(ascending, reduced_axes(feature_axes, ndim))


def gather(stats: Array, feature_axes: Axes) -> Array:
    """X's rank -> features' shape, in the order of `feature_axes`; undoes `spread`."""
    ascending = jnp.squeeze(stats, reduced_axes(feature_axes, stats.ndim))
    return jnp.transpose(ascending, _ascending(_ascending(feature_axes)))


def _ascending(order: Axes) -> Axes:
    """The permutation that sorts `order`; applied twice, the one that undoes it."""
    return tuple(sorted(range(len(order)), key=order.__getitem__))
