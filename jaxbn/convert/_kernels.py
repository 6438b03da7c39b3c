"""Transpose and reshape weights between a library's layout and Flax's.

In Flax a kernel is (*spatial, in / groups, out), the vectors of a layer are (C,), and
an embedding is (N, D), as in each of the libraries.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Shape = tuple[int, ...]


class Layout(NamedTuple):
    """Hold both conversions of a library's kernels, of two axes or more."""

    to_flax: Callable[[np.ndarray, Shape], np.ndarray]  # takes the shape in Flax too
    from_flax: Callable[[np.ndarray], np.ndarray]


def is_vector(shape: Shape) -> bool:
    """Return whether all axes but one have length 1, as in (1, 1, 1, C)."""
    return sum(length > 1 for length in shape) <= 1


def in_flax_layout(
    array: np.ndarray, field: str, shape: Shape, layout: Layout
) -> np.ndarray:
    """Return a library's array in the layout of the Flax variable `field`."""
    if field == "kernel" and array.ndim > 1:
        return layout.to_flax(array, shape)
    if field in ("scale", "bias") and is_vector(array.shape):
        return array.reshape(-1)
    return array


def in_library_layout(array: np.ndarray, field: str, layout: Layout) -> np.ndarray:
    """Return a Flax variable in the library's layout, up to axes of length 1."""
    is_kernel = field == "kernel" and array.ndim > 1
    return layout.from_flax(array) if is_kernel else array


def _keep(kernel: np.ndarray, shape: Shape = ()) -> np.ndarray:
    return kernel


def _features_last(kernel: np.ndarray, shape: Shape) -> np.ndarray:
    """Transpose (out, in, *spatial) to (*spatial, in, out)."""
    return np.moveaxis(kernel, (0, 1), (-1, -2))


def _features_first(kernel: np.ndarray) -> np.ndarray:
    """Transpose (*spatial, in, out) to (out, in, *spatial)."""
    return np.moveaxis(kernel, (-1, -2), (0, 1))


def _merge_multiplier(kernel: np.ndarray, shape: Shape) -> np.ndarray:
    """Reshape (*spatial, C, m) to (*spatial, 1, C·m) if Flax's kernel is depthwise."""
    *spatial, features, multiplier = kernel.shape
    if not spatial or shape[-2:-1] != (1,):
        return kernel
    return kernel.reshape(*spatial, 1, features * multiplier)


FEATURES_LAST = Layout(_keep, _keep)  # Flax, haiku
FEATURES_FIRST = Layout(_features_last, _features_first)  # PyTorch, equinox
# Keras is like Flax, except that a depthwise kernel keeps the multiplier apart;
# `cast_like` reshapes it back.
MULTIPLIER_APART = Layout(_merge_multiplier, _keep)
