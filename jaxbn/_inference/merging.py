"""One state of several: clients, unsynchronized replicas, parts of a data set."""

from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike

from .._core.dtypes import abs_square, accumulation_dtype, real_dtype
from .._core.mask_scale import split_scale
from .._core.variables import BatchNormState, check_kind


def merge_states(
    states: Iterable[BatchNormState],
    weights: ArrayLike | Sequence[ArrayLike] | None = None,
) -> BatchNormState:
    """Merge running statistics by the law of total variance.

        μ = Σ fᵢ μᵢ,   σ² = Σ fᵢ (σᵢ² + |μᵢ - μ|²),   fᵢ = wᵢ / Σ w

    The mean of the variances alone would miss how far the means lie apart.

    **Arguments**

    - `states`: of layers with the same features, from clients, from replicas that were
      not synchronized, or from parts of a data set.
    - `weights`: one for each state, for instance its number of examples; their scale
      does not matter. A state of weight 0 is left out. Equal weights if `None`. Of
      traced weights, negative ones count as 0, and equal ones are taken if all are 0.

    **Returns** a state in the dtypes of the states, promoted where they differ. The
    sums are taken in float32 at least. Its `count` is the sum.

    **Raises** `ValueError` for no states, other shapes, or weights that are negative or
    all 0; `TypeError` for other tuples.

    >>> import jax.numpy as jnp, jaxbn
    >>> _, a = jaxbn.init(1)
    >>> b = a._replace(mean=jnp.array([4.0]))
    >>> merged = jaxbn.merge_states([a, b], weights=[30, 10])
    >>> merged.mean, merged.var  # 1 + (30 · 1² + 10 · 3²) / 40
    (Array([1.], dtype=float32), Array([4.], dtype=float32))
    """
    means, variances, counts = map(_stack, zip(*_check_states(states), strict=True))
    mean_wide, var_wide = _accumulated(means, variances)
    shares = _shares(weights, len(counts), var_wide.dtype)
    shares = shares.reshape(-1, *(1,) * (means.ndim - 1))

    def average(values: Array) -> Array:
        terms = shares.astype(values.dtype) * values
        return jnp.sum(jnp.where(shares == 0, 0, terms), 0)  # NaN stays NaN

    mean = average(mean_wide)
    var = average(var_wide + abs_square(mean_wide - mean[None]))
    count = jnp.sum(counts, 0, dtype=counts.dtype)
    return BatchNormState(mean.astype(means.dtype), var.astype(variances.dtype), count)


def _stack(arrays: Sequence[Array]) -> Array:
    """Stack arrays in their common dtype: complex if one of them is."""
    with jax.numpy_dtype_promotion("standard"):  # "strict" refuses two dtypes
        return jnp.stack(arrays)


def _accumulated(means: Array, variances: Array) -> tuple[Array, Array]:
    """Return means and variances in the dtype of sums, which squares do not outgrow."""
    dtype = accumulation_dtype(means.dtype, variances.dtype)
    return means.astype(dtype), variances.astype(real_dtype(dtype))


def _check_states(states: Iterable[BatchNormState]) -> list[BatchNormState]:
    """Return the states as arrays of equal shapes."""
    alone = isinstance(states, BatchNormState)
    states = list(states)
    if alone or not states:
        raise ValueError(
            "states must be an iterable of at least one BatchNormState; got "
            f"{'one state alone' if alone else 'none'}. Pass [state, ...]."
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
    return states


def _shares(
    weights: ArrayLike | Sequence[ArrayLike] | None, number: int, dtype: np.dtype
) -> Array:
    """Return the share of each state, with a sum of 1."""
    weights = np.ones(number) if weights is None else weights
    if any(isinstance(weight, Tracer) for weight in jax.tree.leaves(weights)):
        weights = jnp.asarray(weights)
        _check_number(weights.shape, number)
        return _traced_shares(weights, dtype)
    known = np.asarray(weights, np.float64)
    _check_number(known.shape, number)
    if not (known.min() >= 0 and 0 < known.max() < np.inf):
        raise ValueError(
            "weights must be finite, not negative, and not all 0; got "
            f"{known.tolist()}. They are the states' shares, of any scale."
        )
    known = known / known.max()
    return jnp.asarray(known / known.sum(), dtype)


def _check_number(shape: tuple[int, ...], number: int) -> None:
    """Check that there is one weight for each state."""
    if shape != (number,):
        raise ValueError(
            f"weights must hold one number for each of {number} states; "
            f"got shape {shape}. For instance each state's number of examples."
        )


def _traced_shares(weights: Array, dtype: np.dtype) -> Array:
    """Return the shares of weights that are not known; equal ones if all are 0."""
    floating = jnp.issubdtype(weights.dtype, jnp.floating)
    w, _, _ = split_scale(weights if floating else weights.astype(dtype), (0,))
    w = jnp.where(w < 0, 0, w)
    w = jnp.where(jnp.any(w != 0), w, 1)
    return (w / jnp.sum(w)).astype(dtype)
