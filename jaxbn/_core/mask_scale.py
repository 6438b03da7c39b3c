"""The scale of a floating mask, and its weights without it.

Any scale will do, up to both ends of the floating-point range. There a plain division
fails: the reciprocal of the largest weight, or the weight itself, can be a denormal
number, which a CPU takes for 0. The power of 2 is therefore divided out first.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from .axes import Axes

_INTEGERS = {32: np.int32, 64: np.int64}
_MAGNITUDE = {32: np.int32(2**31 - 1), 64: np.int64(2**63 - 1)}


class Scale(NamedTuple):
    """Hold the largest weight of each feature as factor · 2^exponent."""

    factor: Float[Array, "*#stats"]
    exponent: Int[Array, "*#stats"]


def split_scale(
    mask: Float[Array, "*#x"], axes: Axes
) -> tuple[Float[Array, "*#x"], Bool[Array, "*#x"], Scale]:
    """Return the weights by the largest of each feature, which are it, and the scale.

    Without a positive weight the factor is 1, and no weight is the largest.
    """
    exponent = _largest_exponent(as_wide(mask), axes)
    scaled = _divide_by_power(as_wide(mask), exponent)
    largest = jnp.max(scaled, axes, keepdims=True, initial=0)
    has_factor = (largest > 0) & (largest < jnp.inf)
    factor = jnp.where(has_factor, largest, 1)
    is_largest = has_factor & (scaled == largest)
    return scaled / factor, is_largest, Scale(factor, exponent)


def divide_by_scale(mask: Float[Array, "*#x"], scale: Scale) -> Float[Array, "*#x"]:
    """Return the weights that `split_scale` returned."""
    return _divide_by_power(as_wide(mask), scale.exponent) / scale.factor


def as_wide(mask: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return a floating mask in at least float32."""
    return mask if mask.dtype == jnp.float64 else mask.astype(jnp.float32)


def _largest_exponent(mask: Float[Array, "*#x"], axes: Axes) -> Int[Array, "*#stats"]:
    """Return e for the largest |w| of each feature: 2^e ≤ |w| < 2^(e+1).

    It is the smallest exponent for a denormal number or 0, and less than the largest
    by 1 at the most: the power of the negative exponent is no denormal number.
    """
    info = jnp.finfo(mask.dtype)
    # Non-negative floating-point numbers have the order of their bits.
    bits = jnp.max(_bits(mask) & _MAGNITUDE[info.bits], axes, keepdims=True, initial=0)
    smallest = int(info.minexp)
    exponent = (bits >> info.nmant).astype(jnp.int32) + (smallest - 1)
    return jnp.clip(exponent, smallest, -smallest)


def _divide_by_power(
    mask: Float[Array, "*#x"], exponent: Int[Array, "*#stats"]
) -> Float[Array, "*#x"]:
    """Return w / 2^e, exactly where it is not small beside the largest."""
    info = jnp.finfo(mask.dtype)
    bits = _bits(mask)
    size = bits & _MAGNITUDE[info.bits]
    mantissa = jnp.where(bits < 0, -size, size).astype(mask.dtype)
    # A denormal number is its mantissa times the smallest one, 2^(minexp - nmant).
    unit = int(info.minexp) - info.nmant
    denormal = mantissa * power_of_2(unit - exponent, mask.dtype)
    normal = mask * power_of_2(-exponent, mask.dtype)
    return jnp.where(size < 1 << info.nmant, denormal, normal)


def power_of_2(exponent: Int[Array, "..."], dtype: DTypeLike) -> Float[Array, "..."]:
    """Return 2^e, and the smallest normal number for a smaller e."""
    info = jnp.finfo(dtype)
    biased = jnp.maximum(exponent - (int(info.minexp) - 1), 1)
    bits = biased.astype(_INTEGERS[info.bits]) << info.nmant
    return lax.bitcast_convert_type(bits, dtype)


def _bits(mask: Float[Array, "..."]) -> Int[Array, "..."]:
    return lax.bitcast_convert_type(mask, _INTEGERS[jnp.finfo(mask.dtype).bits])
