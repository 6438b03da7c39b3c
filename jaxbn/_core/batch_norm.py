"""The public function: validate the arguments, then four steps.

x → moments → merge → running statistics → normalize → y.
"""

from __future__ import annotations  # for a signature that `help` prints as written here

from collections.abc import Sequence
from functools import partial
from typing import Literal

import jax
from jax import Array
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Inexact

from .arguments import Arguments, check_arguments, explain_transformations
from .options import StaticOptions
from .running import update
from .single_elements import warn_single_elements
from .steps import batch_moments, in_accumulation_dtype, infer, normalize_batch
from .variables import AnyParams, BatchNormState
from .virtual_batches import check_virtual_batch_size, train_by_virtual_batches


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
    virtual_batch_size: int | None = None,
) -> tuple[Inexact[Array, "*x"], BatchNormState]:
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
      inf or NaN, but not if gradients are taken. A feature is left out, as if it had no
      element, if the sum of its weights is not positive or is infinite; NaN in the mask
      shows in y.
    - `axis_name`: the mapped axis or axes (`shard_map`, `pmap`, `vmap`) over which the
      statistics are those of the whole batch, weighted by n. It is ignored with
      `train=False`, and `jit` with sharded arrays needs none. An axis of a `vmap`
      inside `shard_map` needs `check_vma=False`.
    - `axis_index_groups`: lists of axis indices that share statistics, as in
      `jax.lax.psum`; the groups partition the axis. Above 64 devices jaxbn uses a
      grouped `psum`, which JAX supports only in `pmap` and unchecked `shard_map`.
    - `dtype`: the dtype of y; that of `x` if `None`.
    - `autodiff`: `"custom_vjp"` differentiates by the closed form and saves only `x`
      and per-feature vectors. Use `"jax"`, the same formula in plain JAX, for the
      transformations that refuse a `custom_vjp`: `jax.jvp`, `jax.jacfwd`,
      `jax.linearize`, `jax.experimental.jet`. Complex `x` always uses it.
    - `virtual_batch_size`: ghost batch norm. Each group of so many consecutive
      examples, along the first reduced axis, is normalized by its own statistics, and
      the running statistics are updated with the mean over the groups of mean and
      variance. The size is that of the whole batch's groups: with `axis_name` a group
      is a part of one device's share, or the shares of consecutive devices. A group
      over several devices, but not all, has the limits of `axis_index_groups`. The size
      is ignored with `train=False`.

    **Returns** `(y, new_state)`. Statistics are accumulated in float32 or wider, and
    the state keeps its dtypes; only a real mean becomes complex, by the first complex
    `x` (for `scan`, start from `init(..., param_dtype=jnp.complex64)`). y of a feature
    with n = 0 uses the running statistics. A batch updates a feature's running
    statistics if n > ddof, with ddof = 1 for `unbiased=True` and 0 for
    `unbiased=False`, and if the state's dtype can hold its moments. `count` grows by 1
    if any feature was updated; features that a mesh axis of `shard_map` divides count
    together.

    **Raises** `ValueError` for shapes and options, `TypeError` for dtypes and kinds,
    while tracing.

    **Warns** if the shapes say that n is 1 for every feature: y is then the bias.

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
    size = check_virtual_batch_size(virtual_batch_size)
    if not train:
        return infer(arguments, options), state
    warn_single_elements(arguments.x, options, size)
    with explain_transformations(options):
        if size is None:
            return _train(arguments, options)
        return train_by_virtual_batches(arguments, options, size)


@partial(jax.jit, inline=True, static_argnames="options")
def _train(
    arguments: Arguments, options: StaticOptions
) -> tuple[Array, BatchNormState]:
    params, state, x, mask, batch_weight, epsilon = arguments
    x_acc = in_accumulation_dtype(x, state, options)
    mean, var, batch = batch_moments(state, x_acc, x, mask, options)
    state = update(state, batch, batch_weight, options.unbiased, options.axis_name)
    return normalize_batch(params, mean, var, x_acc, x, epsilon, options), state
