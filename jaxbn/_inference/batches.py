"""A pass over a stream of batches: their accumulators, merged on the host.

The device computes the moments of one batch; the host merges them in float64: a few
vectors of the features' shape, however long the stream.
"""

import itertools
import operator
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import PyTree

from .accumulator import Accumulator

Batch = TypeVar("Batch")


@runtime_checkable
class SupportsArray(Protocol):
    """A tensor of another library that NumPy can read."""

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        """Convert to NumPy."""
        ...


@runtime_checkable
class SupportsDLPack(Protocol):
    """A tensor of another library that JAX can read."""

    def __dlpack__(self, *args: Any, **kwargs: Any) -> object:
        """Export the memory."""
        ...


Tensor = ArrayLike | SupportsArray | SupportsDLPack


def accumulate(
    measure: Callable[[int, Batch], Mapping[str, Accumulator]],
    batches: Iterable[Batch],
    max_batches: int | None,
    progress: Callable[[Iterable[Batch]], Iterable[Batch]] | None,
    skip_nonfinite: bool,
) -> dict[str, Accumulator]:
    """Merge the accumulators of all batches by layer name, in float64 on the host.

    `measure` is a function of a batch's number, from 0, and of the batch.
    """
    _check_is_iterable_of_batches(batches)
    if max_batches is not None:
        batches = _First(batches, _check_max_batches(max_batches))
    total: dict[str, Accumulator] = {}
    skipped: list[int] = []
    for number, batch in enumerate(batches if progress is None else progress(batches)):
        with _add_batch_note(number):
            new = _to_host(measure(number, _as_arrays(batch)))
            if skip_nonfinite and _nonfinite_layers(new):
                skipped.append(number)
                continue
            _check_batch_is_finite(number, new)
            total = _merge(total, new)
    _check_any_batch(total, skipped)
    _warn_skipped(skipped)
    return total


def _as_arrays(batch: Batch) -> Batch:
    """Return `batch` with the tensors of other libraries as arrays."""
    return jax.tree.map(_as_array, batch)


def _as_array(leaf: PyTree) -> PyTree:
    """Return a leaf that JAX knows as it is, another by `__array__` or DLPack."""
    if _is_known(leaf):
        return leaf
    for convert in (np.asarray, jnp.from_dlpack):  # no bfloat16 in torch's __array__
        try:
            array = convert(leaf)
        except Exception:  # of the other library
            continue
        if _is_known(array):
            return array
    raise TypeError(
        "a batch must hold arrays of dtypes that JAX knows; got "
        f"{type(leaf).__name__} of {getattr(leaf, 'dtype', 'no dtype')}. "
        "Make it a NumPy or JAX array of numbers first, and drop other leaves."
    )


def _is_known(leaf: PyTree) -> bool:
    """Return whether JAX computes with `leaf`."""
    try:
        jax.typeof(leaf)
    except TypeError:
        return False
    return True


def _to_host(measured: Mapping[str, Accumulator]) -> dict[str, Accumulator]:
    """Return accumulators as NumPy arrays of float64, or of complex128."""
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(measured)):
        raise TypeError(
            "population must be called outside of jit and other transformations, "
            "since it merges on the host; got a traced batch or model. Call it as it "
            "is: it compiles what it computes of a batch."
        )
    return {
        name: new.astype(np.result_type(new.mean, np.float64))
        for name, new in jax.device_get(dict(measured)).items()
    }


def _merge(
    total: Mapping[str, Accumulator], new: Mapping[str, Accumulator]
) -> dict[str, Accumulator]:
    """Merge the accumulators of one more batch, by layer name."""
    if not total:
        return dict(new)
    for name in total:
        check_same_features(new[name].mean.shape, total[name].mean.shape)
    return {name: total[name].merge(new[name]) for name in total}


def _nonfinite_layers(new: Mapping[str, Accumulator]) -> list[str]:
    """Return the layers in which a batch has inf or NaN, with numbers of features."""
    bad = {name: ~np.all(np.isfinite([*parts]), 0) for name, parts in new.items()}
    return [
        f"{name!r} ({np.sum(features)} of {features.size} features)"
        for name, features in bad.items()
        if np.any(features)
    ]


class _First(Generic[Batch]):
    """Limit an iterable to its first items, with a length for progress bars."""

    def __init__(self, iterable: Iterable[Batch], most: int):
        self.iterable, self.most = iterable, most

    def __iter__(self) -> Iterator[Batch]:
        return itertools.islice(self.iterable, self.most)

    def __len__(self) -> int:
        return min(operator.length_hint(self.iterable, self.most), self.most)


@contextmanager
def _add_batch_note(number: int) -> Iterator[None]:
    """Add the batch's number to any error: a stream has thousands."""
    try:
        yield
    except Exception as error:
        error.add_note(f"In batch {number} of population; the first is batch 0.")
        raise


def _warn_skipped(skipped: Sequence[int]) -> None:
    """Warn with the numbers of the batches that are left out."""
    if skipped:
        numbers = ", ".join(map(str, skipped))
        warnings.warn(
            "population left out batches with inf or NaN in their statistics, by "
            f"number from 0: {numbers}. Masks would leave out single elements.",
            stacklevel=4,
        )


def check_same_features(new: tuple[int, ...], old: tuple[int, ...]) -> None:
    """Check that a batch has the features of the batches before it, or of the layer."""
    if new != old:
        raise ValueError(
            f"every batch must have the same features, here {old}; got a batch with "
            f"{new}. Pass axis= where the features are not last."
        )


def _check_max_batches(max_batches: int) -> int:
    """Return `max_batches` as an int of at least 1."""
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


def _check_is_iterable_of_batches(batches: object) -> None:
    """Check that `batches` is not itself a batch: an array, or a tree of arrays."""
    is_array = isinstance(batches, SupportsArray | SupportsDLPack)
    is_tree = isinstance(batches, Mapping) or hasattr(batches, "_fields")
    if is_array or is_tree or not isinstance(batches, Iterable):
        shape = f" of shape {tuple(getattr(batches, 'shape', ()))}" if is_array else ""
        raise TypeError(
            "batches must be an iterable of batches; got "
            f"{type(batches).__name__}{shape}, which is one batch. Write [images] "
            "for one batch of images, or list(batches) if each item of the first axis "
            "is a batch."
        )


def _check_any_batch(total: Mapping[str, Accumulator], skipped: Sequence[int]) -> None:
    """Check that there was at least one batch that was not skipped."""
    if not total and skipped:
        raise ValueError(
            f"batches must hold at least one finite batch; got inf or NaN in each of "
            f"{len(skipped)}. Leave out skip_nonfinite to see in which layer."
        )
    if not total:
        raise ValueError(
            "batches must hold at least one batch; got none. A generator can be read "
            "only once: pass a new one, or a list."
        )


def _check_batch_is_finite(number: int, new: Mapping[str, Accumulator]) -> None:
    """Check that the statistics of a batch are numbers in every layer."""
    layers = _nonfinite_layers(new)
    if layers:
        raise ValueError(
            f"statistics must be finite; got inf or NaN in batch {number}, for "
            f"{', '.join(layers)}. Look at the batch, at the parameters, and for "
            "values too large for the dtype; or leave such batches out with "
            "skip_nonfinite=True."
        )
