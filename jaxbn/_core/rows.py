"""Rows and their sums: what every room counts with."""

import math
from collections.abc import Iterable

import jax.numpy as jnp
from jax import Array

from .axes import Axes

# The number of rows: an int where nothing but x's shape decides it, so that dividing by
# it or asking whether there are any costs no operation. Under a mask an array.
Count = Array | int


def row_sum(x: Array, axes: Axes) -> Array:
    """Σ over `axes`, which stay with length 1."""
    return jnp.sum(x, axes, keepdims=True)


def weigh(x: Array, weights: Array | None) -> Array:
    """w·x of every value, 0 for one that weighs nothing."""
    if weights is None:
        return x
    # Selected, not only multiplied: padding may hold inf or NaN, and 0 · inf is NaN.
    return weights.astype(x.dtype) * jnp.where(weights != 0, x, 0)


def abs_square(z: Array) -> Array:
    """|z|², real also for complex z."""
    return jnp.real(z * jnp.conj(z))


def count_rows(x: Array, weights: Array | None, axes: Axes) -> Count:
    """n = Σ w of each channel, the number of its rows where there is no mask."""
    if weights is None:
        return _product(x.shape[a] for a in axes)
    copies = _product(x.shape[a] for a in axes if weights.shape[a] == 1)
    return copies * row_sum(weights, axes)


def _product(lengths: Iterable[int]) -> Count:
    """An int, but of the symbols that `jax.export` may have for lengths."""
    rows = math.prod(lengths)
    return rows if isinstance(rows, int) else jnp.asarray(rows, jnp.float32)


def per_row(total: Array, count: Count) -> Array:
    """`total` / `count`; of no rows, `total` as it is, which then is 0."""
    if isinstance(count, int):
        return total / max(count, 1)
    return total / jnp.where(count > 0, count, 1).astype(total.dtype)
