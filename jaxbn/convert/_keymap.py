"""Find and replace layers in a tree of arrays, by a library's names of the variables.

Each library keeps the same arrays under names of its own, and its kernels in a layout
of its own. A `KeyMap` holds both.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import GetAttrKey, KeyPath, keystr
from jaxtyping import PyTree

from ._kernels import FEATURES_LAST, Layout, in_library_layout

AnyArray = PyTree  # a leaf: an array of NumPy, JAX, PyTorch or Keras
Vectors = dict[str, AnyArray]  # a batch norm's arrays, by jaxbn's names
Weights = dict[str, AnyArray]  # another layer's arrays, by the library's names
Arrays = dict[str, np.ndarray]  # a layer's arrays in NumPy, by Flax's names
Names = Mapping[str, str]  # the library's name of a variable -> Flax's


class Found(NamedTuple):
    """Hold the layers of a model, by name."""

    norms: dict[str, Vectors]  # batch norms with running statistics
    others: dict[str, Weights]


class KeyMap(NamedTuple):
    """Hold a library's names of a layer's arrays, and the layout of its kernels."""

    keys: Names  # of a batch norm
    # Of other layers, by the Flax variable that tells the kind: a `weight` may be each.
    others: Mapping[str, Names]
    separator: str = "/"  # between the layer's name and the array's
    collections: tuple[str, ...] = ()  # first keys that are not in the layer's name
    layout: Layout = FEATURES_LAST
    epsilon: float = 1e-5  # the default of a batch norm: no checkpoint holds its own

    def weight_keys(self) -> set[str]:
        """Return the library's names of the arrays of other layers."""
        return {key for names in self.others.values() for key in names}

    def names_for(self, fields: Collection[str]) -> Names:
        """Return the names in a layer whose Flax variables are `fields`."""
        if "mean" in fields:
            return self.keys
        kinds = [kind for kind in self.others if kind in fields]
        return self.others[kinds[0] if kinds else "scale"]

    def to_library(self, arrays: Arrays) -> Arrays:
        """Return a layer's arrays by the library's names, in its order and layout."""
        return {
            key: in_library_layout(arrays[field], field, self.layout)
            for key, field in self.names_for(arrays).items()
            if field in arrays
        }

    def split(self, path: KeyPath) -> tuple[str, str | None]:
        """Return a leaf's layer and the library's name of the leaf, if it has one."""
        whole = self.separator + self._join(path)
        for key in self.keys.keys() | self.weight_keys():
            layer = whole.removesuffix(self.separator + key)
            if layer != whole:
                return layer.removeprefix(self.separator), key
        return whole, None

    def _join(self, path: KeyPath) -> str:
        if path and path[-1] == GetAttrKey("value"):  # Flax's Variables and boxes
            path = path[:-1]
        names = [keystr((entry,), simple=True) for entry in path]
        if names and names[0] in self.collections:
            names = names[1:]
        return self.separator.join(names)


def find_layers(tree: PyTree, keymap: KeyMap) -> Found:
    """Return the batch norm layers and the other layers with weights in `tree`.

    A layer is a batch norm if it has a running mean or a running variance. The arrays
    are not checked.
    """
    layers: dict[str, Weights] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name, key = keymap.split(path)
        if key is not None:
            layers.setdefault(name, {})[key] = leaf
    named = {name: _translate(layer, keymap.keys) for name, layer in layers.items()}
    norms = {name: v for name, v in named.items() if {"mean", "var"} & v.keys()}
    others = {
        name: weights
        for name, layer in layers.items()
        if name not in norms and (weights := _pick(layer, keymap.weight_keys()))
    }
    return Found(norms, others)


def replace_arrays(
    tree: PyTree, keymap: KeyMap, layers: Mapping[str, Arrays]
) -> PyTree:
    """Return `tree` with the arrays of these layers replaced."""
    new_layers = {name: keymap.to_library(arrays) for name, arrays in layers.items()}

    def new(path: KeyPath, leaf: AnyArray) -> AnyArray:
        name, key = keymap.split(path)
        arrays = new_layers.get(name, {})
        return cast_like(leaf, arrays[key]) if key in arrays else leaf

    return jax.tree_util.tree_map_with_path(new, tree)


def cast_like(old: AnyArray, new: np.ndarray) -> AnyArray:
    """Return `new` with the shape, the dtype and the kind of array of `old`."""
    if hasattr(old, "new_tensor"):  # PyTorch: keeps the device, cannot read bfloat16
        return old.new_tensor(np.asarray(new, np.float64))
    make = jnp.array if isinstance(old, jax.Array | jax.ShapeDtypeStruct) else np.array
    return make(np.ascontiguousarray(new).reshape(old.shape), old.dtype)


def describe(name: str) -> str:
    """Name a layer in a message; the only layer has no name."""
    return f"layer {name!r}" if name else "the layer"


def list_names(names: Iterable[str], most: int = 8) -> str:
    """List names in a message, at most eight."""
    names = sorted(names)
    listed = ", ".join(map(repr, names[:most])) or "none"
    return f"{listed} and {len(names) - most} more" if len(names) > most else listed


def _translate(layer: Weights, names: Names) -> Vectors:
    """Return the arrays that have a name in Flax, by that name."""
    return {names[key]: leaf for key, leaf in layer.items() if key in names}


def _pick(layer: Weights, keys: Collection[str]) -> Weights:
    """Return the arrays with these names."""
    return {key: leaf for key, leaf in layer.items() if key in keys}
