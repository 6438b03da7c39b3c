"""Linear layers of Flax: the axes of their features, and which pad with zeros."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from .._core.axes import Axes


class Linear(NamedTuple):
    """The features of a layer's output and input, by their axes in its kernel.

    `outputs`: the kernel's axes of the last axes of y, in the order of y.
    `inputs`: the kernel's axis for each feature axis of x; all axes are negative.
    `obstacle`: why no batch norm before the layer can be folded into it.
    `refusal`: why no batch norm at all can be folded into it.
    """

    outputs: Axes
    inputs: tuple[tuple[int, int], ...]
    obstacle: str = ""
    refusal: str = ""


DENSE = Linear(outputs=(-1,), inputs=((-1, -2),))


OPTIONS = ("dot_general", "conv_general_dilated", "promote_dtype")
OPTIONS += ("dot_general_cls", "conv_general_dilated_cls")


def describe_functions(layer: object) -> str:
    """Return the refusal of a layer or batch norm with a function of the user."""
    for option in OPTIONS:
        function = getattr(layer, option, None)
        if function is not None and not _is_default(function, option):
            return f"has a {option} of its own, which may not be linear"
    return ""


def _is_default(function: Callable, option: str) -> bool:
    """Recognize a default by its name; a subclass's own default may be custom."""
    package = getattr(function, "__module__", "").partition(".")[0]
    return package in {"flax", "jax"} and function.__name__ == option


def describe_general(
    features: int | Sequence[int],
    axis: int | Sequence[int],
    batched: bool,
    ndim: int,
) -> Linear:
    """Describe `DenseGeneral` and `LinearGeneral`, for x of `ndim` dimensions."""
    num_outputs = len(np.atleast_1d(features))
    contracted = sorted(int(a) % ndim - ndim for a in np.atleast_1d(axis))
    first = -num_outputs - len(contracted)
    inputs = tuple((a, first + i) for i, a in enumerate(contracted))
    obstacle = "has batch dimensions" if batched else ""
    return Linear(tuple(range(-num_outputs, 0)), inputs, obstacle)


def describe_convolution(
    kernel_size: int | Sequence[int], padding: object, dilation: object, mask: object
) -> Linear:
    """Describe `Conv`, of any rank and number of groups; `dilation` of the input."""
    obstacle = ""
    if mask is not None:
        obstacle = "has a mask over its kernel"
    elif any(d != 1 for d in jax.tree.leaves(dilation)):
        obstacle = "puts zeros between the elements of its input"
    elif _pads_with_zeros(padding, kernel_size):
        obstacle = f"pads its input with zeros (padding={padding!r})"
    return DENSE._replace(obstacle=obstacle)


def describe_transposed(transpose_kernel: bool) -> Linear:
    """Describe `ConvTranspose`."""
    outputs = (-2,) if transpose_kernel else (-1,)
    return Linear(outputs, (), "puts zeros around the elements of its input")


def _pads_with_zeros(padding: object, kernel_size: int | Sequence[int]) -> bool:
    if not isinstance(padding, str):
        return any(jax.tree.leaves(padding))
    # These wrap or repeat the input itself.
    if padding.upper() in {"VALID", "CIRCULAR", "REFLECT"}:
        return False
    return bool(np.any(np.not_equal(kernel_size, 1)))
