"""The original linen model with the variables that `fold` returns."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import partial

import jax
from flax import linen as nn
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import PyTree

from .._core.variables import BatchNormParams, BatchNormState
from .._flax.paths import join
from .._fold.weights import LAYER_WEIGHTS
from ._batch_norm import BatchNorm
from ._bridge import intercept_bridges
from ._intercept import NextCall, intercept_calls
from ._tree import batch_norm_paths

LAYERS = (nn.Dense, nn.DenseGeneral, nn.Conv, nn.ConvLocal, nn.ConvTranspose)
NORMS = (nn.BatchNorm, BatchNorm)


@contextmanager
def skip_folded() -> Iterator[None]:
    """Apply variables from `fold` to the original model.

    A context manager, and a decorator; it acts on all code that is traced in this
    thread while it is entered. A `BatchNorm` without variables returns its input, and a
    layer with `use_bias=False` adds the bias that it finds. All other layers, and
    `init`, are unchanged; an nnx module in a `flax.nnx.bridge.ToLinen` that lacks the
    variables of a batch norm raises a `TypeError`. With `replace_batch_norm`, enter
    `replace_batch_norm` last.

    Source: `flax.linen.intercept_methods`, Flax's own mechanism for this purpose.
    """
    with _skip(in_trace=False), intercept_bridges(_check_not_folded):
        yield


@contextmanager
def skip_in_trace() -> Iterator[None]:
    """Do the same in the trace of `fold`, inside of the interceptors that record it.

    An outer `skip_folded` does nothing there: its operations would not be a layer's.
    """
    with _tracing(True), _skip(in_trace=True):
        yield


@contextmanager
def _skip(in_trace: bool) -> Iterator[None]:
    norms = intercept_calls(NORMS, partial(_skip_norm, in_trace))
    layers = intercept_calls(LAYERS, partial(_add_bias, in_trace))
    with norms, layers:
        yield


# Whether the model is called by `fold`.
_tracing = jax.make_user_context(False)


def _check_not_folded(bridge: nn.Module, module: object) -> None:
    """Check that the variables have statistics for all batch norms of an nnx module."""
    from ..nnx._bridge import all_statistics  # a circular import

    norms = batch_norm_paths(bridge.variables.get("batch_stats", {}))
    for norm in all_statistics(module):
        if norm not in norms and not bridge.is_initializing():
            raise TypeError(
                "skip_folded skips the batch norms of linen, not of an nnx module in a "
                f"ToLinen; got {type(module).__name__} at the path "
                f"{join(bridge.path)!r}, without statistics of its {join(norm)!r}. "
                "Apply the variables to a model whose nnx module is folded: "
                "nnx.bridge.to_linen(lambda rngs: jaxbn.nnx.fold(Model(rngs), x))."
            )


def _skip_norm(
    in_trace: bool,
    next_call: NextCall,
    norm: nn.Module,
    x: ArrayLike,
    *args: PyTree,
    **kwargs: PyTree,
) -> ArrayLike:
    """Return the input of a batch norm without variables."""
    if _tracing.value != in_trace or not is_folded(norm):
        return next_call(x, *args, **kwargs)
    return x


def is_folded(norm: nn.Module) -> bool:
    """Return whether a batch norm has no variables."""
    return not norm.is_initializing() and not _variables(norm) & norm_variables(norm)


def norm_variables(norm: nn.Module) -> set[str]:
    """Return the names of all variables that a batch norm may have."""
    unused = {"scale"} if not norm.use_scale else set[str]()
    unused |= {"bias"} if not norm.use_bias else set[str]()
    return {*BatchNormParams._fields, *BatchNormState._fields} - unused


def _variables(module: nn.Module) -> set[str]:
    return {name for collection in module.variables.values() for name in collection}


def has_only(module: nn.Module, names: Collection[str]) -> bool:
    """Return whether a module has no variables but these, nor shares its scope."""
    scope, parent = module.scope, getattr(module.parent, "scope", None)
    shared = scope is None or scope.name != module.name or scope is parent
    return not shared and _variables(module) <= {*names}


def may_gain_bias(layer: nn.Module) -> bool:
    """Return whether a bias of a layer with `use_bias=False` can only be of `fold`.

    A class with code of its own, or a module that shares the layer's variables, may
    have another one of this name.
    """
    kinds = type(layer).__mro__
    derived = kinds[: next(i for i, kind in enumerate(kinds) if kind in LAYERS)]
    names = {field.name for field in fields(layer)}
    has_code = any(_has_code(kind, names) for kind in derived)
    return not has_code and has_only(layer, LAYER_WEIGHTS)


def _has_code(kind: type, options: Collection[str]) -> bool:
    """Return whether a class has methods or properties that no option's default is."""
    own = {name: value for name, value in vars(kind).items() if name not in options}
    return "__call__" in own or any(
        callable(value) or isinstance(value, property)
        for name, value in own.items()
        if not name.startswith("_")
    )


def _add_bias(
    in_trace: bool,
    next_call: NextCall,
    layer: nn.Module,
    *args: PyTree,
    **kwargs: PyTree,
) -> Array:
    """Add the bias that `fold` gave to a layer without one."""
    y = next_call(*args, **kwargs)
    if _tracing.value != in_trace or layer.use_bias or not may_gain_bias(layer):
        return y
    return add_bias(y, layer.get_variable("params", "bias"))


def add_bias(y: Array, bias: Array | None) -> Array:
    """Add a bias, if there is one, in the dtype of `y`."""
    if bias is None:
        return y
    return y + bias.astype(y.dtype).reshape((1,) * (y.ndim - bias.ndim) + bias.shape)
