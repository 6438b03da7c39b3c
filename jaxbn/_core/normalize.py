"""Normalization by given statistics, and its derivative in closed form.

Last step. The statistics are the batch's in training and the running ones at
inference; the formula is the same.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, Inexact

from .axes import Axes
from .dtypes import real_dtype
from .reductions import materialize_on_cpu, product_sums
from .sharding import match_vma

Vector = Inexact[Array, "*stats"]  # with x's rank, length 1 along the reduction axes


def normalize(
    x_acc: Inexact[Array, "*x"],
    x: Inexact[Array, "*x"],
    mean: Vector,
    var: Float[Array, "*stats"],
    scale: Vector,
    bias: Vector,
    epsilon: ArrayLike,
    *,
    axes: Axes,
    dtype: np.dtype,
    closed_form: bool,
) -> Inexact[Array, "*x"]:
    """Return y = (x - μ) / √(σ² + ε) · scale + bias, in `dtype`.

    It is computed in the dtype of `x_acc`; `x_acc` and `x` are as in `moments`.
    """
    mean, scale, bias = (v.astype(x_acc.dtype) for v in (mean, scale, bias))
    var = var.astype(real_dtype(x_acc.dtype))
    epsilon = jnp.asarray(epsilon, var.dtype)
    if closed_form:
        arrays = match_vma(x_acc, x, mean, var, scale, bias, epsilon)
        return _normalize_vjp(*arrays, axes, dtype)
    factor = inverse_std(var, epsilon).astype(scale.dtype) * scale
    return _formula(x_acc, mean, factor, bias, dtype)


def _formula(
    x: Inexact[Array, "*x"], mean: Vector, factor: Vector, bias: Vector, dtype: np.dtype
) -> Inexact[Array, "*x"]:
    # x - μ first: x·a - μ·a cancels where |μ| is large beside σ.
    return ((x.astype(mean.dtype) - mean) * factor + bias).astype(dtype)


def inverse_std(var: Float[Array, "..."], epsilon: ArrayLike) -> Float[Array, "..."]:
    """Return (σ² + ε)^(-1/2), and 0 where both are 0, so that y is the bias there."""
    variance = var + epsilon
    # Not rsqrt: its derivative has (σ² + ε)^(-3/2), which underflows for σ of 1e15.
    inv_std = 1 / jnp.sqrt(jnp.where(variance > 0, variance, 1))
    return jnp.where(variance > 0, inv_std, 0)


@partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def _normalize_vjp(
    x_acc: Inexact[Array, "*x"],
    x: Inexact[Array, "*x"],
    mean: Vector,
    var: Float[Array, "*stats"],
    scale: Vector,
    bias: Vector,
    epsilon: Float[Array, ""],
    axes: Axes,
    dtype: np.dtype,
) -> Inexact[Array, "*x"]:
    arrays = x_acc, x, mean, var, scale, bias, epsilon
    return _normalize_fwd(*arrays, axes, dtype)[0]


# A constant epsilon is a NumPy array in older versions of JAX.
Residuals = tuple[Array, Array, Array, Array, Array | np.ndarray]


def _normalize_fwd(
    x_acc: Inexact[Array, "*x"],
    x: Inexact[Array, "*x"],
    mean: Vector,
    var: Float[Array, "*stats"],
    scale: Vector,
    bias: Vector,
    epsilon: Float[Array, ""],
    axes: Axes,
    dtype: np.dtype,
) -> tuple[Inexact[Array, "*x"], Residuals]:
    # The formula, not `_normalize_vjp`: jvp of grad passes through here.
    (factor,) = materialize_on_cpu(x, inverse_std(var, epsilon) * scale)
    return _formula(x, mean, factor, bias, dtype), (x, mean, var, scale, epsilon)


def _normalize_bwd(
    axes: Axes, dtype: np.dtype, residuals: Residuals, dy: Array
) -> tuple[Array, None, Array, Array, Array, Array, Array]:
    """Apply steps 1-4, 6 and 7 of docs/mathematics.md, with x̂ = (x - μ)·inv_std.

    1.  ∂l/∂x̂ᵢ    = ∂l/∂yᵢ · scale                     (inside 4, 6 and 7)
    2.  ∂l/∂scale = Σ ∂l/∂yᵢ · x̂ᵢ
    3.  ∂l/∂bias  = Σ ∂l/∂yᵢ
    4.  ∂l/∂σ²    = Σ ∂l/∂x̂ᵢ · (-1/2)(xᵢ - μ)(σ² + ε)^(-3/2)  (∂l/∂ε: its sum)
    6.  ∂x̂ᵢ/∂μ    = -(σ² + ε)^(-1/2)
    7.  ∂x̂ᵢ/∂xᵢ   = (σ² + ε)^(-1/2)
    """
    x, mean, var, scale, epsilon = residuals
    inv_std = inverse_std(var, epsilon)
    dbias, products = product_sums(dy, x, mean, var, axes)
    dscale = inv_std * products
    dvar = -0.5 * scale * dscale * inv_std * inv_std  # this order: inv_std³ underflows
    dmean = -scale * inv_std * dbias
    (factor,) = materialize_on_cpu(x, scale * inv_std)
    dx = factor * dy.astype(mean.dtype)
    return dx, None, dmean, dvar, dscale, dbias, jnp.sum(dvar)


_normalize_vjp.defvjp(_normalize_fwd, _normalize_bwd)
