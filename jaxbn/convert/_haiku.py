"""Convert dm-haiku's `BatchNorm`, and the parameters of models.

haiku keeps each running statistic twice: `hidden`, which starts at 0, and `average`,
which is debiased as in Adam and used at inference:

    average = hidden / (1 - decay^counter)
"""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from .._core.axes import check_axis, expand_features
from .._core.variables import AnyParams, BatchNormState
from ._flax import read_from_flax, write_to_flax
from ._kernels import is_vector
from ._keymap import (
    AnyArray,
    Arrays,
    Found,
    KeyMap,
    Vectors,
    describe,
    find_layers,
    replace_arrays,
)
from ._layers import VECTORS, Layer, as_arrays, read_layer
from ._momentum import with_hidden

Dicts = Mapping[str, PyTree]  # haiku's Params and State

HAIKU = KeyMap(
    {
        "scale": "scale",
        "offset": "bias",
        "~/mean_ema/average": "mean",
        "~/var_ema/average": "var",
        "~/mean_ema/counter": "count",
        # Not in jaxbn's state; computed by `with_hidden`:
        "~/mean_ema/hidden": "hidden_mean",
        "~/var_ema/hidden": "hidden_var",
        "~/var_ema/counter": "counter",  # equal to `count`
    },
    {
        "kernel": {"w": "kernel", "b": "bias"},
        "embedding": {"embeddings": "embedding"},
        "scale": {"scale": "scale", "offset": "bias"},
    },
    collections=("0", "1"),  # of the pair (params, state)
)


def from_haiku(params: Dicts, state: Dicts) -> Layer:
    """Convert a haiku layer's parameters and state to jaxbn's `(params, state)`.

    `hk.BatchNorm(create_scale, create_offset, decay_rate)` is then
    `batch_norm(params, state, x, train, momentum=decay_rate, unbiased=False)`, with
    `axis=1` for `data_format="channels_first"`.

    The running statistics are `average`, not `hidden`, so that inference is the same.
    haiku updates them with weights that depend on the step:
    `momentum=debiased_momentum(decay_rate, count)` is the same step, and
    `momentum=decay_rate` is close to it long after 1 / (1 - decay_rate) batches.

    **Arguments**

    - `params`: `{"scale": ..., "offset": ...}`, either or both, of shape (1, ..., C).
    - `state`: `{"~/mean_ema": {"average": ..., "counter": ...}, "~/var_ema": ...}`.
      In both, keys may begin with the layer's name, as in the dicts of haiku's `init`.

    **Raises** `ValueError` and `TypeError` as listed in `jaxbn.convert`.
    """
    return read_layer(_find_layers(params, state).norms, HAIKU)


def to_haiku(
    params: AnyParams,
    state: BatchNormState,
    *,
    decay: float,
    ndim: int,
    axis: int = -1,
) -> tuple[dict[str, AnyArray], dict[str, AnyArray]]:
    """Convert a layer to haiku's parameters and state.

    The inverse of `from_haiku`.

    **Arguments**

    - `decay`: the layer's `decay_rate`, which relates `hidden` to `average`.
    - `ndim`, `axis`: the rank of the layer's input and its feature axis; haiku's
      vectors have the same rank.

    **Returns** `(params, state)` with the keys that `from_haiku` takes, NumPy arrays.

    **Raises** `ValueError` for a count of 0, because the averages are debiased by it.
    If the batches were not counted, set the count: `state._replace(count=batches)`.
    """
    arrays = with_hidden(as_arrays(params, state), decay, None, "")
    flat = HAIKU.to_library(_expand(arrays, ndim, axis))
    return (
        {key: array for key, array in flat.items() if "/" not in key},
        {
            ema: {key: flat[f"{ema}/{key}"] for key in ("hidden", "average", "counter")}
            for ema in ("~/mean_ema", "~/var_ema")
        },
    )


def from_haiku_tree(
    params: Dicts, state: Dicts, names: Mapping[str, str], variables: PyTree
) -> PyTree:
    """Copy the layers of a haiku model to `variables`.

    **Arguments**

    - `params`, `state`: the model's. A layer with a `~/mean_ema` is a batch norm.
    - `names`: haiku's name of each such layer, and its path in `variables`:
      `{"res_net/~/batch_norm": "BatchNorm_0"}`. Convolutions, linear layers, other
      norms and embeddings are copied if they are named: `{"linear": "Dense_0"}`.
    - `variables`: linen variables or an `nnx.State`.

    **Returns** a new tree like `variables`; **raises** as listed in `jaxbn.convert`.
    """
    return write_to_flax(_find_layers(params, state), HAIKU, names, variables)


def to_haiku_tree(
    variables: PyTree,
    names: Mapping[str, str],
    params: Dicts,
    state: Dicts,
    *,
    decay: float,
    count: int | None = None,
) -> tuple[Dicts, Dicts]:
    """Copy the layers of `variables` to a haiku model.

    The inverse of `from_haiku_tree`, with the same `names`.

    **Arguments** besides those of `from_haiku_tree`

    - `decay`: the batch norms' `decay_rate`.
    - `count`: the number of batches, for batch norms that keep no count, as Flax's.

    **Returns** the new `(params, state)`.

    **Raises** `ValueError` for a count of 0 too.
    """
    target = _find_layers(params, state)
    layers = read_from_flax(variables, names, target, HAIKU)
    for name in target.norms:
        layers[name] = with_hidden(layers[name], decay, count, name)
    return replace_arrays((params, state), HAIKU, layers)


def _find_layers(params: Dicts, state: Dicts) -> Found:
    """Return all layers, the arrays of batch norms in the shape (C,)."""
    found = find_layers((params, state), HAIKU)
    norms = {name: _squeeze_all(layer, name) for name, layer in found.norms.items()}
    return found._replace(norms=norms)


def _squeeze_all(layer: Vectors, name: str) -> Vectors:
    """Return the arrays that jaxbn has too, with one axis."""
    return {
        field: _squeeze(layer[field], field, name)
        for field in (*VECTORS, "count")
        if field in layer
    }


def _expand(arrays: Arrays, ndim: int, axis: int) -> Arrays:
    """Expand the vectors, but not the counts, to the rank of the layer's input."""
    axes = check_axis(axis, ndim)
    return {
        field: np.array(expand_features(jnp.asarray(a), axes, ndim)) if a.ndim else a
        for field, a in arrays.items()
    }


def _squeeze(value: AnyArray, field: str, name: str) -> AnyArray:
    """Return a vector with one axis: (1, 1, 1, C) becomes (C,)."""
    shape = np.shape(value)
    if not is_vector(shape):
        raise ValueError(
            f"{field} of {describe(name)} must have one axis, the features', and other "
            f"axes of length 1; got shape {shape}. Convert layers with several feature "
            "axes by hand, with jaxbn.BatchNormParams and BatchNormState."
        )
    return value.reshape(-1) if shape else value
