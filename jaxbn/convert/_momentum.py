"""What other libraries call momentum, and averages that are debiased."""

from typing import Any

import numpy as np

from ._checks import check_counted


def torch_momentum(momentum: float | None) -> float | None:
    """PyTorch's momentum in our terms, and ours in PyTorch's: 1 - momentum.

    PyTorch's is the share that the new batch gets, ours the share that the old
    statistics keep. `None`, the average of all batches, is `None` in both.

    >>> from jaxbn.convert import torch_momentum
    >>> torch_momentum(0.1), torch_momentum(None)
    (0.9, None)
    """
    return None if momentum is None else 1 - momentum


def debiased_momentum(decay: float, count: int) -> float:
    r"""The momentum of the next step of an average that is debiased as Adam's are.

    $$h_t = d h_{t-1} + (1 - d) v_t, \quad a_t = \frac{h_t}{1 - d^t}
    \quad\Rightarrow\quad a_{t+1} = m a_t + (1 - m) v_{t+1}, \quad
    m = 1 - \frac{1 - d}{1 - d^{t+1}}$$

    haiku's averages are such, and equinox's in the mode "batch". With this momentum,
    new at each step, `jaxbn.batch_norm` continues them exactly; with `momentum=decay`
    it forgets the early batches more slowly, which after some multiples of
    1 / (1 - decay) steps makes no difference.

    **Arguments**: `decay`, their momentum; `count`, the batches absorbed so far.

    Source: D. P. Kingma and J. Ba, "Adam: A Method for Stochastic Optimization",
    [arXiv:1412.6980](https://arxiv.org/abs/1412.6980), section 3.

    >>> from jaxbn.convert import debiased_momentum
    >>> debiased_momentum(0.9, 0), round(debiased_momentum(0.9, 1), 4)
    (0.0, 0.4737)
    """
    return 1 - (1 - decay) / (1 - decay ** (count + 1))


def with_hidden(
    vectors: dict[str, Any], decay: float, count: int | None, name: str
) -> dict[str, Any]:
    """A layer's arrays and the hidden ones, h = a · (1 - d^t), that debias to them."""
    count = check_counted(vectors["count"] if count is None else count, name)
    share = 1 - decay**count
    return vectors | {
        "count": np.array(count, np.int32),
        "counter": np.array(count, np.int32),
        "hidden_mean": vectors["mean"] * share,
        "hidden_var": vectors["var"] * share,
    }
