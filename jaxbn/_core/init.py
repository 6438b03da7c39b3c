"""A new layer's parameters and state."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax.typing import DTypeLike

from .checks import check_num_features, check_param_dtype
from .dtypes import real_dtype, accumulation_dtype
from .variables import BatchNormParams, BatchNormState


def init(
    num_features: int | Sequence[int],
    *,
    param_dtype: DTypeLike = jnp.float32,
    use_scale: bool = True,
    use_bias: bool = True,
) -> tuple[BatchNormParams, BatchNormState]:
    """Parameters and running statistics of a new layer, which changes nothing yet.

    scale = 1, bias = 0, mean = 0, var = 1, count = 0, as in Flax and PyTorch.

    **Arguments**

    - `num_features`: the length of the feature axis; a tuple, in the order of `axis`,
      where `batch_norm` is given a tuple of axes.
    - `param_dtype`: of scale and bias, floating or complex. The statistics have at
      least float32: float64 for float64 parameters, and a complex mean with a real
      variance for complex ones.
    - `use_scale`, `use_bias`: `False` puts `None` in the place of the parameter.

    **Returns** `(params, state)`.

    **Raises** `ValueError` for a feature count below 1, `TypeError` for an integer
    `param_dtype` or a feature count that is not an integer.

    >>> import jaxbn
    >>> params, state = jaxbn.init(3, use_bias=False)
    >>> params.scale, params.bias
    (Array([1., 1., 1.], dtype=float32), None)
    >>> state.mean, state.var, state.count
    (Array([0., 0., 0.], dtype=float32),
     Array([1., 1., 1.], dtype=float32),
     Array(0, dtype=int32))
    """
    shape = check_num_features(num_features)
    dtype = check_param_dtype(param_dtype)
    params = BatchNormParams(
        scale=jnp.ones(shape, dtype) if use_scale else None,
        bias=jnp.zeros(shape, dtype) if use_bias else None,
    )
    mean = jnp.zeros(shape, accumulation_dtype(dtype))
    var = jnp.ones(shape, real_dtype(mean.dtype))
    return params, BatchNormState(mean, var, jnp.zeros((), jnp.int32))
