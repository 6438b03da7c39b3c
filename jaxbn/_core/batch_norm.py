"""The public function: validate the arguments, then four steps.

x → moments → merge → running statistics → normalize → y.
"""

from __future__ import annotations  # for a signature that `help` prints as written here

from collections.abc import Sequence
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Inexact

from .axes import check_axis, expand_features, reduction_axes, squeeze_features
from .checkpoint import name_saved
from .dtypes import accumulation_dtype, real_dtype
from .moments import Moments, moments
from .normalize import normalize
from .options import (
    StaticOptions,
    check_autodiff,
    check_epsilon,
    check_momentum,
    check_output_dtype,
    check_train,
    check_unbiased,
    explain_forward_mode,
)
from .running import update_running_stats
from .sharding import shard_like
from .sync import check_axis_name, check_groups, explain_collectives, merge
from .variables import (
    AnyParams,
    BatchNormState,
    check_kinds,
    check_variables,
)
from .weights import check_mask


def batch_norm(
    params: AnyParams,
    state: BatchNormState,
    x: ArrayLike,
    train: bool,
    *,
    axis: int | Sequence[int] = -1,
    momentum: ArrayLike | None = 0.99,
    epsilon: ArrayLike = 1e-5,
    unbiased: bool = True,
    mask: ArrayLike | None = None,
    axis_name: str | Sequence[str] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    dtype: DTypeLike | None = None,
    autodiff: Literal["custom_vjp", "jax"] = "custom_vjp",
) -> tuple[Inexact[Array, ...], BatchNormState]:
    """Normalize `x` over all axes but the feature axes.

        y = (x - μ) / √(σ² + ε) · scale + bias

    With `train=True`, μ and σ² are the mean and the biased variance of this batch, and
    update the running statistics. With `train=False` they are the running statistics,
    which are returned unchanged.

    **Arguments**

    - `params`, `state`: from `jaxbn.init`, in the features' shape: `x.shape[axis]`, or
      the lengths of the axes in the order of `axis`.
    - `x`: floating or complex, with at least one axis.
    - `train`: a Python bool, static under `jit`, like all options but `mask`,
      `momentum` and `epsilon`.
    - `axis`: the feature axis or axes, anywhere; negative axes count from the end.
    - `momentum`: the share of the old running statistics that is kept at each step:
      `running += (1 - momentum) · (batch - running)`, Flax's meaning. It is 1 minus
      PyTorch's momentum. `None` takes the average of all batches with equal weight,
      E[μ_B] and E[σ²_B]. The weight is 1 / (`count` + 1) for all features alike: a
      feature that was wholly masked in some batch counts that batch as its running
      statistics. Momentum 0, and `None` at `count` 0, replace the old statistics, NaN
      included.
    - `epsilon`: added to the variance. Both may be traced scalars, for instance a
      schedule of the step; all values share one program.
    - `unbiased`: the running variance is updated with n/(n-1)·σ² (the paper, PyTorch),
      or with σ² (Flax) if `False`. y always uses σ².
    - `mask`: bool, integer or floating, of any shape that broadcasts to `x`. Its
      values weight the statistics; 0 leaves an element out. A bool or integer mask
      counts: 2 counts an element twice, and n = Σ mask. A floating mask holds weights
      whose scale does not matter: n is their effective number, (Σ w)² / Σ w². y is
      computed at every position. No gradient flows to the mask. Masked elements may be
      inf or NaN, but not if gradients are taken.
    - `axis_name`: the mapped axis or axes (`shard_map`, `pmap`, `vmap`) over which the
      statistics are those of the whole batch, weighted by n. It is ignored with
      `train=False`, and `jit` with sharded arrays needs none.
    - `axis_index_groups`: lists of axis indices that share statistics, as in
      `jax.lax.psum`; the groups partition the axis. JAX refuses groups of an axis of
      more than 64 devices under `vmap` and `shard_map(check_vma=True)`.
    - `dtype`: the dtype of y; that of `x` if `None`.
    - `autodiff`: `"custom_vjp"` differentiates by the closed form and saves only `x`
      and per-feature vectors. Use `"jax"`, the same formula in plain JAX, for the
      transformations that refuse a `custom_vjp`: `jax.jvp`, `jax.jacfwd`,
      `jax.linearize`, `jax.experimental.jet`. Complex `x` always uses it.

    **Returns** `(y, new_state)`. Statistics are accumulated in float32 or wider, and
    the state keeps its dtypes; only a real mean becomes complex, by the first complex
    `x` (for `scan`, start from `init(..., param_dtype=jnp.complex64)`). y of a feature
    with n = 0 uses the running statistics. A batch updates a feature's running
    statistics if n > ddof, with ddof = 1 for `unbiased=True` and 0 for
    `unbiased=False`, and if the state's dtype can hold its moments. `count` grows by 1
    if any feature was updated.

    **Raises** `ValueError` for shapes and options, `TypeError` for dtypes and kinds,
    while tracing.

    Differences from Flax: the variance is numerically stable (Flax's default cancels
    for large means), masked statistics are weighted by n over devices, an empty batch
    changes nothing, the running variance is unbiased by default, and the running
    mean drifts less where it is large beside the deviation.

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
    check_kinds(params, state)
    x = check_input(x)
    options = StaticOptions(
        train=check_train(train),
        axis=check_axis(axis, x.ndim),
        unbiased=check_unbiased(unbiased),
        axis_name=check_axis_name(axis_name),
        axis_index_groups=check_groups(axis_index_groups, axis_name),
        dtype=check_output_dtype(dtype, x.dtype),
        autodiff=check_autodiff(autodiff),
    )
    arrays = check_variables(params, state, x, options.axis)
    mask = check_mask(mask, x.shape)
    momentum, epsilon = check_momentum(momentum), check_epsilon(epsilon)
    # In Python's float64 where momentum is a number: float32 has no 0.9999.
    batch_weight = None if momentum is None else 1 - momentum
    explain = explain_collectives(options.axis_name, options.axis_index_groups)
    with explain, explain_forward_mode():
        y, new_state = _batch_norm(*arrays, x, mask, batch_weight, epsilon, options)
    return y, new_state if options.train else state


def check_input(x: ArrayLike) -> Array:
    """Return `x` as a floating or complex array with at least one axis."""
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


@partial(jax.jit, inline=True, static_argnames="options")
def _batch_norm(
    params: AnyParams,
    state: BatchNormState,
    x: Array,
    mask: Array | None,
    batch_weight: ArrayLike | None,
    epsilon: ArrayLike,
    options: StaticOptions,
) -> tuple[Array, BatchNormState]:
    """Run the four steps, with every vector expanded to x's rank."""
    axes = reduction_axes(options.axis, x.ndim)
    closed_form = options.autodiff == "custom_vjp" and not jnp.iscomplexobj(x)
    acc_dtype = accumulation_dtype(x.dtype, state.mean.dtype, real_dtype(options.dtype))

    def expand(vector: Array) -> Array:
        return shard_like(expand_features(vector, options.axis, x.ndim), x)

    def squeeze(stats: Array, vector: Array) -> Array:
        return shard_like(squeeze_features(stats, options.axis), vector)

    if closed_form:
        x = name_saved(x)
    # The gradient leaves through x_acc, so that the two parts, from moments and from
    # normalize, are added before they are rounded to x's dtype. The values come from
    # x, which is saved.
    x_acc = x.astype(acc_dtype)
    mask = None if mask is None else shard_like(mask, x)
    scale, bias = map(expand, _fill_missing_params(params, state.mean))
    running = state._replace(mean=expand(state.mean), var=expand(state.var))
    mean, var = running.mean, running.var
    if options.train:
        with jax.named_scope("jaxbn.moments"):
            local = moments(
                *(x_acc, x, mask, axes), closed_form=closed_form, guess=(mean, var)
            )
        with jax.named_scope("jaxbn.merge"):
            batch = merge(local, options.axis_name, options.axis_index_groups)
        mean, var = _batch_or_running(batch, running)
        with jax.named_scope("jaxbn.update_running_stats"):
            running = update_running_stats(
                running, batch, batch_weight, options.unbiased
            )
    with jax.named_scope("jaxbn.normalize"):
        y = normalize(
            *(x_acc, x, mean, var, scale, bias, epsilon),
            axes=axes,
            dtype=options.dtype,
            closed_form=closed_form,
        )
    mean, var = squeeze(running.mean, state.mean), squeeze(running.var, state.var)
    return y, BatchNormState(mean, var, running.count)


def _batch_or_running(batch: Moments, running: BatchNormState) -> tuple[Array, Array]:
    """Return the batch statistics, or the running ones for features with n = 0."""
    n, mean, var = batch.n, batch.mean, batch.var
    if isinstance(n, int) and n > 0:
        return mean, var
    return (
        jnp.where(n > 0, mean, running.mean.astype(mean.dtype)),
        jnp.where(n > 0, var, running.var.astype(var.dtype)),
    )


def _fill_missing_params(params: AnyParams, mean: Array) -> tuple[Array, Array]:
    """Return scale and bias as arrays: 1 and 0 if they are `None`."""
    scale, bias = params
    return (
        jnp.ones_like(mean) if scale is None else scale,
        jnp.zeros_like(mean) if bias is None else bias,
    )
