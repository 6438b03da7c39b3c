"""Batch norm at inference is affine: as two vectors, or inside the layer before it.

`_linen_folding` and `_nnx_folding` do it for whole models.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Inexact

from .._core.axes import expand_features
from .._core.checks import check_axis, check_numbers
from .._core.dtypes import real_dtype, accumulation_dtype
from .._core.normalize import inverse_std
from .._core.variables import BatchNormParams, BatchNormState
from .folding_checks import check_layer, check_statistics


def inference_affine(
    params: BatchNormParams, state: BatchNormState, epsilon: float = 1e-5
) -> tuple[Inexact[Array, "*features"], Inexact[Array, "*features"]]:
    r"""Inference as one affine map: `y = x * scale + offset`.

    $$scale = \frac{\gamma}{\sqrt{\sigma^2 + \epsilon}}, \qquad
      offset = \beta - \mu \cdot scale$$

    **Arguments**

    - `params`, `state`: as in `batch_norm`; γ and β are `params.scale` and
      `params.bias`, 1 and 0 where they are `None`.
    - `epsilon`: added to the variance, the same as in training.

    **Returns** `(scale, offset)` in the features' shape, in float32 or wider.

    **Raises** `ValueError` where the shapes differ, or where a variance is negative or
    NaN, which can only be seen outside of `jit`; `TypeError` for dtypes.

    `batch_norm` subtracts the mean first. This form rounds more where the mean is
    large: by about 1e-7·|μ|/σ of y's deviation.

    Source: Ioffe & Szegedy, [arXiv:1502.03167](https://arxiv.org/abs/1502.03167),
    Algorithm 2, step 11.

    >>> import jax.numpy as jnp, jaxbn
    >>> params = jaxbn.BatchNormParams(jnp.array([3.0]), jnp.array([1.0]))
    >>> state = jaxbn.BatchNormState(jnp.array([10.0]), jnp.array([4.0]), jnp.int32(1))
    >>> jaxbn.inference_affine(params, state, epsilon=0.0)
    (Array([1.5], dtype=float32), Array([-14.], dtype=float32))
    """
    _, epsilon = check_numbers(None, epsilon)
    return _inference_affine(*check_statistics(params, state), epsilon)


def fold(
    kernel: ArrayLike,
    bias: ArrayLike | None,
    params: BatchNormParams,
    state: BatchNormState,
    *,
    epsilon: float = 1e-5,
    axis: int | Sequence[int] = -1,
) -> tuple[Inexact[Array, "..."], Inexact[Array, "..."]]:
    r"""The kernel and bias of a layer that does the batch norm after it as well.

    $$W' = W \cdot scale, \qquad b' = (b - \mu) \cdot scale + \beta, \qquad
      scale = \frac{\gamma}{\sqrt{\sigma^2 + \epsilon}}$$

    It holds for every layer that is linear and keeps its features apart: Dense, and
    convolutions of any rank, stride, dilation, padding, grouped, depthwise and
    transposed. Nothing may stand between the two, and nothing else may use the layer's
    output. A batch norm *before* a layer is not folded: the zeros of a padded
    convolution come after it, and its offset is not the same at the border.

    **Arguments**

    - `kernel`: floating or complex, as Flax lays it out, the output features last:
      `(..., in // groups, out)`.
    - `bias`: `(out,)`, or any shape that ends in the features' one; `None` for none.
    - `params`, `state`, `epsilon`: of the batch norm, as in `inference_affine`.
    - `axis`: where the features are in `kernel`: -2 with Flax's
      `ConvTranspose(transpose_kernel=True)`; a tuple where the batch norm has one.

    **Returns** `(kernel, bias)`, in float32 or wider whatever the layer's dtype: cast
    them back, and the folded layer rounds more than the two did.

    **Raises** `ValueError` where the features' shape is not that of `kernel` along
    `axis`, and otherwise as `inference_affine`; `TypeError` for an integer kernel.

    Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference",
    [arXiv:1712.05877](https://arxiv.org/abs/1712.05877), equation 14; PyTorch's
    `fuse_conv_bn_eval`, which keeps the kernel's dtype.

    >>> import jax.numpy as jnp, jaxbn
    >>> params = jaxbn.BatchNormParams(jnp.array([3.0]), jnp.array([1.0]))
    >>> state = jaxbn.BatchNormState(jnp.array([10.0]), jnp.array([4.0]), jnp.int32(1))
    >>> jaxbn.fold(jnp.ones((2, 1)), None, params, state, epsilon=0.0)
    (Array([[1.5],
            [1.5]], dtype=float32), Array([-14.], dtype=float32))
    """
    kernel = jnp.asarray(kernel)
    axes = check_axis(axis, kernel.ndim, of="the kernel")
    features = tuple(kernel.shape[a] for a in axes)
    bias = np.zeros(features, np.float32) if bias is None else bias
    bias = jnp.asarray(bias)
    check_layer(kernel, bias, axes, jnp.shape(state.mean))
    _, epsilon = check_numbers(None, epsilon)
    return _fold(kernel, bias, *check_statistics(params, state), epsilon, axes)


@partial(jax.jit, static_argnames="epsilon")
def _inference_affine(gamma, beta, mean, var, epsilon):
    scale, mean, beta = _centred_affine(gamma, beta, mean, var, epsilon)
    return scale, beta - mean * scale


# Compiled, for a model has dozens of shapes, and each operation of each takes its time.
@partial(jax.jit, static_argnames=("epsilon", "axes"))
def _fold(kernel, bias, gamma, beta, mean, var, epsilon, axes):
    vectors = _centred_affine(gamma, beta, mean, var, epsilon, kernel, bias)
    trailing = tuple(range(bias.ndim - len(axes), bias.ndim))
    kernel_scale = expand_features(vectors[0], axes, kernel.ndim)
    scale, mean, beta = (expand_features(v, trailing, bias.ndim) for v in vectors)
    kernel, bias = kernel.astype(scale.dtype), bias.astype(scale.dtype)
    return kernel * kernel_scale, (bias - mean) * scale + beta


def _centred_affine(gamma, beta, mean, var, epsilon, *others):
    """Scale, μ and β of y = (x - μ) · scale + β, as wide as the widest of all."""
    # What is below 16 bits widens nothing, and JAX promotes no 8-bit floats.
    arrays = (gamma, beta, mean, var, *others)
    wide = accumulation_dtype(*(a.dtype for a in arrays if a.dtype.itemsize > 1))
    scale = gamma.astype(wide) * inverse_std(var.astype(real_dtype(wide)), epsilon)
    return scale, mean.astype(wide), beta.astype(wide)
