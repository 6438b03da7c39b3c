"""Flax's conventions in jaxbn's terms: what the linen and the nnx layer share.

It needs no Flax. The layers keep variables and metadata as Flax does, and call here.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from ._axes import Axes
from ._batch_norm import Options, apply
from ._checks import check_axis
from ._dtypes import widen
from ._variables import BatchNormParams, BatchNormState


def ascending_axes(axis: int | Sequence[int], ndim: int) -> Axes:
    """The feature axes in the order in which Flax lays out its variables."""
    return tuple(sorted(check_axis(axis, ndim)))


def as_inexact(x: ArrayLike) -> Array:
    """`x` itself, or in float32 where it holds integers: Flax takes those too."""
    x = jnp.asarray(x)
    return x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(widen(x.dtype))


def as_weights(mask: ArrayLike | None) -> Array | None:
    """`mask` with integers as bools, as Flax reads them: 2 counts once."""
    if mask is None:
        return None
    mask = jnp.asarray(mask)
    return mask if jnp.issubdtype(mask.dtype, jnp.inexact) else mask.astype(bool)


def state_of(mean: Array, var: Array, count: Array | None = None) -> BatchNormState:
    """The state that a layer's variables hold: mostly without a count of batches."""
    return BatchNormState(mean, var, jnp.int32(0) if count is None else count)


def normalize_with(
    layer: Any,
    params: BatchNormParams,
    state: BatchNormState,
    x: Array,
    *,
    train: bool,
    mask: ArrayLike | None,
    axis_name: str | Sequence[str] | None,
    dtype: DTypeLike,
    unbiased: bool,
    autodiff: str,
) -> tuple[Array, BatchNormState]:
    """`batch_norm`, with the options that linen's and nnx's layers name alike.

    What has no meaning where it stands is dropped, as Flax drops it: mask, axis and
    groups at inference, and groups without an axis.
    """
    if not train:
        mask = axis_name = None
    options = Options(
        train=train,
        axis=ascending_axes(layer.axis, x.ndim),
        momentum=layer.momentum,
        epsilon=layer.epsilon,
        unbiased=unbiased,
        axis_name=axis_name,
        axis_index_groups=None if axis_name is None else layer.axis_index_groups,
        dtype=dtype,
        autodiff=autodiff,
        # One row has a variance, of 0, where it need not be unbiased.
        idle_count=1 if unbiased else 0,
    )
    return apply(params, state, x, as_weights(mask), options)
