"""Batch norm layers in a tree of arrays, whichever library laid it out.

Every library keeps the same vectors under other names. A `Format` says the names; here
is what reads and writes the layers by them.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import GetAttrKey, KeyPath, keystr

from .._core.dtypes import accumulation_dtype
from .._core.variables import BatchNormParams, BatchNormState
from ._checks import check_fit, check_layer, check_single

Layer = tuple[BatchNormParams, BatchNormState]
Vectors = dict[str, Any]  # a layer's arrays, by our names of them


class Format(NamedTuple):
    """Their names of a layer's arrays, and how such a name follows the layer's."""

    keys: Mapping[str, str]  # theirs -> ours
    separator: str = "/"
    collections: tuple[str, ...] = ()  # heads of paths that say nothing of the layer

    def split(self, path: KeyPath) -> tuple[str, str | None]:
        """A leaf's layer, and our name of it there; `None` for what is not ours."""
        whole = self.separator + self._joined(path)
        for theirs, ours in self.keys.items():
            layer = whole.removesuffix(self.separator + theirs)
            if layer != whole:
                return layer.removeprefix(self.separator), ours
        return whole, None

    def _joined(self, path: KeyPath) -> str:
        if path and path[-1] == GetAttrKey("value"):  # Flax's Variables and boxes
            path = path[:-1]
        names = [keystr((entry,), simple=True) for entry in path]
        if names and names[0] in self.collections:
            names = names[1:]
        return self.separator.join(names)


def find(tree: Any, layout: Format) -> dict[str, Vectors]:
    """The arrays of each batch norm layer in `tree`, unchecked, by the layer's name.

    Batch norm is what keeps a running mean or a running variance.
    """
    found: dict[str, Vectors] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name, field = layout.split(path)
        if field is not None:
            found.setdefault(name, {})[field] = leaf
    return {name: v for name, v in found.items() if {"mean", "var"} & v.keys()}


def read(found: Mapping[str, Vectors]) -> dict[str, Layer]:
    """The layers that were found, checked and copied to JAX."""
    return {name: as_layer(vectors, name) for name, vectors in found.items()}


def read_single(found: Mapping[str, Vectors], layout: Format) -> Layer:
    """The one layer that was found."""
    check_single(found, layout.keys)
    (layer,) = read(found).values()
    return layer


def replace(tree: Any, layout: Format, layers: Mapping[str, Vectors]) -> Any:
    """`tree` with the arrays of these layers in the place of its own."""

    def new(path: KeyPath, leaf: Any) -> Any:
        name, field = layout.split(path)
        vectors = layers.get(name, {})
        return like(leaf, vectors[field]) if field in vectors else leaf

    return jax.tree_util.tree_map_with_path(new, tree)


def fitting(
    layers: Mapping[str, Layer], targets: Mapping[str, Vectors]
) -> dict[str, Vectors]:
    """The arrays of the layers, once it is sure that each fits its target."""
    vectors = {name: as_vectors(*layer) for name, layer in layers.items()}
    for name in layers:
        check_fit(name, vectors[name], targets[name])
    return vectors


def as_layer(vectors: Vectors, name: str) -> Layer:
    """Parameters and state in JAX: copies, statistics in float32 or wider."""
    arrays = check_layer(vectors, name)
    params = (jnp.array(arrays[f]) if f in arrays else None for f in ("scale", "bias"))
    mean, var = (jnp.array(arrays[f]) for f in ("mean", "var"))
    mean, var = (a.astype(accumulation_dtype(a.dtype)) for a in (mean, var))
    count = jnp.array(arrays.get("count", 0), jnp.int32)
    return BatchNormParams(*params), BatchNormState(mean, var, count)


def as_vectors(params: BatchNormParams, state: BatchNormState) -> Vectors:
    """All there is, as NumPy arrays of their own."""
    fields = params._asdict() | state._asdict()
    return {name: np.array(a) for name, a in fields.items() if a is not None}


def like(old: Any, new: np.ndarray) -> Any:
    """`new` in the place of `old`: its shape, dtype and kind of array."""
    if hasattr(old, "new_tensor"):  # PyTorch's, which also knows the device
        return old.new_tensor(np.asarray(new, np.float64))  # it knows no bfloat16
    make = jnp.array if isinstance(old, jax.Array | jax.ShapeDtypeStruct) else np.array
    return make(new.reshape(old.shape), old.dtype)
