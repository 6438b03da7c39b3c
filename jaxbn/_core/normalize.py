"""Normalization by given statistics, and its derivative in closed form.

Last step. The statistics are the batch's in training and the running ones at
inference; the formula is the same.
"""

from __future__ import annotations  # for a signature that `help` prints as written here

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Float, Inexact

from .axes import Axes, check_axis, reduction_axes
from .dtypes import accumulation_dtype, as_array, real_dtype
from .options import (
    Autodiff,
    check_autodiff,
    check_epsilon,
    check_input,
    check_output_dtype,
    explain_forward_mode,
    name_input,
    uses_closed_form,
)
from .sharding import expand_like, match_vma
from .sums.cpu import materialize_on_cpu
from .sums.forms import product_sums
from .variables import (
    AnyParams,
    BatchNormParams,
    check_features,
    check_kind,
    check_params,
)

Vector = Inexact[Array, "*stats"]  # with x's rank, length 1 along the reduction axes


def normalize(
    params: AnyParams,
    mean: ArrayLike,
    var: ArrayLike,
    x: ArrayLike,
    *,
    axis: int | Sequence[int] = -1,
    epsilon: ArrayLike = 1e-5,
    dtype: DTypeLike | None = None,
    autodiff: Autodiff = "custom_vjp",
) -> Inexact[Array, "*x"]:
    """Normalize `x` by given statistics.

        y = (x - μ) / √(σ² + ε) · scale + bias

    The last step of `batch_norm`. With the batch's own statistics it trains, with the
    running ones it is the inference; the gradient is exact for every array.

    **Arguments**

    - `params`: scale and bias, or `None` for one of them.
    - `mean`, `var`: in the features' shape, from `batch_statistics` or a state.
    - `x`, `axis`, `epsilon`, `dtype`, `autodiff`: as in `batch_norm`.

    **Returns** y, in x's shape and in `dtype`.

    **Raises** `ValueError` for shapes and options, `TypeError` for dtypes and kinds,
    while tracing.

    >>> import jax.numpy as jnp, jaxbn
    >>> params, _ = jaxbn.init(2)
    >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
    >>> mean, var, _ = jaxbn.batch_statistics(x)
    >>> jaxbn.normalize(params, mean, var, x).round(3)
    Array([[-1., -1.],
           [ 1.,  1.]], dtype=float32)
    """
    order = "The order is normalize(params, mean, var, x); jaxbn.init returns params"
    check_kind("params", params, BatchNormParams, order)
    x = check_input(x)
    axes = check_axis(axis, x.ndim)
    params = check_params(params, x, axes)
    mean = check_features("mean", mean, x, axes)
    var = check_features("var", var, x, axes)
    autodiff = check_autodiff(autodiff)
    with explain_forward_mode():
        return normalize_by(
            params,
            mean,
            var,
            name_input(x, autodiff),
            check_epsilon(epsilon),
            axis=axes,
            dtype=check_output_dtype(dtype, x.dtype),
            autodiff=autodiff,
        )


@partial(jax.jit, inline=True, static_argnames=("axis", "dtype", "autodiff"))
def normalize_by(
    params: AnyParams,
    mean: Array,
    var: Array,
    x: Array,
    epsilon: ArrayLike,
    *,
    axis: Axes,
    dtype: np.dtype,
    autodiff: Autodiff,
) -> Array:
    """Return y; every vector has the features' shape."""
    acc_dtype = accumulation_dtype(x.dtype, mean.dtype, real_dtype(dtype))
    mean, var = (expand_like(v, axis, x) for v in (mean, var))
    return normalize_expanded(
        params,
        mean,
        var,
        x.astype(acc_dtype),
        x,
        epsilon,
        axis=axis,
        dtype=dtype,
        closed_form=uses_closed_form(autodiff, x),
    )


def _expand_params(
    params: AnyParams, mean: Vector, axis: Axes, x: Inexact[Array, "*x"]
) -> tuple[Vector, Vector]:
    """Return scale and bias, of x's rank: 1 and 0 if they are `None`."""
    scale, bias = (None if v is None else expand_like(v, axis, x) for v in params)
    return (
        jnp.ones_like(mean) if scale is None else scale,
        jnp.zeros_like(mean) if bias is None else bias,
    )


def normalize_expanded(
    params: AnyParams,
    mean: Vector,
    var: Float[Array, "*stats"],
    x_acc: Inexact[Array, "*x"],
    x: Inexact[Array, "*x"],
    epsilon: ArrayLike,
    *,
    axis: Axes,
    dtype: np.dtype,
    closed_form: bool,
) -> Inexact[Array, "*x"]:
    """Return y by statistics of x's rank and parameters in the features' shape.

    It is computed in the dtype of `x_acc`; `x_acc` and `x` are as in `moments`.
    """
    with jax.named_scope("jaxbn.normalize"):
        scale, bias = _expand_params(params, mean, axis, x)
        mean, scale, bias = (v.astype(x_acc.dtype) for v in (mean, scale, bias))
        var = var.astype(real_dtype(x_acc.dtype))
        epsilon = jnp.asarray(epsilon, var.dtype)
        if closed_form:
            arrays = match_vma(x_acc, x, mean, var, scale, bias, epsilon)
            return _normalize_vjp(*arrays, reduction_axes(axis, x.ndim), dtype)
        factor = inverse_std(var, epsilon).astype(scale.dtype) * scale
        return _formula(x_acc, mean, factor, bias, dtype)


def _formula(
    x: Inexact[Array, "*x"], mean: Vector, factor: Vector, bias: Vector, dtype: np.dtype
) -> Inexact[Array, "*x"]:
    # x - μ first: x·a - μ·a cancels where |μ| is large beside σ.
    return ((x.astype(mean.dtype) - mean) * factor + bias).astype(dtype)


def inverse_std(
    var: Float[Array, "*stats"], epsilon: ArrayLike
) -> Float[Array, "*stats"]:
    """Return (σ² + ε)^(-1/2): 0 where the sum is 0, for y = bias there; NaN below."""
    variance = var + epsilon
    # Not rsqrt: its derivative has (σ² + ε)^(-3/2), which underflows for σ of 1e15.
    inv_std = 1 / jnp.sqrt(jnp.where(variance == 0, 1, variance))
    return jnp.where(variance == 0, 0, inv_std)


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
# x and epsilon come back as the caller gave them, perhaps in NumPy.
Residuals = tuple[Array | np.ndarray, Array, Array, Array, Array | np.ndarray]


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
    x = as_array(x)
    inv_std = inverse_std(var, epsilon)
    dbias, products = product_sums(dy, x, mean, axes)
    dscale = inv_std * products
    dvar = -0.5 * scale * dscale * inv_std * inv_std  # this order: inv_std³ underflows
    dmean = -scale * inv_std * dbias
    (factor,) = materialize_on_cpu(x, scale * inv_std)
    dx = factor * dy.astype(mean.dtype)
    return dx, None, dmean, dvar, dscale, dbias, jnp.sum(dvar)


_normalize_vjp.defvjp(_normalize_fwd, _normalize_bwd)
