"""The moments of the whole batch from those of each device's share of it.

Second room of four. Everything here is plain JAX on per-channel vectors, so that JAX
itself derives the collective of the backward, and who sums which gradient.
"""

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Int

from ._channel_sums import abs_square, per_row
from ._checks import check_partition
from ._moments import Moments

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
    each = _gather(local, axis_name, groups) if few else _alone(local)

    def total(*parts: Array) -> list[Array]:
        sums = [jnp.sum(part, 0) for part in parts]
        return sums if few else lax.psum(sums, axis_name, axis_index_groups=groups)

    weighted = each.count.astype(each.mean.dtype) * each.mean
    count, weighted = total(each.count, weighted)
    mean = per_row(weighted, count)
    (m2,) = total(each.m2 + each.count * abs_square(each.mean - mean[None]))
    return Moments(count, mean, m2)


def _members(axis_name: AxisName, groups: Groups | None) -> int:
    """How many devices share statistics."""
    if groups is None:
        return lax.axis_size(axis_name)
    check_partition(groups, lax.axis_size(axis_name))
    return max(map(len, groups))


def _alone(local: Moments) -> Moments:
    """This device's moments along a new leading axis of length 1."""
    return Moments(*(m[None] for m in local))


def _gather(local: Moments, axis_name: AxisName, groups: Groups | None) -> Moments:
    """Every device's moments along a new leading axis, the same on all of them.

    One psum of slots that are zero but for the device's own. An all_gather would do,
    but its result counts as varying over the axis where shard_map checks that, and the
    new running statistics could not be returned as replicated.
    """
    mine = jnp.stack([jnp.broadcast_to(m, local.mean.shape) for m in _one_dtype(local)])
    slot, slots = _slot(axis_name, groups), _members(axis_name, groups)
    is_mine = jnp.arange(slots).reshape(slots, *(1,) * mine.ndim) == slot
    table = jnp.where(is_mine, mine[None], 0)
    table = lax.psum(table, axis_name, axis_index_groups=groups)
    count, mean, m2 = (table[:, i] for i in range(3))
    return Moments(jnp.real(count), mean, jnp.real(m2))


def _one_dtype(local: Moments) -> tuple[Array, ...]:
    return tuple(m.astype(local.mean.dtype) for m in local)


def _slot(axis_name: AxisName, groups: Groups | None) -> Int[Array, ""]:
    """The place of this device among those it shares statistics with."""
    index = lax.axis_index(axis_name)
    if groups is None:
        return index
    place = np.zeros(lax.axis_size(axis_name), np.int32)
    for group in groups:
        place[list(group)] = np.arange(len(group))
    return jnp.asarray(place)[index]
