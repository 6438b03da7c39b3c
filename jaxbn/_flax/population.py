"""Population statistics of the layers of a model."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import PyTree

from .._core.dtypes import accumulation_dtype
from .._core.options import check_input
from .._core.weights import check_mask
from .._inference.accumulator import Accumulator, AnyArray
from .._inference.batches import check_same_features
from .._inference.population import Variance, cast_finite, finalize
from .layer import (
    AxisNames,
    Layer,
    ascending_axes,
    flax_mask,
    index_groups,
    mapped_names,
)
from .paths import check_has_batch_norm

# The name of a layer's accumulator, beside its `mean` and `var`.
ACCUMULATOR = "accumulator"

Variables = TypeVar("Variables")
Measured = TypeVar("Measured")


def select_layers(
    paths: Collection[str], layers: Callable[[str], object] | None
) -> tuple[str, ...]:
    """Return the paths of the layers to measure: all of them without a predicate."""
    if layers is None:
        return tuple(paths)
    if not callable(layers):
        raise TypeError(
            f"layers must be a function of a layer's path; got {layers!r}. Write "
            f"layers=lambda path: path in (...). {_list_paths(paths)}"
        )
    selected = tuple(path for path in paths if layers(path))
    if not selected:
        raise ValueError(
            "layers must select at least one batch norm layer; got a function that "
            f"selects none. {_list_paths(paths)}"
        )
    return selected


def _list_paths(paths: Collection[str]) -> str:
    return f"There are: {', '.join(map(repr, paths))}."


def add_call_note(as_it_is: bool) -> AbstractContextManager[None]:
    """Add a note about `call=` to errors of a model that is called on the batch."""
    return add_note(
        Exception if as_it_is else (),
        "population called the model as model(batch). If it takes other arguments, or "
        "a part of the batch, pass for instance "
        "call=lambda model, batch: model(batch['image'], train=False).",
    )


@contextmanager
def add_note(
    kinds: type[Exception] | tuple[type[Exception], ...], note: str
) -> Iterator[None]:
    """Add a note to errors of these kinds."""
    try:
        yield
    except kinds as error:
        error.add_note(note)
        raise


def measure_stacks(
    measure: Callable[[Variables], Measured], variables: Variables
) -> Measured:
    """Measure the model, or each model of a stack that `jax.vmap` initialized.

    The shapes alone do not tell a stack of models from a model of stacked layers, so
    that the stack is tried where the call of one model fails.
    """
    try:
        return measure(variables)
    except Exception:
        if not _is_stack(variables):
            raise
        try:
            return jax.vmap(measure)(variables)
        except Exception:  # the first error is about the model as it is
            pass
        raise


def _is_stack(variables: PyTree) -> bool:
    """Return whether all arrays have a first axis of one size."""
    sizes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(variables)}
    return len(sizes) == 1 and () not in sizes


@contextmanager
def only_mapped_axes(layer: object, axis_name: AxisNames | None) -> Iterator[None]:
    """Drop the axis names of the training step from a layer, during one call of it."""
    # Flax's own `__setattr__` refuses this while a linen layer is bound.
    object.__setattr__(layer, "axis_name", mapped_names(axis_name))
    try:
        yield
    finally:
        object.__setattr__(layer, "axis_name", axis_name)


def accumulate_call(
    old: Accumulator,
    layer: Layer,
    x: Array,
    mask: ArrayLike | None,
    axis_name: tuple[str, ...] | None,
) -> Accumulator:
    """Accumulate the input of one call of a layer."""
    x = check_input(x)
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
    layer = f"layer {name!r}"
    mean, var = finalize(layer, total, variance)
    new = {"mean": mean, "var": var}
    for key, value in new.items():
        stored = cast_finite(layer, value, _stored_dtype(value, stats[key]))
        # A feature without an element in any batch keeps its statistics.
        new[key] = np.where(total.n > 0, stored, np.asarray(stats[key]))
    if "count" in stats:
        stacked = np.shape(stats["count"])
        # A mask can leave features out of a batch: the layer counts the most of any.
        new["count"] = np.asarray(total.num_batches.reshape(*stacked, -1).max(-1))
    return {key: _store_like(value, stats[key]) for key, value in new.items()}


def _stored_dtype(value: AnyArray, old: Array) -> np.dtype:
    """Return the dtype of `old`; that of a complex mean is complex."""
    is_complex = np.iscomplexobj(value)
    return accumulation_dtype(old.dtype, jnp.complex64) if is_complex else old.dtype


def _store_like(value: AnyArray, old: Array) -> Array:
    """Convert to a JAX array with the dtype and sharding of `old`."""
    sharding = old.sharding if getattr(old, "committed", False) else None
    value = jnp.asarray(value, _stored_dtype(value, old))
    return jax.device_put(value, sharding)
