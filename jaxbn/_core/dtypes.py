"""Conversion of x, and the dtypes of sums and statistics, real where x is complex."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike


def as_array(x: ArrayLike) -> Array:
    """Return x as an array of JAX; a traced one, which `asarray` copies, as it is."""
    return x if isinstance(x, Array) else jnp.asarray(x)


def is_inexact(dtype: DTypeLike) -> bool:
    """Decide whether a dtype is floating or complex, with at least 16 bits."""
    return jnp.issubdtype(dtype, jnp.inexact) and jnp.finfo(dtype).bits >= 16


def accumulation_dtype(*dtypes: DTypeLike) -> np.dtype:
    """Return the widest of `dtypes`, at least float32: the dtype of all sums."""
    with jax.numpy_dtype_promotion("standard"):  # "strict" refuses bfloat16 + float32
        return jnp.result_type(jnp.float32, *dtypes)


def real_dtype(dtype: DTypeLike) -> np.dtype:
    """Return the dtype of |z|² for z of `dtype`: float32 for complex64."""
    return jnp.finfo(dtype).dtype


def abs_square(z: Array) -> Array:
    """Return |z|², real also for complex z."""
    return jnp.real(z * jnp.conj(z))
