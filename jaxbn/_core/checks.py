"""Every complaint jaxbn makes, at trace time: the rule, what came, what to do.

`TypeError` for dtypes and kinds of value, `ValueError` for shapes and options.
"""

import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from .dtypes import accumulation_dtype
from .variables import BatchNormParams, BatchNormState

AUTODIFF = ("custom_vjp", "jax")


def check_num_features(num_features: Any) -> tuple[int, ...]:
    """`num_features` as a shape of positive ints."""
    sizes = num_features if isinstance(num_features, Sequence) else (num_features,)
    try:
        shape = tuple(operator.index(size) for size in sizes)
    except TypeError:
        raise TypeError(
            "num_features must be an int, or a tuple of ints where axis is a tuple; "
            f"got {num_features!r}."
        ) from None
    if not shape or min(shape) < 1:
        raise ValueError(
            f"num_features must be at least 1; got {num_features!r}. "
            "It is the length of the feature axis, x.shape[axis]."
        )
    return shape


def check_param_dtype(param_dtype: Any) -> np.dtype:
    """`param_dtype` as a floating or complex dtype."""
    dtype = jnp.dtype(param_dtype)
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(
            f"param_dtype must be a floating or complex dtype; got {dtype}. "
            "Scale and bias are learned by gradient: pass e.g. jnp.float32."
        )
    return dtype


def check_train(train: Any) -> bool:
    """`train` as a Python bool: the two modes are two different programs."""
    if isinstance(train, bool | np.bool_):
        return bool(train)
    raise TypeError(
        f"train must be a Python bool, known while tracing; got {train!r}. "
        "Under jit mark it static: jax.jit(f, static_argnames='train'), "
        "or bind it first with functools.partial(f, train=True)."
    )


