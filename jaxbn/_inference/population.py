"""Population statistics: those of many batches, for inference.

The moments of a batch are taken on the device, those of all batches merged on the host,
in float64: a few vectors of the features' shape, however long the stream.
"""

import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .._core.axes import Axes, gather, reduced_axes
from .._core.checks import check_axis, check_input, check_mask
from .._core.dtypes import real_dtype, widen
from .._core.moments import moments
from .._core.rows import per_row
from .._core.sharding import shard_like
from .._core.sync import merge
from .._core.variables import BatchNormState
from .population_checks import (
    check_batch,
    check_finite,
    check_max_batches,
    check_rows,
    check_same_features,
    check_some_batch,
    check_variance,
    check_varied,
)


def population(
    batches: Iterable[Any],
    *,
    axis: int | Sequence[int] = -1,
    variance: Literal["paper", "total"] | Any = "paper",
    max_batches: int | Any | None = None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] | None = None,
) -> BatchNormState:
    r"""Statistics of a layer's inputs over many batches, to normalize by at inference.

    With $n_B$ rows, mean $\mu_B$ and biased variance $\sigma_B^2$ in batch B, and
    $N = \sum n_B$ rows in all:

    $$\mu = \frac{1}{N} \sum_B n_B \mu_B \qquad
    \sigma^2_{paper} = \frac{\sum n_B \cdot \frac{n_B}{n_B - 1} \sigma_B^2}{\sum n_B}$$

    $$\sigma^2_{total} = \frac{1}{N - 1}
    \sum_B \left( n_B \sigma_B^2 + n_B (\mu_B - \mu)^2 \right)$$

    For batches of m rows each, "paper" is m/(m-1)·E[σ²_B]: the expectation of what the
    layer divided by in training. "total" is the unbiased variance of all rows, as if
    they were one batch; it adds the variance between the batches' means. The order of
    rows in the stream matters to the first, and not to the second.

    **Arguments**

    - `batches`: an iterable of arrays, floating or complex, each of them the input of
      the layer for one batch; or of pairs `(x, mask)`, with a mask as in `batch_norm`.
      Read once, one batch at a time; batches may differ in all but their features, and
      may be sharded.
    - `axis`: the feature axis or axes, as in `batch_norm`.
    - `variance`: `"paper"` or `"total"`. A batch with one row of a channel (n_B ≤ 1)
      has no variance: for "paper" it counts in the mean alone.
    - `max_batches`: read no more than so many; all of them unless given.
    - `progress`: wraps the iterable, to show how far it is: `tqdm.tqdm`,
      `rich.progress.track`. It is told the length where there is one.

    **Returns** a `BatchNormState` for `batch_norm(..., train=False)`: `mean` and `var`
    in float32, or float64 for float64 input; `count` is the number of batches absorbed.

    **Raises** `ValueError` where there is no batch, where batches differ in their
    features, where a channel has no variance, where a result is not finite;
    `TypeError` for dtypes and kinds.

    Against PyTorch, whose `torch.optim.swa_utils.update_bn` gives each batch the same
    weight: a short last batch counts for the rows it has.

    Source: Ioffe & Szegedy, [arXiv:1502.03167](https://arxiv.org/abs/1502.03167),
    Algorithm 2, step 10, for batches of any size. Chan, Golub & LeVeque,
    "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979,
    for the merge. Such a pass is also known as PreciseBN: Wu & Johnson, "Rethinking
    'Batch' in BatchNorm", [arXiv:2105.07576](https://arxiv.org/abs/2105.07576).

    >>> import jax.numpy as jnp, jaxbn
    >>> batches = [jnp.array([[1.0], [3.0]]), jnp.array([[6.0], [8.0], [10.0]])]
    >>> jaxbn.population(batches)  # variances 2 of two rows, 4 of three
    BatchNormState(mean=Array([5.6], dtype=float32),
                   var=Array([3.2], dtype=float32),
                   count=Array(2, dtype=int32))
    >>> jaxbn.population(batches, variance="total").var
    Array([13.3], dtype=float32)
    """
    check_variance(variance)
    dtypes = []

    def measure(batch: Any) -> dict[str, Tally]:
        x, mask = batch if isinstance(batch, tuple) else (batch, None)
        x = check_input(x)
        mask = None if mask is None else check_mask(mask, x.shape)
        dtypes.append(widen(x.dtype))
        return {"x": _tally(x, mask, check_axis(axis, x.ndim))}

    (total,) = tallies(measure, batches, max_batches, progress).values()
    check_rows(total.count)
    mean, var = statistics("x", total, variance)
    dtype = widen(*dtypes)
    return BatchNormState(
        mean=jnp.asarray(mean, dtype),
        var=jnp.asarray(var, real_dtype(dtype)),
        count=jnp.asarray(total.batches.max(), jnp.int32),
    )


