"""The learned parameters, the running statistics, and new ones."""

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Generic, Literal, NamedTuple, overload

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Float, Inexact, Real

from .axes import Axes
from .dtypes import accumulation_dtype, check_width, real_dtype

if TYPE_CHECKING:
    from typing_extensions import TypeVar

    ScaleT = TypeVar("ScaleT", bound=Array | None, default=Array, covariant=True)
    BiasT = TypeVar("BiasT", bound=Array | None, default=Array, covariant=True)

    class BatchNormParams(NamedTuple, Generic[ScaleT, BiasT]):
        """Hold the learned affine map after normalization: y = x̂ · scale + bias."""

        scale: ScaleT
        bias: BiasT

    AnyParams = BatchNormParams[Array | None, Array | None]

else:  # beartype knows no generic NamedTuple

    class BatchNormParams(NamedTuple):
        """Hold the learned affine map after normalization: y = x̂ · scale + bias.

        Both have the features' shape. `None` is no scale (1) or no bias (0). They are γ
        and β of Ioffe & Szegedy,
        [arXiv:1502.03167](https://arxiv.org/abs/1502.03167), Algorithm 1.

        To a type checker `BatchNormParams` has two arrays, and so is one of optax's
        trees; `BatchNormParams[Array, None]` has no bias.
        """

        scale: Inexact[Array, "*features"] | None
        bias: Inexact[Array, "*features"] | None

    AnyParams = BatchNormParams


class BatchNormState(NamedTuple):
    """Hold the running statistics, an immutable pytree: passed in, returned updated.

    `mean` and `var` have the features' shape; `count` is a scalar, the number of
    batches that updated them (PyTorch's `num_batches_tracked`; Flax has none). `init`
    makes it float32, so that averages of states over devices or steps keep all dtypes;
    an integer `count` stays one.
    """

    mean: Inexact[Array, "*features"]
    var: Float[Array, "*features"]
    count: Real[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]


@overload
def init(
    num_features: int | Sequence[int],
    *,
    param_dtype: DTypeLike = jnp.float32,
    use_scale: Literal[True] = True,
    use_bias: Literal[True] = True,
) -> tuple[BatchNormParams, BatchNormState]: ...
@overload
def init(
    num_features: int | Sequence[int],
    *,
    param_dtype: DTypeLike = jnp.float32,
    use_scale: bool = True,
    use_bias: bool = True,
) -> tuple[AnyParams, BatchNormState]: ...
def init(
    num_features: int | Sequence[int],
    *,
    param_dtype: DTypeLike = jnp.float32,
    use_scale: bool = True,
    use_bias: bool = True,
) -> tuple[AnyParams, BatchNormState]:
    """Create the parameters and running statistics of a new layer.

    scale = 1, bias = 0, mean = 0, var = 1, count = 0, as in Flax and PyTorch.

    **Arguments**

    - `num_features`: the length of the feature axis; a tuple, in the order of `axis`,
      if `batch_norm` is given a tuple of axes.
    - `param_dtype`: the dtype of scale and bias, floating or complex. The statistics
      have at least float32: float64 for float64 parameters, and a complex mean with a
      real variance for complex ones.
    - `use_scale`, `use_bias`: `False` makes the parameter `None`.

    **Returns** `(params, state)`.

    **Raises** `ValueError` for a feature count below 1, `TypeError` for an integer
    `param_dtype` or a feature count that is not an integer.

    >>> import jaxbn
    >>> params, state = jaxbn.init(3, use_bias=False)
    >>> params.scale, params.bias
    (Array([1., 1., 1.], dtype=float32), None)
    >>> state.mean, state.var, state.count
    (Array([0., 0., 0.], dtype=float32),
     Array([1., 1., 1.], dtype=float32),
     Array(0., dtype=float32))
    """
    shape = check_num_features(num_features)
    dtype = _check_param_dtype(param_dtype)
    params = BatchNormParams(
        scale=jnp.ones(shape, dtype) if use_scale else None,
        bias=jnp.zeros(shape, dtype) if use_bias else None,
    )
    mean = jnp.zeros(shape, accumulation_dtype(dtype))
    var = jnp.ones(shape, real_dtype(mean.dtype))
    return params, BatchNormState(mean, var, jnp.zeros((), jnp.float32))


