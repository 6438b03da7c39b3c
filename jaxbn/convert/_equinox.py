"""Convert equinox's models, and `nn.BatchNorm`, with statistics in an `nn.State`.

With mode "ema", equinox keeps the running statistics as jaxbn does. With mode "batch",
it keeps a hidden mean that starts at 0 and a hidden variance that starts at 1, and
inference debiases both as if they had started at 0:

    mean = hidden_mean / (1 - momentum^count)
"""

from collections.abc import Mapping

import jax
import numpy as np
from jax.tree_util import keystr
from jaxtyping import PyTree

from .._core.variables import AnyParams, BatchNormState
from ._flax import read_from_flax, write_to_flax
from ._kernels import FEATURES_FIRST
from ._keymap import (
    AnyArray,
    Arrays,
    Found,
    KeyMap,
    Vectors,
    cast_like,
    describe,
    find_layers,
    replace_arrays,
)
from ._layers import Layer, as_arrays, check_fit, read_layer
from ._momentum import with_hidden

# The statistics are in the state: see `_vectors` and `_state_entries`.
EQUINOX = KeyMap(
    {"weight": "scale", "bias": "bias"},
    {
        "kernel": {"weight": "kernel", "bias": "bias"},
        "embedding": {"weight": "embedding"},
        "scale": {"weight": "scale", "bias": "bias"},
    },
    layout=FEATURES_FIRST,
)


def from_equinox(layer: PyTree, state: PyTree) -> Layer:
    """Convert an equinox layer and the model's `eqx.nn.State` to `(params, state)`.

    `eqx.nn.BatchNorm(C, axis_name, eps, momentum=m)` under `vmap` is then
    `batch_norm(params, state, x, train, axis=1, epsilon=eps, momentum=m,
    unbiased=False)`: equinox's running variance is the biased one, although its
    documentation says otherwise.

    The result has the statistics that equinox uses at inference. With mode "ema",
    `momentum=m` continues them; but equinox normalizes by the running statistics in
    training too, and keeps no count, so that `count` is 0. With mode "batch",
    `momentum=debiased_momentum(m, count)` is equinox's next step if `count` is not 0,
    and `momentum=m` is close to it long after 1 / (1 - m) batches. In this mode
    equinox's variance is too large by m^count / (1 - m^count), and so is the result's.

    **Raises** `ValueError` and `TypeError` as listed in `jaxbn.convert`, and
    `ValueError` with mode "ema" before the first batch, when equinox has no statistics.
    """
    return read_layer(_debiased_layers(layer, state), EQUINOX)


def to_equinox(
    params: AnyParams, state: BatchNormState, layer: PyTree, eqx_state: PyTree
) -> tuple[PyTree, PyTree]:
    """Copy a layer to an equinox layer and the model's `eqx.nn.State`.

    The inverse of `from_equinox`.

    **Arguments**

    - `layer`, `eqx_state`: as `eqx.nn.make_with_state` returns them. The layer holds
      the mode and the momentum.

    **Returns** the new `(layer, eqx_state)`.

    **Raises** `ValueError` if the layer does not fit, and with mode "batch" for a count
    of 0, because the statistics are debiased by it. If the batches were not counted,
    set the count: `state._replace(count=batches)`.
    """
    arrays = as_arrays(params, state)
    check_fit("", arrays, _vectors(layer, eqx_state))
    return _replace_layers(layer, eqx_state, {"": arrays}, None)


def from_equinox_tree(
    model: PyTree, state: PyTree, names: Mapping[str, str], variables: PyTree
) -> PyTree:
    """Copy the layers of an equinox model to `variables`.

    **Arguments**

    - `model`, `state`: as `eqx.nn.make_with_state` returns them.
    - `names`: the path of each `eqx.nn.BatchNorm` in `model`, and its path in
      `variables`: `{"layers/1": "BatchNorm_0"}` for the second layer of an
      `eqx.nn.Sequential`. Convolutions, linear layers, other norms and embeddings are
      copied if they are named: `{"layers/0": "Conv_0"}`.
    - `variables`: linen variables or an `nnx.State`.

    **Returns** a new tree like `variables`; **raises** as listed in `jaxbn.convert`.
    """
    source = _find_layers(model, _debiased_layers(model, state))
    return write_to_flax(source, EQUINOX, names, variables)


