"""The sums for CUDA: both as one, of columns in two steps where one idles.

XLA:GPU prices each sum by itself and may write out the terms that two sums share. Both
are therefore one sum of complex numbers.

It gives 32 columns to a block of threads and, up to `MAX_UNCUT_ROWS` rows, all rows of
them: an array of 4,096 × 256 occupies 8 of an H100's 132 processors. Writing x minus a
vector to memory first then costs nothing beside it, and XLA does so.
"""

import math

import jax.numpy as jnp
from jax import Array, lax

from ..axes import Axes, axis_to_cut, divisors, split_axis
from ..weights import sum_over

MAX_UNCUT_ROWS = 4096
COLUMNS_PER_BLOCK = 32
MIN_BLOCKS = 256  # about two for each processor of an H100
MIN_RUN = 48  # shorter runs write too many sums


def packed_sums(axes: Axes, *arrays: Array) -> tuple[Array, ...]:
    """Sum two real arrays as one complex array."""
    if len(arrays) < 2 or jnp.iscomplexobj(arrays[0]):
        return tuple(sum_columns(array, axes) for array in arrays)
    both = sum_columns(lax.complex(*arrays), axes)
    return jnp.real(both), jnp.imag(both)


def sum_columns(x: Array, axes: Axes) -> Array:
    """Sum over `axes`, which stay with length 1, first over runs of rows if it pays."""
    is_of_columns = axes != () and axes[-1] < x.ndim - 1  # XLA sums rows well
    cut = axis_to_cut(x, axes) if is_of_columns else None
    num_runs = None if cut is None else _num_runs(x, axes, cut)
    if cut is None or num_runs is None:
        return sum_over(x, axes)
    runs = split_axis(x, cut, x.shape[cut] // num_runs)
    sums = jnp.sum(runs, [a + 1 for a in axes if a >= cut], keepdims=True)
    # The barrier keeps XLA from joining the two steps.
    return sum_over(lax.optimization_barrier(jnp.squeeze(sums, cut + 1)), axes)


def _num_runs(x: Array, axes: Axes, cut: int) -> int | None:
    """Return the number of runs along axis `cut`, `None` for a single step."""
    n = math.prod(x.shape[a] for a in axes)
    outer = math.prod(x.shape[a] for a in axes if a < cut)
    blocks_per_run = math.ceil(x.size // n / COLUMNS_PER_BLOCK)
    if n > MAX_UNCUT_ROWS:  # XLA cuts these, mid-sized ones into many short runs
        is_better = 128 <= n // outer <= MAX_UNCUT_ROWS
        return 1 if is_better and outer * blocks_per_run >= MIN_BLOCKS else None
    if cut == axes[0] and n.bit_count() > 1:
        return None  # devices that share a power of two of rows hold whole runs
    counts = [k for k in divisors(x.shape[cut]) if n // outer // k >= MIN_RUN]
    if not counts:
        return None
    filling = (k for k in counts if outer * k * blocks_per_run >= MIN_BLOCKS)
    num_runs = next(filling, counts[-1])
    return num_runs if outer * num_runs > 1 else None
