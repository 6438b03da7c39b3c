"""The layer for Flax nnx."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from flax.typing import Initializer
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import PyTree

from .._core.batch_norm import batch_norm
from .._core.variables import BatchNormParams
from .._flax.layer import (
    AxisNames,
    Function,
    Layer,
    as_inexact,
    call_batch_norm,
    check_flag,
    counts_batches,
    make_state,
)
from ._graph import statistics


class BatchNorm(nnx.BatchNorm):
    """Normalize as `flax.nnx.BatchNorm` does, argument for argument, by `batch_norm`.

        y = (x - μ) / √(σ² + ε) · scale + bias

    μ and σ² are the batch's, or the running ones with `use_running_average=True`
    (`model.eval()`, or `nnx.view`). Arguments, defaults and Variables are Flax's, so
    that models and checkpoints work with either: `scale` and `bias` are `nnx.Param`,
    `mean` and `var` `nnx.BatchStat`, each of shape `(num_features,)`. `axis_name` need
    not exist at inference.

    **Arguments that differ from Flax's**

    - `momentum`: as in Flax the share of the old statistics that is kept, in [0, 1]:
      PyTorch's 0.1 is 0.9 here. May be `None`: the running statistics are then the
      average of all batches with equal weight, and a third `nnx.BatchStat`, `count`,
      counts them. `momentum` and `epsilon` may be traced scalars, as in Flax.
    - `unbiased`: `True` updates the running variance with n/(n-1)·σ², as in the paper
      and PyTorch; the default, `False`, with σ², as in Flax.
    - `autodiff`: `"jax"` is for forward mode (`jax.jvp`, `jax.jacfwd`), which the
      closed form of the backward, `"custom_vjp"`, refuses.
    - `virtual_batch_size`: normalizes each group of so many examples by itself, as
      in `jaxbn.batch_norm`.
    - `use_fast_variance`: accepted, and without effect: the variance is the stable one.
    - `promote_dtype`: decides the dtypes of `x`, `scale` and `bias`, as in Flax; its
      results for the statistics are dropped, so that they are never rounded.

    **Arguments** of a call: `x` (integers are converted to float32),
    `use_running_average`, and `mask`, which broadcasts to `x`: bool and integer masks
    leave out zeros, a floating mask holds weights (Flax would read it as a bool).
    `update_statistics=False` normalizes by the batch, with the exact gradient, and
    leaves the running statistics unchanged.

    **Returns** y, in `dtype`, or in the dtype that `x`, `scale` and `bias` promote to.

    **Raises** `ValueError` and `TypeError` as `jaxbn.batch_norm` does, while tracing.

    Differences from Flax: the variance does not cancel for large means, masked
    statistics are weighted by count over devices, an empty batch (or shard) leaves the
    running statistics unchanged, inference in bfloat16 does not round these, and the
    mean of complex input stays complex. Errors here, but not in Flax: a momentum
    outside of [0, 1], a negative epsilon, and other values than bools for
    `use_running_average` and the arguments that are flags.

    Source: Ioffe & Szegedy, [arXiv:1502.03167](https://arxiv.org/abs/1502.03167),
    Algorithms 1 and 2.

    >>> import jax.numpy as jnp, jaxbn.nnx
    >>> from flax import nnx
    >>> layer = jaxbn.nnx.BatchNorm(2, momentum=0.9, rngs=nnx.Rngs(0))
    >>> layer(jnp.array([[1.0, 10.0], [3.0, 30.0]])).round(3)
    Array([[-1., -1.],
           [ 1.,  1.]], dtype=float32)
    >>> layer.mean[...]
    Array([0.2, 2. ], dtype=float32)
    """

    # The options that Flax's layer lacks. Defaults of the class, so that replacing the
    # class of a layer is enough in both directions.
    unbiased: bool = False
    autodiff: Literal["custom_vjp", "jax"] = "custom_vjp"
    virtual_batch_size: int | None = None

    def __init__(
        self,
        num_features: int,
        *,
        use_running_average: bool | None = False,
        axis: int = -1,
        momentum: ArrayLike | None = 0.99,
        epsilon: ArrayLike = 1e-5,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = nnx.initializers.zeros_init(),  # noqa: B008
        scale_init: Initializer = nnx.initializers.ones_init(),  # noqa: B008
        axis_name: str | Sequence[str] | None = None,
        axis_index_groups: Sequence[Sequence[int]] | None = None,
        use_fast_variance: bool = True,
        promote_dtype: Callable[..., PyTree] = dtypes.promote_dtype,
        unbiased: bool = False,
        autodiff: Literal["custom_vjp", "jax"] = "custom_vjp",
        virtual_batch_size: int | None = None,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, object] = MappingProxyType({}),
        scale_metadata: Mapping[str, object] = MappingProxyType({}),
    ):
        check_flag("use_bias", use_bias)
        check_flag("use_scale", use_scale)
        if use_running_average is not None:
            check_flag("use_running_average", use_running_average)
        super().__init__(
            num_features,
            use_running_average=use_running_average,
            axis=axis,
            momentum=momentum,  # pyright: ignore[reportArgumentType]
            epsilon=epsilon,  # pyright: ignore[reportArgumentType]
            dtype=dtype,
            param_dtype=param_dtype,
            use_bias=use_bias,
            use_scale=use_scale,
            bias_init=bias_init,
            scale_init=scale_init,
            axis_name=axis_name,  # pyright: ignore[reportArgumentType]
            axis_index_groups=axis_index_groups,
            use_fast_variance=use_fast_variance,
            promote_dtype=promote_dtype,
            rngs=rngs,
            bias_metadata=bias_metadata,
            scale_metadata=scale_metadata,
        )
        if check_flag("unbiased", unbiased):
            self.unbiased = True
        if autodiff != BatchNorm.autodiff:
            self.autodiff = autodiff
        if virtual_batch_size is not None:
            self.virtual_batch_size = virtual_batch_size
        if counts_batches(self):
            self.count = nnx.BatchStat(jnp.zeros((), jnp.float32))

    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | None = None,
        *,
        mask: ArrayLike | None = None,
        update_statistics: bool = True,
    ) -> jax.Array:
        """Normalize `x`; the arguments are explained at the class."""
        if use_running_average is None:
            use_running_average = check_running_average(self.use_running_average)
        return self._apply_layer(
            x,
            train=not check_flag("use_running_average", use_running_average),
            mask=mask,
            axis_name=self.axis_name,
            update_statistics=check_flag("update_statistics", update_statistics),
            function=self._function(),
        )

    def _function(self) -> Function:
        return partial(batch_norm, virtual_batch_size=self.virtual_batch_size)

    def _apply_layer(
        self,
        x: ArrayLike,
        *,
        train: bool,
        mask: ArrayLike | None,
        axis_name: AxisNames | None,
        update_statistics: bool = True,
        function: Function = batch_norm,
    ) -> jax.Array:
        """Apply the layer in this mode, synchronized over this axis."""
        stats = statistics(self)
        check_counted(self, "count" in stats)
        state = make_state(**{name: variable[...] for name, variable in stats.items()})
        params = [None if p is None else p[...] for p in (self.scale, self.bias)]
        x, _, _, *params = self.promote_dtype(
            (x, state.mean, state.var, *params), dtype=self.dtype
        )
        y, new_state = call_batch_norm(
            function,
            self,
            BatchNormParams(*params),
            state,
            as_inexact(x),
            train=train,
            mask=mask,
            axis_name=axis_name,
            dtype=dtypes.canonicalize_dtype(x, *params, dtype=self.dtype),
            unbiased=self.unbiased,
            autodiff=self.autodiff,
        )
        if train and update_statistics:
            for name, variable in stats.items():
                # Flax lets no gradient into a Variable either.
                variable.set_value(jax.lax.stop_gradient(getattr(new_state, name)))
        return y


def check_running_average(use_running_average: bool | None) -> bool:
    """Return the layer's own choice, for a call without one."""
    if use_running_average is None:
        raise ValueError(
            "use_running_average must be given to the layer or to its call; got None "
            "at both. Pass it to one of them, or call model.train() or model.eval()."
        )
    return use_running_average


def check_counted(layer: Layer, counted: bool) -> None:
    """Check that a layer that needs a count of its batches has one."""
    if counts_batches(layer) and not counted:
        reason = "momentum=None" if layer.momentum is None else "a schedule"
        raise ValueError(
            f"{reason} needs the layer's count of batches; got a layer without one. "
            f"Build it with {reason}, rather than change it afterwards."
        )