def to_equinox_tree(
    variables: PyTree,
    names: Mapping[str, str],
    model: PyTree,
    state: PyTree,
    *,
    count: int | None = None,
) -> tuple[PyTree, PyTree]:
    """Copy the layers of `variables` to an equinox model.

    The inverse of `from_equinox_tree`, with the same `names`.

    **Arguments** besides those of `from_equinox_tree`

    - `count`: the number of batches, for batch norms that keep no count, as Flax's.

    **Returns** the new `(model, state)`.

    **Raises** `ValueError` for a count of 0 too, with mode "batch".
    """
    norms = {name: _vectors(n, state) for name, n in _batch_norms(model).items()}
    layers = read_from_flax(variables, names, _find_layers(model, norms), EQUINOX)
    return _replace_layers(model, state, layers, count)


def _find_layers(model: PyTree, norms: dict[str, Vectors]) -> Found:
    """Return all layers; the batch norms are known by their type."""
    others = find_layers(model, EQUINOX).others
    return Found(norms, {name: others[name] for name in others if name not in norms})


def _batch_norms(model: PyTree) -> dict[str, PyTree]:
    """Return the batch norm layers of the model by their paths."""

    def is_batch_norm(node: PyTree) -> bool:
        return hasattr(node, "batch_state_index") and hasattr(node, "ema_state_index")

    nodes = jax.tree_util.tree_leaves_with_path(model, is_leaf=is_batch_norm)
    return {
        keystr(path, simple=True, separator="/"): node
        for path, node in nodes
        if is_batch_norm(node)
    }


def _vectors(layer: PyTree, state: PyTree) -> Vectors:
    """Return the layer's arrays, hidden statistics with mode "batch"."""
    mean, var = state.get(layer.batch_state_index or layer.ema_state_index)
    vectors = {"scale": layer.weight, "bias": layer.bias, "mean": mean, "var": var}
    return {field: vector for field, vector in vectors.items() if vector is not None}


def _debiased_layers(model: PyTree, state: PyTree) -> dict[str, Vectors]:
    """Return the arrays that inference uses, of each batch norm layer."""
    layers = _batch_norms(model)
    return {name: _debiased(layer, state, name) for name, layer in layers.items()}


def _debiased(layer: PyTree, state: PyTree, name: str) -> Vectors:
    vectors = _vectors(layer, state) | {"epsilon": layer.eps}
    if layer.mode == "ema":
        _check_not_new(state.get(layer.ema_first_time_index), name)
        return vectors
    count = int(state.get(layer.batch_counter))
    factor = 1 - layer.momentum**count if count else 1
    statistics = {field: vectors[field] / factor for field in ("mean", "var")}
    return vectors | statistics | {"count": count}


def _replace_layers(
    model: PyTree, state: PyTree, layers: Mapping[str, Arrays], count: int | None
) -> tuple[PyTree, PyTree]:
    """Return the model and the state with the arrays of all layers replaced.

    `State.set` is not used, because it makes the caller's state unusable.
    """
    leaves, structure = jax.tree.flatten(state)
    positions = jax.tree.unflatten(structure, range(len(leaves)))
    for name, layer in _batch_norms(model).items():
        for index, values in _state_entries(layer, layers[name], count, name):
            entry = jax.tree.leaves(positions.get(index))
            for position, value in zip(entry, values, strict=True):
                leaves[position] = cast_like(leaves[position], value)
    new_state = jax.tree.unflatten(structure, leaves)
    return replace_arrays(model, EQUINOX, layers), new_state


def _state_entries(
    layer: PyTree, arrays: Arrays, count: int | None, name: str
) -> list[tuple[PyTree, list[np.ndarray]]]:
    """Return the layer's entries of the state: index and values."""
    if layer.mode == "ema":
        return [
            (layer.ema_state_index, [arrays["mean"], arrays["var"]]),
            (layer.ema_first_time_index, [np.array(False)]),
        ]
    arrays = with_hidden(arrays, layer.momentum, count, name)
    return [
        (layer.batch_state_index, [arrays["hidden_mean"], arrays["hidden_var"]]),
        (layer.batch_counter, [arrays["count"]]),
    ]


def _check_not_new(first_time: AnyArray, name: str) -> None:
    """Check that a layer with mode "ema" has statistics."""
    if first_time:
        raise ValueError(
            f"{describe(name)} must have seen a batch, because with mode 'ema' equinox "
            "has no statistics before; got a new layer. Train it for a step, or start "
            "from jaxbn.init."
        )
