"""Population statistics: the statistics of many batches, for inference."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from .._core.axes import check_axis
from .._core.dtypes import accumulation_dtype, real_dtype
from .._core.options import check_input
from .._core.variables import BatchNormState
from .._core.weights import check_mask
from .accumulator import Accumulator, AnyArray
from .batches import Tensor, accumulate

Variance = Literal["paper", "total"]
VARIANCES = ("paper", "total")
XAndMask = Tensor | tuple[Tensor, Tensor | None] | list[Any]

_accumulate_batch = partial(jax.jit, static_argnums=2)(Accumulator.from_batch)


def population(
    batches: Iterable[XAndMask],
    *,
    axis: int | Sequence[int] = -1,
    variance: Variance = "paper",
    max_batches: int | None = None,
    progress: Callable[[Iterable[XAndMask]], Iterable[XAndMask]] | None = None,
    skip_nonfinite: bool = False,
) -> BatchNormState:
    """Compute the statistics of a layer's inputs over many batches, for inference.

    With n_B elements per feature, mean μ_B and biased variance σ²_B in batch B, and
    N = Σ n_B elements in all:

        μ         = Σ n_B μ_B / N
        σ²(paper) = Σ n_B · n_B/(n_B - 1) · σ²_B / Σ n_B
        σ²(total) = Σ (n_B σ²_B + n_B (μ_B - μ)²) / (N - 1)

    For batches of m elements each, "paper" is m/(m-1)·E[σ²_B]: the expectation of the
    variance that the layer divided by in training. "total" is the unbiased variance of
    all elements, as if they were one batch; it adds the variance between the batches'
    means. The order of the examples in the stream changes the first, not the second.

    **Arguments**

    - `batches`: an iterable of arrays, floating or complex, each the layer's input for
      one batch; or of pairs `(x, mask)`, with a mask as in `batch_norm`: n_B is Σ mask,
      or the effective number of a floating mask's weights. A list of two arrays is a
      pair too, as PyTorch's loaders make it. Tensors of other libraries are taken by
      their `__array__`, or by DLPack. It is read once, one batch at a time. Batches may
      differ in all but their features, and may be sharded. A single batch is written
      `[x]`.
    - `axis`: the feature axis or axes, as in `batch_norm`.
    - `variance`: `"paper"` or `"total"`. A batch with n_B ≤ 1 has no variance: for
      "paper" it counts in the mean alone.
    - `max_batches`: the largest number of batches to read; all of them if `None`.
    - `progress`: wraps the iterable to show progress: `tqdm.tqdm`,
      `rich.progress.track`. The iterable has a length if `batches` has one.
    - `skip_nonfinite`: whether to leave out a batch with inf or NaN in its statistics,
      and warn at the end with the numbers of all such batches. Otherwise the first one
      is an error, which names it. Masked elements do not matter.

    **Returns** a `BatchNormState` for `batch_norm(..., train=False)`: `mean` and `var`
    in float32, or float64 for float64 input; `count` is the number of batches, of the
    feature that has most. A finished pass is continued by a second one:
    `merge_states([first, second], weights=[n_1, n_2])`, with the elements of a feature
    in each, gives the mean of one pass, and of two "total" variances that of one pass
    to a relative 2/N.

    **Raises** `ValueError` if there is no batch, if batches differ in their features,
    if a feature has no variance, or if a batch or a result is not finite; `TypeError`
    for dtypes and kinds, for an array where an iterable of batches belongs, and within
    `jit`.

    Differences from PyTorch: `torch.optim.swa_utils.update_bn` gives each batch the
    same weight; here a short last batch has the weight of its elements.

    Source: Ioffe & Szegedy, [arXiv:1502.03167](https://arxiv.org/abs/1502.03167),
    Algorithm 2, step 10, for batches of any size. Chan, Golub & LeVeque,
    "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979,
    for the merge. Such a pass is also known as PreciseBN: Wu & Johnson, "Rethinking
    'Batch' in BatchNorm", [arXiv:2105.07576](https://arxiv.org/abs/2105.07576).

    >>> import jax.numpy as jnp, jaxbn
    >>> batches = [jnp.array([[1.0], [3.0]]), jnp.array([[6.0], [8.0], [10.0]])]
    >>> jaxbn.population(batches)  # unbiased variances 2 (n = 2) and 4 (n = 3)
    BatchNormState(mean=Array([5.6], dtype=float32),
                   var=Array([3.2], dtype=float32),
                   count=Array(2., dtype=float32))
    >>> jaxbn.population(batches, variance="total").var
    Array([13.3], dtype=float32)
    """
    check_variance(variance)
    dtypes = []

    def measure(_: int, batch: XAndMask) -> dict[str, Accumulator]:
        x, mask = cast(tuple[ArrayLike, ArrayLike | None], _x_and_mask(batch))
        x = check_input(x)
        dtypes.append(accumulation_dtype(x.dtype))
        mask = check_mask(mask, x.shape)
        return {"x": _accumulate_batch(x, mask, check_axis(axis, x.ndim))}

    totals = accumulate(measure, batches, max_batches, progress, skip_nonfinite)
    (total,) = totals.values()
    _check_every_feature_reached(total.n)
    mean, var = finalize("x", total, variance)
    dtype = accumulation_dtype(*dtypes)
    return BatchNormState(
        mean=jnp.asarray(cast_finite("x", mean, dtype)),
        var=jnp.asarray(cast_finite("x", var, real_dtype(dtype))),
        count=jnp.asarray(total.num_batches.max(), jnp.float32),
    )


def _x_and_mask(batch: XAndMask) -> tuple[Tensor, Tensor | None]:
    """Return x and mask of a batch: of a pair, or of x without a mask."""
    if isinstance(batch, list):
        has_array = any(getattr(item, "ndim", 0) > 0 for item in batch)
        batch = tuple(batch) if has_array else jnp.asarray(batch)
    if not isinstance(batch, tuple):
        return batch, None
    if len(batch) != 2:
        raise ValueError(
            f"a batch must be x or a pair (x, mask); got {len(batch)} of them. "
            "Pass one array for x: batch[0], or jnp.stack(batch)."
        )
    return batch


def finalize(
    layer: str, total: Accumulator, variance: Variance
) -> tuple[AnyArray, AnyArray]:
    """Return mean and variance of each feature; 0 and 0 for one with no element."""
    squares, divisor = (
        (total.weighted_var, total.var_weight)
        if variance == "paper"
        else (total.m2, total.n - 1)
    )
    _check_has_variance(layer, (total.n > 0) & (divisor <= 0), variance)
    return total.mean, squares / np.where(divisor > 0, divisor, 1)


def cast_finite(layer: str, values: AnyArray, dtype: DTypeLike) -> AnyArray:
    """Cast statistics to the dtype that they are stored in, if they fit."""
    with np.errstate(over="ignore"):
        stored = values.astype(dtype)
    bad = ~np.isfinite(stored)
    if np.any(bad):
        raise ValueError(
            f"statistics must be finite; got values too large for {stored.dtype} for "
            f"{np.sum(bad)} of {bad.size} features of {layer}. Scale the batches down, "
            "or store the statistics in a wider dtype."
        )
    return stored


def check_variance(variance: Variance) -> None:
    """Check that `variance` is a known definition."""
    if variance not in VARIANCES:
        raise ValueError(
            f"variance must be one of {VARIANCES}; got {variance!r}. Use 'paper' for "
            "the mean variance of a batch, 'total' for that of all elements together."
        )


def _check_every_feature_reached(n: AnyArray) -> None:
    """Check that every feature has an element in some batch."""
    if np.any(n <= 0):
        raise ValueError(
            "every feature needs an unmasked element in some batch; "
            f"{np.sum(n <= 0)} of {n.size} have none. Pass batches with elements of "
            "each feature, or masks that leave some."
        )


def _check_has_variance(layer: str, lacking: AnyArray, variance: Variance) -> None:
    """Check that every feature with an element has enough for a variance."""
    if np.any(lacking):
        where = "in one batch" if variance == "paper" else "in all batches together"
        raise ValueError(
            f"variance={variance!r} needs more than one element of a feature {where}; "
            f"{np.sum(lacking)} of {lacking.size} features of {layer} have none such. "
            "Pass larger batches" + (", or 'total'." if variance == "paper" else ".")
        )
