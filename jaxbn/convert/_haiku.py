r"""dm-haiku's `BatchNorm`, by its parameters and state.

haiku keeps each running statistic twice: `hidden`, which starts at 0, and `average`,
the same debiased as in Adam, which inference uses:

$$average = hidden / (1 - decay^{counter})$$
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from .._core.axes import expand_features
from .._core.axes import check_axis
from .._core.variables import BatchNormParams, BatchNormState
from ._checks import check_flat
from ._flax import into_flax, out_of_flax
from ._layers import (
    Format,
    Layer,
    Vectors,
    as_vectors,
    find,
    read,
    read_single,
    replace,
)
from ._momentum import with_hidden

Dicts = Mapping[str, Any]

HAIKU = Format(
    {
        "scale": "scale",
        "offset": "bias",
        "~/mean_ema/average": "mean",
        "~/var_ema/average": "var",
        "~/mean_ema/counter": "count",
        # What we do not keep, and make anew:
        "~/mean_ema/hidden": "hidden_mean",
        "~/var_ema/hidden": "hidden_var",
        "~/var_ema/counter": "counter",  # the same number
    },
    collections=("0", "1"),  # of the pair (params, state)
)


def from_haiku(params: Dicts, state: Dicts) -> Layer:
    """A layer's parameters and state as our `(params, state)`.

    `hk.BatchNorm(create_scale, create_offset, decay_rate)` is then
    `batch_norm(params, state, x, train, momentum=decay_rate, unbiased=False)`, with
    `axis=1` for `data_format="channels_first"`.

    The averages are carried, `average` and not `hidden`, so that inference is the same.
    haiku continues them with weights that depend on the step:
    `momentum=debiased_momentum(decay_rate, count)` is the same step, and
    `momentum=decay_rate` is near it once 1 / (1 - decay_rate) batches are well past.

    **Arguments**

    - `params`: `{"scale": ..., "offset": ...}`, either or both, of shape (1, ..., C).
    - `state`: `{"~/mean_ema": {"average": ..., "counter": ...}, "~/var_ema": ...}`.
      Both may have the layer's own name before, as in the dicts of haiku's `init`.

    **Raises** `ValueError` and `TypeError` as told in `jaxbn.convert`.
    """
    return read_single(_find(params, state), HAIKU)


def to_haiku(
    params: BatchNormParams,
    state: BatchNormState,
    *,
    decay: float,
    ndim: int,
    axis: int = -1,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A layer as haiku's parameters and state; undoes `from_haiku`.

    **Arguments**

    - `decay`: the layer's `decay_rate`, by which `hidden` is made of `average`.
    - `ndim`, `axis`: the rank of its input, and the feature axis there: haiku's vectors
      have that rank.

    **Returns** `(params, state)` with the keys that `from_haiku` takes, NumPy arrays.

    **Raises** `ValueError` for a count of 0: there is nothing to debias. For a state
    that was not counted, say so: `state._replace(count=batches)`.
    """
    vectors = with_hidden(as_vectors(params, state), decay, None, "")
    axes = check_axis(axis, ndim)
    vectors = {
        name: np.array(expand_features(jnp.asarray(v), axes, ndim)) if v.ndim else v
        for name, v in vectors.items()
    }
    flat = {key: vectors[ours] for key, ours in HAIKU.keys.items() if ours in vectors}
    return (
        {key: array for key, array in flat.items() if "/" not in key},
        {
            ema: {key: flat[f"{ema}/{key}"] for key in ("hidden", "average", "counter")}
            for ema in ("~/mean_ema", "~/var_ema")
        },
    )


def from_haiku_tree(
    params: Dicts, state: Dicts, names: Mapping[str, str], variables: Any
) -> Any:
    """`variables` with the batch norm layers of a whole haiku model.

    **Arguments**

    - `params`, `state`: the model's. What has a `~/mean_ema` is a batch norm.
    - `names`: haiku's name of each such layer to ours:
      `{"res_net/~/batch_norm": "BatchNorm_0"}`.
    - `variables`: linen variables or an `nnx.State`.

    **Returns** a new tree like `variables`; **raises** as told in `jaxbn.convert`.
    """
    return into_flax(read(_find(params, state)), names, variables)


def to_haiku_tree(
    variables: Any,
    names: Mapping[str, str],
    params: Dicts,
    state: Dicts,
    *,
    decay: float,
    count: int | None = None,
) -> tuple[Dicts, Dicts]:
    """`(params, state)` with the layers of `variables`; `names` as for the way in.

    **Arguments** besides those of `from_haiku_tree`

    - `decay`: the layers' `decay_rate`.
    - `count`: of batches absorbed, for layers that do not count them, as Flax's.

    **Raises** `ValueError` for a count of 0 too.
    """
    vectors = out_of_flax(variables, names, _find(params, state))
    vectors = {n: with_hidden(v, decay, count, n) for n, v in vectors.items()}
    return replace((params, state), HAIKU, vectors)


def _find(params: Dicts, state: Dicts) -> dict[str, Vectors]:
    found = find((params, state), HAIKU)
    return {
        name: {field: check_flat(value, field, name) for field, value in layer.items()}
        for name, layer in found.items()
    }
