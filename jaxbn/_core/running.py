"""The running statistics, which inference uses. Third step."""

from __future__ import annotations  # for a signature that `help` prints as written here

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Bool, Float

from .dtypes import accumulation_dtype
from .moments import Moments
from .options import check_momentum, check_unbiased
from .sharding import shard_like, unchecked_axes, varying_axes
from .statistics import BatchStatistics
from .sync import AxisName, names_of
from .variables import BatchNormState, check_kind
from .weights import bessel_correction


def update_running_stats(
    state: BatchNormState,
    batch: BatchStatistics,
    *,
    momentum: ArrayLike | None = 0.99,
    unbiased: bool = True,
) -> BatchNormState:
    """Update the running statistics with the statistics of one batch.

        running += (1 - momentum) · (batch - running)

    The third step of `batch_norm`. A feature is updated if n > ddof, with ddof = 1 for
    the unbiased variance n/(n-1)·σ² and 0 for the biased one, and if the state's dtype
    can hold its statistics. `count` grows by 1 if any feature was updated.

    **Arguments**

    - `state`: from `jaxbn.init`.
    - `batch`: from `jaxbn.batch_statistics`.
    - `momentum`, `unbiased`: as in `batch_norm`.

    **Returns** the new state, in the dtypes of `state`.

    **Raises** `TypeError` for other tuples, `ValueError` for other features or a
    momentum outside [0, 1].

    >>> import jax.numpy as jnp, jaxbn
    >>> _, state = jaxbn.init(2)
    >>> batch = jaxbn.batch_statistics(jnp.array([[1.0, 10.0], [3.0, 30.0]]))
    >>> jaxbn.update_running_stats(state, batch, momentum=0.5).mean
    Array([ 1., 10.], dtype=float32)
    """
    state, moments = _check_features(state, batch)
    batch_weight = to_batch_weight(check_momentum(momentum))
    return _update(state, moments, batch_weight, check_unbiased(unbiased))


def _check_features(
    state: BatchNormState, batch: BatchStatistics
) -> tuple[BatchNormState, Moments]:
    """Return both as arrays of the same features."""
    order = "The order is update_running_stats(state, batch)"
    check_kind("state", state, BatchNormState, order)
    check_kind("batch", batch, BatchStatistics, order)
    state, batch = jax.tree.map(jnp.asarray, (state, batch))
    if not state.mean.shape == state.var.shape == batch.mean.shape == batch.var.shape:
        raise ValueError(
            "state and batch must have the same features; got state.mean "
            f"{state.mean.shape}, state.var {state.var.shape}, batch.mean "
            f"{batch.mean.shape} and batch.var {batch.var.shape}. Pass "
            "batch_statistics the axis of the layer."
        )
    moments = Moments(batch.mean, batch.var, jnp.broadcast_to(batch.n, batch.var.shape))
    if jnp.iscomplexobj(batch.mean):
        mean = state.mean.astype(accumulation_dtype(batch.mean.dtype, state.mean.dtype))
        state = state._replace(mean=mean)
    return state, moments


def to_batch_weight(momentum: ArrayLike | None) -> ArrayLike | None:
    """Return 1 - momentum, in Python's float64 for a number: float32 has no 0.9999."""
    return None if momentum is None else 1 - momentum


def update(
    state: BatchNormState,
    batch: Moments,
    batch_weight: ArrayLike | None,
    unbiased: bool,
    axis_name: AxisName | None = None,
) -> BatchNormState:
    """Return the updated state; the weight of `None` is 1 / (count + 1).

    That is the average of all batches with equal weight. A weight of 1 replaces the old
    statistics, also where they are NaN.
    """
    with jax.named_scope("jaxbn.update_running_stats"):
        new_var = unbiased_variance(batch) if unbiased else batch.var
        is_new = has_variance(batch, unbiased)
        is_new &= _fits(batch.mean, state.mean) & _fits(new_var, state.var)
        if batch_weight is None:
            batch_weight = 1 / (state.count.astype(batch.var.dtype) + 1)
        grows = _any_feature(is_new, state, axis_name)
        return BatchNormState(
            mean=_mix(state.mean, batch.mean, batch_weight, is_new),
            var=_mix(state.var, new_var, batch_weight, is_new),
            count=state.count + grows.astype(state.count.dtype),
        )


_update = jax.jit(update, inline=True, static_argnames="unbiased")


def has_variance(batch: Moments, unbiased: bool) -> Bool[Array, "*features"]:
    """Decide which features have a variance: n > 1 for the unbiased one, else n > 0."""
    if unbiased and batch.dof is not None:
        return batch.dof > 0
    return jnp.asarray(batch.n) > int(unbiased)


def unbiased_variance(batch: Moments) -> Float[Array, "*features"]:
    """Return n / (n - 1) · σ²."""
    return batch.var * bessel_correction(batch.n, batch.dof)


def _fits(new: Array, running: Array) -> Bool[Array, "*features"]:
    """Decide which statistics of a batch the dtype of the running ones can hold."""
    return jnp.isfinite(new) & jnp.isfinite(new.astype(running.dtype))


def _mix(
    running: Array,
    new: Array,
    batch_weight: ArrayLike,
    is_new: Bool[Array, "*features"],
) -> Array:
    """Return running + batch_weight · (new - running) where `is_new`.

    The weights of the form momentum · running + batch_weight · new do not add up to 1
    in float32: the average of equal values would move away from them.
    """
    new, is_new = shard_like(new, running), shard_like(is_new, running)
    old = running.astype(new.dtype)
    weight = jnp.asarray(batch_weight, new.dtype)
    mixed = jnp.where(weight == 1, new, old + weight * (new - old))
    # The state keeps its dtype, so that a scan can carry it.
    mixed = mixed.astype(running.dtype)
    return jnp.where(is_new & jnp.isfinite(mixed), mixed, running)


def _any_feature(
    is_new: Bool[Array, "*features"], state: BatchNormState, axis_name: AxisName | None
) -> Bool[Array, ""]:
    """Decide whether the batch updates any feature, of all devices that share them.

    A mesh axis divides the features if `mean` varies over it and `count` does not.
    """
    names = varying_axes(is_new) & varying_axes(state.mean)
    names -= varying_axes(state.count)
    if axis_name is not None:
        names |= unchecked_axes().difference(names_of(axis_name))
    grows = jnp.any(is_new)
    return lax.pmax(grows, tuple(names)) if names else grows
