"""The statistics of a batch, as a function of their own."""

from __future__ import annotations  # for a signature that `help` prints as written here

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, Inexact

from .axes import Axes, check_axis, reduction_axes, squeeze_features
from .dtypes import accumulation_dtype
from .moments import Moments, moments
from .options import (
    Autodiff,
    check_autodiff,
    check_input,
    explain_forward_mode,
    name_input,
    uses_closed_form,
)
from .sharding import shard_like
from .sums.shift import Guess
from .sync import (
    AxisName,
    Groups,
    check_axis_name,
    check_groups,
    explain_collectives,
    merge,
)
from .weights import check_mask


class BatchStatistics(NamedTuple):
    """Hold the statistics of one batch, in the features' shape.

    `var` is biased: Σ w|x-μ|² / Σ w. `n` is the number of elements of each feature: the
    sum of a bool or integer mask, the effective number (Σ w)² / Σ w² of a floating one.
    In float32, n of one dominant weight rounds to 1 if the others are below 6e-8 of it.
    """

    mean: Inexact[Array, "*features"]
    var: Float[Array, "*features"]
    n: Float[Array, "*features"]


def batch_statistics(
    x: ArrayLike,
    *,
    axis: int | Sequence[int] = -1,
    mask: ArrayLike | None = None,
    axis_name: str | Sequence[str] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    autodiff: Autodiff = "custom_vjp",
) -> BatchStatistics:
    """Compute mean, variance and n of each feature of `x`.

        μ = Σ w x / Σ w,   σ² = Σ w |x - μ|² / Σ w

    over all axes but the feature axes, and over the devices of `axis_name`. The first
    step of `batch_norm`, whose arguments these are.

    **Returns** `BatchStatistics` in the features' shape, in float32 or wider. Their
    gradient is exact. Of a feature without elements all are 0.

    **Raises** `ValueError` for shapes and options, `TypeError` for dtypes, while
    tracing.

    >>> import jax.numpy as jnp, jaxbn
    >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
    >>> jaxbn.batch_statistics(x)
    BatchStatistics(mean=Array([ 2., 20.], dtype=float32),
                    var=Array([  1., 100.], dtype=float32),
                    n=Array([2., 2.], dtype=float32))
    """
    x = check_input(x)
    options = (
        check_axis(axis, x.ndim),
        check_axis_name(axis_name),
        check_groups(axis_index_groups, axis_name),
        check_autodiff(autodiff),
    )
    _, axis_name, groups, autodiff = options
    with explain_collectives(axis_name, groups), explain_forward_mode():
        named = name_input(x, autodiff)
        return _batch_statistics(named, check_mask(mask, x.shape), *options)


@partial(jax.jit, inline=True, static_argnums=(2, 3, 4, 5))
def _batch_statistics(
    x: Array,
    mask: Array | None,
    axis: Axes,
    axis_name: AxisName | None,
    groups: Groups | None,
    autodiff: Autodiff,
) -> BatchStatistics:
    closed_form = uses_closed_form(autodiff, x)
    batch = moments_of_all(
        x.astype(accumulation_dtype(x.dtype)),
        x,
        mask,
        axes=reduction_axes(axis, x.ndim),
        axis_name=axis_name,
        groups=groups,
        closed_form=closed_form,
    )
    mean, var, n, *_ = squeeze_moments(batch, axis)
    return BatchStatistics(mean, var, jnp.asarray(n))


def moments_of_all(
    x_acc: Inexact[Array, "*x"],
    x: Inexact[Array, "*x"],
    mask: Array | None,
    *,
    axes: Axes,
    axis_name: AxisName | None,
    groups: Groups | None,
    closed_form: bool,
    guess: Guess | None = None,
) -> Moments:
    """Return the moments of the whole batch, of x's rank: the local ones, merged."""
    mask = None if mask is None else shard_like(mask, x)
    with jax.named_scope("jaxbn.moments"):
        local = moments(x_acc, x, mask, axes, closed_form=closed_form, guess=guess)
    with jax.named_scope("jaxbn.merge"):
        return merge(local, axis_name, groups)


def squeeze_moments(batch: Moments, axis: Axes) -> Moments:
    """Return mean, variance, n and `dof` of `batch` in the features' shape."""
    mean, var, n, dof, *_ = batch

    def of_features(v: Array) -> Array:
        return squeeze_features(jnp.broadcast_to(v, var.shape), axis)

    n = jnp.asarray(n, var.dtype)
    return Moments(*jax.tree.map(of_features, (mean, var, n, dof)))
