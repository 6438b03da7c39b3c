"""Convert Keras 3's `BatchNormalization`, and the weights of models."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import PyTree

from .._core.variables import AnyParams, BatchNormState
from ._flax import read_from_flax, write_to_flax
from ._kernels import MULTIPLIER_APART
from ._keymap import AnyArray, KeyMap, find_layers, list_names, replace_arrays
from ._layers import Layer, as_arrays, read_layer

KERAS = KeyMap(
    {
        "gamma": "scale",
        "beta": "bias",
        "moving_mean": "mean",
        "moving_variance": "var",
    },
    {
        "kernel": {"kernel": "kernel", "bias": "bias"},
        "embedding": {"embeddings": "embedding"},
        "scale": {"gamma": "scale", "beta": "bias"},
    },
    layout=MULTIPLIER_APART,
    epsilon=1e-3,
)


def from_keras(
    weights: Mapping[str, AnyArray] | Sequence[AnyArray],
    *,
    scale: bool = True,
    center: bool = True,
) -> Layer:
    """Convert a Keras layer's weights to `(params, state)`.

    `BatchNormalization(momentum=m, epsilon=e)` is then `batch_norm(params, state, x,
    train, momentum=m, epsilon=e, unbiased=False)`. Keras's default epsilon is 1e-3.

    **Arguments**

    - `weights`: `layer.get_weights()`, or `{w.name: w for w in layer.weights}`.
    - `scale`, `center`: the layer's options. They tell which arrays a list of weights
      holds.

    Nothing is lost, but Keras counts no batches: `count` is 0, so that the first batch
    with `momentum=None` replaces the statistics. The extra variables of batch
    renormalization are dropped; they do not change inference.

    **Raises** `ValueError` and `TypeError` as listed in `jaxbn.convert`.

    >>> import numpy as np, jaxbn
    >>> params, state = jaxbn.convert.from_keras(
    ...     [np.ones(2), np.zeros(2), np.ones(2)], scale=False)
    >>> params
    BatchNormParams(scale=None, bias=Array([1., 1.], dtype=float32))
    """
    if not isinstance(weights, Mapping):
        present = {"gamma": scale, "beta": center}
        keys = [key for key in KERAS.keys if present.get(key, True)]
        _check_length(weights, keys)
        weights = dict(zip(keys, weights, strict=True))
    return read_layer(find_layers(dict(weights), KERAS).norms, KERAS)


def to_keras(params: AnyParams, state: BatchNormState) -> dict[str, np.ndarray]:
    """Convert a layer to `{name: NumPy array}`, in the order of Keras's weights.

    The inverse of `from_keras`, without the count. Load it with
    `layer.set_weights(list(arrays.values()))`.
    """
    return KERAS.to_library(as_arrays(params, state))


def from_keras_tree(
    weights: Mapping[str, AnyArray], names: Mapping[str, str], variables: PyTree
) -> PyTree:
    """Copy the layers of a Keras model to `variables`.

    **Arguments**

    - `weights`: `{w.path: w for w in model.weights}`. A layer with a `moving_mean` is a
      batch norm.
    - `names`: Keras's path of each such layer, and its path in `variables`:
      `{"sequential/batch_normalization": "BatchNorm_0"}`. Convolutions, dense layers,
      other norms and embeddings are copied if they are named:
      `{"sequential/dense": "Dense_0"}`.
    - `variables`: linen variables or an `nnx.State`.

    **Returns** a new tree like `variables`; **raises** as listed in `jaxbn.convert`.
    """
    source = find_layers(dict(weights), KERAS)
    return write_to_flax(source, KERAS, names, variables)


def to_keras_tree(
    variables: PyTree, names: Mapping[str, str], weights: Mapping[str, AnyArray]
) -> dict[str, AnyArray]:
    """Copy the layers of `variables` to a Keras model's weights.

    The inverse of `from_keras_tree`, with the same `names`. Load the result with
    `for w in model.weights: w.assign(new[w.path])`.
    """
    old = dict(weights)
    new = read_from_flax(variables, names, find_layers(old, KERAS), KERAS)
    return replace_arrays(old, KERAS, new)


def _check_length(weights: Sequence[AnyArray], keys: Sequence[str]) -> None:
    """Check that a list of weights holds the arrays of the layer's options."""
    if len(weights) != len(keys):
        raise ValueError(
            f"a list of weights must hold {list_names(keys)}; got {len(weights)} "
            "arrays. Pass scale=False, center=False as the layer has them, or a dict."
        )
