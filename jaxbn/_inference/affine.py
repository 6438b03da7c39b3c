"""Batch norm at inference is affine: y = x · scale + offset."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Inexact

from .._core.dtypes import accumulation_dtype, real_dtype
from .._core.normalize import inverse_std
from .._core.options import check_epsilon
from .._core.variables import AnyParams, BatchNormState

Vector = Inexact[Array, "*features"]


def inference_affine(
    params: AnyParams,
    state: BatchNormState,
    epsilon: ArrayLike = 1e-5,
) -> tuple[Vector, Vector]:
    """Return inference as one affine map: y = x · scale + offset.

        scale  = params.scale / √(var + ε)
        offset = params.bias - mean · scale

    **Arguments**

    - `params`, `state`: as in `batch_norm`; a scale of `None` is 1, a bias of `None` 0.
    - `epsilon`: added to the variance, the same as in training.

    **Returns** `(scale, offset)` in the features' shape, in float32 or wider.

    **Raises** `ValueError` if the shapes differ, or if var + ε is negative or NaN:
    where `jit` traces `state.var`, the result is NaN; `TypeError` for dtypes.

    `batch_norm` subtracts the mean first. This form rounds more if the mean is large:
    by about 1e-7·|μ|/σ of y's deviation.

    Source: Ioffe & Szegedy, [arXiv:1502.03167](https://arxiv.org/abs/1502.03167),
    Algorithm 2, step 11.

    >>> import jax.numpy as jnp, jaxbn
    >>> params = jaxbn.BatchNormParams(jnp.array([3.0]), jnp.array([1.0]))
    >>> state = jaxbn.BatchNormState(jnp.array([10.0]), jnp.array([4.0]), 1.0)
    >>> jaxbn.inference_affine(params, state, epsilon=0.0)
    (Array([1.5], dtype=float32), Array([-14.], dtype=float32))
    """
    epsilon = check_epsilon(epsilon)
    return _inference_affine(*check_statistics(params, state, epsilon), epsilon)


@jax.jit
def _inference_affine(
    scale: Vector, bias: Vector, mean: Vector, var: Vector, epsilon: ArrayLike
) -> tuple[Vector, Vector]:
    scale, mean, bias = centred_affine(scale, bias, mean, var, epsilon)
    return scale, bias - mean * scale


def centred_affine(
    scale: Vector,
    bias: Vector,
    mean: Vector,
    var: Vector,
    epsilon: ArrayLike,
    *others: Inexact[Array, "..."],
) -> tuple[Vector, Vector, Vector]:
    """Return a, μ and b of y = (x - μ) · a + b, in the widest dtype of all arrays."""
    # A dtype below 16 bits widens nothing, and JAX promotes no 8-bit floats.
    arrays = (scale, bias, mean, var, *others)
    dtype = accumulation_dtype(*(a.dtype for a in arrays if a.dtype.itemsize > 1))
    scale = scale.astype(dtype) * inverse_std(var.astype(real_dtype(dtype)), epsilon)
    return scale, mean.astype(dtype), bias.astype(dtype)


def check_statistics(
    params: AnyParams, state: BatchNormState, epsilon: ArrayLike
) -> tuple[Array, Array, Array, Array]:
    """Return scale, bias, mean and var as arrays of one shape, var + ε not negative."""
    mean, var = jnp.asarray(state.mean), jnp.asarray(state.var)
    scale = jnp.ones_like(mean) if params.scale is None else jnp.asarray(params.scale)
    bias = jnp.zeros_like(mean) if params.bias is None else jnp.asarray(params.bias)
    named = {"params.scale": scale, "params.bias": bias, "state.mean": mean}
    for name, value in (named | {"state.var": var}).items():
        check_inexact(name, value)
        if value.shape != mean.shape:
            raise ValueError(
                "params and state must have one shape, the features'; got "
                f"{name} {value.shape} and state.mean {mean.shape}. "
                "Take both from the same layer."
            )
    check_variance(state.var, epsilon)  # before `jit` makes a tracer of a NumPy array
    return scale, bias, mean, var


def check_inexact(name: str, value: Array) -> None:
    if not jnp.issubdtype(value.dtype, jnp.inexact):
        raise TypeError(
            f"{name} must be floating or complex; got {value.dtype} of shape "
            f"{value.shape}. Integers cannot hold the product with the scale: fold "
            "first, then quantize."
        )


def check_variance(var: ArrayLike, epsilon: ArrayLike) -> None:
    """Check that var + ε is not negative or NaN, if its values are known."""
    if not (_is_known(var) and _is_known(epsilon)):
        return
    wide = np.asarray(var)  # in NumPy: `jit` would trace operations on known values too
    wide = wide.astype(accumulation_dtype(wide.dtype))
    least = np.min(wide + np.asarray(epsilon, wide.dtype), initial=np.inf)
    if not least >= 0:
        raise ValueError(
            "with epsilon added, a running variance must not be negative or NaN; got "
            f"{least} at the least in state.var + {epsilon}. The checkpoint may be "
            "damaged, or mean and var exchanged."
        )


def _is_known(value: ArrayLike) -> bool:
    """Return whether this process can read the values."""
    if isinstance(value, Tracer):
        return False
    replicated = getattr(value, "is_fully_replicated", True)
    return replicated or getattr(value, "is_fully_addressable", True)
