"""Masks as weights of the elements, and the number of elements of each feature."""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Bool, Float, Inexact, Real

from .axes import Axes
from .dtypes import real_dtype
from .mask_scale import Scale, divide_by_scale, split_scale

# A number of elements: a Python int unless x is masked, so that dividing by it, or
# comparing with it, costs no operation.
Count = Array | int


class Weights(NamedTuple):
    """Hold the mask as it was passed, and sums over the reduction axes of weights w.

    For a mask that counts, w is the mask, and n = `total` = Σ w. For a floating mask w
    is mask / `scale`, and `dof` is n - 1, which an n near 1 would round.
    """

    mask: Real[Array, "*#x"] | Bool[Array, "*#x"]
    total: Float[Array, "*#stats"]
    n: Float[Array, "*#stats"]
    dof: Float[Array, "*#stats"] | None = None
    scale: Scale | None = None


def check_mask(mask: ArrayLike | None, shape: tuple) -> Array | None:
    """Return `mask` as a constant real array of x's rank that broadcasts to x."""
    if mask is None:
        return None
    mask = lax.stop_gradient(jnp.asarray(mask))
    if jnp.issubdtype(mask.dtype, jnp.complexfloating):
        raise TypeError(
            f"mask must be bool, integer or floating; got {mask.dtype}. "
            "Its values are weights: pass the real part."
        )
    padded = (1,) * (len(shape) - mask.ndim) + mask.shape
    fits = len(padded) == len(shape) and all(
        m in (1, n) for m, n in zip(padded, shape, strict=True)
    )
    if not fits:
        leading = mask.shape if mask.shape == shape[: mask.ndim] else shape[:1]
        raise ValueError(
            f"mask must broadcast to x; got mask {mask.shape} for x {shape}. "
            "Give it x's rank with length 1 where it does not vary, for instance "
            f"mask.reshape({leading + (1,) * (len(shape) - len(leading))}) for a mask "
            "of the leading axes."
        )
    return mask.reshape(padded)


def make_weights(
    x: Inexact[Array, "*x"],
    mask: Real[Array, "*#x"] | Bool[Array, "*#x"] | None,
    axes: Axes,
    dtype: DTypeLike,
) -> Weights | None:
    """Make weights of a mask, and their sums in `dtype`; `None` without a mask.

    A bool or integer mask counts elements: n = Σ w. The weights of a floating mask have
    no scale, and their effective number is n = (Σ w)² / Σ w² (L. Kish, "Survey
    Sampling", 1965): the number of elements for equal weights, 1 for a single one. It
    is 0 where Σ w is not positive, or infinite, and NaN where Σ w is NaN.
    """
    if mask is None:
        return None
    copies = _as_factor(_product(x.shape[a] for a in axes if mask.shape[a] == 1), dtype)
    if not jnp.issubdtype(mask.dtype, jnp.floating):
        n = copies * sum_over(mask.astype(real_dtype(dtype)), axes)
        return Weights(mask, n, n)
    w, is_largest, scale = split_scale(mask, axes)
    total, squares, pairs = sums_of_weights(
        w.astype(real_dtype(dtype)),
        is_largest,
        jnp.ones((), real_dtype(dtype)),
        sums=lambda *terms: [sum_over(term, axes) for term in terms],
    )
    # Each weight counts `copies` times: as many pairs of copies of its own.
    dof = copies * divide_by_count(pairs, squares) + (copies - 1)
    return Weights(mask, copies * total, *effective_number(total, dof), scale)


def sums_of_weights(
    w: Float[Array, "..."],
    is_largest: Bool[Array, "..."],
    largest: Float[Array, "..."],
    sums: Callable[..., list[Array]],
) -> tuple[Array, Array, Array]:
    """Return Σ w, Σ w² and Σ wᵢwⱼ over all i ≠ j: n - 1 is the third by the second.

    As (Σ w)² - Σ w², the third would cancel where one weight dominates. Without the k
    largest weights, which are equal, the sums of the others do not.
    """
    others = jnp.where(is_largest, 0, w)
    k, rest, rest_squares = sums(is_largest.astype(w.dtype), others, others * others)
    total = k * largest + rest
    squares = k * largest * largest + rest_squares
    pairs_of_largest = (k - 1) * k * largest * largest + 2 * k * largest * rest
    return total, squares, pairs_of_largest + (rest * rest - rest_squares)


def effective_number(total: Array, dof: Array) -> tuple[Array, Array]:
    """Return n and n - 1, and 0 and -1 where the sum of weights is not positive."""
    is_counted = (total > 0) & (total < jnp.inf)
    nothing = jnp.where(jnp.isnan(total), total, 0)
    return (
        jnp.where(is_counted, 1 + dof, nothing),
        jnp.where(is_counted, dof, nothing - 1),
    )


def num_elements(x: Array, axes: Axes) -> Count:
    """Return the number of elements of each feature of `x`."""
    return _product(x.shape[a] for a in axes)


def total_weight(x: Array, weights: Weights | None, axes: Axes) -> Count:
    """Return Σ w, the number of elements if x is not masked."""
    return num_elements(x, axes) if weights is None else weights.total


def _product(lengths: Iterable[int]) -> Count:
    """Multiply lengths: an int, unless `jax.export` has symbols for lengths.

    Products of symbols are taken in floating point, where they do not overflow.
    """
    lengths = [*lengths]
    known = math.prod(k for k in lengths if isinstance(k, int))
    symbols = [jnp.asarray(k, jnp.float32) for k in lengths if not isinstance(k, int)]
    return math.prod(symbols, start=jnp.float32(known)) if symbols else known


def _as_factor(n: Count, dtype: DTypeLike) -> Array | float:
    """Return a count as a factor of sums in `dtype`, however large it is."""
    return float(n) if isinstance(n, int) else n.astype(real_dtype(dtype))


def sum_over(x: Array, axes: Axes) -> Array:
    """Sum over `axes`, which stay with length 1."""
    return jnp.sum(x, axes, keepdims=True)


def apply_weights(x: Inexact[Array, "*x"], weights: Weights | None) -> Array:
    """Return w·x, and 0 where w is 0."""
    if weights is None:
        return x
    mask, scale = weights.mask, weights.scale
    w = mask if scale is None else divide_by_scale(mask, scale)
    w = w.astype(real_dtype(x.dtype))
    # Selected, not only multiplied: padding may hold inf or NaN, and 0 · inf is NaN.
    return w.astype(x.dtype) * jnp.where(w != 0, x, 0)


def divide_by_count(total: Array, n: Count) -> Array:
    """Return `total` / n, and `total`, which then is 0, where n is not positive."""
    if isinstance(n, int):
        return total / float(max(n, 1))
    return total / jnp.where(n > 0, n, 1).astype(total.dtype)


def bessel_correction(n: Count, dof: Array | None) -> Array | float:
    """Return n / (n - 1), and n where n - 1 is not positive; `dof` as in `Weights`."""
    if isinstance(n, int):
        return n / max(n - 1, 1)
    return divide_by_count(n, n - 1 if dof is None else dof)
