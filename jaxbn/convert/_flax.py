"""Read and replace the layers in Flax's trees: linen variables and `nnx.State`."""

import sys
from collections.abc import Collection, Mapping

from jaxtyping import PyTree

from .._flax.paths import find_name
from ._keymap import Arrays, Found, KeyMap, find_layers, list_names, replace_arrays
from ._layers import (
    Layer,
    as_arrays,
    as_layer,
    check_fit,
    placeholders,
    read_floating,
    read_norms,
    read_weights,
)

NNX = KeyMap(
    {name: name for name in ("scale", "bias", "mean", "var", "count")},
    {
        "kernel": {"kernel": "kernel", "bias": "bias"},
        "embedding": {"embedding": "embedding"},
        "scale": {"scale": "scale", "bias": "bias"},
    },
)
LINEN = NNX._replace(collections=("params", "batch_stats"))


def _keymap(variables: PyTree) -> KeyMap:
    """Return the names in this tree: in nnx a module may be called `params`."""
    nnx = sys.modules.get("flax.nnx")  # slow to import; without it there is no State
    is_state = nnx is not None and isinstance(variables, nnx.State)
    return NNX if is_state else LINEN


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
    norms = read_norms(_find_layers(variables).norms, NNX)
    return {path: as_layer(arrays) for path, arrays in norms.items()}


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
    targets = _find_layers(variables).norms
    paths = {path: find_name(path, targets) for path in layers}
    _check_once("layers", paths)
    _check_known(paths.values(), targets)
    new = {paths[path]: as_arrays(*layer) for path, layer in layers.items()}
    for path, arrays in new.items():
        check_fit(path, arrays, targets[path])
    return replace_arrays(variables, _keymap(variables), new)


def write_to_flax(
    source: Found, keymap: KeyMap, names: Mapping[str, str], variables: PyTree
) -> PyTree:
    """Return `variables` with a library's layers, by the map of names."""
    norms, target = read_norms(source.norms, keymap), _find_layers(variables)
    targets, new = target.norms | target.others, {}
    for name, path in _match(names, source, target).items():
        if name in norms:
            new[path] = norms[name]
        else:
            weights = source.others[name]
            new[path] = read_weights(weights, targets[path], keymap, name)
        check_fit(path, new[path], targets[path])
    return replace_arrays(variables, _keymap(variables), new)


def read_from_flax(
    variables: PyTree, names: Mapping[str, str], target: Found, keymap: KeyMap
) -> dict[str, Arrays]:
    """Return the arrays for a library's layers, by the same map."""
    source = _find_layers(variables)
    norms, new = read_norms(source.norms, keymap), {}
    for name, path in _match(names, target, source).items():
        if path in norms:
            new[name], old = norms[path], target.norms[name]
        else:
            flax, shapes = source.others[path], placeholders(target.others[name])
            new[name] = read_floating(flax, path)
            old = read_weights(shapes, flax, keymap, name)
        check_fit(name, new[name], old)
    return new


def _find_layers(variables: PyTree) -> Found:
    return find_layers(variables, _keymap(variables))


def _match(names: Mapping[str, str], library: Found, flax: Found) -> dict[str, str]:
    """Return `names` with existing paths, if it maps layers to layers of their kind.

    It maps each batch norm of both sides once, and other layers at most once.
    """
    paths = {
        name: find_name(path, flax.others if name in library.others else flax.norms)
        for name, path in names.items()
    }
    _check_once("names", paths)
    norms = {n: path for n, path in paths.items() if n not in library.others}
    _check_others({n: paths[n] for n in paths if n not in norms}, flax)
    _check_side("the other library's model", "keys", norms, library)
    _check_side("our variables", "values", norms.values(), flax)
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


def _check_side(side: str, part: str, given: Collection[str], found: Found) -> None:
    """Check that the keys or the values of `names` give all batch norms of one side."""
    given, existing = set(given), set(found.norms)
    if unknown := given - existing:
        raise ValueError(
            f"the {part} of names must be batch norm layers of {side}; got "
            f"{list_names(unknown)}, and there are {list_names(existing)}. Correct the "
            "map. Layers of other kinds are mapped to layers of their kind; there are "
            f"{list_names(found.others)}."
        )
    if missed := existing - given:
        raise ValueError(
            f"names must map every batch norm layer; its {part} leave out "
            f"{list_names(missed)} of {side}. Add it to the map, or remove it from "
            "the tree that you pass."
        )


def _check_others(paths: Mapping[str, str], flax: Found) -> None:
    """Check that layers of other kinds are mapped to layers of other kinds."""
    unknown = {name: path for name, path in paths.items() if path not in flax.others}
    if unknown:
        raise ValueError(
            "a layer that is not a batch norm must be mapped to another such layer of "
            f"our variables; got {unknown}, and there are {list_names(flax.others)}. "
            "Correct the map."
        )


def _check_known(paths: Collection[str], existing: Collection[str]) -> None:
    """Check that the layers to replace exist."""
    if unknown := set(paths) - set(existing):
        raise ValueError(
            "the layers to replace must be batch norm layers of the variables; got "
            f"{list_names(unknown)}, and there are {list_names(existing)}. Use the "
            "paths that layers_of returns."
        )
