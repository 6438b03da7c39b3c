"""Weighted sums over the elements of each feature, in the form each platform likes.

The sums that read x (two forward, two backward) are the one part of the package that
knows platforms, because XLA treats two sums that share terms differently:

- CPU: a cast that two sums share is written to memory first, and so is a subtracted
  vector. Each sum of a large x therefore reads x by itself; those of x and x² are taken
  about zero where they do not cancel, those of products over runs of rows.
- CUDA: XLA prices each sum alone and may write out the terms that two sums share. Both
  are therefore one sum of complex numbers.
- TPU: two plain sums, which XLA fuses into the convolution that computes x if they wait
  for nothing that is computed from x.
- elsewhere: two plain sums, which XLA fuses.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Float, Inexact

from .axes import Axes
from .column_sums import sum_columns
from .dtypes import abs_square
from .run_sums import sum_over_runs
from .sharding import match_vma, shard_like
from .shift import Guess, guessed_shift, sample, sums_are_accurate
from .weights import (
    Count,
    Weights,
    apply_weights,
    divide_by_count,
    sum_over,
    total_weight,
)

Pair = tuple[Array, Array]
Sums = Callable[..., tuple[Array, ...]]  # from axes and arrays, their sums

# Smaller arrays stay in a CPU's cache. There a conditional, or a separate kernel for a
# vector, takes as much time as it saves, and more to compile.
MIN_SIZE_FOR_CPU_FORMS = 2**18


def _plain_sums(axes: Axes, *arrays: Array) -> tuple[Array, ...]:
    return tuple(sum_over(array, axes) for array in arrays)


def _packed_sums(axes: Axes, *arrays: Array) -> tuple[Array, ...]:
    """Sum two real arrays as one complex array."""
    if len(arrays) < 2 or jnp.iscomplexobj(arrays[0]):
        return tuple(sum_columns(array, axes) for array in arrays)
    both = sum_columns(lax.complex(*arrays), axes)
    return jnp.real(both), jnp.imag(both)


def shifted_sums(
    x: Inexact[Array, "*x"],
    weights: Weights | None,
    axes: Axes,
    dtype: DTypeLike,
    guess: Guess | None,
) -> tuple[Array, Array, Array]:
    """Return `plain_shifted_sums` in the form that the platform likes.

    `guess` may be wrong, NaN or `None`: it decides on speed, not on accuracy.
    """
    by_sample = partial(_sums_shifted_by_sample, axes=axes, dtype=dtype)
    cpu = _sums_unshifted_if_safe if _is_large(x) else _sums_shifted_by_mean
    return lax.platform_dependent(
        *(x, weights, guess),
        cpu=lambda x, weights, _: cpu(x, weights, axes, dtype),
        cuda=lambda x, weights, _: by_sample(x, weights, sums=_packed_sums),
        tpu=partial(_sums_shifted_by_guess_if_safe, axes=axes, dtype=dtype),
        default=lambda x, weights, _: by_sample(x, weights, sums=_plain_sums),
    )


def plain_shifted_sums(
    x: Inexact[Array, "*x"], weights: Weights | None, axes: Axes, dtype: DTypeLike
) -> tuple[Array, Array, Array]:
    """Return a shift s near the mean, Σ w(x-s) and Σ w|x-s|², of each feature.

    Any s gives the exact mean and variance (Chan, Golub & LeVeque, "Algorithms for
    Computing the Sample Variance", 1983); one near the mean keeps Σ|x-s|² from
    cancelling, as Σx² does. So s is a constant to autodiff.
    """
    return _sums_shifted_by_sample(x, weights, axes, dtype, _plain_sums)


def _sums_unshifted_if_safe(
    x: Array, weights: Weights | None, axes: Axes, dtype: DTypeLike
) -> tuple[Array, Array, Array]:
    """Return `shifted_sums` for s = 0 if they do not cancel, else for the mean."""
    total, squares = _sums_about_zero(x, weights, axes, dtype)
    n = total_weight(x, weights, axes)
    mean, is_safe = _offset_and_accuracy(total, squares, n)

    def far() -> Pair:
        # Divided again here, which XLA fuses: an operand costs a kernel.
        deviation = x.astype(dtype) - divide_by_count(total, n)
        return _sums_about_zero(deviation, weights, axes, dtype)

    sums = lax.cond(is_safe, lambda: (total, squares), far)
    return jnp.where(is_safe, 0, mean), *sums


def _sums_about_zero(
    x: Array, weights: Weights | None, axes: Axes, dtype: DTypeLike
) -> Pair:
    """Return Σ wx and Σ w|x|², each from a pass of its own over `x`."""

    def weighted(x: Array, weights: Weights | None) -> Array:
        return apply_weights(x.astype(dtype), weights)

    def weighted_squares(x: Array, weights: Weights | None) -> Array:
        return apply_weights(abs_square(x.astype(dtype)), weights)

    x, x_copy = _prevent_cse(x)
    total = sum_over_runs(weighted, axes, x, weights)
    return total, sum_over_runs(weighted_squares, axes, x_copy, weights)


def _sums_shifted_by_guess_if_safe(
    x: Array,
    weights: Weights | None,
    guess: Guess | None,
    axes: Axes,
    dtype: DTypeLike,
) -> tuple[Array, Array, Array]:
    """Return `shifted_sums` for a guess if they do not cancel, else by a sample.

    The guess does not wait for x, so that the sums can be fused with what computes x.
    """
    shift = guessed_shift(guess, dtype)
    total, squares = _sums_shifted_by(shift, x, weights, axes, dtype)
    _, is_safe = _offset_and_accuracy(total, squares, total_weight(x, weights, axes))
    shift = shard_like(jnp.broadcast_to(shift, total.shape), total)
    near = match_vma(shift, total, squares)
    # The near branch is handed nothing: libtpu 0.0.52 dies of a conditional with a
    # branch that is handed all results of a fusion.
    far = lax.cond(
        is_safe,
        lambda: jax.tree.map(jnp.zeros_like, near),
        lambda: _sums_shifted_by_sample(x, weights, axes, dtype, _plain_sums),
    )
    return jax.tree.map(partial(jnp.where, is_safe), near, far)


def _offset_and_accuracy(total: Array, squares: Array, n: Count) -> Pair:
    """Return μ - s from the sums about s, and whether they do not cancel."""
    offset = divide_by_count(total, n)
    var = divide_by_count(squares, n) - abs_square(offset)
    return offset, sums_are_accurate(offset, var)


def _sums_shifted_by_mean(
    x: Array, weights: Weights | None, axes: Axes, dtype: DTypeLike
) -> tuple[Array, Array, Array]:
    """Return `shifted_sums` for the mean, from a pass of its own."""
    total = sum_over(apply_weights(x.astype(dtype), weights), axes)
    mean = divide_by_count(total, total_weight(x, weights, axes))
    return mean, *_sums_shifted_by(mean, x, weights, axes, dtype)


def _sums_shifted_by_sample(
    x: Array, weights: Weights | None, axes: Axes, dtype: DTypeLike, sums: Sums
) -> tuple[Array, Array, Array]:
    """Return `shifted_sums` for the mean of a sample of `x`."""
    shift = lax.stop_gradient(_shift_from_sample(x, weights, axes, dtype, sums))
    return shift, *_sums_shifted_by(shift, x, weights, axes, dtype, sums)


def _sums_shifted_by(
    shift: Array,
    x: Array,
    weights: Weights | None,
    axes: Axes,
    dtype: DTypeLike,
    sums: Sums = _plain_sums,
) -> Pair:
    """Return Σ w(x-s) and Σ w|x-s|²."""
    deviation = x.astype(dtype) - shift
    squares = apply_weights(abs_square(deviation), weights)
    total, squares = sums(axes, apply_weights(deviation, weights), squares)
    return total, squares


def product_sums(
    dy: Inexact[Array, "*x"],
    x: Inexact[Array, "*x"],
    mean: Float[Array, "*stats"],
    axes: Axes,
) -> Pair:
    """Return Σ dy and Σ dy·(x - μ) of each feature, in the dtype of μ."""
    plain = partial(_sums_with_products, axes=axes, sums=_plain_sums)
    by_runs = partial(_sums_with_products_by_runs, axes=axes)
    return lax.platform_dependent(
        *(dy, x, mean),
        cpu=by_runs if _is_large(x) else plain,
        cuda=partial(_sums_with_products, axes=axes, sums=_packed_sums),
        default=plain,
    )


def _sums_with_products(
    dy: Array, x: Array, mean: Array, axes: Axes, sums: Sums
) -> Pair:
    total, products = sums(axes, dy.astype(mean.dtype), _products(dy, x, mean))
    return total, products


def _sums_with_products_by_runs(dy: Array, x: Array, mean: Array, axes: Axes) -> Pair:
    dy, dy_copy = _prevent_cse(dy)
    total = sum_over(dy.astype(mean.dtype), axes)
    return total, sum_over_runs(_products, axes, dy_copy, x, mean)


def _products(dy: Array, x: Array, mean: Array) -> Array:
    return dy.astype(mean.dtype) * (x.astype(mean.dtype) - mean)


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
