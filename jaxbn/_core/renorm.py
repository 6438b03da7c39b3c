"""Batch renormalization: the running statistics in training too, within limits."""

from __future__ import annotations  # for a signature that `help` prints as written here

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Inexact

from .arguments import Arguments, check_arguments, explain_transformations
from .axes import squeeze_features
from .options import Autodiff, StaticOptions, check_limit
from .running import update
from .sharding import shard_like
from .steps import batch_moments, in_accumulation_dtype, infer, normalize_batch
from .variables import AnyParams, BatchNormParams, BatchNormState


def batch_renorm(
    params: AnyParams,
    state: BatchNormState,
    x: ArrayLike,
    train: bool,
    *,
    r_max: ArrayLike = 3.0,
    d_max: ArrayLike = 5.0,
    axis: int | Sequence[int] = -1,
    momentum: ArrayLike | None = 0.99,
    epsilon: ArrayLike = 1e-5,
    unbiased: bool = True,
    mask: ArrayLike | None = None,
    axis_name: str | Sequence[str] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    dtype: DTypeLike | None = None,
    autodiff: Autodiff = "custom_vjp",
) -> tuple[Inexact[Array, "*x"], BatchNormState]:
    """Normalize `x` by its batch, corrected towards the running statistics.

        y = ((x - μ_B) / σ_B · r + d) · scale + bias
        r = clip(σ_B / σ, 1 / r_max, r_max),   d = clip((μ_B - μ) / σ, -d_max, d_max)

    with σ = √(σ² + ε), and μ, σ² the running statistics before this batch. Within the
    limits y is that of the running statistics, as at inference; no gradient flows
    through r and d. It serves small or dependent batches. With `r_max=1` and `d_max=0`
    it is batch norm. With `train=False` it is the inference of `batch_norm`.

    **Arguments**

    - `r_max`: at least 1; `d_max`: at least 0, for complex `x` the bound of |d|. Both
      may be traced scalars: the paper starts with 1 and 0, and raises them to 3 and 5
      once the running statistics are right. A JAX array below counts as 1 or 0, since
      a schedule's rounding can leave it there; a Python number below is an error.
    - The others are those of `batch_norm`.

    **Returns** `(y, new_state)`, as `batch_norm`.

    **Raises** `ValueError` for shapes and options, `TypeError` for dtypes and kinds,
    while tracing.

    Differences from Flax and PyTorch: both lack it. Keras has it as `renorm=True`, with
    running averages of mean and deviation of its own for r and d.

    Source: S. Ioffe, "Batch Renormalization: Towards Reducing Minibatch Dependence in
    Batch-Normalized Models", [arXiv:1702.03275](https://arxiv.org/abs/1702.03275),
    Algorithm 1.

    >>> import jax.numpy as jnp, jaxbn
    >>> params, state = jaxbn.init(2)
    >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
    >>> y, _ = jaxbn.batch_renorm(params, state, x, train=True)
    >>> y.round()  # x itself in the first feature, whose r and d are within limits
    Array([[1., 2.],
           [3., 8.]], dtype=float32)
    """
    arguments, options = check_arguments(
        params,
        state,
        x,
        train,
        axis=axis,
        momentum=momentum,
        epsilon=epsilon,
        unbiased=unbiased,
        mask=mask,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        dtype=dtype,
        autodiff=autodiff,
    )
    limits = check_limit("r_max", r_max, 1), check_limit("d_max", d_max, 0)
    if not train:
        return infer(arguments, options), state
    with explain_transformations(options):
        return _train(arguments, options, *limits)


@partial(jax.jit, inline=True, static_argnames="options")
def _train(
    arguments: Arguments,
    options: StaticOptions,
    r_max: ArrayLike,
    d_max: ArrayLike,
) -> tuple[Array, BatchNormState]:
    params, state, x, mask, batch_weight, epsilon = arguments
    x_acc = in_accumulation_dtype(x, state, options)
    mean, var, batch = batch_moments(state, x_acc, x, mask, options)
    mean_used, var_used = (squeeze_features(v, options.axis) for v in (mean, var))
    r, d = _correction(mean_used, var_used, state, epsilon, r_max, d_max)
    params = _corrected(params, r, d)
    new_state = update(state, batch, batch_weight, options.unbiased, options.axis_name)
    return normalize_batch(params, mean, var, x_acc, x, epsilon, options), new_state


def _correction(
    mean: Array,
    var: Array,
    state: BatchNormState,
    epsilon: ArrayLike,
    r_max: ArrayLike,
    d_max: ArrayLike,
) -> tuple[Array, Array]:
    """Return r and d, without gradient."""
    mean, var, *running = lax.stop_gradient((mean, var, state.mean, state.var))
    running_mean, running_var = (shard_like(v, mean) for v in running)
    epsilon = jnp.asarray(epsilon, var.dtype)
    r_max, d_max = (jnp.asarray(limit, var.dtype) for limit in (r_max, d_max))
    # A deviation of 0 counts as one below that of any variance: r and d have limits.
    least = jnp.finfo(var.dtype).max ** -0.5
    inv_std = 1 / jnp.maximum(jnp.sqrt(running_var.astype(var.dtype) + epsilon), least)
    r = _clip(jnp.sqrt(var + epsilon) * inv_std, 1 / r_max, r_max)
    d = (mean - running_mean.astype(mean.dtype)) * inv_std.astype(mean.dtype)
    return r, _clip_modulus(d, d_max)


def _clip(v: Array, lower: Array, upper: Array) -> Array:
    # Not jnp.clip: `jet` has no rule for its scalar limits in older versions of JAX.
    return jnp.where(v < lower, lower, jnp.where(v > upper, upper, v))


def _clip_modulus(
    d: Inexact[Array, "*features"], limit: Array
) -> Inexact[Array, "*features"]:
    if not jnp.iscomplexobj(d):
        return _clip(d, -limit, limit)
    size = jnp.abs(d)
    factor = jnp.where(size > limit, limit / jnp.where(size > 0, size, 1), 1)
    return d * factor.astype(d.dtype)


def _corrected(params: AnyParams, r: Array, d: Array) -> AnyParams:
    """Return scale · r and bias + scale · d, so that y needs no further step."""
    scale, bias = (
        None if v is None else shard_like(v, d).astype(d.dtype) for v in params
    )
    if scale is None:
        return BatchNormParams(r, d if bias is None else bias + d)
    return BatchNormParams(
        scale * r.astype(d.dtype), scale * d if bias is None else bias + scale * d
    )