def check_input(x: Any) -> Array:
    """`x` as a floating or complex array with at least one axis."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise TypeError(
            f"x must be floating or complex; got {x.dtype} of shape {x.shape}. "
            "Cast it first, for instance x.astype(jnp.float32)."
        )
    if x.ndim == 0:
        raise ValueError(
            f"x must have at least one axis, the features; got shape (), {x.dtype}. "
            "Give a single value the shape (1, 1): one row, one feature."
        )
    return x


def check_axis(axis: Any, ndim: int, of: str = "x") -> tuple[int, ...]:
    """The feature axes, non-negative, in the order they were given."""
    try:
        given = tuple(map(operator.index, np.atleast_1d(axis)))
    except TypeError:
        raise TypeError(
            f"axis must be an int or a sequence of ints; got {axis!r}. It names the "
            f"feature axes of {of}: -1 for NHWC, 1 for NCHW."
        ) from None
    if not given or any(not -ndim <= a < ndim for a in given):
        raise ValueError(
            f"axis must name feature axes of {of}, from {-ndim} to {ndim - 1}; "
            f"got axis={axis} for {of} of {ndim} dimensions."
        )
    axes = tuple(a % ndim for a in given)
    if len(set(axes)) < len(axes):
        raise ValueError(
            f"axis must name each feature axis once; got axis={axis}, which is "
            f"{axes} for {of} of {ndim} dimensions. Drop the repeated one."
        )
    return axes


def check_variables(
    params: BatchNormParams, state: BatchNormState, x: Array, axes: tuple[int, ...]
) -> tuple[BatchNormParams, BatchNormState]:
    """`params` and `state` as arrays that fit the feature axes of `x`."""
    scale, bias = (
        None if value is None else _check_features(f"params.{name}", value, x, axes)
        for name, value in params._asdict().items()
    )
    mean = _check_features("state.mean", state.mean, x, axes)
    var = _check_features("state.var", state.var, x, axes)
    if jnp.iscomplexobj(x):
        mean = mean.astype(accumulation_dtype(x.dtype, mean.dtype))
    return (
        BatchNormParams(scale, bias),
        BatchNormState(mean, var, jnp.asarray(state.count)),
    )


def _check_features(name: str, value: Any, x: Array, axes: tuple[int, ...]) -> Array:
    shape = tuple(x.shape[a] for a in axes)
    value = jnp.asarray(value)
    if value.shape != shape:
        raise ValueError(
            f"{name} must have the shape of x's feature axes, {shape} for x {x.shape} "
            f"with axis={axes}; got {value.shape}. Build it with jaxbn.init("
            f"{shape[0] if len(shape) == 1 else shape}), or pass axis= where the "
            "features are elsewhere."
        )
    kind = jnp.inexact if jnp.iscomplexobj(x) else jnp.floating
    if not jnp.issubdtype(value.dtype, kind):
        raise TypeError(
            f"{name} must be floating, or complex where x is; got {value.dtype} for x "
            f"of {x.dtype}. Cast it first, for instance with .astype(jnp.float32)."
        )
    return value


def check_mask(mask: Any, shape: tuple[int, ...]) -> Array:
    """`mask` as a real array that broadcasts to x of `shape`, with its rank."""
    mask = jnp.asarray(mask)
    if jnp.issubdtype(mask.dtype, jnp.complexfloating):
        raise TypeError(
            f"mask must be bool, integer or floating; got {mask.dtype}. "
            "Its values are weights: pass the real part."
        )
    padded = (1,) * (len(shape) - mask.ndim) + mask.shape
    fits = len(padded) == len(shape) and all(
        m in (1, n) for m, n in zip(padded, shape, strict=True)
    )
    if not fits:
        raise ValueError(
            f"mask must broadcast to x; got mask {mask.shape} for x {shape}. "
            "Give it x's rank with length 1 where it does not vary, for instance "
            f"mask.reshape({(shape[0],) + (1,) * (len(shape) - 1)}) for a mask of rows."
        )
    return mask.reshape(padded)


def check_numbers(momentum: Any, epsilon: Any) -> tuple[float | None, float]:
    """Momentum as a fraction or None, epsilon as a number that is not negative."""
    momentum = None if momentum is None else _check_number("momentum", momentum)
    epsilon = _check_number("epsilon", epsilon)
    if momentum is not None and not 0 <= momentum <= 1:
        raise ValueError(
            f"momentum must lie in [0, 1], or be None; got {momentum}. It is the "
            "share that the old statistics keep: 1 minus PyTorch's momentum."
        )
    if not epsilon >= 0:
        raise ValueError(
            f"epsilon must not be negative; got {epsilon}. "
            "It is added to the variance: pass a small number such as 1e-5."
        )
    return momentum, epsilon


def _check_number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):  # a traced value's complaint is a TypeError
        raise TypeError(
            f"{name} must be a Python number, known while tracing; got {value!r}. "
            "Under jit pass it as a static argument."
        ) from None


def check_autodiff(autodiff: Any) -> str:
    """`autodiff` as one of those there are."""
    if autodiff not in AUTODIFF:
        raise ValueError(
            f"autodiff must be one of {AUTODIFF}; got {autodiff!r}. Use "
            "'jax' for jvp, jacfwd and linearize, 'custom_vjp' for the rest."
        )
    return autodiff


def check_groups(groups: Any, axis_name: Any) -> Any:
    """`groups` as they came: groups of an axis need the axis."""
    if groups is not None and axis_name is None:
        raise ValueError(
            f"axis_index_groups needs an axis_name; got groups {groups} without one. "
            "Pass the name of the mapped axis that the groups divide."
        )
    return groups


def check_partition(groups: Any, size: int) -> None:
    """`groups` hold each index of an axis of `size` once."""
    try:
        indices = sorted(index for group in groups for index in group)
    except TypeError:
        indices = None
    if indices != list(range(size)) or not all(groups):
        raise ValueError(
            "axis_index_groups must be lists of axis indices that hold each index of "
            f"the axis once, here 0 to {size - 1}; got {groups}. For two groups of "
            "neighbours on 4 devices pass [[0, 1], [2, 3]]."
        )


def check_output_dtype(dtype: Any, x_dtype: np.dtype) -> np.dtype:
    """The dtype of y: x's own unless asked, and never one that drops information."""
    dtype = x_dtype if dtype is None else jnp.dtype(dtype)
    is_complex = jnp.issubdtype(x_dtype, jnp.complexfloating)
    if not jnp.issubdtype(dtype, jnp.complexfloating if is_complex else jnp.inexact):
        raise TypeError(
            f"dtype must be {'complex' if is_complex else 'floating'} for x of "
            f"{x_dtype}; got {dtype}. Leave it out to get x's own dtype."
        )
    return dtype


def check_running_average(use_running_average: bool | None) -> bool:
    """The layer's own choice, where the call made none."""
    if use_running_average is None:
        raise ValueError(
            "use_running_average must be given to the layer or to its call; got None "
            "at both. Pass it to one of them, or call model.train() or model.eval()."
        )
    return use_running_average


def check_counted(momentum: float | None, counted: bool) -> None:
    """A layer that averages with equal weights counts its batches."""
    if momentum is None and not counted:
        raise ValueError(
            "momentum=None needs the layer's count of batches; got a layer without "
            "one. Build it with momentum=None, rather than change it afterwards."
        )


def check_restorable(momentum: float | None, unbiased: bool, counted: bool) -> None:
    """A layer's options and variables are among Flax's."""
    if momentum is None or unbiased or counted:
        raise ValueError(
            "a layer can become flax.nnx.BatchNorm only with a momentum, no count of "
            f"batches and no unbiased; got momentum={momentum}, count={counted}, "
            f"unbiased={unbiased}. Keep jaxbn.nnx.BatchNorm for this model."
        )


@contextmanager
def explain_refused_groups(groups: Any) -> Iterator[None]:
    """Say what to do where JAX cannot sum over `groups`."""
    try:
        yield
    except NotImplementedError as error:
        if groups is None:
            raise
        raise ValueError(
            f"axis_index_groups={groups} is refused by JAX here: it works under pmap, "
            "and under shard_map with check_vma=False. Elsewhere split the mapped axis "
            "in two and pass axis_name the name of the inner one."
        ) from error
