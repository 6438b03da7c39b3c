"""Translate PyTorch's momentum, and the debiased averages of haiku and equinox."""

import numpy as np

from ._keymap import Arrays, describe


def torch_momentum(momentum: float | None) -> float | None:
    """Translate PyTorch's momentum to jaxbn's, or back: 1 - momentum.

    PyTorch's momentum is the weight of the new batch, jaxbn's the weight of the old
    statistics. `None`, the average of all batches, is `None` in both.

    >>> from jaxbn.convert import torch_momentum
    >>> torch_momentum(0.1), torch_momentum(None)
    (0.9, None)
    """
    return None if momentum is None else 1 - momentum


def debiased_momentum(decay: float, count: int) -> float:
    """Return the momentum of a debiased average's next step.

    haiku's averages, and equinox's with mode "batch", are debiased as Adam's are. With
    d the decay, v the batch statistic, h the hidden average and a the debiased one:

        hₜ = d·hₜ₋₁ + (1 - d)·vₜ,   aₜ = hₜ / (1 - dᵗ)
        aₜ₊₁ = m·aₜ + (1 - m)·vₜ₊₁,   m = 1 - (1 - d) / (1 - dᵗ⁺¹)

    With momentum m, new at each step, `jaxbn.batch_norm` continues the average exactly.
    With `momentum=decay` it forgets the early batches more slowly, which makes no
    difference after several multiples of 1 / (1 - decay) steps.

    **Arguments**

    - `decay`: the library's momentum or decay rate, d.
    - `count`: the number of batches so far, t.

    Source: D. P. Kingma and J. Ba, "Adam: A Method for Stochastic Optimization",
    [arXiv:1412.6980](https://arxiv.org/abs/1412.6980), section 3.

    >>> from jaxbn.convert import debiased_momentum
    >>> debiased_momentum(0.9, 0), round(debiased_momentum(0.9, 1), 4)
    (0.0, 0.4737)
    """
    return 1 - (1 - decay) / (1 - decay ** (count + 1))


def with_hidden(arrays: Arrays, decay: float, count: int | None, name: str) -> Arrays:
    """Add the hidden averages, hₜ = aₜ·(1 - dᵗ), to a layer's arrays."""
    count = _check_count(arrays["count"] if count is None else count, name)
    factor = 1 - decay**count
    return arrays | {
        "count": np.array(count, np.int32),
        "counter": np.array(count, np.int32),
        "hidden_mean": arrays["mean"] * factor,
        "hidden_var": arrays["var"] * factor,
    }


def _check_count(count: np.ndarray | int, name: str) -> int:
    """Return the number of batches, if it is positive."""
    if int(count) < 1:
        raise ValueError(
            f"{describe(name)} must have absorbed a batch, because the averages are "
            f"debiased by the count; got count={int(count)}. Flax's layers keep no "
            "count: pass count=, or state._replace(count=...), the number of training "
            "steps."
        )
    return int(count)
