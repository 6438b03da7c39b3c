"""The steps of a training step, for batch norm and its variants.

x → moments → merge → normalize → y, and the statistics → running statistics.
"""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Inexact

from .arguments import Arguments, explain_transformations
from .axes import reduction_axes
from .dtypes import accumulation_dtype, real_dtype
from .moments import Moments
from .normalize import normalize_by, normalize_expanded
from .options import StaticOptions, uses_closed_form
from .sharding import expand_like
from .statistics import moments_of_all, squeeze_moments
from .variables import AnyParams, BatchNormState


def infer(arguments: Arguments, options: StaticOptions) -> Array:
    """Return y by the running statistics."""
    params, state, x, _, _, epsilon = arguments
    with explain_transformations(options):
        return normalize_by(
            params,
            state.mean,
            state.var,
            x,
            epsilon,
            axis=options.axis,
            dtype=options.dtype,
            autodiff=options.autodiff,
        )


def in_accumulation_dtype(
    x: Array, state: BatchNormState, options: StaticOptions
) -> Array:
    """Return x in the dtype of a whole training step.

    The gradient leaves through it, so that its parts, from the statistics and from the
    normalization, are added before they are rounded to x's dtype.
    """
    dtype = accumulation_dtype(x.dtype, state.mean.dtype, real_dtype(options.dtype))
    return x.astype(dtype)


def batch_moments(
    state: BatchNormState,
    x_acc: Inexact[Array, "*x"],
    x: Inexact[Array, "*x"],
    mask: Array | None,
    options: StaticOptions,
) -> tuple[Array, Array, Moments]:
    """Return mean and variance for `normalize_batch`, and the batch's statistics.

    The former have x's rank, and are the running ones for features with n ≤ 0. The
    latter have the features' shape.
    """
    mean, var = (expand_like(v, options.axis, x) for v in (state.mean, state.var))
    batch = moments_of_all(
        x_acc,
        x,
        mask,
        axes=reduction_axes(options.axis, x.ndim),
        axis_name=options.axis_name,
        groups=options.axis_index_groups,
        closed_form=uses_closed_form(options.autodiff, x),
        guess=(mean, var),
    )
    return *_batch_or_running(batch, mean, var), squeeze_moments(batch, options.axis)


def _batch_or_running(batch: Moments, mean: Array, var: Array) -> tuple[Array, Array]:
    """Return the batch statistics, or the running ones for features with n ≤ 0."""
    n = batch.n
    if isinstance(n, int) and n > 0:
        return batch.mean, batch.var
    # NaN in a mask is not hidden: n is NaN then, and not an empty batch's.
    return (
        jnp.where(n <= 0, mean.astype(batch.mean.dtype), batch.mean),
        jnp.where(n <= 0, var.astype(batch.var.dtype), batch.var),
    )


def normalize_batch(
    params: AnyParams,
    mean: Array,
    var: Array,
    x_acc: Inexact[Array, "*x"],
    x: Inexact[Array, "*x"],
    epsilon: ArrayLike,
    options: StaticOptions,
) -> Inexact[Array, "*x"]:
    """Return y by statistics of x's rank."""
    return normalize_expanded(
        params,
        mean,
        var,
        x_acc,
        x,
        epsilon,
        axis=options.axis,
        dtype=options.dtype,
        closed_form=uses_closed_form(options.autodiff, x),
    )
