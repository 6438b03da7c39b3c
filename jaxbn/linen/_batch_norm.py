"""The layer for Flax linen, and its computation, which serves Flax's own layers too."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import field
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.errors import ModifyScopeVariableError
from flax.linen.dtypes import canonicalize_dtype
from flax.typing import Initializer
from jax.typing import ArrayLike

from .._core.batch_norm import batch_norm
from .._core.single_elements import initialization
from .._core.variables import AnyParams, BatchNormParams
from .._flax.layer import (
    AxisNames,
    Function,
    as_inexact,
    ascending_axes,
    call_batch_norm,
    check_flag,
    counts_batches,
    make_state,
)

FLAGS = (
    "use_bias",
    "use_scale",
    "use_fast_variance",
    "force_float32_reductions",
    "unbiased",
)


class BatchNorm(nn.BatchNorm):
    """Normalize as `flax.linen.BatchNorm` does, field for field, by `batch_norm`.

        y = (x - μ) / √(σ² + ε) · scale + bias

    μ and σ² are the batch's, or the running ones with `use_running_average=True`.
    Fields, defaults and variables are Flax's, so that models and checkpoints work with
    either: `params` holds `scale` and `bias`, `batch_stats` holds `mean` and `var`, all
    in the features' shape (in ascending order if `axis` names several axes).
    Nothing is updated during `init`, and `axis_name` need not exist there, nor at
    inference.

    **Fields that differ from Flax's**

    - `momentum`: as in Flax the share of the old statistics that is kept, in [0, 1]:
      PyTorch's 0.1 is 0.9 here. May be `None`: the running statistics are then the
      average of all batches with equal weight, and `batch_stats` holds a `count` of
      them beside `mean` and `var`. Variables without one count as no batch: the first
      replaces them. `momentum` and `epsilon` may be traced scalars, as in Flax.
    - `unbiased`: `True` updates the running variance with n/(n-1)·σ², as in the paper
      and PyTorch; the default, `False`, with σ², as in Flax. Keyword only.
    - `autodiff`: `"jax"` is for forward mode (`jax.jvp`, `jax.jacfwd`), which the
      closed form of the backward, `"custom_vjp"`, refuses. Keyword only.
    - `virtual_batch_size`: normalizes each group of so many examples by itself, as
      in `jaxbn.batch_norm`; not during `init`, whose batch may be of any size. Keyword
      only.
    - `use_fast_variance`: accepted, and without effect: the variance is the stable one.
    - `force_float32_reductions`: `False` stores the statistics in `param_dtype`, as in
      Flax; sums are in float32 or wider either way.

    **Arguments** of a call: `x` (integers are converted to float32),
    `use_running_average`, and `mask`, which broadcasts to `x`: bool and integer masks
    leave out zeros, a floating mask holds weights (Flax would read it as a bool).
    `update_statistics=False` normalizes by the batch, with the exact gradient, and
    leaves the running statistics unchanged.

    **Returns** y, in `dtype`, or in the dtype that `x`, `scale` and `bias` promote to.

    **Raises** `ValueError` and `TypeError` as `jaxbn.batch_norm` does, while tracing.

    Differences from Flax: the variance does not cancel for large means, masked
    statistics are weighted by count over devices, an empty batch (or shard) leaves the
    running statistics unchanged, and these keep their dtype under x64. Errors here, but
    not in Flax: `axis=()`, a momentum outside of [0, 1], a negative epsilon, and other
    values than bools for `use_running_average` and the fields that are flags.

    Source: Ioffe & Szegedy, [arXiv:1502.03167](https://arxiv.org/abs/1502.03167),
    Algorithms 1 and 2.

    >>> import jax, jax.numpy as jnp, jaxbn.linen
    >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
    >>> layer = jaxbn.linen.BatchNorm(use_running_average=False, momentum=0.9)
    >>> variables = layer.init(jax.random.key(0), x)
    >>> y, updates = layer.apply(variables, x, mutable=["batch_stats"])
    >>> y.round(3)
    Array([[-1., -1.],
           [ 1.,  1.]], dtype=float32)
    >>> updates["batch_stats"]["mean"]
    Array([0.2, 2. ], dtype=float32)
    """

    axis: int | Sequence[int] = -1  # pyright: ignore[reportIncompatibleVariableOverride]
    momentum: ArrayLike | None = 0.99  # pyright: ignore[reportIncompatibleVariableOverride]
    epsilon: ArrayLike = 1e-5  # pyright: ignore[reportIncompatibleVariableOverride]
    axis_name: str | Sequence[str] | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    unbiased: bool = field(default=False, kw_only=True)
    autodiff: Literal["custom_vjp", "jax"] = field(default="custom_vjp", kw_only=True)
    virtual_batch_size: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Check the fields that are flags: a wrong one would count as True."""
        for name in FLAGS:
            check_flag(name, getattr(self, name))
        if self.use_running_average is not None:
            check_flag("use_running_average", self.use_running_average)
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | None = None,
        *,
        mask: ArrayLike | None = None,
        update_statistics: bool = True,
    ) -> jax.Array:
        """Normalize `x`; the arguments are explained at the class."""
        return apply_layer(
            self,
            x,
            use_running_average,
            mask=mask,
            unbiased=self.unbiased,
            autodiff=self.autodiff,
            update_statistics=update_statistics,
            function=self._function(),
        )

    @nn.nowrap
    def _function(self) -> Function:
        size = None if self.is_initializing() else self.virtual_batch_size
        return partial(batch_norm, virtual_batch_size=size)


