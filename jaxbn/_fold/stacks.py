"""Folding of one layer and its batch norm, or of a whole stack of them at once."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

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
    params, state = _norm_variables(fold, norm)
    layer = jnp.asarray(kernel), None if bias is None else jnp.asarray(bias)
    fold_one = _fold_one(fold, shape_bias)
    if stack is None:
        return fold_one(*layer, params, state)
    bias_stack = fold.stacks.get(Mark("bias", fold.layer)) or stack
    bias_axis = None if bias is None else _bias_axis(bias_stack, jnp.ndim(bias))
    fold_each = jax.vmap(fold_one, (stack, bias_axis, 0, 0), (stack, 0))
    kernel, new_bias = fold_each(*layer, params, state)
    return kernel, jnp.moveaxis(new_bias, 0, _bias_axis(bias_stack, new_bias.ndim))


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
        dtype = kernel.dtype if fold.dtype is None else fold.dtype
        return kernel.astype(dtype), shape_bias(bias).astype(dtype)

    return fold_one


def _norm_variables(
    fold: Fold, norm: Mapping[str, ArrayLike]
) -> tuple[AnyParams, BatchNormState]:
    """Return a batch norm's variables with the stacked axis first."""
    stacked = {
        name: jnp.moveaxis(
            jnp.asarray(value), fold.stacks[Mark(name, fold.norm)] or 0, 0
        )
        for name, value in norm.items()
    }
    mean, var = stacked["mean"], stacked["var"]
    # Not the moved array: under jit or vmap its values are not known.
    check_variance(norm["var"], fold.epsilon)
    stack = fold.stacks[Mark("mean", fold.norm)]
    count = jnp.zeros(mean.shape[: 0 if stack is None else 1])
    params = BatchNormParams(stacked.get("scale"), stacked.get("bias"))
    return params, BatchNormState(mean, var, count)


def _bias_axis(stack: int, ndim: int) -> int:
    """Return the stacked axis of a bias, by its kernel's, which has more axes."""
    return min(stack, ndim - 1)