class Tally(NamedTuple):
    """What some batches say of each channel: six arrays of the features' shape.

    The `mean` μ and `m2` = Σ|x-μ|² of the `count` = N = Σ n_B rows in all, and how many
    `batches` have a row of the channel. For the paper's variance, `varied` = Σ n_B and
    `spread` = Σ n_B s²_B over the batches with a variance s²_B = n_B/(n_B-1)·σ²_B.
    """

    mean: Any
    m2: Any
    count: Any  # pyright: ignore[reportIncompatibleMethodOverride]
    batches: Any
    varied: Any
    spread: Any


def no_tally(mean: Array) -> Tally:
    """Of no batch, for a `mean` of that shape, in the widest dtype there is."""
    return Tally(*[jnp.zeros(mean.shape, jax.dtypes.canonicalize_dtype("float64"))] * 6)


def tally(
    x: Array, mask: Array | None, axes: Axes, axis_name: Any = None, groups: Any = None
) -> Tally:
    """Of one batch, over all axes but the feature axes `axes`, on the device."""
    mask = None if mask is None else shard_like(mask, x)
    x = x.astype(widen(x.dtype))
    reduced = reduced_axes(axes, x.ndim)
    batch = merge(moments(x, x, mask, reduced, closed_form=False), axis_name, groups)
    count = jnp.asarray(batch.count, batch.m2.dtype)
    n = jnp.broadcast_to(count, batch.mean.shape)
    varied = jnp.where(n > 1, n, 0)
    unbiased = per_row(batch.m2, n - 1)
    batches = (n > 0).astype(n.dtype)
    parts = (batch.mean, batch.m2, n, batches, varied, varied * unbiased)
    return Tally(*(gather(part, axes) for part in parts))


_tally = partial(jax.jit, static_argnums=2)(tally)


def add(a: Tally, b: Tally) -> Tally:
    """Of the batches of both, each weighted by its count: NumPy's arrays, or JAX's.

        N = n_a + n_b,   μ = μ_a + δ n_b / N,   m2 = m2_a + m2_b + |δ|² n_a n_b / N

    with δ = μ_b - μ_a: Chan, Golub & LeVeque 1979, eq. 2.1.
    """
    count = a.count + b.count
    share = b.count / (count + (count == 0).astype(count.dtype))
    delta = b.mean - a.mean
    return Tally(
        mean=a.mean + share.astype(delta.dtype) * delta,
        m2=a.m2 + b.m2 + a.count * share * (delta * delta.conj()).real,
        count=count,
        batches=a.batches + b.batches,
        varied=a.varied + b.varied,
        spread=a.spread + b.spread,
    )


def cast(a: Tally, dtype: Any) -> Tally:
    """The same, with the mean in `dtype` and all else in the real one to it."""
    mean, *others = a
    return Tally(mean.astype(dtype), *(o.astype(real_dtype(dtype)) for o in others))


def tallies(
    measure: Callable[[Any], dict[str, Tally]],
    batches: Iterable[Any],
    max_batches: Any,
    progress: Callable[[Iterable[Any]], Iterable[Any]] | None,
) -> dict[str, Tally]:
    """The tally of every layer, by name, over all batches, in float64 on the host."""
    if max_batches is not None:
        batches = _First(batches, check_max_batches(max_batches))
    total: dict[str, Tally] = {}
    for batch in batches if progress is None else progress(batches):
        for name, new in jax.device_get(measure(check_batch(batch))).items():
            new = Tally(
                *(part.astype(np.result_type(part, np.float64)) for part in new)
            )
            old = total.get(name, new)
            check_same_features(new.mean.shape, old.mean.shape)
            total[name] = add(old, new) if name in total else new
    return check_some_batch(total)


class _First:
    """The first `most` of an iterable, with a length for whoever shows progress."""

    def __init__(self, iterable: Iterable[Any], most: int):
        self.iterable, self.most = iterable, most

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(self.iterable, self.most)

    def __len__(self) -> int:
        return min(operator.length_hint(self.iterable, self.most), self.most)


def statistics(
    layer: str, total: Tally, variance: str
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of each channel; 0 and 0 of one that never had a row."""
    squares, rows = (
        (total.spread, total.varied)
        if variance == "paper"
        else (total.m2, total.count - 1)
    )
    check_varied(layer, (total.count > 0) & (rows <= 0), variance)
    check_finite(layer, total.mean, squares)
    return total.mean, squares / np.where(rows > 0, rows, 1)
