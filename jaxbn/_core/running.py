"""The running statistics, which inference uses. Third step."""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool

from .moments import Moments
from .variables import BatchNormState
from .weights import bessel_correction


def update_running_stats(
    state: BatchNormState,
    batch: Moments,
    batch_weight: ArrayLike | None,
    unbiased: bool,
) -> BatchNormState:
    """Update the running statistics with one batch; all vectors have x's rank.

        running += batch_weight · (batch - running)

    with `batch_weight` = 1 - momentum or, if it is `None`, 1 / (count + 1), for the
    average of all batches with equal weight. A weight of 1 replaces the old statistics,
    also where they are NaN. A feature is updated if n > ddof, with ddof = 1 for the
    unbiased variance n/(n-1)·σ² and 0 for the biased one, if the state's dtype can hold
    the batch's statistics, and if the difference to the old ones does not overflow.
    """
    ddof = int(unbiased)
    batch_var = batch.var * bessel_correction(batch.n) if unbiased else batch.var
    if batch_weight is None:
        batch_weight = 1 / (state.count.astype(batch.var.dtype) + 1)
    mean = _mix(state.mean, batch.mean, batch_weight)
    var = _mix(state.var, batch_var, batch_weight)
    fits = _fits(mean, batch.mean) & _fits(var, batch_var)
    is_updated = fits & (batch.n > ddof)
    return BatchNormState(
        mean=jnp.where(is_updated, mean, state.mean),
        var=jnp.where(is_updated, var, state.var),
        count=state.count + jnp.any(is_updated).astype(state.count.dtype),
    )


def _mix(running: Array, new: Array, batch_weight: ArrayLike) -> Array:
    """Return running + batch_weight · (new - running), in the state's dtype.

    The weights of the form momentum · running + batch_weight · new do not add up to 1
    in float32: the average of equal values would move away from them.
    """
    old = running.astype(new.dtype)
    weight = jnp.asarray(batch_weight, new.dtype)
    mixed = jnp.where(weight == 1, new, old + weight * (new - old))
    # The state keeps its dtype, so that a scan can carry it.
    return mixed.astype(running.dtype)


def _fits(mixed: Array, new: Array) -> Bool[Array, "..."]:
    """Decide whether the state's dtype holds `new` and the average with it.

    In one dtype the average is not finite where `new` is not.
    """
    is_finite = jnp.isfinite(mixed)
    if mixed.dtype == new.dtype:
        return is_finite
    return is_finite & jnp.isfinite(new.astype(mixed.dtype))
