"""The layers in Flax's trees, linen variables and `nnx.State`, and the map to them."""

from collections.abc import Mapping
from typing import Any

from ._checks import check_known, check_names, check_once
from ._layers import Format, Layer, Vectors, find, fitting, read, replace

FLAX = Format(
    {name: name for name in ("scale", "bias", "mean", "var", "count")},
    collections=("params", "batch_stats"),
)


def layers_of(variables: Any) -> dict[str, Layer]:
    """The batch norm layers of linen variables or an `nnx.State`, by their paths.

    Flax's layers keep no count of batches, ours only with `momentum=None`: `count` is
    0 where there is none.

    **Raises** `ValueError` and `TypeError` as the conversions do (see `jaxbn.convert`).

    >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxbn
    >>> model = nn.Sequential([nn.Dense(2), nn.BatchNorm(use_running_average=True)])
    >>> variables = model.init(jax.random.key(0), jnp.ones((4, 3)))
    >>> jaxbn.convert.layers_of(variables)["layers_1"]
    (BatchNormParams(scale=Array([1., 1.], dtype=float32),
                     bias=Array([0., 0.], dtype=float32)),
     BatchNormState(mean=Array([0., 0.], dtype=float32),
                    var=Array([1., 1.], dtype=float32),
                    count=Array(0, dtype=int32)))
    """
    return read(find(variables, FLAX))


def replace_layers(variables: Any, layers: Mapping[str, Layer]) -> Any:
    """`variables` with these layers' values in the place of their own.

    **Arguments**

    - `variables`: linen variables, or an `nnx.State` that holds parameters and
      statistics: `nnx.update(model, replace_layers(nnx.state(model), layers))`.
    - `layers`: `{path: (params, state)}`, for some of the layers that `layers_of`
      finds. A count is dropped where the layer keeps none.

    **Returns** a new tree of the same structure, shapes and dtypes.

    **Raises** `ValueError` for a path that is not in `variables`, and for a layer that
    does not fit.
    """
    targets = find(variables, FLAX)
    check_known(layers, targets)
    return replace(variables, FLAX, fitting(layers, targets))


def into_flax(
    layers: Mapping[str, Layer], names: Mapping[str, str], variables: Any
) -> Any:
    """`variables` with all these layers, by the map from their names to ours."""
    check_once(names)
    check_names(names, layers, find(variables, FLAX))
    return replace_layers(
        variables, {ours: layers[theirs] for theirs, ours in names.items()}
    )


def out_of_flax(
    variables: Any, names: Mapping[str, str], targets: Mapping[str, Vectors]
) -> dict[str, Vectors]:
    """The arrays for all the targets, by the same map."""
    layers = layers_of(variables)
    check_once(names)
    check_names(names, targets, layers)
    return fitting({theirs: layers[ours] for theirs, ours in names.items()}, targets)
