"""The running statistics, which inference uses. Third step."""

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from .moments import Moments
from .reductions import divide_by_count
from .variables import BatchNormState


def update_running_stats(
    state: BatchNormState, batch: Moments, momentum: float | None, unbiased: bool
) -> BatchNormState:
    """Update the running statistics with one batch; all vectors have x's rank.

        running = keep · running + take · batch

    with keep = momentum and take = 1 - momentum, or, for the average of all batches
    with equal weight, keep = count / (count + 1) and take = 1 / (count + 1). A feature
    is updated if n > ddof, with ddof = 1 for the unbiased variance m2 / (n - 1) and 0
    for the biased one, and if the state's dtype can hold its moments.
    """
    ddof = int(unbiased)
    var = divide_by_count(batch.m2, batch.n - ddof)
    is_updated = (
        (batch.n > ddof)
        & jnp.isfinite(batch.mean.astype(state.mean.dtype))
        & jnp.isfinite(var.astype(state.var.dtype))
    )
    keep, take = _update_weights(state.count, momentum, var.dtype)

    def update(running: Array, new: Array) -> Array:
        # The state keeps its dtype, so that a scan can carry it.
        old = running.astype(new.dtype)
        mixed = keep.astype(new.dtype) * old + take.astype(new.dtype) * new
        return jnp.where(is_updated, mixed, old).astype(running.dtype)

    return BatchNormState(
        mean=update(state.mean, batch.mean),
        var=update(state.var, var),
        count=state.count + jnp.any(is_updated).astype(state.count.dtype),
    )


def _update_weights(
    count: Int[Array, ""], momentum: float | None, dtype: DTypeLike
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    if momentum is not None:
        return jnp.asarray(momentum, dtype), jnp.asarray(1 - momentum, dtype)
    batches = count.astype(dtype)
    return batches / (batches + 1), 1 / (batches + 1)