def check_num_features(num_features: int | Sequence[int]) -> tuple[int, ...]:
    """Return `num_features` as a shape of positive ints."""
    sizes = num_features if isinstance(num_features, Sequence) else (num_features,)
    try:
        shape = tuple(operator.index(size) for size in sizes)
    except TypeError:
        raise TypeError(
            "num_features must be an int, or a tuple of ints where axis is a tuple; "
            f"got {num_features!r}. Pass the length of the feature axis, x.shape[axis]."
        ) from None
    if not shape or min(shape) < 1:
        raise ValueError(
            f"num_features must be at least 1; got {num_features!r}. "
            "It is the length of the feature axis, x.shape[axis]."
        )
    return shape


def _check_param_dtype(param_dtype: DTypeLike) -> np.dtype:
    """Return `param_dtype` as a floating or complex dtype."""
    dtype = jnp.dtype(param_dtype)
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(
            f"param_dtype must be a floating or complex dtype; got {dtype}. "
            "Scale and bias are learned by gradient: pass e.g. jnp.float32."
        )
    check_width("param_dtype", dtype)
    return dtype


def check_kinds(params: object, state: object) -> None:
    """Check that `params` and `state` are jaxbn's tuples, in this order."""
    order = (
        "The order is batch_norm(params, state, x, train). "
        "jaxbn.init(num_features) returns params and state"
    )
    check_kind("params", params, BatchNormParams, order)
    check_kind("state", state, BatchNormState, order)


def check_kind(name: str, value: object, kind: type, advice: str) -> None:
    """Check that `value` is a tuple of the class `kind`."""
    if not isinstance(value, kind):
        raise TypeError(
            f"{name} must be a {kind.__name__}; got {_describe(value)}. {advice}; "
            f"for a restored dict pass jaxbn.{kind.__name__}(**restored)."
        )


def _describe(value: object) -> str:
    shape = getattr(value, "shape", None)
    kind = type(value).__name__
    return kind if shape is None else f"{kind} of shape {shape}"


def check_variables(
    params: AnyParams, state: BatchNormState, x: Array, axes: Axes
) -> tuple[AnyParams, BatchNormState]:
    """Return `params` and `state` as arrays that fit the feature axes of `x`."""
    mean = check_features("state.mean", state.mean, x, axes)
    var = check_features("state.var", state.var, x, axes)
    if jnp.iscomplexobj(x):
        mean = mean.astype(accumulation_dtype(x.dtype, mean.dtype))
    count = jnp.asarray(state.count)
    return check_params(params, x, axes), BatchNormState(mean, var, count)


def check_params(params: AnyParams, x: Array, axes: Axes) -> AnyParams:
    """Return `params` as arrays that fit the feature axes of `x`."""
    scale, bias = (
        None if value is None else check_features(f"params.{name}", value, x, axes)
        for name, value in params._asdict().items()
    )
    return BatchNormParams(scale, bias)


def check_features(name: str, value: ArrayLike, x: Array, axes: Axes) -> Array:
    shape = tuple(x.shape[a] for a in axes)
    value = jnp.asarray(value)
    if value.shape != shape:
        size = shape[0] if len(shape) == 1 else shape
        raise ValueError(
            f"{name} must have the shape of x's feature axes, {shape} for x {x.shape} "
            f"with axis={axes}; got {value.shape}. {_suggest_axis(value.shape, x)}"
            f"Build it with jaxbn.init({size}), a layer with num_features={size}, or "
            "pass axis= where the features are elsewhere."
        )
    kind = jnp.inexact if jnp.iscomplexobj(x) else jnp.floating
    if not jnp.issubdtype(value.dtype, kind):
        raise TypeError(
            f"{name} must be floating, or complex where x is; got {value.dtype} for x "
            f"of {x.dtype}. Cast it first, for instance with .astype(jnp.float32)."
        )
    check_width(name, value.dtype)
    return value


def _suggest_axis(features: tuple[int, ...], x: Array) -> str:
    """Name the axis of x that has the features, if there is one behind the batch."""
    sizes = enumerate(x.shape[1:], start=1)
    axes = [axis for axis, size in sizes if (size,) == features]
    if not axes:
        return ""
    return f"x has {features[0]} along axis {axes[0]}: pass axis={axes[0]}. "
