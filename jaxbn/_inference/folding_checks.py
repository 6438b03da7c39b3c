"""What is not folded, and why: the complaints of `fold`, of arrays and of models."""

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
