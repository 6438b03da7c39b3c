"""Convert PyTorch's `state_dict`, of batch norms (`SyncBatchNorm` too) and models."""

from collections.abc import Mapping
from typing import TypeVar

import numpy as np
from jaxtyping import PyTree

from .._core.variables import AnyParams, BatchNormState
from ._flax import read_from_flax, write_to_flax
from ._kernels import FEATURES_FIRST
from ._keymap import AnyArray, KeyMap, find_layers, replace_arrays
from ._layers import Layer, as_arrays, read_layer

ArrayT = TypeVar("ArrayT")

TORCH = KeyMap(
    {
        "weight": "scale",
        "bias": "bias",
        "running_mean": "mean",
        "running_var": "var",
        "num_batches_tracked": "count",
    },
    {
        "kernel": {"weight": "kernel", "bias": "bias"},
        "embedding": {"weight": "embedding"},
        "scale": {"weight": "scale", "bias": "bias"},
    },
    separator=".",
    layout=FEATURES_FIRST,
)


def from_torch(state_dict: Mapping[str, AnyArray]) -> Layer:
    """Convert a PyTorch layer's `state_dict` to `(params, state)`.

    `nn.BatchNorm2d(C, eps, momentum=p)` is then
    `batch_norm(params, state, x, train, axis=1, epsilon=eps, momentum=1 - p)`, with the
    default `unbiased=True`; `momentum=None` is `None` in both. `affine=False` gives
    `BatchNormParams(None, None)`.

    A layer with `track_running_stats=False` has no state and is rejected: run
    `batch_norm` with `train=True` in both modes, on the state of `jaxbn.init`, and drop
    the new state.

    Values keep their dtype, but for running statistics below float32, which widen, and
    for what JAX holds in float32: float64 where x64 is off, and `count`.

    **Raises** `ValueError` and `TypeError` as listed in `jaxbn.convert`.

    >>> import numpy as np, jaxbn
    >>> params, state = jaxbn.convert.from_torch({
    ...     "running_mean": np.array([0.5, 1.5]), "running_var": np.array([2.0, 3.0]),
    ...     "num_batches_tracked": np.array(7)})
    >>> params, state.count
    (BatchNormParams(scale=None, bias=None), Array(7., dtype=float32))
    """
    return read_layer(find_layers(dict(state_dict), TORCH).norms, TORCH)


def to_torch(params: AnyParams, state: BatchNormState) -> dict[str, np.ndarray]:
    """Convert a layer to a PyTorch `state_dict` of NumPy arrays.

    The inverse of `from_torch`. Load it with
    `layer.load_state_dict({k: torch.from_numpy(v) for k, v in arrays.items()})`.
    bfloat16, which `from_numpy` does not read, becomes float32, and PyTorch rounds it
    back where its layer is bfloat16: nothing is lost.
    """
    arrays = as_arrays(params, state)
    arrays["count"] = arrays["count"].astype("int64")
    return TORCH.to_library({key: _as_builtin(a) for key, a in arrays.items()})


def _as_builtin(array: np.ndarray) -> np.ndarray:
    """Return an array of NumPy's own dtypes: bfloat16 is one of JAX's."""
    return array if array.dtype.isbuiltin == 1 else array.astype(np.float32)


def from_torch_tree(
    state_dict: Mapping[str, AnyArray], names: Mapping[str, str], variables: PyTree
) -> PyTree:
    """Copy the layers of a PyTorch model to `variables`.

    **Arguments**

    - `state_dict`: `model.state_dict()`. A layer with a `running_mean` is a batch norm.
    - `names`: PyTorch's name of each such layer, and its path in `variables`:
      `{"layer1.0.bn1": "Block_0/BatchNorm_0"}`. Convolutions, linear layers, other
      norms and embeddings are copied if they are named: `{"fc": "Dense_0"}`.
    - `variables`: linen variables or an `nnx.State`.

    **Returns** a new tree like `variables`; **raises** as listed in `jaxbn.convert`.
    """
    source = find_layers(dict(state_dict), TORCH)
    return write_to_flax(source, TORCH, names, variables)


def to_torch_tree(
    variables: PyTree, names: Mapping[str, str], state_dict: Mapping[str, ArrayT]
) -> dict[str, ArrayT]:
    """Copy the layers of `variables` to a PyTorch model's `state_dict`.

    The inverse of `from_torch_tree`, with the same `names`. Load the result with
    `model.load_state_dict(to_torch_tree(variables, names, model.state_dict()))`. The
    count of batch norms that keep none, as Flax's, is 0; only `momentum=None` uses it.
    """
    old = dict(state_dict)
    new = read_from_flax(variables, names, find_layers(old, TORCH), TORCH)
    return replace_arrays(old, TORCH, new)
