"""Batch norm at inference as a part of the linear layer before or after it."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Inexact

from .._core.axes import Axes, check_axis, expand_features, reduction_axes
from .._core.options import check_epsilon
from .._core.sharding import replicate, shard_like
from .._core.variables import AnyParams, BatchNormState
from .affine import Vector, centred_affine, check_inexact, check_statistics


def fold(
    kernel: ArrayLike,
    bias: ArrayLike | None,
    params: AnyParams,
    state: BatchNormState,
    *,
    epsilon: ArrayLike = 1e-5,
    axis: int | Sequence[int] = -1,
    input_axis: int | Sequence[int] | None = None,
) -> tuple[Inexact[Array, "..."], Inexact[Array, "..."]]:
    """Fold a batch norm into the linear layer before it, or after it.

        kernel' = kernel · scale
        bias'   = (bias - mean) · scale + params.bias

    with scale = params.scale / √(var + ε). It holds for every layer that is linear and
    keeps its features apart: Dense, and convolutions of any rank, stride, dilation and
    padding, grouped, depthwise and transposed. Nothing may stand between the two, and
    nothing else may use the layer's output.

    With `input_axis` the batch norm is the one before the layer:

        kernel' = scale · kernel, along the input features
        bias'   = bias + Σ (params.bias - mean · scale) · kernel

    summed over all axes but the output features. It holds for Dense and for
    convolutions without padding: padded zeros come after the batch norm, so that its
    offset is not the same at the border.

    **Arguments**

    - `kernel`: floating or complex, in Flax's layout, the output features last:
      `(..., in // groups, out)`.
    - `bias`: `(out,)`, or any shape that ends in the features' shape; `None` for a
      layer without a bias.
    - `params`, `state`, `epsilon`: the batch norm's, as in `inference_affine`.
    - `axis`: the axis of the output features in `kernel`: -2 for Flax's
      `ConvTranspose(transpose_kernel=True)`; a tuple if there are several.
    - `input_axis`: for a batch norm before the layer, the axis of the input features in
      `kernel`: -2 in Flax's layout, also of a grouped convolution; `None` for a batch
      norm after the layer.

    **Returns** `(kernel, bias)`, in float32 or wider whatever the layer's dtype. Cast
    back, the folded layer rounds more than the two layers did.

    **Raises** `ValueError` if the features' shape is not the shape of `kernel` along
    `axis` (along `input_axis`, times the number of groups), and otherwise as
    `inference_affine`; `TypeError` for an integer kernel.

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
    >>> kernel = jnp.ones((1, 2))
    >>> jaxbn.fold(kernel, None, params, state, epsilon=0.0, input_axis=-2)
    (Array([[1.5, 1.5]], dtype=float32), Array([-14., -14.], dtype=float32))
    """
    kernel = jnp.asarray(kernel)
    outputs = check_axis(axis, kernel.ndim, of="the kernel")
    features = tuple(kernel.shape[a] for a in outputs)
    bias = np.zeros(features, np.float32) if bias is None else bias
    bias = jnp.asarray(bias)
    inputs = input_axis
    if inputs is not None:
        inputs = check_axis(inputs, kernel.ndim, of="the kernel")
    _check_layer(kernel, bias, outputs, inputs, jnp.shape(state.mean))
    epsilon = check_epsilon(epsilon)
    vectors = *check_statistics(params, state, epsilon), epsilon
    if inputs is None:
        return _fold(kernel, bias, *vectors, outputs)
    return _fold_before(kernel, bias, *vectors, outputs, inputs)


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
    vectors = centred_affine(*affine, epsilon, kernel, bias)
    trailing = tuple(range(bias.ndim - len(axes), bias.ndim))
    kernel_scale = shard_like(expand_features(vectors[0], axes, kernel.ndim), kernel)
    scale, mean, offset = (expand_features(v, trailing, bias.ndim) for v in vectors)
    kernel, bias = kernel.astype(scale.dtype), bias.astype(scale.dtype)
    return kernel * kernel_scale, (bias - mean) * scale + offset


@partial(jax.jit, static_argnames=("outputs", "inputs"))
def _fold_before(
    kernel: Inexact[Array, "..."],
    bias: Inexact[Array, "..."],
    norm_scale: Vector,
    norm_bias: Vector,
    mean: Vector,
    var: Vector,
    epsilon: ArrayLike,
    outputs: Axes,
    inputs: Axes,
) -> tuple[Inexact[Array, "..."], Inexact[Array, "..."]]:
    affine = norm_scale, norm_bias, mean, var
    scale, mean, offset = centred_affine(*affine, epsilon, kernel, bias)
    kernel, bias = kernel.astype(scale.dtype), bias.astype(scale.dtype)
    expand = partial(_expand_inputs, kernel=kernel, outputs=outputs, inputs=inputs)
    shift = kernel * expand(offset - mean * scale)
    ascending = shift.sum(reduction_axes(outputs, kernel.ndim))
    added = ascending.transpose([sorted(outputs).index(a) for a in outputs])
    trailing = tuple(range(bias.ndim - len(outputs), bias.ndim))
    return kernel * expand(scale), bias + expand_features(added, trailing, bias.ndim)


def _expand_inputs(vector: Vector, kernel: Array, outputs: Axes, inputs: Axes) -> Array:
    """Expand the input features to the kernel's rank, each group's to its outputs."""
    along, axes = tuple(kernel.shape[a] for a in inputs), inputs
    if vector.shape != along:
        # On each device: shards need not be groups.
        per_group = replicate(vector).reshape(-1, *along)
        repeats = kernel.shape[outputs[0]] // per_group.shape[0]
        vector = jnp.repeat(per_group, repeats, axis=0)
        axes = (*outputs, *inputs)
    return shard_like(expand_features(vector, axes, kernel.ndim), kernel)


def _check_layer(
    kernel: Array,
    bias: Array,
    outputs: Axes,
    inputs: Axes | None,
    features: tuple[int, ...],
) -> None:
    """Check that the batch norm's `features` are the layer's, and the bias's shape."""
    check_inexact("kernel", kernel)
    check_inexact("bias", bias)
    out_features = tuple(kernel.shape[a] for a in outputs)
    if inputs is not None:
        _check_inputs(kernel, outputs, inputs, features)
    elif out_features != features:
        raise ValueError(
            "the batch norm must have the features of the layer before it; got "
            f"statistics of shape {features}, and {out_features} along axis={outputs} "
            f"of the kernel {kernel.shape}. Only a batch norm over this layer's output "
            "can be folded; pass axis= where the kernel's output features are not last."
        )
    if bias.shape[-len(outputs) :] != out_features:
        raise ValueError(
            f"the layer's bias must end in the features' shape; got bias {bias.shape} "
            f"for {out_features} features. Pass None for a layer without a bias."
        )


