"""PyTorch's `nn.BatchNorm1d`, `2d`, `3d` and `SyncBatchNorm`, by their `state_dict`."""

from collections.abc import Mapping
from typing import Any

from .._core.variables import BatchNormParams, BatchNormState
from ._flax import into_flax, out_of_flax
from ._layers import Format, Layer, as_vectors, find, read, read_single, replace

TORCH = Format(
    {
        "weight": "scale",
        "bias": "bias",
        "running_mean": "mean",
        "running_var": "var",
        "num_batches_tracked": "count",
    },
    separator=".",
)


def from_torch(state_dict: Mapping[str, Any]) -> Layer:
    """A layer's `state_dict()` as `(params, state)`.

    `nn.BatchNorm2d(C, eps, momentum=p)` is then
    `batch_norm(params, state, x, train, axis=1, epsilon=eps, momentum=1 - p)`, with our
    default `unbiased=True`; `momentum=None` is `None` in both. `affine=False` gives
    `BatchNormParams(None, None)`.

    A layer with `track_running_stats=False` has no state, and is refused: run
    `batch_norm` with `train=True` in both modes, on `jaxbn.init`'s state, and drop the
    new one.

    Nothing is lost, and nothing on the way back.

    **Raises** `ValueError` and `TypeError` as told in `jaxbn.convert`.

    >>> import numpy as np, jaxbn
    >>> params, state = jaxbn.convert.from_torch({
    ...     "running_mean": np.array([0.5, 1.5]), "running_var": np.array([2.0, 3.0]),
    ...     "num_batches_tracked": np.array(7)})
    >>> params, state.count
    (BatchNormParams(scale=None, bias=None), Array(7, dtype=int32))
    """
    return read_single(find(dict(state_dict), TORCH), TORCH)


def to_torch(params: BatchNormParams, state: BatchNormState) -> dict[str, Any]:
    """A layer as a `state_dict` of NumPy arrays; undoes `from_torch`.

    `layer.load_state_dict({k: torch.from_numpy(v) for k, v in arrays.items()})`.
    """
    vectors = as_vectors(params, state)
    vectors["count"] = vectors["count"].astype("int64")
    return {key: vectors[ours] for key, ours in TORCH.keys.items() if ours in vectors}


def from_torch_tree(
    state_dict: Mapping[str, Any], names: Mapping[str, str], variables: Any
) -> Any:
    """`variables` with the batch norm layers of a whole PyTorch model.

    **Arguments**

    - `state_dict`: `model.state_dict()`. What keeps a `running_mean` is a batch norm.
    - `names`: PyTorch's name of each such layer to ours:
      `{"layer1.0.bn1": "Block_0/BatchNorm_0"}`.
    - `variables`: linen variables or an `nnx.State`.

    **Returns** a new tree like `variables`; **raises** as told in `jaxbn.convert`.
    """
    return into_flax(read(find(dict(state_dict), TORCH)), names, variables)


def to_torch_tree(
    variables: Any, names: Mapping[str, str], state_dict: Mapping[str, Any]
) -> dict[str, Any]:
    """`state_dict` with the layers of `variables`; `names` as for the way in.

    `model.load_state_dict(to_torch_tree(variables, names, model.state_dict()))`. A
    count that Flax does not keep is 0, which matters to `momentum=None` alone.
    """
    arrays = dict(state_dict)
    return replace(arrays, TORCH, out_of_flax(variables, names, find(arrays, TORCH)))
