"""The options that select a program, and the checks of each."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple, get_args

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.errors import ConcretizationTypeError
from jax.typing import ArrayLike, DTypeLike

from .axes import Axes
from .checkpoint import name_saved
from .dtypes import as_array, check_width
from .sync import AxisName, Groups

Autodiff = Literal["custom_vjp", "jax"]


class StaticOptions(NamedTuple):
    """Hold the checked, hashable options of `batch_norm`; a change recompiles it."""

    train: bool
    axis: Axes
    unbiased: bool
    axis_name: AxisName | None
    axis_index_groups: Groups | None
    dtype: np.dtype
    autodiff: Autodiff


def check_input(x: ArrayLike) -> Array:
    """Return `x` as a floating or complex array with at least one axis."""
    x = as_array(x)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise TypeError(
            f"x must be floating or complex; got {x.dtype} of shape {x.shape}. "
            "Cast it first, for instance x.astype(jnp.float32)."
        )
    check_width("x", x.dtype)
    if x.ndim == 0:
        raise ValueError(
            f"x must have at least one axis, the features; got shape (), {x.dtype}. "
            "Give a single value the shape (1, 1): one row, one feature."
        )
    return x


def check_train(train: bool) -> bool:
    """Return `train` as a Python bool: the two modes are two different programs."""
    if isinstance(train, bool | np.bool_):
        return bool(train)
    raise TypeError(
        f"train must be a Python bool, known while tracing; got {train!r}. "
        "Under jit mark it static: jax.jit(f, static_argnames='train'), "
        "or bind it, and other options, first: functools.partial(f, train=True)."
    )


def check_momentum(momentum: ArrayLike | None) -> float | Array | None:
    """Return `momentum` as a fraction, as a traced scalar, or None."""
    if momentum is None:
        return None
    momentum = _check_scalar("momentum", momentum)
    if isinstance(momentum, float) and not 0 <= momentum <= 1:
        raise ValueError(
            f"momentum must lie in [0, 1], or be None; got {momentum}. It is the "
            "share that the old statistics keep: 1 minus PyTorch's momentum."
        )
    return momentum


def check_epsilon(epsilon: ArrayLike) -> float | Array:
    """Return `epsilon` as a number that is not negative, if its value is known."""
    epsilon = _check_scalar("epsilon", epsilon)
    if isinstance(epsilon, float) and not epsilon >= 0:
        raise ValueError(
            f"epsilon must not be negative; got {epsilon}. "
            "It is added to the variance: pass a small number such as 1e-5."
        )
    return epsilon


def check_limit(name: str, limit: ArrayLike, minimum: int) -> float | Array:
    """Return `limit` as a number of at least `minimum`.

    An array is raised to it: rounding can leave that of a schedule just below.
    """
    value = _check_scalar(name, limit)
    if isinstance(value, Array):
        return jnp.maximum(value, minimum)
    if isinstance(limit, Array):
        value = float(np.maximum(value, minimum))  # NaN stays NaN
    if not value >= minimum:
        raise ValueError(
            f"{name} must be at least {minimum}; got {value}. "
            "With r_max=1 and d_max=0 batch renorm is batch norm."
        )
    return value


def _check_scalar(name: str, value: ArrayLike) -> float | Array:
    """Return a number as a float, a traced scalar as it is."""
    try:
        return float(value)  # pyright: ignore[reportArgumentType]
    except ConcretizationTypeError:
        if jnp.shape(value) == () and jnp.isrealobj(value):
            return jnp.asarray(value)
    except (TypeError, ValueError):
        pass
    raise TypeError(
        f"{name} must be a Python number or a traced real scalar; got {value!r}. "
        "Of a schedule, pass the value at one step."
    )


def is_known_bool(value: object) -> bool:
    """Decide whether a value is a bool of Python, NumPy or JAX that is not traced."""
    if isinstance(value, bool):
        return True
    if isinstance(value, Tracer) or not isinstance(
        value, np.bool_ | np.ndarray | Array
    ):
        return False
    return value.shape == () and value.dtype == bool


def check_unbiased(unbiased: bool) -> bool:
    """Return `unbiased` as a Python bool."""
    if is_known_bool(unbiased):
        return bool(unbiased)
    raise TypeError(
        f"unbiased must be a Python bool, known while tracing; got {unbiased!r}. "
        "Bind it before jit: functools.partial(jaxbn.batch_norm, unbiased=False)."
    )


def check_output_dtype(dtype: DTypeLike | None, x_dtype: np.dtype) -> np.dtype:
    """Return the dtype of y: x's unless given, and complex if x is."""
    dtype = x_dtype if dtype is None else jnp.dtype(dtype)
    is_complex = jnp.issubdtype(x_dtype, jnp.complexfloating)
    if not jnp.issubdtype(dtype, jnp.complexfloating if is_complex else jnp.inexact):
        raise TypeError(
            f"dtype must be {'complex' if is_complex else 'floating'} for x of "
            f"{x_dtype}; got {dtype}. Leave it out to get x's own dtype."
        )
    check_width("dtype", dtype)
    return dtype


def check_autodiff(autodiff: Autodiff) -> Autodiff:
    """Return `autodiff` if it is a known rule."""
    if autodiff not in get_args(Autodiff):
        raise ValueError(
            f"autodiff must be one of {get_args(Autodiff)}; got {autodiff!r}. Use "
            "'jax' for jvp, jacfwd and linearize, 'custom_vjp' for the rest."
        )
    return autodiff


def uses_closed_form(autodiff: Autodiff, x: Array) -> bool:
    """Decide on the derivative; a complex x takes the plain formula."""
    return autodiff == "custom_vjp" and not jnp.iscomplexobj(x)


def name_input(x: Array, autodiff: Autodiff) -> Array:
    """Mark x for `checkpoint_policy`; plain JAX names no arrays.

    Do it outside of our own `jit`: the name hides that a residual is an input, which
    `jit` returns as it is, and x would be copied.
    """
    return name_saved(x) if uses_closed_form(autodiff, x) else x


@contextmanager
def explain_forward_mode() -> Iterator[None]:
    """Name `autodiff="jax"` where JAX refuses forward mode through a custom_vjp."""
    try:
        yield
    except TypeError as error:
        if "forward-mode" in str(error):
            error.add_note(
                'jaxbn: pass autodiff="jax" for jvp, jacfwd and linearize; its values '
                "are the same, and its backward keeps more."
            )
        raise
