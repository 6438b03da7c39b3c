"""One state of several: clients, unsynchronized replicas, parts of a data set."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike

from .._core.dtypes import abs_square
from .._core.variables import BatchNormState, check_kind


def merge_states(
    states: Sequence[BatchNormState],
    weights: ArrayLike | Sequence[ArrayLike] | None = None,
) -> BatchNormState:
    """Merge running statistics by the law of total variance.

        μ = Σ fᵢ μᵢ,   σ² = Σ fᵢ (σᵢ² + |μᵢ - μ|²),   fᵢ = wᵢ / Σ w

    The mean of the variances alone would miss how far the means lie apart.

    **Arguments**

    - `states`: of layers with the same features, from clients, from replicas that were
      not synchronized, or from parts of a data set.
    - `weights`: one for each state, for instance its number of examples; their scale
      does not matter. A state of weight 0 is left out. Equal weights if `None`.

    **Returns** a state in the dtypes of the first one. Its `count` is the sum.

    **Raises** `ValueError` for no states, other shapes, or weights that are negative or
    all 0; `TypeError` for other tuples.

    >>> import jax.numpy as jnp, jaxbn
    >>> _, a = jaxbn.init(1)
    >>> b = a._replace(mean=jnp.array([4.0]))
    >>> merged = jaxbn.merge_states([a, b], weights=[30, 10])
    >>> merged.mean, merged.var  # 1 + (30 · 1² + 10 · 3²) / 40
    (Array([1.], dtype=float32), Array([4.], dtype=float32))
    """
    first, *_ = states = _check_states(states)
    means, variances, counts = (jnp.stack(v) for v in zip(*states, strict=True))
    shares = _check_weights(weights, len(states), variances.dtype)
    shares = shares.reshape(-1, *(1,) * first.mean.ndim)

    def average(values: Array) -> Array:
        terms = shares.astype(values.dtype) * values
        return jnp.sum(jnp.where(shares > 0, terms, 0), 0)

    mean = average(means)
    var = average(variances + abs_square(means - mean[None]))
    return BatchNormState(mean, var, jnp.sum(counts, 0, dtype=first.count.dtype))


def _check_states(states: Sequence[BatchNormState]) -> list[BatchNormState]:
    """Return the states as arrays of equal shapes, in the dtypes of the first."""
    if isinstance(states, BatchNormState) or not states:
        raise ValueError(
            "states must be a sequence of at least one BatchNormState; got "
            f"{'one state alone' if states else 'none'}. Pass [state, ...]."
        )
    for state in states:
        check_kind("each of states", state, BatchNormState, "Pass [state, ...]")
    states = [BatchNormState(*map(jnp.asarray, state)) for state in states]
    shapes = [jax.tree.map(jnp.shape, tuple(state)) for state in states]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError(
            f"states must have the same features; got shapes {shapes} of mean, var and "
            "count. Merge the states of one layer at a time."
        )
    return [jax.tree.map(lambda a, b: a.astype(b.dtype), s, states[0]) for s in states]


def _check_weights(
    weights: ArrayLike | Sequence[ArrayLike] | None, number: int, dtype: np.dtype
) -> Array:
    """Return the share of each state, with a sum of 1."""
    weights = jnp.asarray(np.ones(number) if weights is None else weights, dtype)
    if weights.shape != (number,):
        raise ValueError(
            f"weights must hold one number for each of {number} states; "
            f"got shape {weights.shape}. For instance each state's number of examples."
        )
    largest = jnp.max(weights)
    if not isinstance(weights, Tracer) and not (
        jnp.min(weights) >= 0 and 0 < largest < jnp.inf
    ):
        raise ValueError(
            "weights must be finite, not negative, and not all 0; got "
            f"{weights.tolist()}. They are the states' shares, of any scale."
        )
    weights = weights / largest
    return weights / jnp.sum(weights)
