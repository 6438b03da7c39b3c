"""The moments of the local batch, and their derivative in closed form.

First step: moments → merge (`sync`) → running statistics (`running`) → normalize.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Inexact, Real

from .axes import Axes
from .checkpoint import name_saved
from .dtypes import as_array
from .mask_scale import Scale
from .sharding import match_vma
from .sums.cpu import materialize_on_cpu
from .sums.forms import shifted_sums
from .sums.plain import plain_shifted_sums
from .sums.shift import Guess
from .weights import (
    Weights,
    apply_weights,
    divide_by_count,
    make_weights,
    num_elements,
    total_weight,
)


class Moments(NamedTuple):
    """Hold the mean μ, the biased variance σ² and n of each feature.

    All have x's rank, with length 1 along the reduction axes. n is a Python int unless
    x is masked, merged or of symbolic size; then it may have length 1 along feature
    axes too. For a floating mask `dof` is n - 1, not rounded, and Σ mask is `total`
    times `scale`.
    """

    mean: Inexact[Array, "*stats"]
    var: Float[Array, "*stats"]
    n: Float[Array, "*#stats"] | int
    dof: Float[Array, "*#stats"] | None = None
    total: Float[Array, "*#stats"] | None = None
    scale: Scale | None = None


def moments(
    x_acc: Inexact[Array, "*x"],
    x: Inexact[Array, "*x"],
    mask: Real[Array, "*#x"] | Bool[Array, "*#x"] | None,
    axes: Axes,
    *,
    closed_form: bool,
    guess: Guess | None = None,
) -> Moments:
    """Compute the moments of `x` over `axes`, in the dtype of `x_acc`.

    `x_acc` is x in the accumulation dtype. With `closed_form` the values come from x,
    which is saved for the backward pass, while the gradient leaves through `x_acc`: it
    is added to the gradient from `normalize` before the sum is rounded to x's dtype.
    `guess` is a mean and a variance known before x; none of the results depends on it
    beyond rounding.
    """
    weights = make_weights(x, mask, axes, x_acc.dtype)
    if closed_form:
        mean, m2 = _moments_vjp(*match_vma(x_acc, x, weights, guess), axes)
    else:
        mean, m2 = _formula(plain_shifted_sums, x_acc, weights, axes, x_acc.dtype)
    var = divide_by_count(m2, total_weight(x, weights, axes))
    if weights is None:
        return Moments(mean, var, num_elements(x, axes))
    total = None if weights.scale is None else weights.total
    return Moments(mean, var, weights.n, weights.dof, total, weights.scale)


def _formula(
    sums: Callable[..., tuple[Array, Array, Array]],
    x: Inexact[Array, "*x"],
    weights: Weights | None,
    axes: Axes,
    dtype: DTypeLike,
) -> tuple[Inexact[Array, "*stats"], Float[Array, "*stats"]]:
    shift, total, squares = sums(x, weights, axes, dtype)
    # With d = x - s:  μ = s + Σwd / Σw  and  Σw|x-μ|² = Σw|d|² - |Σwd|² / Σw.
    offset = divide_by_count(total, total_weight(x, weights, axes))
    m2 = squares - jnp.real(total * jnp.conj(offset))
    return shift + offset, _at_least_zero(m2)


def _at_least_zero(m2: Float[Array, "*stats"]) -> Float[Array, "*stats"]:
    """Return max(m2, 0) with the derivative of m2: only rounding makes it negative."""
    # Not m2 - min(m2, 0): `jet` has no rule for min in older versions of JAX.
    return m2 + lax.stop_gradient(jnp.maximum(-m2, 0))


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _moments_vjp(
    x_acc: Inexact[Array, "*x"],
    x: Inexact[Array, "*x"],
    weights: Weights | None,
    guess: Guess | None,
    axes: Axes,
) -> tuple[Inexact[Array, "*stats"], Float[Array, "*stats"]]:
    return _moments_fwd(x_acc, x, weights, guess, axes)[0]


# x comes back as the caller gave it, perhaps in NumPy.
Residuals = tuple[Array | np.ndarray, Weights | None, Array]


def _moments_fwd(
    x_acc: Inexact[Array, "*x"],
    x: Inexact[Array, "*x"],
    weights: Weights | None,
    guess: Guess | None,
    axes: Axes,
) -> tuple[tuple[Array, Array], Residuals]:
    # The formula, not `_moments_vjp`: jvp of grad passes through here.
    mean, m2 = _formula(
        partial(shifted_sums, guess=guess), x, weights, axes, x_acc.dtype
    )
    mean, m2 = name_saved((mean, m2))
    return (mean, m2), (x, weights, mean)


def _moments_bwd(
    axes: Axes, residuals: Residuals, cotangents: tuple[Array, Array]
) -> tuple[Array, None, None, None]:
    """Apply steps 8 and 9 of docs/mathematics.md; its step 5 is zero: Σ w(x-μ) = 0.

    8.  ∂μ/∂xᵢ  = wᵢ / Σw
    9.  ∂m2/∂xᵢ = 2 wᵢ (xᵢ - μ), with σ² = m2 / Σw
    """
    x, weights, mean = residuals
    x = as_array(x)
    dmean, dm2 = cotangents
    offset = divide_by_count(dmean, total_weight(x, weights, axes))
    mean, offset, slope = materialize_on_cpu(x, mean, offset, 2 * dm2)
    dx = offset + slope * (x.astype(mean.dtype) - mean)
    return apply_weights(dx, weights), None, None, None


_moments_vjp.defvjp(_moments_fwd, _moments_bwd)