def _check_inputs(
    kernel: Array, outputs: Axes, inputs: Axes, features: tuple[int, ...]
) -> None:
    """Check that the layer's input features are the batch norm's `features`."""
    if set(inputs) & set(outputs):
        raise ValueError(
            "input_axis must name other axes of the kernel than axis; got input_axis="
            f"{inputs} and axis={outputs} for the kernel {kernel.shape}."
        )
    along = tuple(kernel.shape[a] for a in inputs)
    out_features = tuple(kernel.shape[a] for a in outputs)
    if features != along and not _are_groups(features, along, out_features):
        raise ValueError(
            "the batch norm must have the features of the layer after it; got "
            f"statistics of shape {features}, and {along} along input_axis={inputs} of "
            f"the kernel {kernel.shape}. Only a batch norm over this layer's input can "
            "be folded; the features of a grouped convolution are the kernel's, times "
            "the number of groups, which divides its output features."
        )


def _are_groups(
    features: tuple[int, ...], along: tuple[int, ...], outputs: tuple[int, ...]
) -> bool:
    """Return whether the features are a grouped convolution's input features."""
    if len(features) != 1 or len(along) != 1 or len(outputs) != 1:
        return False
    groups, rest = divmod(features[0], along[0])
    return rest == 0 and groups > 0 and outputs[0] % groups == 0
