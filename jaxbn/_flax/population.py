"""Population statistics of the layers of a model."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from .._core.dtypes import accumulation_dtype
from .._core.weights import check_mask
from .._inference.accumulator import Accumulator
from .._inference.population import Variance, check_same_features, finalize
from .folding import check_has_batch_norm
from .layer import Layer, ascending_axes, flax_mask, index_groups

# The name of a layer's accumulator, beside its `mean` and `var`.
ACCUMULATOR = "accumulator"


def accumulate_call(
    old: Accumulator,
    layer: Layer,
    x: Array,
    mask: ArrayLike | None,
    axis_name: tuple[str, ...] | None,
) -> Accumulator:
    """Accumulate the input of one call of a layer."""
    new = Accumulator.from_batch(
        x,
        check_mask(flax_mask(mask), x.shape),
        ascending_axes(layer.axis, x.ndim),
        axis_name,
        index_groups(layer, axis_name),
    )
    check_same_features(new.mean.shape, old.mean.shape)
    # The mean turns complex with the first complex x.
    dtype = accumulation_dtype(old.mean.dtype, new.mean.dtype)
    return old.astype(dtype).merge(new.astype(dtype))


def new_statistics(
    totals: Mapping[str, Accumulator],
    stats: Mapping[str, Mapping[str, Array]],
    variance: Variance,
) -> dict[str, dict[str, Array]]:
    """Return the new statistics of each layer that had an element in some batch."""
    reached = [name for name, total in totals.items() if np.any(total.n > 0)]
    check_has_batch_norm(
        reached, "population needs a batch norm layer that the batches reach; got"
    )
    return {
        name: _new_statistics(name, totals[name], stats[name], variance)
        for name in reached
    }


def _new_statistics(
    name: str, total: Accumulator, stats: Mapping[str, Array], variance: Variance
) -> dict[str, Array]:
    mean, var = finalize(f"layer {name!r}", total, variance)
    new = {"mean": mean, "var": var}
    for key, value in new.items():
        # A feature without an element in any batch keeps its statistics.
        old = np.asarray(stats[key]).astype(np.result_type(value, np.float64))
        new[key] = np.where(total.n > 0, value, old)
    if "count" in stats:
        stacked = np.shape(stats["count"])
        new["count"] = np.asarray(total.num_batches.reshape(*stacked, -1).max(-1))
    return {key: _as_stored(value, stats[key]) for key, value in new.items()}


def _as_stored(value: Array | np.ndarray, old: Array) -> Array:
    """Convert to the dtype and sharding of `old`; a complex mean stays complex."""
    is_complex = np.iscomplexobj(value)
    dtype = accumulation_dtype(old.dtype, jnp.complex64) if is_complex else old.dtype
    sharding = old.sharding if getattr(old, "committed", False) else None
    return jax.device_put(jnp.asarray(value, dtype), sharding)
