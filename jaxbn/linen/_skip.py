"""The original linen model with the variables that `fold` returns."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import jax
from flax import linen as nn
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import PyTree

from .._flax.paths import join
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
    return not norm.is_initializing() and not norm.has_variable("batch_stats", "var")


def _add_bias(
    in_trace: bool,
    next_call: NextCall,
    layer: nn.Module,
    *args: PyTree,
    **kwargs: PyTree,
) -> Array:
    """Add the bias that `fold` gave to a layer without one."""
    y = next_call(*args, **kwargs)
    if _tracing.value != in_trace or layer.use_bias:
        return y
    if not layer.has_variable("params", "bias"):
        return y
    bias = layer.get_variable("params", "bias").astype(y.dtype)
    return y + bias.reshape((1,) * (y.ndim - bias.ndim) + bias.shape)
