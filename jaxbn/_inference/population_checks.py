"""What population statistics are refused for, with messages that say what to do."""

import operator
from typing import Any

import jax
import numpy as np

VARIANCES = ("paper", "total")


def check_variance(variance: Any) -> None:
    """`variance` is one of those there are."""
    if variance not in VARIANCES:
        raise ValueError(
            f"variance must be one of {VARIANCES}; got {variance!r}. Use 'paper' for "
            "the mean variance of a batch, 'total' for that of all rows together."
        )


def check_max_batches(max_batches: Any) -> int:
    """`max_batches` as an int of at least 1."""
    try:
        most = operator.index(max_batches)
    except TypeError:
        raise TypeError(
            f"max_batches must be an int, or None for all; got {max_batches!r}."
        ) from None
    if most < 1:
        raise ValueError(
            f"max_batches must be at least 1; got {most}. Leave it out to read all."
        )
    return most


def check_batch(batch: Any) -> Any:
    """`batch` as it came: arrays, and pytrees of arrays, of dtypes that JAX knows."""
    for leaf in jax.tree.leaves(batch):
        try:
            jax.typeof(leaf)
        except TypeError:
            raise TypeError(
                "a batch must hold arrays of dtypes that JAX knows; got "
                f"{type(leaf).__name__} of {getattr(leaf, 'dtype', 'no dtype')}. "
                "Make it a NumPy or JAX array of numbers first, and drop what is none."
            ) from None
    return batch


def check_some_batch(tallies: dict) -> dict:
    """`tallies` as they came: of one batch or more."""
    if not tallies:
        raise ValueError(
            "batches must hold at least one batch; got none. A generator can be read "
            "only once: pass a new one, or a list."
        )
    return tallies


def check_same_features(new: tuple[int, ...], old: tuple[int, ...]) -> None:
    """This batch has the features of those before, or of the layer."""
    if new != old:
        raise ValueError(
            f"every batch must have the same features, here {old}; got a batch with "
            f"{new}. Pass axis= where the features are not last."
        )


def check_rows(count: np.ndarray) -> None:
    """Every channel has a row in some batch."""
    if np.any(count <= 0):
        raise ValueError(
            "every channel must have a row in some batch; got none in "
            f"{np.sum(count <= 0)} of {count.size} channels. Batches without rows, and "
            "masks that leave none, say nothing: leave them out, or add others."
        )


def check_varied(layer: str, lacking: np.ndarray, variance: str) -> None:
    """Every channel that had a row had enough of them for a variance."""
    if np.any(lacking):
        rows = "in one batch" if variance == "paper" else "in all batches together"
        raise ValueError(
            f"variance={variance!r} needs more than one row of a channel {rows}; got "
            f"none such for {np.sum(lacking)} of {lacking.size} channels of {layer}. "
            "Pass larger batches" + (", or 'total'." if variance == "paper" else ".")
        )


def check_finite(layer: str, mean: np.ndarray, squares: np.ndarray) -> None:
    """The statistics are numbers."""
    bad = ~(np.isfinite(mean) & np.isfinite(squares))
    if np.any(bad):
        raise ValueError(
            f"statistics must be finite; got inf or NaN for {np.sum(bad)} of "
            f"{bad.size} channels of {layer}. Look for the first of them in the "
            "batches, in the parameters, and in values too large for the dtype."
        )


def check_layers(layers: Any, model: str) -> None:
    """There is a batch norm layer, or the pass reached one."""
    if not layers:
        raise ValueError(
            f"population needs {model}; got none. Batch norm layers are those of Flax "
            "and of jaxbn, and of classes that inherit from them."
        )
