"""Sums over the rows of each channel: the only passes over x that reduce.

What a sum looks like may depend on the platform, and nothing else in jaxbn does. It
is chosen while lowering (`lax.platform_dependent`), so that ahead-of-time compilation
and multi-platform export get the right form, and a compiled program no conditional.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from ._axes import Axes

ROWS_PER_SAMPLE = 64


def row_sum(x: Array, axes: Axes) -> Array:
    """Σ over `axes`, which stay with length 1."""
    return jnp.sum(x, axes, keepdims=True)


def shifted_sums(
    x: Array, weights: Array | None, count: Array, axes: Axes, dtype: DTypeLike
) -> tuple[Array, Array, Array]:
    """A shift s near the mean, Σ w(x-s) and Σ w|x-s|², of each channel in `dtype`.

    Any s gives the exact mean and variance (Chan, Golub & LeVeque, "Algorithms for
    Computing the Sample Variance", 1983); one near the mean keeps Σ|x-s|² from
    cancelling, as Σx² does. So s is a constant to autodiff.
    """
    shift = lax.stop_gradient(_shift(x, weights, count, axes, dtype))
    deviation = x.astype(dtype) - shift
    if weights is None:
        return shift, row_sum(deviation, axes), row_sum(abs_square(deviation), axes)
    # Selected, not multiplied: padding may hold inf or NaN, and 0 · inf is NaN.
    deviation = jnp.where(weights != 0, deviation, 0)
    total = row_sum(weights.astype(dtype) * deviation, axes)
    return shift, total, row_sum(weights * abs_square(deviation), axes)


def abs_square(z: Array) -> Array:
    """|z|², real also for complex z."""
    return jnp.real(z * jnp.conj(z))


def _shift(
    x: Array, weights: Array | None, count: Array, axes: Axes, dtype: DTypeLike
) -> Array:
    """On CPU the mean itself, by a pass of its own: a plain sum is nearly free there.

    GPU and TPU take the mean of a sample instead and so read x once less, except under
    a mask, which may leave nothing of any sample.
    """

    def mean_of_all(x: Array) -> Array:
        wide = x.astype(dtype)
        if weights is not None:
            wide = jnp.where(weights != 0, weights.astype(dtype) * wide, 0)
        return per_row(row_sum(wide, axes), count)

    def mean_of_sample(x: Array) -> Array:
        return jnp.mean(_sample(x, axes), axes, dtype, keepdims=True)

    if weights is not None or x.size == 0:
        return mean_of_all(x)
    return lax.platform_dependent(x, cpu=mean_of_all, default=mean_of_sample)


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
            one_in = one_in * length // x.shape[axis]
            x = lax.slice_in_dim(x, 0, length, axis=axis)
    return x


def per_row(total: Array, count: Array) -> Array:
    """`total` / `count`; of no rows, `total` as it is, which then is 0."""
    return total / jnp.where(count > 0, count, 1).astype(total.dtype)
