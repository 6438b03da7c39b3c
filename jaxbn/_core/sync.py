"""The moments of the whole batch from those of each device's share of it.

Second room of four. Everything here is plain JAX on per-channel vectors, so that JAX
itself derives the collective of the backward, and who sums which gradient.
"""

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Int

from .checks import check_partition
from .moments import Moments
from .rows import abs_square, per_row

AxisName = str | tuple[str, ...]
Groups = tuple[tuple[int, ...], ...]


# One collective carries the moments of up to this many devices. Its bytes grow with the
# devices, 12 for each channel and device: two small collectives move less beyond.
MOST_SLOTS = 64


def merge(local: Moments, axis_name: AxisName | None, groups: Groups | None) -> Moments:
    """Moments over every device of the axis, each weighted by its count.

        n = Σ nᵢ,   μ = Σ nᵢμᵢ / n,   m2 = Σ m2ᵢ + Σ nᵢ|μᵢ - μ|²

    Chan, Golub & LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing
    Sample Variances", 1979, eq. 2.1, for any number of parts. Without an axis name,
    `local` as it is.
    """
    if axis_name is None:
        return local
    few = _members(axis_name, groups) <= MOST_SLOTS
    counts, means, m2s = (
        _gather(_arrays(local), axis_name, groups)
        if few
        else (m[None] for m in _arrays(local))
    )

    def total(*parts: Array) -> list[Array]:
        sums = [jnp.sum(part, 0) for part in parts]
        return sums if few else lax.psum(sums, axis_name, axis_index_groups=groups)

    count, weighted = total(counts, counts.astype(means.dtype) * means)
    mean = per_row(weighted, count)
    (m2,) = total(m2s + counts * abs_square(means - mean[None]))
    return Moments(count, mean, m2)


def _members(axis_name: AxisName, groups: Groups | None) -> int:
    """How many devices share statistics."""
    if groups is None:
        return lax.axis_size(axis_name)
    check_partition(groups, lax.axis_size(axis_name))
    return max(map(len, groups))


def _arrays(local: Moments) -> tuple[Array, Array, Array]:
    """Count, mean and m2 in one shape."""
    count = jnp.asarray(local.count, local.m2.dtype)
    return jnp.broadcast_to(count, local.m2.shape), local.mean, local.m2


def _gather(
    moments: tuple[Array, ...], axis_name: AxisName, groups: Groups | None
) -> tuple[Array, Array, Array]:
    """Every device's moments along a new leading axis, the same on all of them.

    One psum of slots that are zero but for the device's own. An all_gather would do,
    but its result counts as varying over the axis where shard_map checks that, and the
    new running statistics could not be returned as replicated.
    """
    dtype = jnp.result_type(*moments)
    mine = jnp.stack([m.astype(dtype) for m in moments])
    slot, slots = _slot(axis_name, groups), _members(axis_name, groups)
    is_mine = jnp.arange(slots).reshape(slots, *(1,) * mine.ndim) == slot
    table = jnp.where(is_mine, mine[None], 0)
    table = lax.psum(table, axis_name, axis_index_groups=groups)
    count, mean, m2 = (table[:, i] for i in range(3))
    return jnp.real(count), mean, jnp.real(m2)


def _slot(axis_name: AxisName, groups: Groups | None) -> Int[Array, ""]:
    """The place of this device among those it shares statistics with."""
    index = lax.axis_index(axis_name)
    if groups is None:
        return index
    place = np.zeros(lax.axis_size(axis_name), np.int32)
    for group in groups:
        place[list(group)] = np.arange(len(group))
    return jnp.asarray(place)[index]
