"""Batch renormalization as a layer for Flax linen."""

from dataclasses import field

from flax import linen as nn

from .._flax.layer import Function, Limit, renorm_function
from ._batch_norm import BatchNorm


class BatchRenorm(BatchNorm):
    """Normalize as `BatchNorm` does, corrected towards the running statistics.

        y = ((x - μ_B) / σ_B · r + d) · scale + bias
        r = clip(σ_B / σ, 1 / r_max, r_max),   d = clip((μ_B - μ) / σ, -d_max, d_max)

    as `jaxbn.batch_renorm` does. Fields and variables are those of
    `jaxbn.linen.BatchNorm`, without `virtual_batch_size`, so that checkpoints work with
    either.

    **Fields of its own**

    - `r_max`, `d_max`: a number, or a schedule of the layer's step: a function of the
      number of batches that have updated the statistics, for instance optax's.
      `batch_stats` then holds a `count` beside `mean` and `var`. The paper keeps 1 and
      0, batch norm, for 5,000 steps, and raises them to 3 in 40,000 and 5 in 25,000
      steps. Keyword only.

    Source: S. Ioffe, [arXiv:1702.03275](https://arxiv.org/abs/1702.03275), Algorithm 1.

    >>> import jax, jax.numpy as jnp, jaxbn.linen, optax
    >>> layer = jaxbn.linen.BatchRenorm(
    ...     use_running_average=False,
    ...     r_max=optax.linear_schedule(1.0, 3.0, 35_000, transition_begin=5_000),
    ...     d_max=optax.linear_schedule(0.0, 5.0, 20_000, transition_begin=5_000),
    ... )
    >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
    >>> variables = layer.init(jax.random.key(0), x)
    >>> y, updates = layer.apply(variables, x, mutable=["batch_stats"])
    >>> y.round(3)  # the first step is batch norm
    Array([[-1., -1.],
           [ 1.,  1.]], dtype=float32)
    >>> updates["batch_stats"]["count"]
    Array(1., dtype=float32)
    """

    r_max: Limit = field(default=3.0, kw_only=True)
    d_max: Limit = field(default=5.0, kw_only=True)

    @nn.nowrap
    def _function(self) -> Function:
        return renorm_function(self.r_max, self.d_max, self.virtual_batch_size)
