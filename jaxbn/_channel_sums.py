"""Sums over the rows of each channel: the only passes over x that reduce."""

import math

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from ._axes import Axes
from ._dtypes import real_dtype

ROWS_PER_SAMPLE = 64


def row_sum(x: Array, axes: Axes) -> Array:
    """Σ over `axes`, which stay with length 1."""
    return jnp.sum(x, axes, keepdims=True)


def abs_square(z: Array) -> Array:
    """|z|², real also for complex z."""
    return jnp.real(z * jnp.conj(z))


def per_row(total: Array, count: Array) -> Array:
    """`total` / `count`; of no rows, `total` as it is, which then is 0."""
    return total / jnp.where(count > 0, count, 1).astype(total.dtype)


def count_rows(x: Array, weights: Array | None, axes: Axes, dtype: DTypeLike) -> Array:
    """n = Σ w of each channel, the number of its rows where there is no mask."""
    if weights is None:
        return jnp.full((1,) * x.ndim, math.prod(x.shape[a] for a in axes), dtype)
    copies = math.prod(x.shape[a] for a in axes if weights.shape[a] == 1)
    return copies * row_sum(weights, axes)


def shifted_sums(
    x: Array, weights: Array | None, axes: Axes, dtype: DTypeLike
) -> tuple[Array, Array, Array]:
    """A shift s near the mean, Σ w(x-s) and Σ w|x-s|², of each channel in `dtype`.

    Any s gives the exact mean and variance (Chan, Golub & LeVeque, "Algorithms for
    Computing the Sample Variance", 1983); one near the mean keeps Σ|x-s|² from
    cancelling, as Σx² does. So s is a constant to autodiff.
    """
    shift = lax.stop_gradient(_shift(x, weights, axes, dtype))
    deviation = x.astype(dtype) - shift
    if weights is None:
        return shift, row_sum(deviation, axes), row_sum(abs_square(deviation), axes)
    # Selected, not only multiplied: padding may hold inf or NaN, and 0 · inf is NaN.
    deviation = jnp.where(weights != 0, deviation, 0)
    total = row_sum(weights.astype(dtype) * deviation, axes)
    return shift, total, row_sum(weights * abs_square(deviation), axes)


def _shift(x: Array, weights: Array | None, axes: Axes, dtype: DTypeLike) -> Array:
    """The mean of a sample, for the price of a glance, or of all that a mask leaves.

    A mask may leave nothing of any sample, and so costs another pass over x.
    """
    if weights is None:
        x = _sample(x, axes)
        total = row_sum(x.astype(dtype), axes)
    else:
        kept = jnp.where(weights != 0, x.astype(dtype), 0)
        total = row_sum(weights.astype(dtype) * kept, axes)
    return per_row(total, count_rows(x, weights, axes, real_dtype(dtype)))


def _sample(x: Array, axes: Axes) -> Array:
    """A leading block of at least one row in `ROWS_PER_SAMPLE`, mostly contiguous.

    The mean of any k of n values lies within √(n/k - 1) standard deviations of the
    mean of all, so that even a sample of outliers costs no more than a factor n/k ≤ 64
    of float32's 6e-8. A single row could cost a factor n.
    """
    sharding = jax.typeof(x).sharding.spec
    one_in = ROWS_PER_SAMPLE
    for axis in (*axes[1:], *axes[:1]):  # the batch, which is often sharded, comes last
        whole = sharding[axis] is not None or not isinstance(x.shape[axis], int)
        if one_in > 1 and not whole:  # JAX will not slice a sharded or a symbolic axis
            length = math.ceil(x.shape[axis] / one_in)
            one_in = one_in * length // max(x.shape[axis], 1)
            x = lax.slice_in_dim(x, 0, length, axis=axis)
    return x
