"""The layer for Flax nnx, and how layers in a model are found and changed."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from flax.typing import Initializer
from jax.typing import ArrayLike, DTypeLike

from .._core.checks import check_counted, check_running_average
from .._core.variables import BatchNormParams
from .._flax.layer import as_inexact, normalize_with, state_of


class BatchNorm(nnx.BatchNorm):
    r"""`flax.nnx.BatchNorm`, argument for argument, computed as jaxbn does.

    $$y = \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} \cdot scale + bias$$

    μ and σ² are the batch's, or the running ones with `use_running_average=True`
    (`model.eval()`, or `nnx.view`). Arguments, defaults and Variables are Flax's, so
    that models and checkpoints work with either: `scale` and `bias` are `nnx.Param`,
    `mean` and `var` `nnx.BatchStat`, each of shape `(num_features,)`. `axis_name` need
    not exist at inference.

    **Arguments that differ from Flax's**

    - `momentum`: may be `None`: the running statistics are then the average of all
      batches with equal weight, and a third `nnx.BatchStat`, `count`, counts them.
      `momentum` and `epsilon` are Python numbers, never traced.
    - `unbiased`: the running variance absorbs n/(n-1)·σ², as in the paper and PyTorch.
      `False`, as in Flax, unless given.
    - `autodiff`: `"jax"` is for forward mode (`jax.jvp`, `jax.jacfwd`), which the
      closed form of the backward, `"custom_vjp"`, refuses.
    - `use_fast_variance`: accepted, and without effect: the variance is the stable one.
    - `promote_dtype`: decides the dtypes of `x`, `scale` and `bias`, as in Flax; what
      it makes of the statistics is dropped, so that they are never rounded.

    **Arguments** of a call: `x` (integers are taken as float32), `use_running_average`,
    and `mask`, which broadcasts to `x`: bool and integer masks leave out what is 0, a
    floating one weighs.

    **Returns** y, in `dtype`, or in what `x`, `scale` and `bias` promote to.

    **Raises** `ValueError` and `TypeError` as `jaxbn.batch_norm` does, while tracing.

    Against Flax: the variance does not cancel for large means, masked statistics are
    weighted by count over devices, an empty batch (or shard) leaves the running
    statistics alone, inference in bfloat16 does not round these, and the mean of
    complex input stays complex.

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

    # What Flax does not have. Here, so that a layer of Flax's that becomes one of ours
    # needs nothing more, nor one that goes back less.
    unbiased: bool = False
    autodiff: str = "custom_vjp"

    def __init__(
        self,
        num_features: int,
        *,
        use_running_average: bool | None = False,
        axis: int = -1,
        momentum: float | None = 0.99,
        epsilon: float = 1e-5,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = nnx.initializers.zeros_init(),  # noqa: B008
        scale_init: Initializer = nnx.initializers.ones_init(),  # noqa: B008
        axis_name: str | Sequence[str] | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: Callable[..., Any] = dtypes.promote_dtype,
        unbiased: bool = False,
        autodiff: str = "custom_vjp",
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        scale_metadata: Mapping[str, Any] = MappingProxyType({}),
    ):
        super().__init__(
            num_features,
            use_running_average=use_running_average,
            axis=axis,
            momentum=momentum,  # pyright: ignore[reportArgumentType]
            epsilon=epsilon,
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
        if unbiased:
            self.unbiased = True
        if autodiff != BatchNorm.autodiff:
            self.autodiff = autodiff
        if momentum is None:
            self.count = nnx.BatchStat(jnp.zeros((), jnp.int32))

    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | None = None,
        *,
        mask: ArrayLike | None = None,
    ) -> jax.Array:
        """Normalize `x`; the arguments are explained at the class."""
        if use_running_average is None:
            use_running_average = check_running_average(self.use_running_average)
        return self._compute(
            x, train=not use_running_average, mask=mask, axis_name=self.axis_name
        )

    def _compute(
        self, x: ArrayLike, *, train: bool, mask: ArrayLike | None, axis_name: Any
    ) -> jax.Array:
        """A call whose mode, and axis to synchronize over, are settled."""
        stats = self._stats()
        state = state_of(**{name: variable[...] for name, variable in stats.items()})
        params = [None if p is None else p[...] for p in (self.scale, self.bias)]
        x, _, _, *params = self.promote_dtype(
            (x, state.mean, state.var, *params), dtype=self.dtype
        )
        y, new_state = normalize_with(
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
        if train:
            for name, variable in stats.items():
                # Flax lets no gradient into a Variable either.
                variable.set_value(jax.lax.stop_gradient(getattr(new_state, name)))
        return y

    def _stats(self) -> dict[str, nnx.BatchStat]:
        check_counted(self.momentum, hasattr(self, "count"))
        names = ("mean", "var", "count")
        return {name: getattr(self, name) for name in names if hasattr(self, name)}


def set_class(layer: Any, kind: type) -> None:
    """Change a layer's class alone, so that all who hold the layer hold the new one.

    Past nnx's own `__setattr__`, which in Flax 0.12.8 notes the class as an attribute.
    """
    object.__setattr__(layer, "__class__", kind)


def batch_norms(model: Any) -> dict[str, Any]:
    """Flax's layers, ours and their subclasses by path, each once however shared."""
    nodes = nnx.iter_graph(model, graph=True)
    return {
        "/".join(map(str, path)): node
        for path, node in nodes
        if isinstance(node, nnx.BatchNorm)
    }
