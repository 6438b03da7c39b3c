"""Normalization by given statistics, and its derivative in closed form.

Last room of four. In training the statistics are the batch's, at inference the running
ones: the formula is the same.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Inexact

from .axes import Axes
from .dtypes import real_dtype
from .reductions import product_sums, ready
from .sharding import vary_alike


def normalize(
    x_wide: Inexact[Array, "*x"],
    x: Inexact[Array, "*x"],
    mean: Inexact[Array, "*stats"],
    var: Float[Array, "*stats"],
    scale: Inexact[Array, "*stats"],
    bias: Inexact[Array, "*stats"],
    *,
    epsilon: float,
    axes: Axes,
    dtype: DTypeLike,
    closed_form: bool,
) -> Inexact[Array, "*x"]:
    """y = (x - μ) / √(σ² + ε) · scale + bias, computed as wide as x_wide, in `dtype`.

    Everything has x's rank. `x_wide` and `x` as in `moments`.
    """
    mean, scale, bias = (v.astype(x_wide.dtype) for v in (mean, scale, bias))
    var = var.astype(real_dtype(x_wide.dtype))
    if closed_form:
        arrays = vary_alike(x_wide, x, mean, var, scale, bias)
        return _closed_form(*arrays, epsilon, axes, dtype)
    return _formula(x_wide, mean, var, scale, bias, epsilon, dtype)


def _formula(x, mean, var, scale, bias, epsilon, dtype):
    # x - μ first: x·a - μ·a cancels where |μ| is large beside σ.
    factor = inverse_std(var, epsilon).astype(scale.dtype) * scale
    mean, factor, bias = ready(mean, factor, bias)
    return ((x.astype(mean.dtype) - mean) * factor + bias).astype(dtype)


def inverse_std(var: Array, epsilon: float) -> Array:
    """(σ² + ε)^(-1/2), and 0 for a constant channel with ε = 0, where y is the bias."""
    variance = var + epsilon
    # Not rsqrt: its derivative has (σ² + ε)^(-3/2), which underflows for σ of 1e15.
    inv_std = 1 / jnp.sqrt(jnp.where(variance > 0, variance, 1))
    return jnp.where(variance > 0, inv_std, 0)


@partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def _closed_form(x_wide, x, mean, var, scale, bias, epsilon, axes, dtype):
    return _formula(x, mean, var, scale, bias, epsilon, dtype)


def _closed_form_fwd(x_wide, x, mean, var, scale, bias, epsilon, axes, dtype):
    # The formula inlined, not `_closed_form` called: jvp of grad passes through here.
    y = _formula(x, mean, var, scale, bias, epsilon, dtype)
    return y, (x, mean, var, scale)


def _closed_form_bwd(epsilon, axes, dtype, residuals, dy):
    """Steps 1-4, 6 and 7 of docs/mathematics.md, with x̂ = (x - μ)·inv_std.

    1.  ∂l/∂x̂ᵢ    = ∂l/∂yᵢ · scale                     (inside 4, 6 and 7)
    2.  ∂l/∂scale = Σ ∂l/∂yᵢ · x̂ᵢ
    3.  ∂l/∂bias  = Σ ∂l/∂yᵢ
    4.  ∂l/∂σ²    = Σ ∂l/∂x̂ᵢ · (-1/2)(xᵢ - μ)(σ² + ε)^(-3/2)
    6.  ∂x̂ᵢ/∂μ    = -(σ² + ε)^(-1/2)
    7.  ∂x̂ᵢ/∂xᵢ   = (σ² + ε)^(-1/2)
    """
    x, mean, var, scale = residuals
    inv_std = inverse_std(var, epsilon)
    dbias, products = product_sums(dy, x, mean, var, axes)
    dscale = inv_std * products
    dvar = -0.5 * scale * dscale * inv_std * inv_std  # this order: inv_std³ underflows
    dmean = -scale * inv_std * dbias
    (factor,) = ready(scale * inv_std)
    dx = factor * dy.astype(mean.dtype)
    return dx, None, dmean, dvar, dscale, dbias


_closed_form.defvjp(_closed_form_fwd, _closed_form_bwd)
