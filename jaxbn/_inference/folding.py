"""Batch norm at inference is affine: two vectors, or part of the preceding layer."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Float, Inexact

from .._core.axes import Axes, check_axis, expand_features
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

    **Raises** `ValueError` if the shapes differ, or if a variance is negative or NaN,
    which is visible outside of `jit` alone; `TypeError` for dtypes.

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
    statistics = _check_statistics(params, state)
    return _inference_affine(*statistics, check_epsilon(epsilon))


def fold(
    kernel: ArrayLike,
    bias: ArrayLike | None,
    params: AnyParams,
    state: BatchNormState,
    *,
    epsilon: ArrayLike = 1e-5,
    axis: int | Sequence[int] = -1,
) -> tuple[Inexact[Array, "..."], Inexact[Array, "..."]]:
    """Fold a batch norm into the preceding linear layer.

        kernel' = kernel · scale
        bias'   = (bias - mean) · scale + params.bias

    with scale = params.scale / √(var + ε). It holds for every layer that is linear and
    keeps its features apart: Dense, and convolutions of any rank, stride, dilation and
    padding, grouped, depthwise and transposed. Nothing may stand between the two, and
    nothing else may use the layer's output. A batch norm *before* a layer is not
    folded: the zeros of a padded convolution come after it, and its offset is not the
    same at the border.

    **Arguments**

    - `kernel`: floating or complex, in Flax's layout, the output features last:
      `(..., in // groups, out)`.
    - `bias`: `(out,)`, or any shape that ends in the features' shape; `None` for a
      layer without a bias.
    - `params`, `state`, `epsilon`: the batch norm's, as in `inference_affine`.
    - `axis`: the axis of the output features in `kernel`: -2 for Flax's
      `ConvTranspose(transpose_kernel=True)`; a tuple if the batch norm has one.

    **Returns** `(kernel, bias)`, in float32 or wider whatever the layer's dtype. Cast
    back, the folded layer rounds more than the two layers did.

    **Raises** `ValueError` if the features' shape is not the shape of `kernel` along
    `axis`, and otherwise as `inference_affine`; `TypeError` for an integer kernel.

    Differences from PyTorch: `fuse_conv_bn_eval` keeps the kernel's dtype.

    Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference",
    [arXiv:1712.05877](https://arxiv.org/abs/1712.05877), equation 14.

    >>> import jax.numpy as jnp, jaxbn
    >>> params = jaxbn.BatchNormParams(jnp.array([3.0]), jnp.array([1.0]))
    >>> state = jaxbn.BatchNormState(jnp.array([10.0]), jnp.array([4.0]), 1.0)
    >>> jaxbn.fold(jnp.ones((2, 1)), None, params, state, epsilon=0.0)
    (Array([[1.5],
            [1.5]], dtype=float32), Array([-14.], dtype=float32))
    """
    kernel = jnp.asarray(kernel)
    axes = check_axis(axis, kernel.ndim, of="the kernel")
    features = tuple(kernel.shape[a] for a in axes)
    bias = np.zeros(features, np.float32) if bias is None else bias
    bias = jnp.asarray(bias)
    _check_layer(kernel, bias, axes, jnp.shape(state.mean))
    statistics = _check_statistics(params, state)
    return _fold(kernel, bias, *statistics, check_epsilon(epsilon), axes)


@jax.jit
def _inference_affine(
    scale: Vector, bias: Vector, mean: Vector, var: Vector, epsilon: ArrayLike
) -> tuple[Vector, Vector]:
    scale, mean, bias = _centred_affine(scale, bias, mean, var, epsilon)
    return scale, bias - mean * scale


# Compiled: a model has dozens of shapes, and each operation on each shape takes time.
@partial(jax.jit, static_argnames="axes")
def _fold(
    kernel: Inexact[Array, "..."],
    bias: Inexact[Array, "..."],
    norm_scale: Vector,
    norm_bias: Vector,
    mean: Vector,
    var: Vector,
    epsilon: ArrayLike,
    axes: Axes,
) -> tuple[Inexact[Array, "..."], Inexact[Array, "..."]]:
    affine = norm_scale, norm_bias, mean, var
    vectors = _centred_affine(*affine, epsilon, kernel, bias)
    trailing = tuple(range(bias.ndim - len(axes), bias.ndim))
    kernel_scale = expand_features(vectors[0], axes, kernel.ndim)
    scale, mean, offset = (expand_features(v, trailing, bias.ndim) for v in vectors)
    kernel, bias = kernel.astype(scale.dtype), bias.astype(scale.dtype)
    return kernel * kernel_scale, (bias - mean) * scale + offset


def _centred_affine(
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


def _check_statistics(
    params: AnyParams, state: BatchNormState
) -> tuple[Array, Array, Array, Array]:
    """Return scale, bias, mean and var as arrays of one shape, var not negative."""
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
    _check_not_negative(var)
    return scale, bias, mean, var


def _check_layer(
    kernel: Array, bias: Array, axes: Axes, features: tuple[int, ...]
) -> None:
    """Check that the layer's output features are the batch norm's `features`."""
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


def _check_not_negative(var: Float[Array, "*features"]) -> None:
    if not isinstance(var, Tracer) and not _all_not_negative(var):
        raise ValueError(
            "a running variance must not be negative or NaN; got values from "
            f"{var.min()} to {var.max()} in state.var. The checkpoint may be damaged, "
            "or mean and var exchanged."
        )


@jax.jit
def _all_not_negative(var: Float[Array, "*features"]) -> Array:
    return (var >= 0).all()
