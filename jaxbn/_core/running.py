"""The running statistics: what inference will use.

Third room of four.
"""

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from .moments import Moments
from .rows import per_row
from .variables import BatchNormState


def absorb(
    state: BatchNormState,
    batch: Moments,
    momentum: float | None,
    unbiased: bool,
    idle_count: int = 1,
) -> BatchNormState:
    """`state` after one more batch; the vectors of both have x's rank.

        running = keep · running + take · batch

    with keep = momentum and take = 1 - momentum, or the equal-weight average of all
    batches with keep = count / (count + 1) and take = 1 / (count + 1). A channel
    whose rows number `idle_count` or fewer, or whose moments the state's dtype cannot
    hold, stays as it was.
    """
    keep, take = _shares(state.count, momentum, batch.var.dtype)
    var = per_row(batch.m2, batch.count - 1) if unbiased else batch.var
    usable = (
        (batch.count > idle_count)
        & jnp.isfinite(batch.mean.astype(state.mean.dtype))
        & jnp.isfinite(var.astype(state.var.dtype))
    )

    def update(running: Array, new: Array) -> Array:
        # The state keeps its dtype, so that a scan can carry it.
        old = running.astype(new.dtype)
        mixed = keep.astype(new.dtype) * old + take.astype(new.dtype) * new
        return jnp.where(usable, mixed, old).astype(running.dtype)

    return BatchNormState(
        mean=update(state.mean, batch.mean),
        var=update(state.var, var),
        count=state.count + jnp.any(usable).astype(state.count.dtype),
    )


def _shares(
    count: Int[Array, ""], momentum: float | None, dtype: DTypeLike
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    if momentum is not None:
        return jnp.asarray(momentum, dtype), jnp.asarray(1 - momentum, dtype)
    batches = count.astype(dtype)
    return batches / (batches + 1), 1 / (batches + 1)
