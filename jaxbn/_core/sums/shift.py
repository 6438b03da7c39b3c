"""The shift s of the sums Σ(x-s) and Σ|x-s|²: candidates, and whether one is near.

The variance is a difference of the two. It cancels where s is far from the mean beside
the deviation (Chan, Golub & LeVeque, "Algorithms for Computing the Sample Variance",
1983).
"""

import math

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_batching import custom_vmap
from jax.typing import DTypeLike
from jaxtyping import Bool

from ..axes import Axes, every_kth
from ..dtypes import abs_square, real_dtype
from ..weights import Count, divide_by_count

Guess = tuple[Array, Array]  # a mean and a variance that x may have

SAMPLE_STRIDE = 64

# With |μ-s|² ≤ 16 σ², Σ|x-s|² - n|μ-s|² is at least 1/17 of Σ|x-s|²: at most
# log₂ 17 = 4.09 of 24 bits are lost.
MAX_SQUARED_OFFSET_TO_VAR = 16


def offset_and_accuracy(total: Array, squares: Array, n: Count) -> tuple[Array, Array]:
    """Return μ - s from the sums about s, and whether they do not cancel."""
    offset = divide_by_count(total, n)
    var = divide_by_count(squares, n) - abs_square(offset)
    return offset, sums_are_accurate(offset, var)


def sums_are_accurate(offset: Array, var: Array) -> Bool[Array, ""]:
    """Decide whether a shift is near enough for every feature; `offset` is μ - s.

    It is not if the variance is infinite or NaN, from squares that overflowed.
    """
    is_near = abs_square(offset) <= MAX_SQUARED_OFFSET_TO_VAR * var
    return _all(lax.stop_gradient(is_near & jnp.isfinite(var)))


@custom_vmap
def _all(values: Bool[Array, "..."]) -> Bool[Array, ""]:
    return jnp.all(values)


@_all.def_vmap
def _all_members(
    axis_size: int, in_batched: list[bool], values: Bool[Array, "..."]
) -> tuple[Bool[Array, ""], bool]:
    # One answer for all members: `vmap` turns a conditional into a selection between
    # the results of both branches where the predicate varies over the members.
    return _all(values), False


def guessed_shift(guess: Guess | None, dtype: DTypeLike) -> Array:
    """Return the guessed mean where it is far from 0 beside the deviation, else 0.

    The running mean of a feature that died decays for ever: about it, the sums of zeros
    would cancel.
    """
    if guess is None:
        return jnp.zeros((), dtype)
    mean, var = guess[0].astype(dtype), guess[1].astype(real_dtype(dtype))
    is_far = jnp.isfinite(mean) & (abs_square(mean) > MAX_SQUARED_OFFSET_TO_VAR * var)
    return lax.stop_gradient(jnp.where(is_far, mean, 0))


def sample(x: Array, axes: Axes) -> Array:
    """Return one element in `SAMPLE_STRIDE`: a leading block, and every k-th example.

    The mean of any k of n values lies within √(n/k - 1) standard deviations of the
    mean of all, so that even a sample of outliers costs no more than a factor n/k ≤ 64
    of float32's 6e-8. A single element could cost a factor n.
    """
    spec = jax.typeof(x).sharding.spec
    one_in = SAMPLE_STRIDE
    for axis in (*axes[1:], *axes[:1]):  # the batch comes last
        size = x.shape[axis]
        # JAX slices neither an explicitly sharded nor a symbolic axis.
        if one_in > 1 and spec[axis] is None and isinstance(size, int):
            length = math.ceil(size / one_in)
            # Every k-th example, because a leading block lies on few of the devices
            # that share the batch. Along the last axis a block is read in one piece.
            is_batch = axis == axes[0] < x.ndim - 1
            x = (
                every_kth(x, one_in, axis)
                if is_batch
                else lax.slice_in_dim(x, 0, length, axis=axis)
            )
            one_in = one_in * length // max(size, 1)
    return x
