"""How arrays lie on the axes of a mesh, where JAX keeps account of it in their types.

`shard_map` knows which axes an array varies over; axes of the explicit kind are part of
an array's type under `jit`. Both want operands that agree.
"""

from typing import Any

import jax
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec


def vary_alike(*arrays: Any) -> tuple[Any, ...]:
    """`arrays`, all marked as varying over every axis that one of them varies over.

    A custom_vjp must return cotangents that vary as its arguments do. Marking the
    arguments at the door makes its local sums right, and JAX adds them up over the
    devices when it transposes the mark. `None` passes.
    """
    every = frozenset().union(*map(_varying, arrays))
    return tuple(
        lax.pcast(a, tuple(every - _varying(a)), to="varying")
        if a is not None and every - _varying(a)
        else a
        for a in arrays
    )


def _varying(array: Any) -> frozenset[Any]:
    if array is None:
        return frozenset()
    return jax.typeof(array).manual_axis_type.varying


def shard_like(array: Array, x: Array) -> Array:
    """`array`, sharded as `x` is along every axis that it has in common with it.

    For explicit mesh axes; elsewhere no array's type names any, and all are alike.
    """
    sharding = jax.typeof(x).sharding
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
