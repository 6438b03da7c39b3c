"""The moments of the whole batch from the moments of each device's share.

Second step. It is plain JAX on per-feature vectors, so that JAX itself derives the
collective of the backward pass, and which device sums which gradient.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool

from .checkpoint import name_saved
from .dtypes import abs_square
from .mask_scale import power_of_2
from .moments import Moments
from .sharding import checked_axes, shard_like
from .weights import divide_by_count, effective_number, sums_of_weights

AxisName = str | tuple[str, ...]
Groups = tuple[tuple[int, ...], ...]

# One collective carries the moments of up to this many devices. Its bytes grow with the
# devices, 12 for each feature and device: two small collectives move less beyond.
MAX_GATHERED_DEVICES = 64

_NO_EXPONENT = -10_000  # of a device without weights, below those of all floats


def check_axis_name(axis_name: str | Sequence[str] | None) -> AxisName | None:
    """Return `axis_name` in a form that jit accepts as static."""
    if axis_name is None or isinstance(axis_name, str):
        return axis_name
    return tuple(axis_name)


def names_of(axis_name: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return the names of mapped axes: none, one or several."""
    if axis_name is None:
        return ()
    return (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)


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


def _check_vmapped_names(axis_name: AxisName) -> None:
    """Check that JAX can sum over the axes: its check of mesh axes knows no other."""
    checked = checked_axes()
    others = [n for n in names_of(axis_name) if checked and n not in checked]
    if others:
        raise ValueError(
            "axis_name must name mesh axes inside shard_map(check_vma=True), where JAX "
            f"has no collective for an axis of vmap; got {axis_name!r}, with "
            f"{', '.join(map(repr, others))} of a vmap. Pass check_vma=False."
        )


def merge(local: Moments, axis_name: AxisName | None, groups: Groups | None) -> Moments:
    """Merge the moments of every device of the axis, each weighted by its Σ w.

        μ = Σ fᵢμᵢ,   σ² = Σ fᵢ(σᵢ² + |μᵢ - μ|²)

    with fᵢ the device's share of Σ w: the law of total variance. n = Σ nᵢ for weights
    that count, and Kish's effective number of all weights for a floating mask. Without
    an axis name, `local` is returned unchanged.
    """
    if axis_name is None:
        return local
    size = lax.axis_size(axis_name)
    _check_vmapped_names(axis_name)
    if groups is not None:
        check_partition(groups, size)
    local = _as_arrays(local)
    if size <= MAX_GATHERED_DEVICES:
        return _merge(_gather_moments(local, axis_name, groups), _TABLE)
    return _merge(jax.tree.map(lambda m: m[None], local), _devices(axis_name, groups))


class _Reductions(NamedTuple):
    """Hold the reductions of arrays with a row for each device."""

    sums: Callable[..., list[Array]]
    largest: Callable[[Array], Array]


_TABLE = _Reductions(
    sums=lambda *rows: [jnp.sum(row, 0) for row in rows],
    largest=lambda rows: jnp.max(rows, 0),
)


def _devices(axis_name: AxisName, groups: Groups | None) -> _Reductions:
    """Return the reductions of arrays with the row of this device alone."""

    def sums(*rows: Array) -> list[Array]:
        own = [row[0] for row in rows]
        return name_saved(lax.psum(own, axis_name, axis_index_groups=groups))

    def largest(rows: Array) -> Array:
        return lax.pmax(rows[0], axis_name, axis_index_groups=groups)

    return _Reductions(sums, largest)


def _merge(local: Moments, over: _Reductions) -> Moments:
    weights = _comparable_weights(local, over)
    weight, weighted = over.sums(weights, weights.astype(local.mean.dtype) * local.mean)
    mean = divide_by_count(weighted, weight)
    shares = divide_by_count(weights, weight[None])
    # A share without elements has mean 0, whose distance, squared, may overflow.
    distances = jnp.where(weights > 0, local.mean - mean[None], 0)
    variances = shares * (local.var + abs_square(distances))
    if local.dof is None:
        (var,) = over.sums(variances)
        return Moments(mean, var, weight)
    squares = divide_by_count(weights * weights, local.n)
    var, squares, pairs = over.sums(variances, squares, local.dof * squares)
    # Pairs of elements: of one device, and of two.
    largest = over.largest(weights)
    is_largest = weights == largest[None]
    _, _, pairs_between = sums_of_weights(weights, is_largest, largest, over.sums)
    dof = divide_by_count(pairs + pairs_between, squares)
    return Moments(mean, var, *effective_number(weight, dof))


def _comparable_weights(local: Moments, over: _Reductions) -> Array:
    """Return every device's Σ w at one scale, near 1 for the largest weight."""
    if local.total is None or local.scale is None:
        return jnp.asarray(local.n)
    is_empty = local.total <= 0
    factor, exponent = local.scale
    exponent = jnp.where(is_empty, _NO_EXPONENT, exponent.astype(jnp.int32))
    power = power_of_2(exponent - over.largest(exponent)[None], local.total.dtype)
    return jnp.where(is_empty, 0, local.total * factor * power)


def _as_arrays(local: Moments) -> Moments:
    """Return all moments as arrays of one shape."""
    mean, var, n, *others = local

    def broadcast(v: Array) -> Array:
        return shard_like(jnp.broadcast_to(v, mean.shape), mean)

    n = broadcast(jnp.asarray(n, var.dtype))
    return Moments(mean, var, n, *jax.tree.map(broadcast, others))


def _gather_moments(
    local: Moments, axis_name: AxisName, groups: Groups | None
) -> Moments:
    """Gather every device's moments along a new leading axis, alike on all devices.

    Rows of other groups are 0.

    It is one psum of rows that are zero but for the device's own. An all_gather would
    do, but its result counts as varying over the axis where shard_map checks that, and
    the new running statistics could not be returned as replicated.
    """
    moments, structure = jax.tree.flatten(local)
    dtype = local.mean.dtype
    own = jnp.stack([m.astype(dtype) for m in moments])
    devices = np.arange(lax.axis_size(axis_name), dtype=np.int32)
    is_own = lax.axis_index(axis_name) == devices.reshape(-1, *(1,) * own.ndim)
    table = jnp.where(is_own, own[None], 0)
    table = name_saved(lax.psum(table, axis_name))
    if groups is not None:  # not by groups, which JAX sums only in some mappings
        table = jnp.where(_same_group(axis_name, groups, table.ndim), table, 0)
    rows = [
        table[:, i] if jnp.iscomplexobj(m) else jnp.real(table[:, i])
        for i, m in enumerate(moments)
    ]
    return structure.unflatten(rows)


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
