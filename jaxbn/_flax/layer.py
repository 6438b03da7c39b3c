"""From a layer's call, by Flax's conventions, to `batch_norm`.

The layers keep their variables and metadata as Flax does, and call here.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from .._core.axes import Axes, check_axis
from .._core.dtypes import accumulation_dtype, as_array
from .._core.options import Autodiff, is_known_bool
from .._core.renorm import batch_renorm
from .._core.sync import Groups, check_groups, names_of
from .._core.variables import AnyParams, BatchNormState

AxisNames = str | Sequence[str]
Function = Callable[..., tuple[Array, BatchNormState]]  # batch_norm, or a variant
Limit = ArrayLike | Callable[[Array], ArrayLike]  # a number, or a schedule of the step
IndexGroups = Sequence[Sequence[int]] | np.ndarray


@runtime_checkable
class Layer(Protocol):
    """The options that linen's and nnx's layers name alike."""

    @property
    def axis(self) -> int | Sequence[int]:
        """The feature axis or axes."""
        ...

    @property
    def momentum(self) -> ArrayLike | None:
        """The share that the running statistics keep."""
        ...

    @property
    def epsilon(self) -> ArrayLike:
        """Added to the variance."""
        ...

    @property
    def axis_index_groups(self) -> IndexGroups | None:
        """The groups of axis indices that share statistics."""
        ...


def call_batch_norm(
    function: Function,
    layer: Layer,
    params: AnyParams,
    state: BatchNormState,
    x: Array,
    *,
    train: bool,
    mask: ArrayLike | None,
    axis_name: AxisNames | None,
    dtype: DTypeLike,
    unbiased: bool,
    autodiff: Autodiff,
) -> tuple[Array, BatchNormState]:
    """Call `function`, batch norm or a variant, with the options of a layer.

    Options without an effect are dropped, as in Flax: mask, axis name and groups at
    inference, and groups without an axis name.
    """
    if not train:
        mask = axis_name = None
    return function(
        params,
        state,
        x,
        train,
        axis=ascending_axes(layer.axis, x.ndim),
        momentum=layer.momentum,
        epsilon=layer.epsilon,
        unbiased=unbiased,
        mask=flax_mask(mask),
        axis_name=axis_name,
        axis_index_groups=index_groups(layer, axis_name),
        dtype=dtype,
        autodiff=autodiff,
    )


def index_groups(layer: Layer, axis_name: AxisNames | None) -> Groups | None:
    """Return the layer's groups; none without an axis."""
    if axis_name is None:
        return None
    return check_groups(layer.axis_index_groups, axis_name)


def ascending_axes(axis: int | Sequence[int], ndim: int) -> Axes:
    """Return the feature axes, each once, in the order of Flax's variables."""
    given = axis if isinstance(axis, Sequence) else [axis]
    if not given:
        raise ValueError(
            f"axis must name a feature axis, unlike in Flax; got axis={axis}. For one "
            "mean of all of x give x a feature axis of length 1, x[..., None], and "
            "leave axis at -1."
        )
    return tuple(sorted({a for one in given for a in check_axis(one, ndim)}))


def check_flag(name: str, value: object) -> bool:
    """Return an option of a layer, or of its call, as a Python bool."""
    if is_known_bool(value):
        return bool(value)
    raise TypeError(
        f"{name} must be a Python bool, known while tracing; got {value!r}. Linen's "
        "layers have no num_features: they read it off x. Under jit mark the "
        "argument static: jax.jit(f, static_argnames='train')."
    )


def as_inexact(x: ArrayLike) -> Array:
    """Convert integers to float32, as Flax does."""
    x = as_array(x)
    if jnp.issubdtype(x.dtype, jnp.inexact):
        return x
    return x.astype(accumulation_dtype(x.dtype))


def flax_mask(mask: ArrayLike | None) -> Array | None:
    """Convert integers to bools, as Flax does: 2 counts once."""
    if mask is None:
        return None
    mask = jnp.asarray(mask)
    return mask if jnp.issubdtype(mask.dtype, jnp.inexact) else mask.astype(bool)


def make_state(mean: Array, var: Array, count: Array | None = None) -> BatchNormState:
    """Make a state of a layer's variables; most layers have no count of batches."""
    return BatchNormState(mean, var, jnp.float32(0) if count is None else count)


def counts_batches(layer: Layer) -> bool:
    """Decide whether a layer counts its batches: for equal weights or for schedules."""
    limits = (getattr(layer, name, None) for name in ("r_max", "d_max"))
    return layer.momentum is None or any(map(callable, limits))


def renorm_function(r_max: Limit, d_max: Limit, size: int | None) -> Function:
    """Return `batch_renorm` with the limits of a layer at its step."""
    if size is not None:
        raise ValueError(
            "BatchRenorm has no virtual_batch_size: its groups would all be corrected "
            f"towards the same statistics; got {size}. Leave it out, or use BatchNorm."
        )
    return partial(_batch_renorm, r_max=r_max, d_max=d_max)


def _batch_renorm(
    params: AnyParams,
    state: BatchNormState,
    x: Array,
    train: bool,
    *,
    r_max: Limit,
    d_max: Limit,
    **options: Any,  # those of `call_batch_norm`
) -> tuple[Array, BatchNormState]:
    return batch_renorm(
        params,
        state,
        x,
        train,
        r_max=_limit_at_step(r_max, state),
        d_max=_limit_at_step(d_max, state),
        **options,
    )


def _limit_at_step(limit: Limit, state: BatchNormState) -> ArrayLike:
    """Return a limit of batch renorm: a number, or a schedule at the layer's step."""
    if callable(limit):
        return jnp.asarray(limit(state.count.astype(jnp.int32)))
    return limit


def mapped_names(axis_name: AxisNames | None) -> tuple[str, ...] | None:
    """Return the names that are mapped here, for instance by a `vmap` in the model."""
    return tuple(filter(_is_mapped, names_of(axis_name))) or None


def _is_mapped(name: str) -> bool:
    try:
        lax.axis_size(name)
    except NameError:
        return False
    return True
