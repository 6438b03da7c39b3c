"""Conversion of x, and the dtypes of sums and statistics, real where x is complex."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike


def as_array(x: ArrayLike) -> Array:
    """Return x as an array of JAX; a traced one, which `asarray` copies, as it is."""
    return x if isinstance(x, Array) else jnp.asarray(x)


def check_width(name: str, dtype: DTypeLike) -> None:
    """Check that a floating dtype has at least 16 bits: JAX promotes no others."""
    if jnp.finfo(dtype).bits < 16:
        raise TypeError(
            f"{name} must have 16 bits or more; got {jnp.dtype(dtype)}. Cast it first, "
            "to jnp.bfloat16 for instance."
        )


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
