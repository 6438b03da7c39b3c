"""The pure function: four rooms, and the data flows one way through them.

x → moments → merge → running statistics → normalize → y.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Inexact

from .axes import squeeze_features, reduction_axes, expand_features
from .checks import (
    check_autodiff,
    check_axis,
    check_groups,
    check_input,
    check_mask,
    check_numbers,
    check_output_dtype,
    check_train,
    check_variables,
    explain_refused_groups,
)
from .dtypes import real_dtype, accumulation_dtype
from .moments import moments
from .normalize import normalize
from .rows import Count
from .running import absorb
from .sharding import shard_like
from .sync import merge
from .variables import BatchNormParams, BatchNormState


def batch_norm(
    params: BatchNormParams,
    state: BatchNormState,
    x: ArrayLike,
    train: bool | Any,  # Any, like Any below: our own error reports what is refused
    *,
    axis: int | Sequence[int] = -1,
    momentum: float | Any | None = 0.99,
    epsilon: float | Any = 1e-5,
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
    - `train`: a Python bool, static under `jit`, like all options but `mask`.
    - `axis`: the feature axis or axes, anywhere, negative ones counted from the end.
    - `momentum`: what the running statistics keep at each step, `running = momentum ·
      running + (1 - momentum) · batch`, as in Flax; PyTorch's momentum is 1 - ours.
      `None`: the average of all batches with equal weight, E[μ_B] and E[σ²_B]. The
      weight is 1 / (`count` + 1) for all channels alike: a channel that was wholly
      masked in some batch counts that batch as its running statistics.
    - `epsilon`: added to the variance.
    - `unbiased`: the running variance absorbs n/(n-1)·σ² (the paper, PyTorch), else σ²
      (Flax). y always uses σ².
    - `mask`: bool, integer or floating, of any shape that broadcasts to `x`. Its
      values weigh the statistics: 0 leaves a position out, 2 counts it twice, so that
      n = Σ mask (scale sample weights to an average of about 1: n = 1 says nothing
      about a variance). y is computed at every position. No gradient flows to the
      mask. What is masked may be inf or NaN, but not where gradients are wanted.
    - `axis_name`: mapped axis or axes (`shard_map`, `pmap`, `vmap`) over which the
      statistics are those of the whole batch, weighted by count. Ignored with
      `train=False`. `jit` with sharded arrays needs none.
    - `axis_index_groups`: lists of axis indices that share statistics, as in
      `jax.lax.psum`; the groups partition the axis. JAX has them under `pmap` and
      under `shard_map` with `check_vma=False`.
    - `dtype`: of y; that of `x` unless given.
    - `autodiff`: `"custom_vjp"` differentiates by the closed form and saves only `x`
      and per-channel vectors. Use `"jax"`, the same formula in plain JAX, where a
      `custom_vjp` is refused: `jax.jvp`, `jax.jacfwd`, `jax.linearize`. Complex `x` is
      always served by it.

    **Returns** `(y, new_state)`. Statistics are accumulated in float32 or wider, and
    the state keeps its dtypes; only a real mean becomes complex, by the first complex
    `x` (to `scan`, start from `init(..., param_dtype=jnp.complex64)`). A channel with
    n = 0 takes the running statistics for y; one with n ≤ 1, or whose moments the
    state's dtype cannot hold, leaves its running statistics as they were. `count` grows
    by 1 where any channel absorbed the batch.

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
    options = Options(
        train=train,
        axis=axis,
        momentum=momentum,
        epsilon=epsilon,
        unbiased=unbiased,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        dtype=dtype,
        autodiff=autodiff,
    )
    return apply(params, state, x, mask, options)


class Options(NamedTuple):
    """What is static in a call: a change of it is another program."""

    train: Any
    axis: Any
    momentum: Any
    epsilon: Any
    unbiased: Any
    axis_name: Any
    axis_index_groups: Any
    dtype: Any
    autodiff: Any = "custom_vjp"
    # The running statistics absorb a batch whose count is above this. Flax's layers
    # have 0: they take one row's variance of 0 for what it is.
    idle_count: int = 1


def apply(
    params: BatchNormParams,
    state: BatchNormState,
    x: ArrayLike,
    mask: ArrayLike | None,
    options: Options,
) -> tuple[Array, BatchNormState]:
    """`batch_norm` by its options: check all that came, then run."""
    x = check_input(x)
    options = _checked(options, x)
    arrays = check_variables(params, state, x, options.axis)
    mask = None if mask is None else lax.stop_gradient(check_mask(mask, x.shape))
    with explain_refused_groups(options.axis_index_groups):
        y, new_state = _batch_norm(*arrays, x, mask, options)
    return y, new_state if options.train else state


def _checked(options: Options, x: Array) -> Options:
    """The options as the rooms take them, hashable and without a doubt."""
    momentum, epsilon = check_numbers(options.momentum, options.epsilon)
    axis_name = _hashable(options.axis_name)
    groups = check_groups(_hashable(options.axis_index_groups), axis_name)
    return options._replace(
        train=check_train(options.train),
        axis=check_axis(options.axis, x.ndim),
        momentum=momentum,
        epsilon=epsilon,
        unbiased=bool(options.unbiased),
        axis_name=axis_name,
        axis_index_groups=groups,
        dtype=check_output_dtype(options.dtype, x.dtype),
        autodiff=check_autodiff(options.autodiff),
    )


@partial(jax.jit, inline=True, static_argnames="options")
def _batch_norm(
    params: BatchNormParams,
    state: BatchNormState,
    x: Array,
    mask: Array | None,
    options: Options,
) -> tuple[Array, BatchNormState]:
    """Run the four rooms, with every vector laid out along x's feature axes."""
    axes = reduction_axes(options.axis, x.ndim)
    closed_form = options.autodiff == "custom_vjp" and not jnp.iscomplexobj(x)

    def lay_out(vector: Array) -> Array:
        return shard_like(expand_features(vector, options.axis, x.ndim), x)

    def take_back(stats: Array, vector: Array) -> Array:
        return shard_like(squeeze_features(stats, options.axis), vector)

    mask = None if mask is None else shard_like(mask, x)
    running = state._replace(mean=lay_out(state.mean), var=lay_out(state.var))
    # The gradient leaves through x_wide, so that what moments and normalize each add
    # to it is rounded to x's dtype once; the values come from x, which is saved.
    wide = accumulation_dtype(x.dtype, state.mean.dtype, real_dtype(options.dtype))
    x_wide = x.astype(wide)
    mean, var = running.mean, running.var
    if options.train:
        local = moments(x_wide, x, mask, axes, closed_form=closed_form)
        batch = merge(local, options.axis_name, options.axis_index_groups)
        mean = _or(batch.count, batch.mean, mean)
        var = _or(batch.count, batch.var, var)
        running = absorb(
            running, batch, options.momentum, options.unbiased, options.idle_count
        )
    scale, bias = _affine(params, state.mean)
    y = normalize(
        x_wide,
        x,
        mean,
        var,
        lay_out(scale),
        lay_out(bias),
        epsilon=options.epsilon,
        axes=axes,
        dtype=options.dtype,
        closed_form=closed_form,
    )
    mean = take_back(running.mean, state.mean)
    var = take_back(running.var, state.var)
    return y, BatchNormState(mean, var, running.count)


def _or(count: Count, batch: Array, running: Array) -> Array:
    """The batch's statistic, of no rows the running one."""
    if isinstance(count, int) and count > 0:
        return batch
    return jnp.where(count > 0, batch, running.astype(batch.dtype))


def _affine(params: BatchNormParams, mean: Array) -> tuple[Array, Array]:
    """Scale and bias as arrays: 1 and 0 in the place of `None`."""
    scale, bias = params
    return (
        jnp.ones_like(mean) if scale is None else scale,
        jnp.zeros_like(mean) if bias is None else bias,
    )


def _hashable(names: Any) -> Any:
    """Lists and arrays as tuples, so that jit can take them as static arguments."""
    names = names.tolist() if isinstance(names, np.ndarray) else names
    if isinstance(names, Sequence) and not isinstance(names, str):
        return tuple(map(_hashable, names))
    return names
