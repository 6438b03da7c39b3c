"""The checks of the arguments that batch norm and its variants share."""

import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

from jax import Array
from jax.typing import ArrayLike, DTypeLike

from .axes import check_axis, reduction_axes
from .options import (
    Autodiff,
    StaticOptions,
    check_autodiff,
    check_epsilon,
    check_input,
    check_momentum,
    check_output_dtype,
    check_train,
    check_unbiased,
    explain_forward_mode,
    name_input,
)
from .running import to_batch_weight
from .sync import check_axis_name, check_groups, explain_collectives
from .variables import AnyParams, BatchNormState, check_kinds, check_variables
from .weights import check_mask


class Arguments(NamedTuple):
    """Hold the checked arguments that are arrays; `StaticOptions` hold the others."""

    params: AnyParams
    state: BatchNormState
    x: Array
    mask: Array | None
    batch_weight: ArrayLike | None
    epsilon: ArrayLike


def check_arguments(
    params: AnyParams,
    state: BatchNormState,
    x: ArrayLike,
    train: bool,
    *,
    axis: int | Sequence[int],
    momentum: ArrayLike | None,
    epsilon: ArrayLike,
    unbiased: bool,
    mask: ArrayLike | None,
    axis_name: str | Sequence[str] | None,
    axis_index_groups: Sequence[Sequence[int]] | None,
    dtype: DTypeLike | None,
    autodiff: Autodiff,
) -> tuple[Arguments, StaticOptions]:
    """Check each argument of `batch_norm`, beside the code that uses it."""
    check_kinds(params, state)
    x = check_input(x)
    options = StaticOptions(
        train=check_train(train),
        axis=check_axis(axis, x.ndim),
        unbiased=check_unbiased(unbiased),
        axis_name=check_axis_name(axis_name),
        axis_index_groups=check_groups(axis_index_groups, axis_name),
        dtype=check_output_dtype(dtype, x.dtype),
        autodiff=check_autodiff(autodiff),
    )
    arguments = Arguments(
        *check_variables(params, state, x, options.axis),
        name_input(x, options.autodiff),
        check_mask(mask, x.shape),
        to_batch_weight(check_momentum(momentum)),
        check_epsilon(epsilon),
    )
    return arguments, options


@contextmanager
def explain_transformations(options: StaticOptions) -> Iterator[None]:
    """Say which option helps where JAX refuses a transformation or a collective."""
    collectives = explain_collectives(options.axis_name, options.axis_index_groups)
    with collectives, explain_forward_mode():
        yield


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


LIBRARIES = ("jaxbn", "flax", "jax", "contextlib")


def _stacklevel_of_user() -> int:
    """Return the caller's stacklevel of the first frame outside of the libraries."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals["__name__"].split(".")[0] in LIBRARIES:
        level, frame = level + 1, frame.f_back
    return level
