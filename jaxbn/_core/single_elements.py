"""A hint where each feature has one element, which normalization sets to the bias."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from jax import Array

from .axes import reduction_axes
from .options import StaticOptions

_initializing = ContextVar("initializing", default=False)


@contextmanager
def initialization(active: bool) -> Iterator[None]:
    """Mark the initialization of a model, for which a batch of one is usual."""
    token = _initializing.set(active)
    try:
        yield
    finally:
        _initializing.reset(token)


def warn_single_elements(x: Array, options: StaticOptions, group: int | None) -> None:
    """Warn if each feature has one element: y is then the bias, whatever x is."""
    lengths = [x.shape[a] for a in reduction_axes(options.axis, x.ndim)]
    if group is not None:
        lengths[:1] = [group]
    alone = all(isinstance(length, int) and length == 1 for length in lengths)
    if alone and options.axis_name is None and not _initializing.get():
        _hint(
            "batch_norm with train=True needs more than one element of each feature, "
            f"or y is the bias, whatever x is; got x {x.shape} with axis={options.axis}"
            f" and virtual_batch_size={group}. Pass the whole batch: not under vmap, "
            "or there with axis_name=. For one example pass train=False "
            "(use_running_average=True to a layer)."
        )


def _hint(text: str) -> None:
    """Warn, or log the text where a filter makes warnings errors.

    y is right: what trains with Flax's layers trains with ours, under any filter.
    """
    try:
        warnings.warn(text, UserWarning, _stacklevel_of_user())
    except UserWarning:
        logging.getLogger("jaxbn").warning(text)


_LIBRARIES = ("jaxbn", "flax", "jax", "contextlib")


def _stacklevel_of_user() -> int:
    """Return the caller's stacklevel of the first frame outside of the libraries."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals["__name__"].split(".")[0] in _LIBRARIES:
        level, frame = level + 1, frame.f_back
    return level
