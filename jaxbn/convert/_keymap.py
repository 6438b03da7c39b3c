"""Find, read and replace the batch norm layers in a tree of arrays.

Each library keeps the same vectors under names of its own. A `KeyMap` holds the names;
the functions here read and write layers by it.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import GetAttrKey, KeyPath, keystr
from jaxtyping import PyTree

from .._core.dtypes import accumulation_dtype
from .._core.variables import AnyParams, BatchNormParams, BatchNormState

AnyArray = PyTree  # a leaf: an array of NumPy, JAX, PyTorch or Keras
Layer = tuple[AnyParams, BatchNormState]
Vectors = dict[str, AnyArray]  # a layer's arrays, by jaxbn's names
Arrays = dict[str, np.ndarray]  # the same, in NumPy

VECTORS = ("scale", "bias", "mean", "var")


class KeyMap(NamedTuple):
    """Hold a library's names of a layer's arrays."""

    keys: Mapping[str, str]  # the library's name -> jaxbn's name
    separator: str = "/"  # between the layer's name and the array's
    collections: tuple[str, ...] = ()  # first keys that are not in the layer's name

    def split(self, path: KeyPath) -> tuple[str, str | None]:
        """Return a leaf's layer and jaxbn's name of the leaf, if it has one."""
        whole = self.separator + self._join(path)
        for key, field in self.keys.items():
            layer = whole.removesuffix(self.separator + key)
            if layer != whole:
                return layer.removeprefix(self.separator), field
        return whole, None

    def _join(self, path: KeyPath) -> str:
        if path and path[-1] == GetAttrKey("value"):  # Flax's Variables and boxes
            path = path[:-1]
        names = [keystr((entry,), simple=True) for entry in path]
        if names and names[0] in self.collections:
            names = names[1:]
        return self.separator.join(names)


def find_layers(tree: PyTree, keymap: KeyMap) -> dict[str, Vectors]:
    """Return the arrays of each batch norm layer in `tree`, by the layer's name.

    A layer is a batch norm if it has a running mean or a running variance. The arrays
    are not checked.
    """
    found: dict[str, Vectors] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name, field = keymap.split(path)
        if field is not None:
            found.setdefault(name, {})[field] = leaf
    return {name: v for name, v in found.items() if {"mean", "var"} & v.keys()}


def read_layers(found: Mapping[str, Vectors]) -> dict[str, Layer]:
    """Check the layers and copy them to JAX."""
    return {name: as_layer(vectors, name) for name, vectors in found.items()}


def read_layer(found: Mapping[str, Vectors], keymap: KeyMap) -> Layer:
    """Check the only layer and copy it to JAX."""
    if len(found) != 1:
        raise ValueError(
            "there must be one batch norm layer, with arrays named "
            f"{list_names(keymap.keys)}; got {len(found)}: {list_names(found)}. "
            "For a whole model use the function that ends in _tree. A layer without "
            "running statistics (track_running_stats=False) has no state to convert: "
            "start from jaxbn.init, and always pass train=True."
        )
    (layer,) = read_layers(found).values()
    return layer


def replace_arrays(
    tree: PyTree, keymap: KeyMap, layers: Mapping[str, Arrays]
) -> PyTree:
    """Return `tree` with the arrays of these layers replaced."""

    def new(path: KeyPath, leaf: AnyArray) -> AnyArray:
        name, field = keymap.split(path)
        arrays = layers.get(name, {})
        return cast_like(leaf, arrays[field]) if field in arrays else leaf

    return jax.tree_util.tree_map_with_path(new, tree)


def check_and_flatten(
    layers: Mapping[str, Layer], targets: Mapping[str, Vectors]
) -> dict[str, Arrays]:
    """Return the arrays of the layers, if each layer fits its target."""
    flat = {name: as_arrays(*layer) for name, layer in layers.items()}
    for name in layers:
        _check_fit(name, flat[name], targets[name])
    return flat


def as_layer(vectors: Vectors, name: str) -> Layer:
    """Copy a layer to JAX, statistics in float32 or wider."""
    arrays = _check_arrays(vectors, name)
    params = (jnp.array(arrays[f]) if f in arrays else None for f in ("scale", "bias"))
    mean, var = (jnp.array(arrays[f]) for f in ("mean", "var"))
    mean, var = (a.astype(accumulation_dtype(a.dtype)) for a in (mean, var))
    count = jnp.array(arrays.get("count", 0), jnp.float32)
    return BatchNormParams(*params), BatchNormState(mean, var, count)


def as_arrays(params: AnyParams, state: BatchNormState) -> Arrays:
    """Copy a layer to NumPy, without `None`."""
    fields = params._asdict() | state._asdict()
    return {name: np.array(a) for name, a in fields.items() if a is not None}


def rename(arrays: Arrays, keymap: KeyMap) -> Arrays:
    """Return a layer's arrays by the library's names, in the library's order."""
    return {key: arrays[f] for key, f in keymap.keys.items() if f in arrays}


