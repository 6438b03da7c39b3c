"""Batch norms of other classes, with the fields and variables of Flax's."""

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from inspect import isfunction, signature, unwrap
from typing import NamedTuple

from jax.typing import ArrayLike

from .._core.variables import BatchNormParams, BatchNormState

# The arguments that choose the mode, and their value for the running statistics.
_MODES = {
    "use_running_average": True,
    "train": False,
    "training": False,
    "is_training": False,
}
_ARGUMENTS = {*_MODES, "mask"}


class Call(NamedTuple):
    """The arguments of a layer's call, by Flax's names."""

    x: ArrayLike
    use_running_average: bool | None
    mask: ArrayLike | None


def read_call(
    call: Callable[..., object],
    layer: object,
    args: Iterable[object],
    kwargs: Mapping[str, object],
) -> Call:
    """Read the arguments of `call`, the `__call__` of some class."""
    bound = signature(unwrap(call)).bind(layer, *args, **kwargs)
    bound.apply_defaults()
    _, x, *_ = bound.args
    given = bound.arguments
    modes = [
        given[name] if value else not given[name]
        for name, value in _MODES.items()
        if given.get(name) is not None
    ]
    return Call(x, modes[0] if modes else None, given.get("mask"))


def check_also(also: Iterable[type]) -> tuple[type, ...]:
    """Check that `also` holds classes whose calls can be read."""
    if isinstance(also, type) or not isinstance(also, Iterable):
        raise TypeError(
            "also must be a list of classes; got "
            f"{also!r}. Write also=[TheirBatchNorm]."
        )
    kinds = tuple(also)
    for kind in kinds:
        _check_arguments(kind)
    return kinds


def _check_arguments(kind: type) -> None:
    """Check that the call of a class takes arguments of Flax's meaning alone."""
    call = unwrap(kind.__call__) if isinstance(kind, type) else None
    if not isfunction(call):
        raise TypeError(
            f"also must hold classes of layers, with a __call__; got {kind!r}."
        )
    names = list(signature(call).parameters)[2:]
    unknown = [name for name in names if name not in _ARGUMENTS]
    if unknown:
        raise TypeError(
            "classes in also must be called with x, use_running_average or train, and "
            f"mask; got {kind.__name__}, which takes {', '.join(unknown)}. Call "
            "jaxbn.batch_norm in its code."
        )


def check_variables(kind: type, names: Collection[str]) -> None:
    """Check that a layer of this class has the variables of Flax's layer."""
    known = {*BatchNormParams._fields, *BatchNormState._fields}
    if not {"mean", "var"} <= {*names} <= known:
        raise TypeError(
            "classes in also must have the variables of Flax's BatchNorm, mean and "
            f"var, scale and bias; got {kind.__name__} with "
            f"{', '.join(sorted(names)) or 'none'}. Call jaxbn.batch_norm in its code."
        )


def warn_not_replaced(where: str, others: Mapping[str, type], stacklevel: int) -> None:
    """Warn that there was nothing to replace; `others` have running statistics."""
    found = [f"{k.__module__}.{k.__name__} at {p!r}" for p, k in others.items()]
    names = ", ".join(dict.fromkeys(kind.__name__ for kind in others.values()))
    hint = f" Pass also=[{names}] if they have Flax's fields." if others else ""
    warnings.warn(
        f"replace_batch_norm replaced nothing: no BatchNorm of Flax in {where}. "
        f"Other layers with running statistics: {', '.join(found) or 'none'}.{hint}",
        UserWarning,
        stacklevel + 1,
    )
