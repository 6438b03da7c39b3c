"""Agreement of operands on mesh axes, where JAX records them in an array's type.

`shard_map` records the axes over which an array varies (vma); under `jit`, mesh axes of
the explicit kind are part of an array's type. Operands must agree in both.
"""

import math

import jax
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec

from .axes import Axes, expand_features


def match_vma(*trees: object) -> tuple:
    """Mark all arrays as varying over every axis that one of them varies over.

    A custom_vjp must return cotangents that vary as its arguments do. With marked
    arguments its local sums are right, and JAX adds them over the devices when it
    transposes the mark.
    """
    every = frozenset().union(*map(varying_axes, jax.tree.leaves(trees)))

    def mark(array: Array) -> Array:
        missing = tuple(every - varying_axes(array))
        return lax.pcast(array, missing, to="varying") if missing else array

    return jax.tree.map(mark, trees)


def varying_axes(array: Array) -> frozenset[str]:
    """Return the axes of `shard_map` over which it knows that an array varies."""
    return jax.typeof(array).manual_axis_type.varying


def checked_axes() -> frozenset[str]:
    """Return the axes that `shard_map` maps here, if it checks how arrays vary."""
    axes = jax.sharding.get_abstract_mesh().manual_axes
    return frozenset(a for a in axes if varying_axes(lax.axis_index(a)))


def unchecked_axes() -> frozenset[str]:
    """Return the axes that `shard_map` maps here without that check."""
    return frozenset(jax.sharding.get_abstract_mesh().manual_axes) - checked_axes()


def shard_like(array: Array, x: Array) -> Array:
    """Shard `array` as `x` along every axis of equal length, for explicit mesh axes.

    `array` is returned unchanged if the type of `x` has no mesh, as that of an array
    from before `jax.set_mesh`.
    """
    sharding = jax.typeof(x).sharding
    if sharding.mesh.empty:
        return array
    spec = PartitionSpec(
        *(
            name if own == length else None
            for name, own, length in zip(
                sharding.spec, array.shape, x.shape, strict=True
            )
        )
    )
    if jax.typeof(array).sharding.spec == spec:
        return array
    return jax.reshard(array, NamedSharding(sharding.mesh, spec))


def replicate(array: Array) -> Array:
    """Copy `array` to all devices of explicit mesh axes."""
    sharding = jax.typeof(array).sharding
    if sharding.mesh.empty or not any(sharding.spec):
        return array
    return jax.reshard(array, NamedSharding(sharding.mesh, PartitionSpec()))


def explicit_shards(x: Array, axis: int) -> int:
    """Return over how many devices of explicit mesh axes an axis of x is divided."""
    sharding = jax.typeof(x).sharding
    if sharding.mesh.empty or sharding.spec[axis] is None:
        return 1
    names = sharding.spec[axis]
    names = names if isinstance(names, tuple) else (names,)
    return math.prod(sharding.mesh.shape[name] for name in names)


def expand_like(vector: Array, feature_axes: Axes, x: Array) -> Array:
    """Expand the features' shape to x's rank, sharded as `x`."""
    return shard_like(expand_features(vector, feature_axes, x.ndim), x)
