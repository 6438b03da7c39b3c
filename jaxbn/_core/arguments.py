"""The checks of the arguments that batch norm and its variants share."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from jax import Array
from jax.typing import ArrayLike, DTypeLike

from .axes import check_axis
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
