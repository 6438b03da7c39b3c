"""The moments of the local batch, and their derivative in closed form.

First step: moments → merge (`sync`) → running statistics (`running`) → normalize.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Inexact, Real

from .axes import Axes
from .reductions import (
    Weights,
    apply_weights,
    divide_by_count,
    materialize_on_cpu,
    num_elements,
    shifted_sums,
    sum_weights,
)
from .sharding import match_vma


class Moments(NamedTuple):
    """Hold n, the mean μ and m2 = Σ w|x-μ|² of each feature.

    All have x's rank, with length 1 along the reduction axes. n is a Python int unless
    x is masked; then it may also have length 1 along feature axes.
    """

    n: Float[Array, "*#stats"] | int
    mean: Inexact[Array, "*stats"]
    m2: Float[Array, "*stats"]

    @property
    def var(self) -> Float[Array, "*stats"]:
        """Return the biased variance σ² = m2 / n, and 0 where n is 0."""
        return divide_by_count(self.m2, self.n)


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


def moments(
    x_acc: Inexact[Array, "*x"],
    x: Inexact[Array, "*x"],
    mask: Real[Array, "*#x"] | Bool[Array, "*#x"] | None,
    axes: Axes,
    *,
    closed_form: bool,
) -> Moments:
    """Compute the moments of `x` over `axes`, in the dtype of `x_acc`.

    `x_acc` is x in the accumulation dtype. With `closed_form` the values come from x,
    which is saved for the backward pass, while the gradient leaves through `x_acc`: it
    is added to the gradient from `normalize` before the sum is rounded to x's dtype.
    """
    weights = sum_weights(x, mask, axes, x_acc.dtype)
    n = num_elements(x, weights, axes)
    if closed_form:
        return Moments(n, *_moments_vjp(*match_vma(x_acc, x, weights), axes))
    return Moments(n, *_formula(x_acc, x_acc, weights, axes))


def _formula(
    x_acc: Inexact[Array, "*x"],
    x: Inexact[Array, "*x"],
    weights: Weights | None,
    axes: Axes,
) -> tuple[Inexact[Array, "*stats"], Float[Array, "*stats"]]:
    shift, total, squares = shifted_sums(x, weights, axes, x_acc.dtype)
    # With d = x - s:  μ = s + Σwd / n  and  Σw|x-μ|² = Σw|d|² - |Σwd|² / n.
    offset = divide_by_count(total, num_elements(x, weights, axes))
    m2 = squares - jnp.real(total * jnp.conj(offset))
    return shift + offset, _at_least_zero(m2)


def _at_least_zero(m2: Float[Array, "*stats"]) -> Float[Array, "*stats"]:
    """Return max(m2, 0) with the derivative of m2: only rounding makes it negative."""
    return m2 + lax.stop_gradient(jnp.maximum(m2, 0) - m2)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _moments_vjp(
    x_acc: Inexact[Array, "*x"],
    x: Inexact[Array, "*x"],
    weights: Weights | None,
    axes: Axes,
) -> tuple[Inexact[Array, "*stats"], Float[Array, "*stats"]]:
    return _formula(x_acc, x, weights, axes)


Residuals = tuple[Array, Weights | None, Array]


def _moments_fwd(
    x_acc: Inexact[Array, "*x"],
    x: Inexact[Array, "*x"],
    weights: Weights | None,
    axes: Axes,
) -> tuple[tuple[Array, Array], Residuals]:
    # The formula, not `_moments_vjp`: jvp of grad passes through here.
    mean, m2 = _formula(x_acc, x, weights, axes)
    return (mean, m2), (x, weights, mean)


def _moments_bwd(
    axes: Axes, residuals: Residuals, cotangents: tuple[Array, Array]
) -> tuple[Array, None, None]:
    """Apply steps 8 and 9 of docs/mathematics.md; its step 5 is zero: Σ w(x-μ) = 0.

    8.  ∂μ/∂xᵢ  = wᵢ / n
    9.  ∂m2/∂xᵢ = 2 wᵢ (xᵢ - μ), with σ² = m2 / n
    """
    x, weights, mean = residuals
    dmean, dm2 = cotangents
    offset = divide_by_count(dmean, num_elements(x, weights, axes))
    mean, offset, slope = materialize_on_cpu(mean, offset, 2 * dm2)
    dx = offset + slope * (x.astype(mean.dtype) - mean)
    return apply_weights(dx, weights), None, None


_moments_vjp.defvjp(_moments_fwd, _moments_bwd)
