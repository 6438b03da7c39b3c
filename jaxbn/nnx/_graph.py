"""The modules in an nnx model: iterate, get, put, change the class."""

from collections.abc import Iterator
from functools import reduce
from typing import TypeVar, cast

from flax import nnx
from jaxtyping import PyTree

from .._core.variables import BatchNormState
from .._flax.folding import path_error
from .._flax.paths import Path

Kind = TypeVar("Kind", bound=nnx.BatchNorm)


def iterate(model: PyTree) -> Iterator[tuple[Path, object]]:
    """Yield each node with its path, once even if it is shared."""
    return cast(Iterator[tuple[Path, object]], nnx.iter_graph(model, graph=True))


def batch_norms(model: PyTree) -> dict[Path, nnx.BatchNorm]:
    """Return all batch norms by their paths, subclasses included."""
    nodes = iterate(model)
    return {path: node for path, node in nodes if isinstance(node, nnx.BatchNorm)}


def statistics(layer: nnx.BatchNorm) -> dict[str, nnx.BatchStat]:
    """Return a layer's running statistics by name, with a `count` if it has one."""
    names = BatchNormState._fields
    return {name: getattr(layer, name) for name in names if hasattr(layer, name)}


def replace_class(layer: nnx.BatchNorm, kind: type[Kind]) -> Kind:
    """Change the class of a layer in place, for all that hold the layer.

    Past nnx's own `__setattr__`, which in Flax 0.12.8 records the class as an
    attribute.
    """
    object.__setattr__(layer, "__class__", kind)
    return cast(Kind, layer)


def get(model: PyTree, path: Path) -> object:
    """Return the node at `path`, by attributes, and by items of lists and dicts."""
    try:
        return reduce(_child, path, model)
    except (AttributeError, LookupError, ValueError) as error:
        raise path_error(path, type(model).__name__) from error


def _child(holder: PyTree, key: str | int) -> PyTree:
    if isinstance(holder, list | tuple):
        return holder[int(key)]
    return holder[key] if isinstance(holder, dict) else getattr(holder, str(key))


def put(model: PyTree, path: Path, value: nnx.Module) -> None:
    """Replace the node at `path`, and at no other path."""
    holder, key = get(model, path[:-1]), path[-1]
    if isinstance(holder, list):
        holder[int(key)] = value
    elif isinstance(holder, dict):
        holder[key] = value
    else:
        setattr(holder, str(key), value)
