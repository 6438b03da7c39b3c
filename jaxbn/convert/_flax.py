"""Read and replace the layers in Flax's trees: linen variables and `nnx.State`."""

from collections.abc import Collection, Mapping

from jaxtyping import PyTree

from .._flax.paths import find_name
from ._keymap import (
    Arrays,
    KeyMap,
    Layer,
    Vectors,
    check_and_flatten,
    find_layers,
    list_names,
    read_layers,
    replace_arrays,
)

FLAX = KeyMap(
    {name: name for name in ("scale", "bias", "mean", "var", "count")},
    collections=("params", "batch_stats"),
)


def layers_of(variables: PyTree) -> dict[str, Layer]:
    """Return the batch norm layers of linen variables or an `nnx.State`, by path.

    Flax's layers keep no count of batches, and jaxbn's keep one only with
    `momentum=None`; elsewhere `count` is 0.

    **Raises** `ValueError` and `TypeError` as the conversions do (see `jaxbn.convert`).

    >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxbn
    >>> model = nn.Sequential([nn.Dense(2), nn.BatchNorm(use_running_average=True)])
    >>> variables = model.init(jax.random.key(0), jnp.ones((4, 3)))
    >>> jaxbn.convert.layers_of(variables)["layers_1"]
    (BatchNormParams(scale=Array([1., 1.], dtype=float32),
                     bias=Array([0., 0.], dtype=float32)),
     BatchNormState(mean=Array([0., 0.], dtype=float32),
                    var=Array([1., 1.], dtype=float32),
                    count=Array(0., dtype=float32)))
    """
    return read_layers(find_layers(variables, FLAX))


def replace_layers(variables: PyTree, layers: Mapping[str, Layer]) -> PyTree:
    """Return `variables` with the values of some layers replaced.

    **Arguments**

    - `variables`: linen variables, or an `nnx.State` that holds parameters and
      statistics: `nnx.update(model, replace_layers(nnx.state(model), layers))`.
    - `layers`: `{path: (params, state)}`, for some of the layers that `layers_of`
      finds; "." is accepted for "/". A count is dropped if the layer keeps none.

    **Returns** a new tree of the same structure, shapes and dtypes.

    **Raises** `ValueError` for a path that is not in `variables`, for two paths of one
    layer, and for a layer that does not fit.
    """
    targets = find_layers(variables, FLAX)
    paths = {path: find_name(path, targets) for path in layers}
    _check_once("layers", paths)
    _check_known(paths.values(), targets)
    new = {paths[path]: layer for path, layer in layers.items()}
    return replace_arrays(variables, FLAX, check_and_flatten(new, targets))


def write_to_flax(
    layers: Mapping[str, Layer], names: Mapping[str, str], variables: PyTree
) -> PyTree:
    """Return `variables` with all of a library's layers, by the map of names."""
    paths = _check_names(names, layers, find_layers(variables, FLAX))
    new = {path: layers[name] for name, path in paths.items()}
    return replace_layers(variables, new)


def read_from_flax(
    variables: PyTree, names: Mapping[str, str], targets: Mapping[str, Vectors]
) -> dict[str, Arrays]:
    """Return the arrays for all of a library's layers, by the same map."""
    layers = layers_of(variables)
    paths = _check_names(names, targets, layers)
    new = {name: layers[path] for name, path in paths.items()}
    return check_and_flatten(new, targets)


def _check_names(
    names: Mapping[str, str], library: Collection[str], variables: Collection[str]
) -> dict[str, str]:
    """Return `names` with existing paths, if it maps each layer of both sides once."""
    paths = {name: find_name(path, variables) for name, path in names.items()}
    _check_once("names", paths)
    _check_side("the other library's model", "keys", paths.keys(), library)
    _check_side("our variables", "values", paths.values(), variables)
    return paths


def _check_once(argument: str, paths: Mapping[str, str]) -> None:
    """Check that no two names stand for one path."""
    names: dict[str, list[str]] = {path: [] for path in paths.values()}
    for name, path in paths.items():
        names[path].append(name)
    repeated = {path: given for path, given in names.items() if len(given) > 1}
    if repeated:
        raise ValueError(
            f"{argument} must give each layer once; got {repeated}. Map each name to a "
            "layer of its own."
        )


def _check_side(
    side: str, part: str, given: Collection[str], existing: Collection[str]
) -> None:
    """Check that the keys or the values of `names` are all layers of one side."""
    given, existing = set(given), set(existing)
    if unknown := given - existing:
        raise ValueError(
            f"the {part} of names must be batch norm layers of {side}; got "
            f"{list_names(unknown)}, and there are {list_names(existing)}. Correct the "
            "map."
        )
    if missed := existing - given:
        raise ValueError(
            f"names must map every batch norm layer; its {part} leave out "
            f"{list_names(missed)} of {side}. Add it to the map, or remove it from "
            "the tree that you pass."
        )


def _check_known(paths: Collection[str], existing: Collection[str]) -> None:
    """Check that the layers to replace exist."""
    if unknown := set(paths) - set(existing):
        raise ValueError(
            "the layers to replace must be batch norm layers of the variables; got "
            f"{list_names(unknown)}, and there are {list_names(existing)}. Use the "
            "paths that layers_of returns."
        )
