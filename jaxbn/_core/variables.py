"""What a layer learns (`BatchNormParams`) and remembers (`BatchNormState`)."""

from typing import NamedTuple

from jaxtyping import Array, Float, Inexact, Int


class BatchNormParams(NamedTuple):
    r"""The learned affine map after normalization: $y = \hat x \cdot scale + bias$.

    Both have the features' shape. `None` stands for no scale (1) or no bias (0).
    They are γ and β of Ioffe & Szegedy, [arXiv:1502.03167](https://arxiv.org/abs/1502.03167),
    Algorithm 1.
    """

    scale: Inexact[Array, "*features"] | None
    bias: Inexact[Array, "*features"] | None


class BatchNormState(NamedTuple):
    """The running statistics, an immutable pytree: passed in, and returned updated.

    `mean` and `var` have the features' shape; `count` is an int32 scalar, the number
    of batches absorbed so far (PyTorch's `num_batches_tracked`; Flax has none).
    """

    mean: Inexact[Array, "*features"]
    var: Float[Array, "*features"]
    count: Int[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]
