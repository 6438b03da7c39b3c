"""The modules in a tree of linen variables, by their paths."""

from collections.abc import Callable, Mapping
from typing import cast

from flax.traverse_util import flatten_dict
from jaxtyping import PyTree

from .._flax.paths import Path, find_name, join, split

Variables = Mapping[str, PyTree]


def batch_norm_paths(stats: Variables) -> list[Path]:
    """Return the path of each batch norm: a module with a mean and a variance."""
    with_var = set(paths_with(stats, "var"))
    return [path for path in paths_with(stats, "mean") if path in with_var]


def paths_with(collection: Variables, name: str) -> list[Path]:
    """Return the path of each module that has a variable of this name."""
    flat = flatten_dict(dict(collection))
    return [path[:-1] for path in flat if path[-1] == name]


def rebuild_like(tree: PyTree, original: PyTree) -> PyTree:
    """Return nested dicts in the kinds of mappings that `original` has."""
    if not isinstance(tree, Mapping) or not isinstance(original, Mapping):
        return tree
    kind = cast(Callable[[dict[str, PyTree]], Variables], type(original))
    return kind({k: rebuild_like(v, original.get(k)) for k, v in tree.items()})


def find_path(path: str | Path, existing: list[Path]) -> Path:
    """Return the existing path that a string names; another string is split."""
    if not isinstance(path, str):
        return split(path)
    by_name = {join(p): p for p in existing}
    name = find_name(path, by_name)
    return by_name.get(name, split(name))
