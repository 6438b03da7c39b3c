"""The sums for a TPU: about a guess that is known before x.

XLA fuses two plain sums into the convolution that computes x if they wait for nothing
that is computed from x.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from ..axes import Axes
from ..sharding import match_vma, shard_like
from ..weights import Weights, total_weight
from .plain import sums_shifted_by, sums_shifted_by_sample
from .shift import Guess, guessed_shift, offset_and_accuracy


def sums_shifted_by_guess_if_safe(
    x: Array,
    weights: Weights | None,
    guess: Guess | None,
    axes: Axes,
    dtype: DTypeLike,
) -> tuple[Array, Array, Array]:
    """Return `shifted_sums` for a guess if they do not cancel, else by a sample.

    The guess does not wait for x, so that the sums can be fused with what computes x.
    """
    shift = guessed_shift(guess, dtype)
    total, squares = sums_shifted_by(shift, x, weights, axes, dtype)
    _, is_safe = offset_and_accuracy(total, squares, total_weight(x, weights, axes))
    shift = shard_like(jnp.broadcast_to(shift, total.shape), total)
    near = match_vma(shift, total, squares)
    # The near branch takes no operand: libtpu 0.0.52 crashes if a branch takes every
    # output of a fusion.
    far = lax.cond(
        is_safe,
        lambda: jax.tree.map(jnp.zeros_like, near),
        lambda: sums_shifted_by_sample(x, weights, axes, dtype),
    )
    return jax.tree.map(partial(jnp.where, is_safe), near, far)
