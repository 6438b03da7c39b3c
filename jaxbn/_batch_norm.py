"""The pure function: four rooms, and the data flows one way through them.

x → moments → merge → running statistics → normalize → y.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Inexact

from ._axes import gather, reduced_axes, spread
from ._checks import (
    check_axis,
    check_groups,
    check_input,
    check_mask,
    check_options,
    check_output_dtype,
    check_train,
    check_variables,
    explain_refused_groups,
)
from ._dtypes import widen
from ._moments import moments
from ._normalize import normalize
from ._running import absorb
from ._sync import merge
from ._variables import BatchNormParams, BatchNormState


def batch_norm(
    params: BatchNormParams,
    state: BatchNormState,
    x: ArrayLike,
    train: bool | Any,  # Any, like Any below: our own error reports what is refused
    *,
    axis: int | Sequence[int] = -1,
    momentum: float | int | None = 0.99,
    epsilon: float | int = 1e-5,
    unbiased: bool = True,
    mask: ArrayLike | None = None,
    axis_name: str | Sequence[str] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    dtype: DTypeLike | None = None,
    autodiff: Literal["custom_vjp", "jax"] | Any = "custom_vjp",
) -> tuple[Inexact[Array, "..."], BatchNormState]:
    r"""Normalize `x` over all axes but the feature axes, and update the statistics.

    $$y = \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} \cdot scale + bias$$

    With `train=True`, μ and σ² are the mean and the biased variance of this batch and
    the running statistics absorb them; with `train=False` they are the running ones,
    which are returned as they came.

    **Arguments**

    - `params`, `state`: from `jaxbn.init`, in the features' shape: `x.shape[axis]`, or
      the lengths of the axes in the order of `axis`.
    - `x`: floating or complex, one axis or more.
    - `train`: a Python bool, static under `jit`.
    - `axis`: the feature axis or axes, anywhere, negative ones counted from the end.
    - `momentum`: what the running statistics keep at each step, `running = momentum ·
      running + (1 - momentum) · batch`, as in Flax; PyTorch's momentum is 1 - ours.
      `None`: the average of all batches with equal weight, E[μ_B] and E[σ²_B].
    - `epsilon`: added to the variance.
    - `unbiased`: the running variance absorbs n/(n-1)·σ² (the paper, PyTorch), else σ²
      (Flax). y always uses σ².
    - `mask`: bool, integer or floating, of any shape that broadcasts to `x`. Its
      values weigh the statistics: 0 leaves a position out, 2 counts it twice, so that
      n = Σ mask. y is computed at every position. No gradient flows to the mask.
    - `axis_name`: mapped axis or axes (`shard_map`, `pmap`, `vmap`) over which the
      statistics are those of the whole batch, weighted by count. Ignored with
      `train=False`. `jit` with sharded arrays needs none.
    - `axis_index_groups`: lists of axis indices that share statistics, as in
      `jax.lax.psum`; the groups partition the axis.
    - `dtype`: of y; that of `x` unless given.
    - `autodiff`: `"custom_vjp"` differentiates by the closed form and saves only `x`
      and per-channel vectors. Use `"jax"`, the same formula in plain JAX, where a
      `custom_vjp` is refused: `jax.jvp`, `jax.jacfwd`, `jax.linearize`. Complex `x` is
      always served by it.

    **Returns** `(y, new_state)`. Statistics are accumulated in float32 or wider, and
    the state keeps its dtypes (a real mean becomes complex for complex `x`). A channel
    with n = 0 takes the running statistics for y; one with n ≤ 1, or whose moments
    overflow, leaves its running statistics as they were. `count` grows by 1 where any
    channel absorbed the batch.

    **Raises** `ValueError` for shapes and options, `TypeError` for dtypes and kinds,
    while tracing.

    Against Flax: the variance is stable (Flax's default cancels for large means),
    masked statistics are weighted by count over devices, an empty batch is harmless,
    and the running variance is unbiased unless asked.

    Source: S. Ioffe and C. Szegedy, "Batch Normalization: Accelerating Deep Network
    Training by Reducing Internal Covariate Shift",
    [arXiv:1502.03167](https://arxiv.org/abs/1502.03167), Algorithms 1 and 2.

    >>> import jax.numpy as jnp, jaxbn
    >>> params, state = jaxbn.init(2)
    >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
    >>> y, state = jaxbn.batch_norm(params, state, x, train=True, momentum=None)
    >>> y.round(3)
    Array([[-1., -1.],
           [ 1.,  1.]], dtype=float32)
    >>> state.mean, state.var  # the unbiased variance: 2 and 200
    (Array([ 2., 20.], dtype=float32), Array([  2., 200.], dtype=float32))
    >>> y, _ = jaxbn.batch_norm(params, state, x, train=False)
    >>> y.round(3)
    Array([[-0.707, -0.707],
           [ 0.707,  0.707]], dtype=float32)
    """
    train = check_train(train)
    x = check_input(x)
    feature_axes = check_axis(axis, x.ndim)
    check_variables(params, state, x, feature_axes)
    check_options(momentum, epsilon, autodiff)
    check_groups(axis_index_groups, axis_name)
    with explain_refused_groups(axis_index_groups):
        return _batch_norm(
            jax.tree.map(jnp.asarray, params),
            _state_for(x, state),
            x,
            None if mask is None else check_mask(mask, x.shape),
            train=train,
            feature_axes=feature_axes,
            momentum=None if momentum is None else float(momentum),
            epsilon=float(epsilon),
            unbiased=bool(unbiased),
            axis_name=_hashable(axis_name),
            axis_index_groups=_hashable(axis_index_groups),
            dtype=check_output_dtype(dtype, x.dtype),
            closed_form=autodiff == "custom_vjp" and not jnp.iscomplexobj(x),
        )


@partial(
    jax.jit,
    inline=True,
    static_argnames=(
        "train",
        "feature_axes",
        "momentum",
        "epsilon",
        "unbiased",
        "axis_name",
        "axis_index_groups",
        "dtype",
        "closed_form",
    ),
)
def _batch_norm(
    params: BatchNormParams,
    state: BatchNormState,
    x: Array,
    mask: Array | None,
    *,
    train: bool,
    feature_axes: tuple[int, ...],
    momentum: float | None,
    epsilon: float,
    unbiased: bool,
    axis_name: Any,
    axis_index_groups: tuple[tuple[int, ...], ...] | None,
    dtype: Any,
    closed_form: bool,
) -> tuple[Array, BatchNormState]:
    axes = reduced_axes(feature_axes, x.ndim)
    x_wide = x.astype(widen(x.dtype, state.mean.dtype))
    running = state._replace(
        mean=spread(state.mean, feature_axes, x.ndim),
        var=spread(state.var, feature_axes, x.ndim),
    )
    mean, var = running.mean, running.var
    if train:
        local = moments(x_wide, x, mask, axes, closed_form=closed_form)
        batch = merge(local, axis_name, axis_index_groups)
        mean = jnp.where(batch.count > 0, batch.mean, mean.astype(batch.mean.dtype))
        var = jnp.where(batch.count > 0, batch.var, var.astype(batch.var.dtype))
        running = absorb(running, batch, momentum, unbiased)
    y = normalize(
        x_wide,
        x,
        mean,
        var,
        *(spread(p, feature_axes, x.ndim) for p in _affine(params, state.mean)),
        epsilon=epsilon,
        axes=axes,
        dtype=dtype,
        closed_form=closed_form,
    )
    new_state = running._replace(
        mean=gather(running.mean, feature_axes), var=gather(running.var, feature_axes)
    )
    return y, new_state


def _affine(params: BatchNormParams, mean: Array) -> tuple[Array, Array]:
    """Scale and bias as arrays: 1 and 0 in the place of `None`."""
    scale, bias = params
    return (
        jnp.ones_like(mean) if scale is None else scale,
        jnp.zeros_like(mean) if bias is None else bias,
    )


def _state_for(x: Array, state: BatchNormState) -> BatchNormState:
    """`state` as arrays; the mean of complex x is complex."""
    mean, var, count = map(jnp.asarray, state)
    if jnp.iscomplexobj(x):
        mean = mean.astype(widen(x.dtype, mean.dtype))
    return BatchNormState(mean, var, count)


def _hashable(names: Any) -> Any:
    """Lists as tuples, so that jit can take them as static arguments."""
    if isinstance(names, Sequence) and not isinstance(names, str):
        return tuple(map(_hashable, names))
    return names
