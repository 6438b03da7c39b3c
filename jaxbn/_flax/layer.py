"""Flax's conventions in jaxbn's terms: what the linen and the nnx layer share.

It needs no Flax. The layers keep variables and metadata as Flax does, and call here.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from .._core.axes import Axes
from .._core.batch_norm import Options, apply
from .._core.checks import check_axis, check_mask
from .._core.dtypes import accumulation_dtype
from .._core.variables import BatchNormParams, BatchNormState
from .._inference.population import Tally, add, cast, statistics, tally
from .._inference.population_checks import check_layers, check_same_features


def ascending_axes(axis: int | Sequence[int], ndim: int) -> Axes:
    """The feature axes in the order in which Flax lays out its variables."""
    return tuple(sorted(check_axis(axis, ndim)))


def as_inexact(x: ArrayLike) -> Array:
    """`x` itself, or in float32 where it holds integers: Flax takes those too."""
    x = jnp.asarray(x)
    return (
        x
        if jnp.issubdtype(x.dtype, jnp.inexact)
        else x.astype(accumulation_dtype(x.dtype))
    )


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


def absorb_call(
    old: Tally, layer: Any, x: Array, mask: ArrayLike | None, axis_name: Any
) -> Tally:
    """A layer's tally after one more call."""
    weights = as_weights(mask)
    new = tally(
        x,
        None if weights is None else check_mask(weights, x.shape),
        ascending_axes(layer.axis, x.ndim),
        axis_name,
        None if axis_name is None else layer.axis_index_groups,
    )
    check_same_features(new.mean.shape, old.mean.shape)
    dtype = accumulation_dtype(
        old.mean.dtype, new.mean.dtype
    )  # complex, after the first such x
    return add(cast(old, dtype), cast(new, dtype))


def mapped_names(axis_name: Any) -> tuple[str, ...] | None:
    """Those of the names that are mapped here, as by a `vmap` inside the model."""
    names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name or ())
    return tuple(filter(_is_mapped, names)) or None


def _is_mapped(name: str) -> bool:
    try:
        lax.axis_size(name)
    except NameError:
        return False
    return True


def recomputed(
    totals: dict[str, Tally], stats: dict[str, dict[str, Array]], variance: str
) -> dict[str, dict[str, Array]]:
    """New statistics, by name, of the layers that had a row in some batch."""
    reached = [name for name, total in totals.items() if np.any(total.count > 0)]
    check_layers(reached, "a batch norm layer that the batches reach")
    return {
        name: _recomputed(name, totals[name], stats[name], variance) for name in reached
    }


def _recomputed(
    name: str, total: Tally, stats: dict[str, Array], variance: str
) -> dict[str, Array]:
    mean, var = statistics(f"layer {name!r}", total, variance)
    new = {"mean": mean, "var": var}
    for key, value in new.items():
        # A channel that never had a row stays as it was.
        old = np.asarray(stats[key]).astype(np.result_type(value, np.float64))
        new[key] = np.where(total.count > 0, value, old)
    if "count" in stats:
        stacked = np.shape(stats["count"])
        new["count"] = np.asarray(total.batches.reshape(*stacked, -1).max(-1))
    return {key: _as_stored(value, stats[key]) for key, value in new.items()}


def _as_stored(value: np.ndarray, old: Array) -> Array:
    """`value` in the dtype and in the place of `old`; a complex mean stays complex."""
    dtype = (
        accumulation_dtype(old.dtype, jnp.complex64)
        if np.iscomplexobj(value)
        else old.dtype
    )
    sharding = old.sharding if getattr(old, "committed", False) else None
    return jax.device_put(jnp.asarray(value, dtype), sharding)
