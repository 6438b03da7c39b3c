"""Which mesh axes an array varies over, where shard_map keeps account of it."""

from typing import Any

import jax
from jax import lax


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
