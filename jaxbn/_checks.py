"""Every complaint jaxbn makes, at trace time: the rule, what came, what to do.

`TypeError` for dtypes and kinds of value, `ValueError` for shapes and options.
"""

import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ._dtypes import widen
from ._variables import BatchNormParams, BatchNormState

AUTODIFF = ("custom_vjp", "jax")
VARIANCES = ("paper", "total")


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
        mean = mean.astype(widen(x.dtype, mean.dtype))
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
