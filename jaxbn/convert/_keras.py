"""Keras 3's `BatchNormalization`, by its weights."""

from collections.abc import Mapping, Sequence
from typing import Any

from .._core.variables import BatchNormParams, BatchNormState
from ._checks import check_length
from ._flax import into_flax, out_of_flax
from ._layers import Format, Layer, as_vectors, find, read, read_single, replace

KERAS = Format(
    {
        "gamma": "scale",
        "beta": "bias",
        "moving_mean": "mean",
        "moving_variance": "var",
    }
)


def from_keras(
    weights: Mapping[str, Any] | Sequence[Any],
    *,
    scale: bool = True,
    center: bool = True,
) -> Layer:
    """A layer's weights as `(params, state)`.

    `BatchNormalization(momentum=m, epsilon=e)` is then `batch_norm(params, state, x,
    train, momentum=m, epsilon=e, unbiased=False)`. Mind that Keras's epsilon is 1e-3
    unless given.

    **Arguments**

    - `weights`: `layer.get_weights()`, or `{w.name: w for w in layer.weights}`.
    - `scale`, `center`: the layer's own, which tell what a list of weights holds.

    Nothing is lost; but Keras counts no batches: `count` is 0, so that a first batch
    with `momentum=None` would replace the statistics. What batch renormalization keeps
    besides is dropped: inference is the same.

    **Raises** `ValueError` and `TypeError` as told in `jaxbn.convert`.

    >>> import numpy as np, jaxbn
    >>> params, state = jaxbn.convert.from_keras(
    ...     [np.ones(2), np.zeros(2), np.ones(2)], scale=False)
    >>> params
    BatchNormParams(scale=None, bias=Array([1., 1.], dtype=float32))
    """
    if not isinstance(weights, Mapping):
        present = {"gamma": scale, "beta": center}
        keys = [key for key in KERAS.keys if present.get(key, True)]
        weights = dict(zip(keys, check_length(weights, keys), strict=True))
    return read_single(find(dict(weights), KERAS), KERAS)


def to_keras(params: BatchNormParams, state: BatchNormState) -> dict[str, Any]:
    """A layer as `{name: NumPy array}`, in Keras's order; undoes `from_keras`.

    `layer.set_weights(list(arrays.values()))`. The count is lost.
    """
    vectors = as_vectors(params, state)
    return {key: vectors[ours] for key, ours in KERAS.keys.items() if ours in vectors}


def from_keras_tree(
    weights: Mapping[str, Any], names: Mapping[str, str], variables: Any
) -> Any:
    """`variables` with the batch norm layers of a whole Keras model.

    **Arguments**

    - `weights`: `{w.path: w for w in model.weights}`. What has a `moving_mean` is a
      batch norm.
    - `names`: Keras's path of each such layer to ours:
      `{"sequential/batch_normalization": "BatchNorm_0"}`.
    - `variables`: linen variables or an `nnx.State`.

    **Returns** a new tree like `variables`; **raises** as told in `jaxbn.convert`.
    """
    return into_flax(read(find(dict(weights), KERAS)), names, variables)


def to_keras_tree(
    variables: Any, names: Mapping[str, str], weights: Mapping[str, Any]
) -> dict[str, Any]:
    """`weights` with the layers of `variables`; `names` as for the way in.

    `for w in model.weights: w.assign(new[w.path])`.
    """
    arrays = dict(weights)
    return replace(arrays, KERAS, out_of_flax(variables, names, find(arrays, KERAS)))
