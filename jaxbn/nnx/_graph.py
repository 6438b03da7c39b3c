"""The modules in an nnx model: iterate, get, put, change the class."""

from collections.abc import Iterator, Mapping
from functools import cache, reduce
from typing import TypeVar, cast

from flax import nnx
from jaxtyping import PyTree

from .._core.variables import BatchNormState
from .._flax.paths import Path, join, path_error

Kind = TypeVar("Kind", bound=nnx.Module)


def iterate(model: PyTree) -> Iterator[tuple[Path, object]]:
    """Yield each node with its path, once even if it is shared."""
    return cast(Iterator[tuple[Path, object]], nnx.iter_graph(model, graph=True))


def batch_norms(model: PyTree) -> dict[Path, nnx.BatchNorm]:
    """Return all batch norms by their paths, subclasses included."""
    nodes = [*iterate(model)]
    check_layers_exist(dict(nodes))
    return {path: node for path, node in nodes if isinstance(node, nnx.BatchNorm)}


def check_layers_exist(nodes: Mapping[Path, object]) -> None:
    """Check that no module makes its layers within its calls."""
    kinds = (nnx.BatchNorm, nnx.bridge.ToNNX)
    layers = [path for path, node in nodes.items() if isinstance(node, kinds)]
    for path, node in nodes.items():
        is_bridge = isinstance(node, nnx.bridge.Module | nnx.bridge.Functional)
        if is_bridge and not any(p[: len(path)] == path for p in layers):
            raise TypeError(
                "the layers must exist before the model is called; got the "
                f"flax.nnx.bridge module {type(node).__name__} at the path "
                f"{join(path)!r}, which makes its layers in each call. Use "
                "jaxbn.nnx.BatchNorm in its code, and pass the other modules of the "
                "model in a list."
            )


def statistics(layer: nnx.BatchNorm) -> dict[str, nnx.BatchStat]:
    """Return a layer's running statistics by name, with a `count` if it has one."""
    names = BatchNormState._fields
    return {name: getattr(layer, name) for name in names if hasattr(layer, name)}


def replace_class(layer: nnx.Module, kind: type[Kind]) -> Kind:
    """Change the class of a layer in place, for all that hold the layer.

    Past nnx's own `__setattr__`, which in Flax 0.12.8 records the class as an
    attribute.
    """
    object.__setattr__(layer, "__class__", kind)
    return cast(Kind, layer)


@cache
def subclass(kind: type, parent: type[Kind]) -> type[Kind]:
    """Return `kind` with the `__call__` of its Flax parent replaced by `parent`'s.

    Python's order of inheritance is `kind`, `parent`, and the parents that they share.
    """
    if issubclass(kind, parent):
        return kind
    if issubclass(parent, kind):
        return parent
    return cast(type[Kind], type(kind.__name__, (kind, parent), {}))


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


def put(model: PyTree, path: Path, value: object) -> None:
    """Replace the node at `path`, and at no other path."""
    holder, key = get(model, path[:-1]), path[-1]
    if isinstance(holder, list):
        holder[int(key)] = value
    elif isinstance(holder, dict):
        holder[key] = value
    else:
        setattr(holder, str(key), value)
