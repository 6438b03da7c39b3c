"""Weighted sums over the elements of each feature, in the form each platform likes.

The sums that read x (two forward, two backward) are the one part of the package that
knows platforms, because XLA treats two sums that share terms differently:

- CPU: a sum of x, x² or dy·x runs at memory speed, but a cast that two sums share is
  written out first, and so is a subtracted vector. Each sum of a large x therefore
  reads x by itself, and unshifted sums serve where they do not cancel.
- CUDA: XLA prices each sum alone and may write out the terms that two sums share. Both
  are therefore one sum of complex numbers.
- elsewhere: two plain sums, which XLA fuses.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_batching import custom_vmap
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Inexact

from .axes import Axes
from .weights import Weights, apply_weights, divide_by_count, sum_over, total_weight

Pair = tuple[Array, Array]
SumPair = Callable[[Array, Array, Axes], Pair]

SAMPLE_STRIDE = 64

# With |μ|² ≤ 16 σ², Σx² - n|μ|² is at least 1/17 of Σx²: at most 4 of 24 bits are lost.
MAX_SQUARED_MEAN_TO_VAR = 16

# Smaller arrays stay in a CPU's cache. There a conditional, or a separate kernel for a
# vector, takes as much time as it saves, and more to compile.
MIN_SIZE_FOR_CPU_FORMS = 2**18


def abs_square(z: Array) -> Array:
    """Return |z|², real also for complex z."""
    return jnp.real(z * jnp.conj(z))


def _two_sums(a: Array, b: Array, axes: Axes) -> Pair:
    return sum_over(a, axes), sum_over(b, axes)


def _packed_sums(a: Array, b: Array, axes: Axes) -> Pair:
    if jnp.iscomplexobj(a):
        return _two_sums(a, b, axes)
    both = sum_over(lax.complex(a, b), axes)
    return jnp.real(both), jnp.imag(both)


def shifted_sums(
    x: Inexact[Array, "*x"], weights: Weights | None, axes: Axes, dtype: DTypeLike
) -> tuple[Array, Array, Array]:
    """Return `plain_shifted_sums` in the form that the platform likes."""
    static = {"axes": axes, "dtype": dtype}
    by_sample = partial(_sums_shifted_by_sample, **static)
    cpu = _sums_unshifted_if_safe if _is_large(x) else _sums_shifted_by_mean
    return lax.platform_dependent(
        x,
        weights,
        cpu=partial(cpu, **static),
        cuda=partial(by_sample, sum_pair=_packed_sums),
        default=partial(by_sample, sum_pair=_two_sums),
    )


def plain_shifted_sums(
    x: Inexact[Array, "*x"], weights: Weights | None, axes: Axes, dtype: DTypeLike
) -> tuple[Array, Array, Array]:
    """Return a shift s near the mean, Σ w(x-s) and Σ w|x-s|², of each feature.

    Any s gives the exact mean and variance (Chan, Golub & LeVeque, "Algorithms for
    Computing the Sample Variance", 1983); one near the mean keeps Σ|x-s|² from
    cancelling, as Σx² does. So s is a constant to autodiff.
    """
    return _sums_shifted_by_sample(x, weights, axes, dtype, _two_sums)


def _sums_unshifted_if_safe(
    x: Array, weights: Weights | None, axes: Axes, dtype: DTypeLike
) -> tuple[Array, Array, Array]:
    """Return `shifted_sums` for s = 0 if they do not cancel, else for the mean."""
    total, squares = _sums_shifted_by(0, *_prevent_cse(x), weights, axes, dtype)
    n = total_weight(x, weights, axes)
    mean = divide_by_count(total, n)
    var = divide_by_count(squares, n) - abs_square(mean)
    is_safe = _unshifted_is_safe(mean, var)

    def far() -> Pair:
        # Divided again here, which XLA fuses: an operand costs a kernel.
        shift = divide_by_count(total, n)
        return _sums_shifted_by(shift, *_prevent_cse(x), weights, axes, dtype)

    sums = lax.cond(is_safe, lambda: (total, squares), far)
    return jnp.where(is_safe, 0, mean), *sums


def _sums_shifted_by_mean(
    x: Array, weights: Weights | None, axes: Axes, dtype: DTypeLike
) -> tuple[Array, Array, Array]:
    """Return `shifted_sums` for the mean, from a pass of its own."""
    total = sum_over(apply_weights(x.astype(dtype), weights), axes)
    mean = divide_by_count(total, total_weight(x, weights, axes))
    return mean, *_sums_shifted_by(mean, x, x, weights, axes, dtype)


def _sums_shifted_by_sample(
    x: Array, weights: Weights | None, axes: Axes, dtype: DTypeLike, sum_pair: SumPair
) -> tuple[Array, Array, Array]:
    """Return `shifted_sums` for the mean of a sample of `x`."""
    shift = lax.stop_gradient(_shift_from_sample(x, weights, axes, dtype))
    return shift, *_sums_shifted_by(shift, x, x, weights, axes, dtype, sum_pair)


def _sums_shifted_by(
    shift: Array | int,
    x: Array,
    x_copy: Array,
    weights: Weights | None,
    axes: Axes,
    dtype: DTypeLike,
    sum_pair: SumPair = _two_sums,
) -> Pair:
    """Return Σ w(x-s) and Σ w|x-s|², the second from `x_copy`."""
    deviation, other = x.astype(dtype) - shift, x_copy.astype(dtype) - shift
    squares = apply_weights(abs_square(other), weights)
    return sum_pair(apply_weights(deviation, weights), squares, axes)


def product_sums(
    dy: Inexact[Array, "*x"],
    x: Inexact[Array, "*x"],
    mean: Float[Array, "*stats"],
    var: Float[Array, "*stats"],
    axes: Axes,
) -> Pair:
    """Return Σ dy and Σ dy·(x - μ) of each feature, in the dtype of μ."""
    with_deviation = partial(_products_with_deviation, axes=axes)
    plain = partial(with_deviation, sum_pair=_two_sums)
    return lax.platform_dependent(
        *(dy, x, mean, var),
        cpu=partial(_products_unshifted_if_safe, axes=axes) if _is_large(x) else plain,
        cuda=partial(with_deviation, sum_pair=_packed_sums),
        default=plain,
    )


def _products_with_deviation(
    dy: Array, x: Array, mean: Array, var: Array, axes: Axes, sum_pair: SumPair
) -> Pair:
    del var
    return sum_pair(dy.astype(mean.dtype), _products(dy, x, mean, mean.dtype), axes)


def _products_unshifted_if_safe(
    dy: Array, x: Array, mean: Array, var: Array, axes: Axes
) -> Pair:
    dy, dy_copy = _prevent_cse(dy)
    total = sum_over(dy.astype(mean.dtype), axes)
    return total, lax.cond(
        _unshifted_is_safe(mean, var),
        lambda: sum_over(_products(dy_copy, x, 0, mean.dtype), axes) - mean * total,
        lambda: sum_over(_products(dy_copy, x, mean, mean.dtype), axes),
    )


def _products(dy: Array, x: Array, shift: Array | int, dtype: DTypeLike) -> Array:
    return dy.astype(dtype) * (x.astype(dtype) - shift)


def materialize_on_cpu(x: Array, *vectors: Array) -> tuple[Array, ...]:
    """Compute `vectors` before the pass over `x` that uses them, if `x` is large.

    XLA:CPU repeats a computation that it fuses with a broadcast for every element.
    """
    if not _is_large(x):
        return vectors
    return lax.platform_dependent(
        *vectors, cpu=lambda *v: lax.optimization_barrier(v), default=lambda *v: v
    )


def _is_large(x: Array) -> bool:
    """Decide whether the CPU's forms pay; a symbolic size counts as large."""
    return not isinstance(x.size, int) or x.size >= MIN_SIZE_FOR_CPU_FORMS


def _prevent_cse(x: Array) -> Pair:
    """Return `x` twice, as two arrays to XLA, so that no cast serves two sums."""
    return lax.optimization_barrier((x, x))


def _unshifted_is_safe(mean: Array, var: Array) -> Bool[Array, ""]:
    """Decide whether unshifted sums are accurate enough for every feature.

    They are not if the variance is NaN, from squares that overflowed.
    """
    return _all(lax.stop_gradient(abs_square(mean) <= MAX_SQUARED_MEAN_TO_VAR * var))


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


def _shift_from_sample(
    x: Array, weights: Weights | None, axes: Axes, dtype: DTypeLike
) -> Array:
    """Estimate the mean from a small sample; with a mask, from all unmasked elements.

    A mask may leave out any sample, and so costs another pass over x.
    """
    if weights is None:
        x = _sample(x, axes)
    total = sum_over(apply_weights(x.astype(dtype), weights), axes)
    return divide_by_count(total, total_weight(x, weights, axes))


def _sample(x: Array, axes: Axes) -> Array:
    """Return a leading block of one element in `SAMPLE_STRIDE`, mostly contiguous.

    The mean of any k of n values lies within √(n/k - 1) standard deviations of the
    mean of all, so that even a sample of outliers costs no more than a factor n/k ≤ 64
    of float32's 6e-8. A single element could cost a factor n.
    """
    spec = jax.typeof(x).sharding.spec
    one_in = SAMPLE_STRIDE
    for axis in (*axes[1:], *axes[:1]):  # the batch, which is often sharded, comes last
        size = x.shape[axis]
        # JAX slices neither a sharded nor a symbolic axis.
        if one_in > 1 and spec[axis] is None and isinstance(size, int):
            length = math.ceil(size / one_in)
            one_in = one_in * length // max(size, 1)
            x = lax.slice_in_dim(x, 0, length, axis=axis)
    return x
