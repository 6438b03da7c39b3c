"""The options that select a program, and the checks of each."""

from typing import Literal, NamedTuple, get_args

import jax.numpy as jnp
import numpy as np
from jax.errors import TracerBoolConversionError
from jax.typing import ArrayLike, DTypeLike

from .axes import Axes
from .sync import AxisName, Groups

Autodiff = Literal["custom_vjp", "jax"]


class StaticOptions(NamedTuple):
    """Hold the checked, hashable options of `batch_norm`; a change recompiles it."""

    train: bool
    axis: Axes
    momentum: float | None
    epsilon: float
    unbiased: bool
    axis_name: AxisName | None
    axis_index_groups: Groups | None
    dtype: np.dtype
    autodiff: Autodiff


def check_train(train: bool) -> bool:
    """Return `train` as a Python bool: the two modes are two different programs."""
    if isinstance(train, bool | np.bool_):
        return bool(train)
    raise TypeError(
        f"train must be a Python bool, known while tracing; got {train!r}. "
        "Under jit mark it static: jax.jit(f, static_argnames='train'), "
        "or bind it, and other options, first: functools.partial(f, train=True)."
    )


def check_momentum(momentum: ArrayLike | None) -> float | None:
    """Return `momentum` as a fraction, or None."""
    momentum = None if momentum is None else _check_number("momentum", momentum)
    if momentum is not None and not 0 <= momentum <= 1:
        raise ValueError(
            f"momentum must lie in [0, 1], or be None; got {momentum}. It is the "
            "share that the old statistics keep: 1 minus PyTorch's momentum."
        )
    return momentum


def check_epsilon(epsilon: ArrayLike) -> float:
    """Return `epsilon` as a number that is not negative."""
    epsilon = _check_number("epsilon", epsilon)
    if not epsilon >= 0:
        raise ValueError(
            f"epsilon must not be negative; got {epsilon}. "
            "It is added to the variance: pass a small number such as 1e-5."
        )
    return epsilon


def _check_number(name: str, value: ArrayLike) -> float:
    try:
        return float(value)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError):  # the error for a traced value is a TypeError
        raise TypeError(
            f"{name} must be a Python number, known while tracing; got {value!r}. "
            "Under jit pass it as a static argument."
        ) from None


def check_unbiased(unbiased: bool) -> bool:
    """Return `unbiased` as a Python bool."""
    try:
        return bool(unbiased)
    except TracerBoolConversionError:
        raise TypeError(
            f"unbiased must be a Python bool, known while tracing; got {unbiased!r}. "
            "Bind it before jit: functools.partial(jaxbn.batch_norm, unbiased=False)."
        ) from None


def check_output_dtype(dtype: DTypeLike | None, x_dtype: np.dtype) -> np.dtype:
    """Return the dtype of y: x's unless given, and complex if x is."""
    dtype = x_dtype if dtype is None else jnp.dtype(dtype)
    is_complex = jnp.issubdtype(x_dtype, jnp.complexfloating)
    if not jnp.issubdtype(dtype, jnp.complexfloating if is_complex else jnp.inexact):
        raise TypeError(
            f"dtype must be {'complex' if is_complex else 'floating'} for x of "
            f"{x_dtype}; got {dtype}. Leave it out to get x's own dtype."
        )
    return dtype


def check_autodiff(autodiff: Autodiff) -> Autodiff:
    """Return `autodiff` if it is a known rule."""
    if autodiff not in get_args(Autodiff):
        raise ValueError(
            f"autodiff must be one of {get_args(Autodiff)}; got {autodiff!r}. Use "
            "'jax' for jvp, jacfwd and linearize, 'custom_vjp' for the rest."
        )
    return autodiff
