"""The sums for a CPU: each reads x by itself, those of products over runs of rows.

XLA:CPU writes a cast that two sums share to memory first, and so a subtracted vector.
It leaves sums to YNNPACK, which sums one array as fast as memory delivers it; a product
of two takes twice as long, and a vector or mask is repeated to x's shape first. Sums of
x and x² are therefore taken about zero where they do not cancel.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from ..axes import Axes, axis_to_cut, every_kth
from ..dtypes import abs_square
from ..weights import Weights, apply_weights, divide_by_count, sum_over, total_weight
from .plain import Pair, products, sums_shifted_by, sums_with_products
from .shift import offset_and_accuracy

# Smaller arrays stay in a CPU's cache. There a conditional, or a separate kernel for a
# vector, takes as much time as it saves, and more to compile.
MIN_SIZE_FOR_CPU_FORMS = 2**18

MIN_RUN, MAX_RUN = 4, 20  # shorter runs write many sums, longer ones compile slowly
MAX_DEVICES = 16


def _is_large(x: Array) -> bool:
    """Decide whether the CPU's forms pay; a symbolic size counts as large."""
    return not isinstance(x.size, int) or x.size >= MIN_SIZE_FOR_CPU_FORMS


def shifted_sums(
    x: Array, weights: Weights | None, axes: Axes, dtype: DTypeLike
) -> tuple[Array, Array, Array]:
    """Return `plain_shifted_sums` by the form for the size of x."""
    form = _sums_unshifted_if_safe if _is_large(x) else _sums_shifted_by_mean
    return form(x, weights, axes, dtype)


def product_sums(dy: Array, x: Array, mean: Array, axes: Axes) -> Pair:
    """Return Σ dy and Σ dy·(x - μ) by the form for the size of x."""
    form = _products_by_runs if _is_large(x) else sums_with_products
    return form(dy, x, mean, axes)


def _sums_unshifted_if_safe(
    x: Array, weights: Weights | None, axes: Axes, dtype: DTypeLike
) -> tuple[Array, Array, Array]:
    """Return `shifted_sums` for s = 0 if they do not cancel, else for the mean."""
    total, squares = _sums_about_zero(x, weights, axes, dtype)
    n = total_weight(x, weights, axes)
    mean, is_safe = offset_and_accuracy(total, squares, n)

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


def _sums_shifted_by_mean(
    x: Array, weights: Weights | None, axes: Axes, dtype: DTypeLike
) -> tuple[Array, Array, Array]:
    """Return `shifted_sums` for the mean, from a pass of its own."""
    total = sum_over(apply_weights(x.astype(dtype), weights), axes)
    mean = divide_by_count(total, total_weight(x, weights, axes))
    return mean, *sums_shifted_by(mean, x, weights, axes, dtype)


def _products_by_runs(dy: Array, x: Array, mean: Array, axes: Axes) -> Pair:
    """Return Σ dy and Σ dy·(x - μ), the latter first over runs of rows."""
    dy, dy_copy = _prevent_cse(dy)
    total = sum_over(dy.astype(mean.dtype), axes)
    return total, sum_over_runs(products, axes, dy_copy, x, mean)


def _prevent_cse(x: Array) -> Pair:
    """Return `x` twice, as two arrays to XLA, so that no cast serves two sums."""
    return lax.optimization_barrier((x, x))


def materialize_on_cpu(x: Array, *vectors: Array) -> tuple[Array, ...]:
    """Compute `vectors` before the pass over `x` that uses them, if `x` is large.

    XLA:CPU repeats a computation that it fuses with a broadcast for every element.
    """
    if not _is_large(x):
        return vectors
    return lax.platform_dependent(
        *vectors, cpu=lambda *v: lax.optimization_barrier(v), default=lambda *v: v
    )


def sum_over_runs(
    function: Callable[..., Array],
    axes: Axes,
    x: Array,
    *others: Weights | Array | None,
) -> Array:
    """Sum an elementwise function of arrays over `axes`, first over runs of rows.

    The others have x's rank. A single array is summed in one step, and so are rows that
    cannot be cut.
    """
    arrays = (x, *others)
    cut = axis_to_cut(x, axes) if len(jax.tree.leaves(arrays)) > 1 else None
    length = None if cut is None else _length_of_runs(x.shape[cut], cut == axes[0])
    if cut is None or length is None:
        return sum_over(function(*arrays), axes)

    def values(start: int) -> Array:
        def slice_rows(array: Array) -> Array:
            if array.shape[cut] == 1:
                return array
            return every_kth(array, length, cut, start)

        return function(*jax.tree.map(slice_rows, arrays))

    sums = sum(map(values, range(1, length)), values(0))
    # The barrier keeps XLA from joining the two steps.
    return sum_over(lax.optimization_barrier(sums), axes)


def _length_of_runs(rows: int, is_batch: bool) -> int | None:
    """Return the largest possible length of runs.

    Up to `MAX_DEVICES` devices that share a batch equally hold whole runs of it.
    """
    devices = range(1, MAX_DEVICES + 1 if is_batch else 2)
    shares = [rows // n for n in devices if rows % n == 0]
    lengths = range(MAX_RUN, MIN_RUN - 1, -1)
    return next((k for k in lengths if all(s % k == 0 for s in shares)), None)
