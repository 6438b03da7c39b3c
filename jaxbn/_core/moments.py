"""The moments of this device's rows, and their derivative in closed form.

First room of four: moments → merge (`_sync`) → running statistics (`_running`) →
normalize (`_normalize`).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Inexact, Real

from .axes import Axes
from .dtypes import real_dtype
from .reductions import ready, shifted_sums
from .rows import count_rows, per_row
from .sharding import vary_alike


class Moments(NamedTuple):
    """Of each channel: the number of rows n, their mean μ, and m2 = Σ w|x-μ|².

    All have x's rank, with length 1 along the reduced axes; `count` has it along the
    feature axes too where the mask does not tell them apart.
    """

    count: Float[Array, "*#stats"] | int  # pyright: ignore[reportIncompatibleMethodOverride]
    mean: Inexact[Array, "*stats"]
    m2: Float[Array, "*stats"]

    @property
    def var(self) -> Array:
        """The biased variance σ² = m2 / n, and 0 of no rows."""
        return per_row(self.m2, self.count)


def moments(
    x_wide: Inexact[Array, "*x"],
    x: Inexact[Array, "*x"],
    mask: Real[Array, "*#x"] | Bool[Array, "*#x"] | None,
    axes: Axes,
    *,
    closed_form: bool,
) -> Moments:
    """Moments of `x`, in the dtype of `x_wide`, over its axes `axes`.

    `x_wide` is x in the accumulation dtype. With `closed_form` the values come from x,
    which is what the backward saves, while the gradient leaves through `x_wide`: it is
    added to the one from `normalize` before anything is rounded to x's dtype.
    """
    count = count_rows(x, _weights(mask, x_wide.dtype), axes)
    if closed_form:
        mean, m2 = _closed_form(*vary_alike(x_wide, x, mask), axes)
    else:
        mean, m2 = _formula(x_wide, x_wide, mask, axes)
    return Moments(count, mean, m2)


def _formula(
    x_wide: Array, x: Array, mask: Array | None, axes: Axes
) -> tuple[Array, Array]:
    weights = _weights(mask, x_wide.dtype)
    shift, total, squares = shifted_sums(x, weights, axes, x_wide.dtype)
    # With d = x - s:  μ = s + Σwd / n  and  Σw|x-μ|² = Σw|d|² - |Σwd|² / n.
    offset = per_row(total, count_rows(x, weights, axes))
    m2 = squares - jnp.real(total * jnp.conj(offset))
    return shift + offset, _at_least_zero(m2)


def _weights(mask: Array | None, dtype: DTypeLike) -> Array | None:
    return None if mask is None else mask.astype(real_dtype(dtype))


def _at_least_zero(m2: Array) -> Array:
    """max(m2, 0) with the slope of m2: rounding may dip below 0, the truth cannot."""
    return m2 + lax.stop_gradient(jnp.maximum(m2, 0) - m2)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _closed_form(x_wide, x, mask, axes):
    return _formula(x_wide, x, mask, axes)


def _closed_form_fwd(x_wide, x, mask, axes):
    # The formula inlined, not `_closed_form` called: jvp of grad passes through here.
    mean, m2 = _formula(x_wide, x, mask, axes)
    # The mask as it came, which may be a byte for each value and not four, and what
    # else would be another pass over it.
    masked = mask is not None
    count = count_rows(x, _weights(mask, x_wide.dtype), axes) if masked else None
    return (mean, m2), (x, mask, count, mean)


def _closed_form_bwd(axes, residuals, cotangents):
    """Steps 8 and 9 of docs/mathematics.md; its step 5 is zero: Σ w(x-μ) = 0.

    8.  ∂μ/∂xᵢ  = wᵢ / n
    9.  ∂m2/∂xᵢ = 2 wᵢ (xᵢ - μ), with σ² = m2 / n
    """
    x, mask, count, mean = residuals
    dmean, dm2 = cotangents
    count = count_rows(x, None, axes) if count is None else count
    mean, offset, slope = ready(mean, per_row(dmean, count), 2 * dm2)
    dx = offset + slope * (x.astype(mean.dtype) - mean)
    if mask is not None:
        weights = _weights(mask, dx.dtype)
        dx = jnp.where(weights != 0, weights * dx, 0)
    return dx, None, None


_closed_form.defvjp(_closed_form_fwd, _closed_form_bwd)
