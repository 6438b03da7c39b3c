"""Sums over rows in two steps, where one step is slower than a CPU's memory.

XLA:CPU leaves sums to YNNPACK, which sums one array as fast as memory delivers it. A
product of two takes twice as long, and a vector or mask is repeated to x's shape first.
"""

from collections.abc import Callable

import jax
from jax import Array, lax

from .axes import Axes, every_kth
from .column_sums import axis_to_cut
from .weights import Weights, sum_over

MIN_RUN, MAX_RUN = 4, 20  # shorter runs write many sums, longer ones compile slowly
MAX_DEVICES = 16


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
