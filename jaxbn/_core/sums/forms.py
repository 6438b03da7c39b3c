"""Weighted sums over the elements of each feature, with a form for each platform.

The sums that read x, two forward and two backward, are the one part of the package that
knows platforms, because XLA treats two sums that share terms differently on each. A new
platform is a file beside this one, and a row in each of these two functions.
"""

from functools import partial

from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Float, Inexact

from ..axes import Axes
from ..weights import Weights
from . import cpu, cuda, plain, tpu
from .shift import Guess


def shifted_sums(
    x: Inexact[Array, "*x"],
    weights: Weights | None,
    axes: Axes,
    dtype: DTypeLike,
    guess: Guess | None,
) -> tuple[Array, Array, Array]:
    """Return `plain_shifted_sums` in the platform's form.

    `guess` may be wrong, NaN or `None`: it decides on speed, not on accuracy.
    """
    by_sample = partial(plain.sums_shifted_by_sample, axes=axes, dtype=dtype)
    on_cpu = partial(cpu.shifted_sums, axes=axes, dtype=dtype)
    return lax.platform_dependent(
        x,
        weights,
        guess,
        cpu=lambda x, weights, _: on_cpu(x, weights),
        cuda=lambda x, weights, _: by_sample(x, weights, sums=cuda.packed_sums),
        tpu=partial(tpu.sums_shifted_by_guess_if_safe, axes=axes, dtype=dtype),
        default=lambda x, weights, _: by_sample(x, weights),
    )


def product_sums(
    dy: Inexact[Array, "*x"],
    x: Inexact[Array, "*x"],
    mean: Float[Array, "*stats"],
    axes: Axes,
) -> tuple[Array, Array]:
    """Return Σ dy and Σ dy·(x - μ) of each feature, in the dtype of μ."""
    return lax.platform_dependent(
        dy,
        x,
        mean,
        cpu=partial(cpu.product_sums, axes=axes),
        cuda=partial(plain.sums_with_products, axes=axes, sums=cuda.packed_sums),
        default=partial(plain.sums_with_products, axes=axes),
    )
