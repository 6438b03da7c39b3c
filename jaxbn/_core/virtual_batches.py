"""Ghost batch norm: groups of a batch, each normalized by its own statistics.

The groups are one more feature axis of x: their statistics have the shape
(groups, *features), and the steps are those of batch norm.
"""

import operator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from .arguments import Arguments
from .axes import divisors, reduction_axes, split_axis
from .moments import Moments
from .options import StaticOptions
from .running import has_variance, unbiased_variance, update
from .sharding import explicit_shards
from .steps import batch_moments, in_accumulation_dtype, normalize_batch
from .sync import MAX_GATHERED_DEVICES, AxisName, Groups
from .variables import BatchNormParams, BatchNormState
from .weights import divide_by_count


def check_virtual_batch_size(size: int | None) -> int | None:
    """Return `size` as a positive Python int, or None."""
    if size is None:
        return None
    try:
        examples = operator.index(size)
    except TypeError:
        raise TypeError(
            f"virtual_batch_size must be an int, known while tracing; got {size!r}. "
            "It is the number of examples that share statistics, for instance 32."
        ) from None
    if examples < 1:
        raise ValueError(
            f"virtual_batch_size must be at least 1; got {examples}. "
            "Leave it out to normalize by the whole batch."
        )
    return examples


def train_by_virtual_batches(
    arguments: Arguments, options: StaticOptions, size: int
) -> tuple[Array, BatchNormState]:
    """Train a step; `size` examples along the first reduced axis share statistics."""
    try:
        return _train(arguments, options, size)
    except NotImplementedError as error:  # the psum of groups of devices
        if options.axis_name is None:
            raise
        raise ValueError(
            f"virtual_batch_size={size} spans a part of the devices, and JAX refuses "
            f"such groups here: on more than {MAX_GATHERED_DEVICES} devices they work "
            "under pmap, and under shard_map with check_vma=False. Elsewhere pass a "
            "size that divides the examples of one device, or the whole batch's."
        ) from error


@partial(jax.jit, inline=True, static_argnames=("options", "size"))
def _train(
    arguments: Arguments, options: StaticOptions, size: int
) -> tuple[Array, BatchNormState]:
    params, state, x, mask, batch_weight, epsilon = arguments
    shape, all_devices = x.shape, options.axis_name
    batch_axis = _batch_axis(options, x)
    local_size, axis_name, groups = _place_groups(x.shape[batch_axis], size, options)
    _check_shards(x, batch_axis, local_size)
    x = split_axis(x, batch_axis, local_size)
    mask = None if mask is None else split_axis(mask, batch_axis, local_size)
    options = options._replace(
        axis=(batch_axis, *(a + (a > batch_axis) for a in options.axis)),
        axis_name=axis_name,
        axis_index_groups=groups,
    )
    per_group = partial(_repeat, times=x.shape[batch_axis])
    params = BatchNormParams(*map(per_group, params))
    running = state._replace(mean=per_group(state.mean), var=per_group(state.var))

    x_acc = in_accumulation_dtype(x, state, options)
    mean, var, batch = batch_moments(running, x_acc, x, mask, options)
    average = _average(batch, options.unbiased, all_devices)
    state = update(state, average, batch_weight, False, all_devices)
    y = normalize_batch(params, mean, var, x_acc, x, epsilon, options)
    return y.reshape(shape), state


def _batch_axis(options: StaticOptions, x: Array) -> int:
    """Return the first reduced axis."""
    axes = reduction_axes(options.axis, x.ndim)
    if not axes:
        raise ValueError(
            "virtual_batch_size needs an axis of examples to divide; got x of shape "
            f"{x.shape}, all features with axis={options.axis}. Leave it out."
        )
    return axes[0]


def _place_groups(
    share: Any, size: int, options: StaticOptions
) -> tuple[int, AxisName | None, Groups | None]:
    """Return the examples of a group on one device, and the devices that share one.

    They are no axis for a group inside a device, and no groups for all devices.

    `share` is the number of examples on each device of the mapped axis: an int, or a
    symbol of `jax.export`.
    """
    if options.axis_index_groups is not None:
        raise ValueError(
            "virtual_batch_size and axis_index_groups both choose the examples that "
            f"share statistics; got {size} and {options.axis_index_groups}. "
            "Pass one of them."
        )
    devices = 1 if options.axis_name is None else lax.axis_size(options.axis_name)
    if share % size == 0:
        return size, None, None
    if not isinstance(share, int):
        raise ValueError(
            "virtual_batch_size must divide the examples of x for every value of a "
            f"symbol; got {size} for {share} examples. Export with a multiple of it: "
            f'"{size}*b".'
        )
    length = size // share
    if size % share == 0 and devices % length == 0:
        if length == devices:
            return share, options.axis_name, None
        starts = range(0, devices, length)
        groups = tuple(tuple(range(i, i + length)) for i in starts)
        return share, options.axis_name, groups
    fitting = [*divisors(share), *(share * k for k in divisors(devices) if k > 1)]
    raise ValueError(
        f"virtual_batch_size must divide the {share} examples of x"
        + (f" on each of {devices} devices, or hold" * (devices > 1))
        + f"; got {size}. Sizes that fit: {', '.join(map(str, fitting))}."
    )


def _check_shards(x: Array, axis: int, size: int) -> None:
    """Check that groups lie inside the shards of an explicit mesh, or are one group."""
    shards, groups = explicit_shards(x, axis), x.shape[axis] // size
    if groups % shards and groups > 1:
        raise ValueError(
            f"virtual_batch_size must divide the {x.shape[axis] // shards} examples of "
            f"each of {shards} shards of an explicit mesh axis, or be the whole batch; "
            f"got {size}. With a mesh axis of the type Auto, or with axis_name under "
            "shard_map, a group may span several shards."
        )


def _repeat(vector: Array | None, times: Any) -> Array | None:
    """Return a copy of `vector` for each group, along a new first axis."""
    if vector is None:
        return None
    return jnp.broadcast_to(vector, (times, *vector.shape))


def _average(batch: Moments, unbiased: bool, axis_name: AxisName | None) -> Moments:
    """Return the mean of the statistics of all groups with n > ddof.

    The variances are the unbiased ones if `unbiased`; n is the number of the groups.
    """
    counts = has_variance(batch, unbiased)
    var = unbiased_variance(batch) if unbiased else batch.var
    terms = (batch.mean, var, jnp.ones_like(var))
    sums = [jnp.sum(jnp.where(counts, v, 0), 0) for v in terms]
    if axis_name is not None:
        sums = lax.psum(sums, axis_name)
    mean, var, n = sums
    return Moments(divide_by_count(mean, n), divide_by_count(var, n), n)