def cast_like(old: AnyArray, new: np.ndarray) -> AnyArray:
    """Return `new` with the shape, the dtype and the kind of array of `old`."""
    if hasattr(old, "new_tensor"):  # PyTorch: keeps the device, cannot read bfloat16
        return old.new_tensor(np.asarray(new, np.float64))
    make = jnp.array if isinstance(old, jax.Array | jax.ShapeDtypeStruct) else np.array
    return make(new.reshape(old.shape), old.dtype)


def _check_arrays(vectors: Vectors, name: str) -> Arrays:
    """Return a layer's arrays in NumPy, if they are valid together."""
    _check_complete(vectors, name)
    arrays = {
        field: _check_floating(vectors[field], field, name)
        for field in VECTORS
        if field in vectors
    }
    _check_one_shape(arrays, name)
    _check_var(arrays["var"], name)
    if "count" in vectors:
        arrays["count"] = np.asarray(vectors["count"])
    return arrays


def _check_complete(vectors: Vectors, name: str) -> None:
    """Check that a layer has both running statistics."""
    missing = {"mean", "var"} - vectors.keys()
    if missing:
        raise ValueError(
            f"{describe(name)} must have a running mean and a running variance; got no "
            f"{' and no '.join(missing)}. Is the checkpoint complete?"
        )


def _check_floating(value: AnyArray, field: str, name: str) -> np.ndarray:
    """Return `value` as a floating array."""
    try:
        array = np.asarray(value)
    except (TypeError, RuntimeError) as error:  # PyTorch: bfloat16, cuda, grad
        reason = str(error).rstrip(".")
        raise TypeError(
            f"{field} of {describe(name)} must be readable as a NumPy array; got "
            f"{type(value).__name__}: {reason}. For a PyTorch tensor pass "
            ".detach().float().cpu()."
        ) from error
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(
            f"{field} of {describe(name)} must be floating; got {array.dtype}. "
            "Cast it first, for instance with .astype('float32')."
        )
    return array


def _check_one_shape(arrays: Arrays, name: str) -> None:
    """Check that all arrays of a layer have the features' shape."""
    shapes = {field: array.shape for field, array in arrays.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(
            f"the vectors of {describe(name)} must have one shape, the features'; got "
            f"{shapes}. Are they all from the same layer?"
        )


def _check_var(var: np.ndarray, name: str) -> None:
    """Check that a running variance is not negative or NaN."""
    bad = np.argwhere(~(var >= 0))  # NaN is not >= 0
    if bad.size:
        first = tuple(bad[0].tolist())
        raise ValueError(
            f"var of {describe(name)} must not be negative or NaN; got {var[first]} at "
            f"{first}, and {len(bad)} such of {var.size}. The checkpoint is broken, or "
            "this is not a variance: use another, or recompute the statistics."
        )


def _check_fit(name: str, arrays: Arrays, target: Vectors) -> None:
    """Check that a layer has the arrays of its target, in the same shapes."""
    new, old = (
        {field: np.shape(side[field]) for field in VECTORS if field in side}
        for side in (arrays, target)
    )
    if new != old:
        raise ValueError(
            f"{describe(name)} must fit its target, with the same features and scale "
            f"and bias on both sides or on none; got {new} for {old}. Correct the map, "
            "or build the target with the source's options."
        )


def describe(name: str) -> str:
    """Name a layer in a message; the only layer has no name."""
    return f"layer {name!r}" if name else "the layer"


def list_names(names: Iterable[str], most: int = 8) -> str:
    """List names in a message, at most eight."""
    names = sorted(names)
    listed = ", ".join(map(repr, names[:most])) or "none"
    return f"{listed} and {len(names) - most} more" if len(names) > most else listed