def apply_layer(
    layer: nn.BatchNorm,
    x: ArrayLike,
    use_running_average: bool | None = None,
    *,
    mask: ArrayLike | None = None,
    unbiased: bool = False,
    autodiff: Literal["custom_vjp", "jax"] = "custom_vjp",
    update_statistics: bool = True,
    function: Function = batch_norm,
) -> jax.Array:
    """Apply a layer of Flax or jaxbn in the mode that it or its call names."""
    inference = nn.merge_param(
        "use_running_average", layer.use_running_average, use_running_average
    )
    with explain_immutable():
        return _apply_layer(
            layer,
            x,
            train=not check_flag("use_running_average", inference),
            mask=mask,
            axis_name=None if layer.is_initializing() else layer.axis_name,
            unbiased=unbiased,
            autodiff=autodiff,
            update_statistics=check_flag("update_statistics", update_statistics),
            function=function,
        )


@contextmanager
def explain_immutable() -> Iterator[None]:
    """Say which arguments help where Flax refuses to update the statistics."""
    try:
        yield
    except ModifyScopeVariableError as error:
        error.add_note(
            'jaxbn: in training pass mutable=["batch_stats"] to apply, which then '
            "returns the new statistics beside y; at evaluation pass "
            "use_running_average=True to the layer."
        )
        raise


def _apply_layer(
    layer: nn.BatchNorm,
    x: ArrayLike,
    *,
    train: bool,
    mask: ArrayLike | None,
    axis_name: AxisNames | None,
    unbiased: bool = False,
    autodiff: Literal["custom_vjp", "jax"] = "custom_vjp",
    update_statistics: bool = True,
    function: Function = batch_norm,
) -> jax.Array:
    """Apply a layer in this mode, synchronized over this axis."""
    initializing = layer.is_initializing()
    shape = tuple(jnp.shape(x)[a] for a in ascending_axes(layer.axis, jnp.ndim(x)))
    updated = train and update_statistics
    stats = _statistics(layer, shape, counted=initializing or updated)
    params = _params(layer, shape)
    with initialization(initializing):
        y, state = call_batch_norm(
            function,
            layer,
            params,
            make_state(**{name: variable.value for name, variable in stats.items()}),
            as_inexact(x),
            train=train,
            mask=mask,
            axis_name=axis_name,
            dtype=canonicalize_dtype(x, *params, dtype=layer.dtype),
            unbiased=unbiased,
            autodiff=autodiff,
        )
    if updated and not initializing:
        for name, variable in stats.items():
            variable.value = getattr(state, name)
    return y


def _statistics(
    layer: nn.BatchNorm, shape: tuple[int, ...], counted: bool
) -> dict[str, nn.Variable]:
    """Return the layer's variables; the `count` exists, or is created if `counted`."""
    dtype = jnp.float32 if layer.force_float32_reductions else layer.param_dtype
    variable = partial(layer.variable, "batch_stats")
    stats = {
        "mean": variable("mean", jnp.zeros, shape, dtype),
        "var": variable("var", jnp.ones, shape, dtype),
    }
    counted = counted or layer.has_variable("batch_stats", "count")
    if counted and counts_batches(layer):
        stats["count"] = variable("count", jnp.zeros, (), jnp.float32)
    return stats


def _params(layer: nn.BatchNorm, shape: tuple[int, ...]) -> AnyParams:
    def param(name: str, used: bool, init: Initializer) -> jax.Array | None:
        if not used:
            return None
        value = layer.param(name, init, shape, layer.param_dtype)
        keep = layer.force_float32_reductions
        return value if keep else value.astype(layer.param_dtype)

    return BatchNormParams(
        scale=param("scale", layer.use_scale, layer.scale_init),
        bias=param("bias", layer.use_bias, layer.bias_init),
    )
