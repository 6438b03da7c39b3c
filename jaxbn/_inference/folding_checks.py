"""What is not folded, and why: the complaints of `fold`, of arrays and of models."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer

from .._core.variables import BatchNormParams, BatchNormState


def check_statistics(
    params: BatchNormParams, state: BatchNormState
) -> tuple[Array, Array, Array, Array]:
    """γ, β, μ and σ² as arrays of one shape, σ² where it can be seen not negative."""
    mean, var = jnp.asarray(state.mean), jnp.asarray(state.var)
    scale = jnp.ones_like(mean) if params.scale is None else jnp.asarray(params.scale)
    bias = jnp.zeros_like(mean) if params.bias is None else jnp.asarray(params.bias)
    named = {"params.scale": scale, "params.bias": bias, "state.mean": mean}
    for name, value in (named | {"state.var": var}).items():
        _check_inexact(name, value)
        if value.shape != mean.shape:
            raise ValueError(
                "params and state must have one shape, the features'; got "
                f"{name} {value.shape} and state.mean {mean.shape}. "
                "Take both from the same layer."
            )
    _check_variance(var)
    return scale, bias, mean, var


def check_layer(
    kernel: Array, bias: Array, axes: tuple[int, ...], features: tuple[int, ...]
) -> None:
    """The layer's output features are those of the batch norm, `features`."""
    _check_inexact("kernel", kernel)
    _check_inexact("bias", bias)
    along = tuple(kernel.shape[a] for a in axes)
    if along != features:
        raise ValueError(
            "the batch norm must have the features of the layer before it; got "
            f"statistics of shape {features}, and {along} along axis={axes} of the "
            f"kernel {kernel.shape}. Only a batch norm over this layer's output can be "
            "folded; pass axis= where the kernel's output features are not last."
        )
    if bias.shape[-len(axes) :] != features:
        raise ValueError(
            f"the layer's bias must end in the features' shape; got bias {bias.shape} "
            f"for {features} features. Pass None for a layer without a bias."
        )


def _check_inexact(name: str, value: Array) -> None:
    if not jnp.issubdtype(value.dtype, jnp.inexact):
        raise TypeError(
            f"{name} must be floating or complex; got {value.dtype} of shape "
            f"{value.shape}. Integers cannot hold the product with the scale: fold "
            "first, then quantize."
        )


def _check_variance(var: Array) -> None:
    if not isinstance(var, Tracer) and not _all_variances(var):
        raise ValueError(
            "a running variance must not be negative or NaN; got values from "
            f"{var.min()} to {var.max()} in state.var. The checkpoint may be damaged, "
            "or mean and var exchanged."
        )


@jax.jit
def _all_variances(var: Array) -> Array:
    return (var >= 0).all()


@contextmanager
def naming(layer: str, norm: str) -> Iterator[None]:
    """Say of any complaint which layers it is about: a model has dozens."""
    try:
        yield
    except (TypeError, ValueError) as error:
        error.add_note(f"While folding the batch norm {norm!r} into {layer!r}.")
        raise


def check_some(pairs: Collection[Any]) -> None:
    """There is something to fold."""
    if not pairs:
        raise ValueError(
            "found no layer with a batch norm to fold into it; got a model, or pairs, "
            "without one. Only a batch norm right after a linear layer can be folded: "
            "name such layers with pairs={layer: norm}."
        )


def check_has_batch_norm(norms: Collection[Any]) -> None:
    """There is a batch norm."""
    if not norms:
        raise ValueError(
            "the model must have a batch norm; found none. Pass the whole of it: for "
            "linen all variables, with 'batch_stats', and not 'params' alone."
        )


def check_there(path: Any, kind: str, there: Collection[Any]) -> None:
    """`path` is among those that are there."""
    if path not in there:
        raise ValueError(
            f"pairs must name {kind} of the model; got {_join(path)!r}. There are: "
            f"{', '.join(map(repr, map(_join, there))) or 'none'}."
        )


def unreachable(path: str, model: str) -> ValueError:
    """The complaint that an attribute path leads nowhere."""
    return ValueError(
        f"pairs must name attributes of the model; got {path!r}, which this {model} "
        "does not have. Write paths as 'blocks.0.conv', or as tuples."
    )


def check_kind(value: Any, kinds: tuple[type, ...]) -> None:
    """`value` is of one of `kinds`, and computes as they do."""
    if not computes_as(value, kinds):
        raise TypeError(
            f"only {', '.join(kind.__name__ for kind in kinds)} of Flax or jaxbn, with "
            f"their own __call__, can be folded; got {type(value).__name__}."
        )


def computes_as(value: Any, kinds: tuple[type, ...]) -> bool:
    """Whether `value` has the `__call__` of one of `kinds`."""
    return type(value).__call__ in {kind.__call__ for kind in kinds}


def check_last(axis: Any) -> None:
    """A batch norm of the last axis, where the layer before it has its features."""
    if axis != -1:
        raise ValueError(
            f"the batch norm must have axis=-1, its layer's features; got axis={axis}. "
            "Set its axis to -1 if that is the same one."
        )


def _join(path: Any) -> str:
    return path if isinstance(path, str) else "/".join(map(str, path))
