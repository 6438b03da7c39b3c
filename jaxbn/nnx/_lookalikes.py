"""The class of a layer after its replacement.

It is made for each class that is replaced, so that the layer is an instance of its
class, and of jaxbn's.
"""

from functools import cache
from typing import TypeVar, cast

from flax import nnx
from flax.nnx.nn import dtypes
from jax import Array
from jaxtyping import PyTree

from .._flax.lookalikes import read_call
from ._batch_norm import BatchNorm

Kind = TypeVar("Kind", bound=BatchNorm)


class UnbiasedBatchNorm(BatchNorm):
    """A layer of Flax that updates the running variance with n/(n-1)·σ².

    A class of its own, and not an option of the layer, so that restoring it is exact.
    """

    unbiased = True


class _FlaxDefaults:
    """The attributes of Flax's layer that a layer of another class may lack."""

    use_running_average = None
    axis = -1
    momentum = 0.99
    epsilon = 1e-5
    dtype = None
    scale = None
    bias = None
    axis_name = None
    axis_index_groups = None
    promote_dtype = staticmethod(dtypes.promote_dtype)


@cache
def replaced_class(kind: type[nnx.Module], parent: type[Kind]) -> type[Kind]:
    """Return the class of a replaced layer of class `kind`, called as `parent`."""
    if kind is nnx.BatchNorm:
        return parent

    def __call__(self: BatchNorm, *args: PyTree, **kwargs: PyTree) -> Array:
        x, use_running_average, mask = read_call(kind.__call__, self, args, kwargs)
        # Not the parent at once: a pass of `population` puts its class before it.
        call = next(k.__call__ for k in type(self).__mro__ if _is_behind(k, kind))
        return call(self, x, use_running_average, mask=mask)

    def __reduce_ex__(self: BatchNorm, protocol: int) -> tuple[object, ...]:
        _, _, *state = object.__reduce_ex__(self, protocol)
        return _make_empty, (kind, parent), *state

    namespace = {"__module__": kind.__module__, "__reduce_ex__": __reduce_ex__}
    if kind.__call__ is not nnx.BatchNorm.__call__:
        namespace["__call__"] = __call__
    bases = kind, parent, _FlaxDefaults
    return cast(type[Kind], type(kind.__name__, bases, namespace))  # pyright: ignore[reportGeneralTypeIssues]


def _make_empty(kind: type[nnx.Module], parent: type[Kind]) -> Kind:
    """Make a replaced layer without attributes, for pickle."""
    replaced = replaced_class(kind, parent)
    return replaced.__new__(replaced)


def _is_behind(candidate: type, kind: type) -> bool:
    return issubclass(candidate, BatchNorm) and not issubclass(candidate, kind)


def original_class(kind: type[nnx.Module]) -> type[nnx.Module] | None:
    """Return the class of a layer before its replacement; none of another layer."""
    if kind in (BatchNorm, UnbiasedBatchNorm):
        return nnx.BatchNorm
    first, *others = kind.__bases__
    for parent in (BatchNorm, UnbiasedBatchNorm):
        if parent in others and replaced_class(first, parent) is kind:
            return first
    return None
