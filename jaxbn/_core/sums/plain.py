"""Sums in plain JAX, about a sample's mean: the form of every other platform.

XLA fuses two plain sums of one array.
"""

from collections.abc import Callable

from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Inexact

from ..axes import Axes
from ..dtypes import abs_square
from ..weights import Weights, apply_weights, divide_by_count, sum_over, total_weight
from .shift import sample

Pair = tuple[Array, Array]
Sums = Callable[..., tuple[Array, ...]]  # from axes and arrays, their sums


def plain_sums(axes: Axes, *arrays: Array) -> tuple[Array, ...]:
    """Sum each array by itself."""
    return tuple(sum_over(array, axes) for array in arrays)


def plain_shifted_sums(
    x: Inexact[Array, "*x"], weights: Weights | None, axes: Axes, dtype: DTypeLike
) -> tuple[Array, Array, Array]:
    """Return a shift s near the mean, Σ w(x-s) and Σ w|x-s|², of each feature.

    Any s gives the exact mean and variance (Chan, Golub & LeVeque, "Algorithms for
    Computing the Sample Variance", 1983); one near the mean keeps Σ|x-s|² from
    cancelling, as Σx² does. So s is a constant to autodiff.
    """
    return sums_shifted_by_sample(x, weights, axes, dtype)


def sums_shifted_by_sample(
    x: Array,
    weights: Weights | None,
    axes: Axes,
    dtype: DTypeLike,
    sums: Sums = plain_sums,
) -> tuple[Array, Array, Array]:
    """Return `shifted_sums` for the mean of a sample of `x`."""
    shift = lax.stop_gradient(_shift_from_sample(x, weights, axes, dtype, sums))
    return shift, *sums_shifted_by(shift, x, weights, axes, dtype, sums)


def sums_shifted_by(
    shift: Array,
    x: Array,
    weights: Weights | None,
    axes: Axes,
    dtype: DTypeLike,
    sums: Sums = plain_sums,
) -> Pair:
    """Return Σ w(x-s) and Σ w|x-s|²."""
    deviation = x.astype(dtype) - shift
    squares = apply_weights(abs_square(deviation), weights)
    total, squares = sums(axes, apply_weights(deviation, weights), squares)
    return total, squares


def _shift_from_sample(
    x: Array, weights: Weights | None, axes: Axes, dtype: DTypeLike, sums: Sums
) -> Array:
    """Estimate the mean from a small sample; with a mask, from all unmasked elements.

    A mask may leave out any sample, and so costs another pass over x.
    """
    if weights is None:
        x = sample(x, axes)
    (total,) = sums(axes, apply_weights(x.astype(dtype), weights))
    return divide_by_count(total, total_weight(x, weights, axes))


def sums_with_products(
    dy: Array, x: Array, mean: Array, axes: Axes, sums: Sums = plain_sums
) -> Pair:
    """Return Σ dy and Σ dy·(x - μ)."""
    total, total_of_products = sums(axes, dy.astype(mean.dtype), products(dy, x, mean))
    return total, total_of_products


def products(dy: Array, x: Array, mean: Array) -> Array:
    """Return dy·(x - μ) of each element."""
    return dy.astype(mean.dtype) * (x.astype(mean.dtype) - mean)
