"""The moments of the whole batch from the moments of each device's share.

Second step. It is plain JAX on per-feature vectors, so that JAX itself derives the
collective of the backward pass, and which device sums which gradient.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool

from .checkpoint import name_saved
from .dtypes import abs_square
from .moments import Moments
from .sharding import shard_like
from .weights import divide_by_count

AxisName = str | tuple[str, ...]
Groups = tuple[tuple[int, ...], ...]

# One collective carries the moments of up to this many devices. Its bytes grow with the
# devices, 12 for each feature and device: two small collectives move less beyond.
MAX_GATHERED_DEVICES = 64


def check_axis_name(axis_name: str | Sequence[str] | None) -> AxisName | None:
    """Return `axis_name` in a form that jit accepts as static."""
    if axis_name is None or isinstance(axis_name, str):
        return axis_name
    return tuple(axis_name)


def check_groups(
    groups: Sequence[Sequence[int]] | np.ndarray | None,
    axis_name: str | Sequence[str] | None,
) -> Groups | None:
    """Return `groups` in a form that jit accepts as static."""
    if groups is None:
        return None
    hashable = _as_tuples(groups)
    if axis_name is None:
        raise ValueError(
            f"axis_index_groups needs an axis_name; got groups {hashable} without one. "
            "Pass the name of the mapped axis that the groups divide."
        )
    return hashable


def _as_tuples(groups: Any) -> Any:
    """Convert nested sequences and arrays to tuples; `check_partition` sees inside."""
    groups = groups.tolist() if isinstance(groups, np.ndarray) else groups
    if isinstance(groups, Sequence) and not isinstance(groups, str):
        return tuple(map(_as_tuples, groups))
    return groups


def check_partition(groups: Groups, size: int) -> None:
    """Check that `groups` hold each index of an axis of `size` once."""
    try:
        indices = sorted(index for group in groups for index in group)
    except TypeError:
        indices = None
    if indices != list(range(size)) or not all(groups):
        raise ValueError(
            "axis_index_groups must be lists of axis indices that hold each index of "
            f"the axis once, here 0 to {size - 1}; got {groups}. For two groups of "
            "neighbours on 4 devices pass [[0, 1], [2, 3]]."
        )


def merge(local: Moments, axis_name: AxisName | None, groups: Groups | None) -> Moments:
    """Merge the moments of every device of the axis, each weighted by its Σ w.

        μ = Σ fᵢμᵢ,   σ² = Σ fᵢ(σᵢ² + |μᵢ - μ|²),   1/n = Σ fᵢ²/nᵢ

    with fᵢ the device's share of Σ w: the law of total variance, and Kish's effective
    size for floating weights; n = Σ nᵢ for weights that count. Without an axis name,
    `local` is returned unchanged.
    """
    if axis_name is None:
        return local
    size = lax.axis_size(axis_name)
    if groups is not None:
        check_partition(groups, size)
    gathered = size <= MAX_GATHERED_DEVICES
    means, variances, ns, *sums = (
        _gather_moments(_as_arrays(local), axis_name, groups)
        if gathered
        else (m[None] for m in _as_arrays(local))
    )
    weights = sums[0] if sums else ns

    def total(*parts: Array) -> list[Array]:
        sums = [jnp.sum(part, 0) for part in parts]
        if gathered:
            return sums
        return name_saved(lax.psum(sums, axis_name, axis_index_groups=groups))

    weight, weighted = total(weights, weights.astype(means.dtype) * means)
    mean = divide_by_count(weighted, weight)
    shares = divide_by_count(weights, weight[None])
    # A share without elements has mean 0, whose distance, squared, may overflow.
    distances = jnp.where(weights > 0, means - mean[None], 0)
    variances = shares * (variances + abs_square(distances))
    if not sums:
        (var,) = total(variances)
        return Moments(mean, var, weight)
    var, inverse_n = total(variances, divide_by_count(shares * shares, ns))
    n = divide_by_count((weight > 0).astype(var.dtype), inverse_n)
    return Moments(mean, var, n, weight)


def _as_arrays(local: Moments) -> list[Array]:
    """Return mean, variance, n and, where it is not n, Σ w, in one shape."""
    mean, var, *counts = local
    counts = [jnp.asarray(n, var.dtype) for n in counts if n is not None]
    counts = [shard_like(jnp.broadcast_to(n, mean.shape), mean) for n in counts]
    return [mean, var, *counts]


def _gather_moments(
    moments: list[Array], axis_name: AxisName, groups: Groups | None
) -> list[Array]:
    """Gather every device's moments along a new leading axis, alike on all devices.

    Rows of other groups are 0.

    It is one psum of rows that are zero but for the device's own. An all_gather would
    do, but its result counts as varying over the axis where shard_map checks that, and
    the new running statistics could not be returned as replicated.
    """
    dtype = jnp.result_type(*moments)
    own = jnp.stack([m.astype(dtype) for m in moments])
    devices = jnp.arange(lax.axis_size(axis_name)).reshape(-1, *(1,) * own.ndim)
    table = jnp.where(devices == lax.axis_index(axis_name), own[None], 0)
    table = name_saved(lax.psum(table, axis_name))
    if groups is not None:  # not by groups, which JAX sums only in some mappings
        table = jnp.where(_same_group(axis_name, groups, table.ndim), table, 0)
    return [
        table[:, i] if jnp.iscomplexobj(m) else jnp.real(table[:, i])
        for i, m in enumerate(moments)
    ]


def _same_group(axis_name: AxisName, groups: Groups, ndim: int) -> Bool[Array, "..."]:
    """Mark the devices of this device's group, along the first of `ndim` axes."""
    group_of = np.zeros(lax.axis_size(axis_name), np.int32)
    for number, group in enumerate(groups):
        group_of[list(group)] = number
    own = jnp.asarray(group_of)[lax.axis_index(axis_name)]
    return group_of.reshape(-1, *(1,) * (ndim - 1)) == own


@contextmanager
def explain_collectives(
    axis_name: AxisName | None, groups: Groups | None
) -> Iterator[None]:
    """Say what to do where JAX knows no such axis, or cannot sum over `groups`."""
    try:
        yield
    except NameError as error:
        error.add_note(
            f"jaxbn: axis_name={axis_name!r} must be the name of an axis that "
            "shard_map, pmap or vmap maps here. Under jit with sharded arrays leave it "
            "out: the statistics are those of the whole batch."
        )
        raise
    except NotImplementedError as error:  # the psum of groups
        if groups is None:
            raise
        raise ValueError(
            f"axis_index_groups={groups} is refused by JAX here: on more than "
            f"{MAX_GATHERED_DEVICES} devices it works under pmap, and under shard_map "
            "with check_vma=False. Elsewhere split the mapped axis in two and pass "
            "axis_name the name of the inner one."
        ) from error
