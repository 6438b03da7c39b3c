"""Batch renormalization as a layer for Flax nnx."""

from typing import Any

from .._flax.layer import Function, Limit, renorm_function
from ._batch_norm import BatchNorm


class BatchRenorm(BatchNorm):
    """Normalize as `BatchNorm` does, corrected towards the running statistics.

        y = ((x - μ_B) / σ_B · r + d) · scale + bias
        r = clip(σ_B / σ, 1 / r_max, r_max),   d = clip((μ_B - μ) / σ, -d_max, d_max)

    as `jaxbn.batch_renorm` does. Arguments and Variables are those of
    `jaxbn.nnx.BatchNorm`, without `virtual_batch_size`, so that checkpoints work with
    either.

    **Arguments of its own**

    - `r_max`, `d_max`: a number, or a schedule of the layer's step: a function of the
      number of batches that have updated the statistics, for instance optax's. The
      layer then has a third `nnx.BatchStat`, `count`. The paper keeps 1 and 0, batch
      norm, for 5,000 steps, and raises them to 3 in 40,000 and 5 in 25,000 steps.

    Source: S. Ioffe, [arXiv:1702.03275](https://arxiv.org/abs/1702.03275), Algorithm 1.

    >>> import jax.numpy as jnp, jaxbn.nnx, optax
    >>> from flax import nnx
    >>> layer = jaxbn.nnx.BatchRenorm(
    ...     2,
    ...     r_max=optax.linear_schedule(1.0, 3.0, 35_000, transition_begin=5_000),
    ...     d_max=optax.linear_schedule(0.0, 5.0, 20_000, transition_begin=5_000),
    ...     rngs=nnx.Rngs(0),
    ... )
    >>> layer(jnp.array([[1.0, 10.0], [3.0, 30.0]])).round(3)  # batch norm at first
    Array([[-1., -1.],
           [ 1.,  1.]], dtype=float32)
    >>> layer.count[...]
    Array(1., dtype=float32)
    """

    def __init__(
        self,
        num_features: int,
        *,
        r_max: Limit = 3.0,
        d_max: Limit = 5.0,
        **options: Any,  # those of `BatchNorm`
    ):
        self.r_max, self.d_max = r_max, d_max  # first: a schedule needs a count
        super().__init__(num_features, **options)

    def _function(self) -> Function:
        return renorm_function(self.r_max, self.d_max, self.virtual_batch_size)
