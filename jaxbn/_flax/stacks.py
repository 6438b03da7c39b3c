"""Folding of one layer and its batch norm, or of a whole stack of them at once."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from .._core.axes import Axes
from .._core.variables import AnyParams, BatchNormParams, BatchNormState
from .._inference.affine import check_variance
from .._inference.folding import fold as fold_layer
from .marks import Mark
from .pairs import Fold

FoldLayer = Callable[
    [Array, Array | None, AnyParams, BatchNormState], tuple[Array, Array]
]


def fold_stacks(
    fold: Fold,
    kernel: ArrayLike,
    bias: ArrayLike | None,
    norm: Mapping[str, ArrayLike],
    shape_bias: Callable[[Array], Array] = lambda bias: bias,
) -> tuple[Array, Array]:
    """Return the kernel and bias of the layers that include their batch norms.

    `shape_bias` brings the bias of one layer to the shape that it must have.
    """
    stack = fold.stacks[Mark("kernel", fold.layer)]
    known = fold.stacks.get(Mark("bias", fold.layer))
    fold_each = _fold_one(fold, shape_bias)
    for _ in stack:
        fold_each = jax.vmap(fold_each)
    kernel = _to_front(jnp.asarray(kernel), stack)
    if bias is not None:
        bias = jnp.asarray(bias)
        bias = _to_front(bias, known or _bias_stack(stack, bias.ndim))
    kernel, new_bias = fold_each(kernel, bias, *_norm_variables(fold, norm))
    back = known or _bias_stack(stack, new_bias.ndim)
    return _from_front(kernel, stack), _from_front(new_bias, back)


def _fold_one(fold: Fold, shape_bias: Callable[[Array], Array]) -> FoldLayer:
    def fold_one(
        kernel: Array, bias: Array | None, params: AnyParams, state: BatchNormState
    ) -> tuple[Array, Array]:
        kernel, bias = fold_layer(
            kernel,
            bias,
            params,
            state,
            epsilon=fold.epsilon,
            axis=fold.axis,
            input_axis=fold.input_axis,
        )
        return kernel, shape_bias(bias)

    return fold_one


def _norm_variables(
    fold: Fold, norm: Mapping[str, ArrayLike]
) -> tuple[AnyParams, BatchNormState]:
    """Return a batch norm's variables with the stacked axes first."""
    stacked = {
        name: _to_front(jnp.asarray(value), fold.stacks[Mark(name, fold.norm)])
        for name, value in norm.items()
    }
    mean, var = stacked["mean"], stacked["var"]
    # Not the moved array: under jit or vmap its values are not known.
    check_variance(norm["var"], fold.epsilon)
    count = jnp.zeros(mean.shape[: len(fold.stacks[Mark("mean", fold.norm)])])
    params = BatchNormParams(stacked.get("scale"), stacked.get("bias"))
    return params, BatchNormState(mean, var, count)


def _bias_stack(stack: Axes, ndim: int) -> Axes:
    """Return the stacked axes of a new bias, by the stacked axes of its kernel."""
    axes: dict[int, int] = {}
    # From the last: axes that count from the end are among the fewer axes of a bias.
    for a in sorted(stack, reverse=True):
        axes[a] = min(a, ndim - 1 - len(axes))
    return tuple(axes[a] for a in stack)


def _to_front(array: Array, stack: Axes) -> Array:
    return jnp.moveaxis(array, stack, range(len(stack)))


def _from_front(array: Array, stack: Axes) -> Array:
    return jnp.moveaxis(array, range(len(stack)), stack)
