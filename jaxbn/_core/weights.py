"""Masks as weights of the elements, and the number of elements of each feature."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Bool, Float, Inexact, Real

from .axes import Axes
from .dtypes import real_dtype

# A number of elements: a Python int unless x is masked, so that dividing by it, or
# comparing with it, costs no operation.
Count = Array | int


class Weights(NamedTuple):
    """Hold the mask as it was passed, and w = mask / scale over the reduction axes.

    `scale` is `None` for a mask that counts: then w is the mask, and n = `total` = Σ w.
    """

    mask: Real[Array, "*#x"] | Bool[Array, "*#x"]
    scale: Float[Array, "*#stats"] | None
    total: Float[Array, "*#stats"]
    n: Float[Array, "*#stats"]

    @property
    def sum_of_mask(self) -> Float[Array, "*#stats"] | None:
        """Return Σ mask where that is not n."""
        return None if self.scale is None else self.total * self.scale


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
    Sampling", 1965): the number of elements for equal weights, 1 for a single one. They
    are scaled to a maximum of 1, so that no sum overflows that would not without them.
    """
    if mask is None:
        return None
    copies = _product(x.shape[a] for a in axes if mask.shape[a] == 1)
    w = mask.astype(real_dtype(dtype))
    if not jnp.issubdtype(mask.dtype, jnp.floating):
        n = copies * sum_over(w, axes)
        return Weights(mask, None, n, n)
    scale = jnp.max(jnp.abs(w), axes, keepdims=True, initial=0)
    scale = jnp.where(scale > 0, scale, 1)
    w = w / scale
    total, squares = copies * sum_over(w, axes), copies * sum_over(w * w, axes)
    # Not total · (total / squares): for a single weight both squares round alike.
    return Weights(mask, scale, total, divide_by_count(total * total, squares))


def num_elements(x: Array, axes: Axes) -> Count:
    """Return the number of elements of each feature of `x`."""
    return _product(x.shape[a] for a in axes)


def total_weight(x: Array, weights: Weights | None, axes: Axes) -> Count:
    """Return Σ w, the number of elements if x is not masked."""
    return num_elements(x, axes) if weights is None else weights.total


def _product(lengths: Iterable[int]) -> Count:
    """Multiply lengths: an int, unless `jax.export` has symbols for lengths."""
    product = math.prod(lengths)
    return product if isinstance(product, int) else jnp.asarray(product, jnp.float32)


def sum_over(x: Array, axes: Axes) -> Array:
    """Sum over `axes`, which stay with length 1."""
    return jnp.sum(x, axes, keepdims=True)


def apply_weights(x: Inexact[Array, "*x"], weights: Weights | None) -> Array:
    """Return w·x, and 0 where w is 0."""
    if weights is None:
        return x
    w = weights.mask.astype(real_dtype(x.dtype))
    w = w if weights.scale is None else w / weights.scale
    # Selected, not only multiplied: padding may hold inf or NaN, and 0 · inf is NaN.
    return w.astype(x.dtype) * jnp.where(w != 0, x, 0)


def divide_by_count(total: Array, n: Count) -> Array:
    """Return `total` / n, and `total`, which then is 0, where n is not positive."""
    if isinstance(n, int):
        return total / max(n, 1)
    return total / jnp.where(n > 0, n, 1).astype(total.dtype)


def bessel_correction(n: Count) -> Array | float:
    """Return n / (n - 1), and 0 or n where n - 1 is not positive."""
    if isinstance(n, int):
        return n / max(n - 1, 1)
    return divide_by_count(n, n - 1)
