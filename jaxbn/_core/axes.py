"""Feature axes, reduction axes, and per-feature vectors that broadcast against x.

Inside the package every statistic has x's rank, with length 1 along the reduction
axes, wherever the feature axes are.
"""

import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

Axes = tuple[int, ...]


def check_axis(axis: int | Sequence[int], ndim: int, of: str = "x") -> Axes:
    """Return the feature axes, non-negative, in the given order."""
    try:
        given = tuple(map(operator.index, np.atleast_1d(axis)))
    except TypeError:
        raise TypeError(
            f"axis must be an int or a sequence of ints; got {axis!r}. It names the "
            f"feature axes of {of}: -1 for NHWC, 1 for NCHW. Under jit bind it first: "
            "functools.partial(jaxbn.batch_norm, axis=1)."
        ) from None
    if not given or any(not -ndim <= a < ndim for a in given):
        raise ValueError(
            f"axis must name feature axes of {of}, from {-ndim} to {ndim - 1}; "
            f"got axis={axis} for {of} of {ndim} dimensions."
        )
    axes = tuple(a % ndim for a in given)
    if len(set(axes)) < len(axes):
        raise ValueError(
            f"axis must name each feature axis once; got axis={axis}, which is "
            f"{axes} for {of} of {ndim} dimensions. Drop the repeated one."
        )
    return axes


def reduction_axes(feature_axes: Axes, ndim: int) -> Axes:
    """Return all axes but the feature axes, ascending."""
    return tuple(a for a in range(ndim) if a not in feature_axes)


def expand_features(vector: Array, feature_axes: Axes, ndim: int) -> Array:
    """Expand the features' shape to x's rank: (C,) to (1, 1, 1, C) for NHWC."""
    ascending = jnp.transpose(vector, _sorting_permutation(feature_axes))
    return jnp.expand_dims(ascending, reduction_axes(feature_axes, ndim))


def squeeze_features(stats: Array, feature_axes: Axes) -> Array:
    """Undo `expand_features`: features in the order of `feature_axes`."""
    ascending = jnp.squeeze(stats, reduction_axes(feature_axes, stats.ndim))
    order = _sorting_permutation(feature_axes)
    return jnp.transpose(ascending, _sorting_permutation(order))


def _sorting_permutation(order: Axes) -> Axes:
    """Return the permutation that sorts `order`; applied twice, its inverse."""
    return tuple(sorted(range(len(order)), key=order.__getitem__))


def divisors(number: int) -> list[int]:
    """Return the lengths of equal groups that an axis of this length can have."""
    return [k for k in range(1, number + 1) if number % k == 0]


def split_axis(array: Array, axis: int, size: int) -> Array:
    """Split an axis into groups of `size`; an axis of length 1 into (1, 1)."""
    length = array.shape[axis]
    groups = (1, 1) if length == 1 else (length // size, size)
    return array.reshape(*array.shape[:axis], *groups, *array.shape[axis + 1 :])


def every_kth(array: Array, k: int, axis: int, start: int = 0) -> Array:
    """Return every `k`-th row along `axis`, from `start` on."""
    if start + k < array.shape[axis]:
        return lax.slice_in_dim(array, start, None, k, axis)
    # One row, without a stride: XLA's partitioner loses it if the axis is sharded.
    end = min(start + 1, array.shape[axis])
    return lax.slice_in_dim(array, start, end, axis=axis)


def axis_to_cut(x: Array, axes: Axes) -> int | None:
    """Return the axis of rows that can be cut into runs, or `None`.

    The batch stays whole, however it is sharded, unless all rows are in its axis.
    """
    if axes == () or not isinstance(x.size, int) or x.size == 0:
        return None
    inner = [a for a in axes[1:] if x.shape[a] > 1]
    cut = inner[0] if inner else axes[0]
    # JAX cuts no explicitly sharded axis, and the last axis holds no rows.
    is_sharded = jax.typeof(x).sharding.spec[cut] is not None
    return None if is_sharded or cut == x.ndim - 1 else cut
