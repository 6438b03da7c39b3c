"""The sums of each channel that read x: two forward, two backward.

The one module that knows platforms, for what XLA makes of two sums that share terms:

- CPU: a sum of x, x² or dy·x runs at the speed of memory, but a cast that two sums
  share is first written out, and so is a vector that one subtracts. There each sum has
  x to itself, and sums about 0 serve where they do not cancel.
- CUDA: each sum is priced alone, and terms that two share may be written out. There
  both are one sum of complex numbers.
- elsewhere: two plain sums, which XLA joins.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from .axes import Axes
from .rows import abs_square, count_rows, per_row, row_sum, weigh

Pair = tuple[Array, Array]
Sums = Callable[[Array, Array, Axes], Pair]

ROWS_PER_SAMPLE = 64

# With |μ|² ≤ 16 σ², Σx² - n|μ|² is at least 1/17 of Σx²: at most 4 of 24 bits are lost.
NEAR_ZERO = 16

# Below this many values a conditional costs a CPU more than the sums that it saves.
FEW_VALUES = 2**14


def shifted_sums(
    x: Array, weights: Array | None, axes: Axes, dtype: DTypeLike
) -> tuple[Array, Array, Array]:
    """A shift s near the mean, Σ w(x-s) and Σ w|x-s|², of each channel in `dtype`.

    Any s gives the exact mean and variance (Chan, Golub & LeVeque, "Algorithms for
    Computing the Sample Variance", 1983); one near the mean keeps Σ|x-s|² from
    cancelling, as Σx² does. So s is a constant to autodiff.
    """

    def about(shift: Array | int, sums: Sums, x: Array, again: Array) -> Pair:
        deviation, other = x.astype(dtype) - shift, again.astype(dtype) - shift
        return sums(weigh(deviation, weights), weigh(abs_square(other), weights), axes)

    def about_sample(sums: Sums, x: Array, again: Array) -> tuple[Array, Array, Array]:
        shift = lax.stop_gradient(_sample_mean(x, weights, axes, dtype))
        return shift, *about(shift, sums, x, again)

    def about_zero_if_near(x: Array) -> tuple[Array, Array, Array]:
        total, squares = about(0, _two_sums, *_apart(x, x))
        count = count_rows(x, weights, axes)
        mean = per_row(total, count)
        var = per_row(squares, count) - abs_square(mean)
        return lax.cond(
            _is_near_zero(mean, var),
            lambda: (jnp.zeros_like(total), total, squares),
            lambda: about_sample(_two_sums, *_apart(x, x)),
        )

    return _on_platform(
        x,
        cpu=about_zero_if_near,
        cuda=lambda x: about_sample(_packed_sums, x, x),
        default=lambda x: about_sample(_two_sums, x, x),
    )


def product_sums(dy: Array, x: Array, mean: Array, var: Array, axes: Axes) -> Pair:
    """Σ dy and Σ dy·(x - μ) of each channel, in μ's dtype."""

    def products(dy: Array, x: Array, shift: Array | int) -> Array:
        return dy.astype(mean.dtype) * (x.astype(mean.dtype) - shift)

    def about_mean(sums: Sums, dy: Array, x: Array) -> Pair:
        return sums(dy.astype(mean.dtype), products(dy, x, mean), axes)

    def about_zero_if_near(dy: Array, x: Array) -> Pair:
        first, second = _apart(dy, dy)
        total = row_sum(first.astype(mean.dtype), axes)
        return total, lax.cond(
            _is_near_zero(mean, var),
            lambda: row_sum(products(second, x, 0), axes) - mean * total,
            lambda: row_sum(products(second, x, mean), axes),
        )

    return _on_platform(
        dy,
        x,
        cpu=about_zero_if_near,
        cuda=partial(about_mean, _packed_sums),
        default=partial(about_mean, _two_sums),
    )


def ready(*vectors: Array) -> tuple[Array, ...]:
    """`vectors`, computed before the pass over x that they are for.

    XLA:CPU computes what it fuses with a broadcast again for every value.
    """

    def cpu(*vectors: Array) -> tuple[Array, ...]:
        return lax.optimization_barrier(vectors)

    return lax.platform_dependent(*vectors, cpu=cpu, default=lambda *v: v)


def _on_platform(*arrays: Array, **forms: Callable[..., Any]) -> Any:
    """The platform's form of a sum; of few values everywhere the default one."""
    size = arrays[0].size  # of symbols, under jax.export
    if isinstance(size, int) and size < FEW_VALUES:
        return forms["default"](*arrays)
    return lax.platform_dependent(*arrays, **forms)


def _two_sums(a: Array, b: Array, axes: Axes) -> Pair:
    return row_sum(a, axes), row_sum(b, axes)


def _packed_sums(a: Array, b: Array, axes: Axes) -> Pair:
    if jnp.iscomplexobj(a):
        return _two_sums(a, b, axes)
    both = row_sum(lax.complex(a, b), axes)
    return jnp.real(both), jnp.imag(both)


def _apart(*arrays: Array) -> tuple[Array, ...]:
    """`arrays`, which XLA no longer knows to be the same: no cast serves two sums."""
    return lax.optimization_barrier(arrays)


def _is_near_zero(mean: Array, var: Array) -> Array:
    """Whether sums about 0 are as good as sums about the mean, in every channel.

    Not so where the variance is NaN, from squares that overflowed.
    """
    return jnp.all(abs_square(mean) <= NEAR_ZERO * var)


def _sample_mean(
    x: Array, weights: Array | None, axes: Axes, dtype: DTypeLike
) -> Array:
    """The mean of a sample, for the price of a glance, or of all that a mask leaves.

    A mask may leave nothing of any sample, and so costs another pass over x.
    """
    if weights is None:
        x = _sample(x, axes)
    total = row_sum(weigh(x.astype(dtype), weights), axes)
    return per_row(total, count_rows(x, weights, axes))


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
