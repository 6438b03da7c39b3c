"""The statistics of many batches, merged exactly."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Inexact

from .._core.axes import Axes, reduction_axes
from .._core.dtypes import accumulation_dtype, real_dtype
from .._core.moments import moments
from .._core.running import has_variance, unbiased_variance
from .._core.sharding import shard_like
from .._core.statistics import squeeze_moments
from .._core.sync import AxisName, Groups, merge

AnyArray = Array | np.ndarray  # JAX on the device, NumPy on the host
Real = Float[AnyArray, "*features"]


class Accumulator(NamedTuple):
    """Hold the statistics of some batches: six arrays of the features' shape.

    `mean` and `m2` = Σ|x-μ|² are those of all `n` = Σ n_B elements together;
    `num_batches` counts the batches that have an element of the feature. The paper's
    variance needs two sums over the batches with n_B > 1, which have an unbiased
    variance s²_B: `var_weight` = Σ n_B and `weighted_var` = Σ n_B s²_B.
    """

    mean: Inexact[AnyArray, "*features"]
    m2: Real
    n: Real
    num_batches: Real
    var_weight: Real
    weighted_var: Real

    @classmethod
    def empty(cls, mean: Array) -> "Accumulator":
        """Return the accumulator of no batch, for features of shape `mean.shape`.

        Its dtype is the widest that is enabled.
        """
        return Accumulator(
            *[jnp.zeros(mean.shape, jax.dtypes.canonicalize_dtype("float64"))] * 6
        )

    @classmethod
    def from_batch(
        cls,
        x: Inexact[Array, "*x"],
        mask: Array | None,
        feature_axes: Axes,
        axis_name: AxisName | None = None,
        groups: Groups | None = None,
    ) -> "Accumulator":
        """Accumulate one batch over all axes but `feature_axes`, on the device."""
        mask = None if mask is None else shard_like(mask, x)
        x_acc = x.astype(accumulation_dtype(x.dtype))
        axes = reduction_axes(feature_axes, x.ndim)
        closed_form = not jnp.iscomplexobj(x)
        local = moments(x_acc, x, mask, axes, closed_form=closed_form)
        batch = squeeze_moments(merge(local, axis_name, groups), feature_axes)
        # Of a feature without elements the moments are no numbers.
        mean, var, n = (jnp.where(batch.n <= 0, 0, v) for v in batch[:3])
        var_weight = jnp.where(has_variance(batch, unbiased=True), n, 0)
        weighted_var = jnp.where(var_weight > 0, n * unbiased_variance(batch), 0)
        is_reached = (n > 0).astype(n.dtype)
        return Accumulator(mean, n * var, n, is_reached, var_weight, weighted_var)

    def merge(self, other: "Accumulator") -> "Accumulator":
        """Return the accumulator of the batches of both, in NumPy or JAX arrays.

            n = n₁ + n₂,   μ = μ₁ + δ n₂ / n,   m2 = m2₁ + m2₂ + |δ|² n₁ n₂ / n

        with δ = μ₂ - μ₁: Chan, Golub & LeVeque 1979, eq. 2.1.
        """
        n = self.n + other.n
        share = other.n / (n + (n == 0).astype(n.dtype))
        delta = other.mean - self.mean
        return Accumulator(
            mean=self.mean + share.astype(delta.dtype) * delta,
            m2=self.m2 + other.m2 + self.n * share * abs(delta) ** 2,
            n=n,
            num_batches=self.num_batches + other.num_batches,
            var_weight=self.var_weight + other.var_weight,
            weighted_var=self.weighted_var + other.weighted_var,
        )

    def astype(self, dtype: DTypeLike) -> "Accumulator":
        """Cast the mean to `dtype`, and the other arrays to its real dtype."""
        mean, *others = self
        real = real_dtype(dtype)
        return Accumulator(mean.astype(dtype), *(part.astype(real) for part in others))
