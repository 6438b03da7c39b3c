r"""equinox's `nn.BatchNorm`, by the layer and its `State`.

The mode "ema" keeps the running statistics as we do. The mode "batch" keeps a hidden
mean, which starts at 0, and a hidden variance, which starts at 1, and inference
debiases both as if they had started at 0:

$$mean = hidden\_mean / (1 - momentum^{count})$$
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.tree_util import keystr

from .._core.variables import BatchNormParams, BatchNormState
from ._checks import check_begun
from ._flax import into_flax, out_of_flax
from ._layers import (
    Format,
    Layer,
    Vectors,
    fitting,
    like,
    read,
    read_single,
    replace,
)
from ._momentum import with_hidden

EQUINOX = Format({"weight": "scale", "bias": "bias"})  # the state has keys of its own


def from_equinox(layer: Any, state: Any) -> Layer:
    """A layer and the model's `eqx.nn.State` as `(params, state)`.

    `eqx.nn.BatchNorm(C, axis_name, eps, momentum=m)` under `vmap` is then
    `batch_norm(params, state, x, train, axis=1, epsilon=eps, momentum=m,
    unbiased=False)`: equinox's running variance is the biased one, whatever its
    documentation says.

    What inference uses is carried. With the mode "ema", `momentum=m` goes on from
    there; but equinox normalizes by the running statistics in training too, and keeps
    no count: it is 0. With the mode "batch", `momentum=debiased_momentum(m, count)` is
    equinox's next step, if `count` is not 0, and `momentum=m` is near it once
    1 / (1 - m) batches are well past. equinox's variance there is too large by
    m^count / (1 - m^count), which is carried too.

    **Raises** `ValueError` and `TypeError` as told in `jaxbn.convert`, and `ValueError`
    for the mode "ema" before its first batch, when equinox has no statistics.
    """
    return read_single(_debiased(layer, state), EQUINOX)


def to_equinox(
    params: BatchNormParams, state: BatchNormState, layer: Any, eqx_state: Any
) -> tuple[Any, Any]:
    """`(layer, eqx_state)` with our values; undoes `from_equinox`.

    **Arguments**: `layer` and `eqx_state` as `eqx.nn.make_with_state` returns them,
    which says the mode and the momentum.

    **Raises** `ValueError` if the layer does not fit, and in the mode "batch" for a
    count of 0: there is nothing to debias. For a state that was not counted, say so:
    `state._replace(count=batches)`.
    """
    vectors = fitting({"": (params, state)}, {"": _vectors(layer, eqx_state)})
    return _replace(layer, eqx_state, vectors, None)


def from_equinox_tree(
    model: Any, state: Any, names: Mapping[str, str], variables: Any
) -> Any:
    """`variables` with the batch norm layers of a whole equinox model.

    **Arguments**

    - `model`, `state`: as `eqx.nn.make_with_state` returns them.
    - `names`: the path of each `eqx.nn.BatchNorm` in `model` to ours:
      `{"layers/1": "BatchNorm_0"}` for the second layer of an `eqx.nn.Sequential`.
    - `variables`: linen variables or an `nnx.State`.

    **Returns** a new tree like `variables`; **raises** as told in `jaxbn.convert`.
    """
    return into_flax(read(_debiased(model, state)), names, variables)


def to_equinox_tree(
    variables: Any,
    names: Mapping[str, str],
    model: Any,
    state: Any,
    *,
    count: int | None = None,
) -> tuple[Any, Any]:
    """`(model, state)` with the layers of `variables`; `names` as for the way in.

    **Arguments** besides those of `from_equinox_tree`

    - `count`: of batches absorbed, for layers that do not count them, as Flax's.

    **Raises** `ValueError` for a count of 0 too, in the mode "batch".
    """
    targets = {name: _vectors(n, state) for name, n in _layers(model).items()}
    return _replace(model, state, out_of_flax(variables, names, targets), count)


def _layers(model: Any) -> dict[str, Any]:
    """The layers that are batch norms, by their paths."""

    def is_batch_norm(node: Any) -> bool:
        return hasattr(node, "batch_state_index") and hasattr(node, "ema_state_index")

    nodes = jax.tree_util.tree_leaves_with_path(model, is_leaf=is_batch_norm)
    return {
        keystr(path, simple=True, separator="/"): node
        for path, node in nodes
        if is_batch_norm(node)
    }


def _vectors(layer: Any, state: Any) -> Vectors:
    """What the layer keeps, as it keeps it."""
    mean, var = state.get(layer.batch_state_index or layer.ema_state_index)
    vectors = {"scale": layer.weight, "bias": layer.bias, "mean": mean, "var": var}
    return {field: vector for field, vector in vectors.items() if vector is not None}


def _debiased(model: Any, state: Any) -> dict[str, Vectors]:
    """What inference uses, of all layers."""

    def debiased(layer: Any, name: str) -> Vectors:
        vectors = _vectors(layer, state)
        if layer.mode == "ema":
            check_begun(state.get(layer.ema_first_time_index), name)
            return vectors
        count = int(state.get(layer.batch_counter))
        share = 1 - layer.momentum**count if count else 1
        stats = {field: vectors[field] / share for field in ("mean", "var")}
        return vectors | stats | {"count": count}

    return {name: debiased(layer, name) for name, layer in _layers(model).items()}


def _replace(
    model: Any, state: Any, layers: Mapping[str, Vectors], count: int | None
) -> tuple[Any, Any]:
    # Not by `State.set`, which would make the caller's state unusable.
    leaves, structure = jax.tree.flatten(state)
    places = jax.tree.unflatten(structure, range(len(leaves)))

    def put(index: Any, *values: np.ndarray) -> None:
        for place, value in zip(
            jax.tree.leaves(places.get(index)), values, strict=True
        ):
            leaves[place] = like(leaves[place], value)

    for name, layer in _layers(model).items():
        vectors = layers[name]
        if layer.mode == "ema":
            put(layer.ema_state_index, vectors["mean"], vectors["var"])
            put(layer.ema_first_time_index, np.array(False))
        else:
            vectors = with_hidden(vectors, layer.momentum, count, name)
            put(layer.batch_state_index, vectors["hidden_mean"], vectors["hidden_var"])
            put(layer.batch_counter, vectors["count"])
    return replace(model, EQUINOX, layers), jax.tree.unflatten(structure, leaves)
