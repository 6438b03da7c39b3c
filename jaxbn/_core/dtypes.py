"""In which dtype a batch is summed, and in which its statistics are kept."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def widen(*dtypes: Any) -> np.dtype:
    """The widest of `dtypes`, and at least float32: the dtype of every statistic."""
    with jax.numpy_dtype_promotion("standard"):  # "strict" refuses bfloat16 + float32
        return jnp.result_type(jnp.float32, *dtypes)


def real_dtype(dtype: Any) -> np.dtype:
    """The dtype of |z|² for z of `dtype`: complex64 gives float32."""
    return jnp.finfo(dtype).dtype
