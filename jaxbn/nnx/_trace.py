"""The layers and batch norms that an nnx model calls, and how they are connected."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache
from typing import TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import PyTree

from .._flax.paths import Path, join
from .._fold.checks import uses_call_of
from .._fold.dataflow import read_dataflow
from .._fold.linear import (
    DENSE,
    Linear,
    describe_convolution,
    describe_functions,
    describe_general,
    describe_transposed,
)
from .._fold.marks import Mark
from .._fold.pairs import Trace
from .._fold.plain import Weights
from .._fold.tracing import Recorder, describe_norm, names, trace_call
from .._fold.weights import LAYER_WEIGHTS, NORM_WEIGHTS
from ._batch_norm import BatchNorm, check_running_average
from ._graph import iterate, replace_class

Layer = nnx.Linear | nnx.LinearGeneral | nnx.Conv | nnx.ConvTranspose
LAYERS = (nnx.Linear, nnx.LinearGeneral, nnx.Conv, nnx.ConvTranspose)
NORMS = (nnx.BatchNorm, BatchNorm)
WEIGHTS = {*LAYER_WEIGHTS, *NORM_WEIGHTS}
PLACE = "jaxbn_place"
Kind = TypeVar("Kind", bound=nnx.Module)


def trace_model(
    model: PyTree, args: tuple[PyTree, ...], kwargs: dict[str, PyTree]
) -> Trace:
    """Trace one call of the model, which is not changed."""
    graphdef, state = nnx.split(model, graph=True)
    keyed, structure = jax.tree.flatten_with_path(state)
    leaves = [leaf for _, leaf in keyed]
    paths = [names(keys) for keys, _ in keyed]
    recorder = Recorder()

    def call(leaves: list[Array], *args: PyTree, **kwargs: PyTree) -> PyTree:
        copy = nnx.merge(graphdef, structure.unflatten(leaves))
        record_calls(copy, recorder)
        # The state too: an array that the call stores is used.
        return copy(*args, **kwargs), nnx.state(copy, graph=True)

    program, stored = trace_call(call, leaves, args, kwargs)
    known = _weights_by_path(model, paths)
    return Trace(
        read_dataflow(program, paths, stored),
        recorder.layers,
        recorder.norms,
        recorder.plain,
        known,
        {leaf: np.dtype(leaves[leaf].dtype) for leaf in known.values()},
    )


def _weights_by_path(model: PyTree, state: list[Path]) -> dict[Mark, int]:
    """Return the number of each weight among the leaves of the state."""
    nodes = [*iterate(model)]
    # A Variable of several layers is in the state once, at its first path.
    paths = {id(node): join(p) for p, node in nodes if isinstance(node, nnx.Variable)}
    leaves = {join(path): leaf for leaf, path in enumerate(state)}
    return {
        Mark(name, join(path)): leaves[paths[id(variable)]]
        for path, node in nodes
        if isinstance(node, (*LAYERS, *NORMS))
        for name, variable in weights(node).items()
    }


def weights(layer: nnx.Module) -> dict[str, nnx.Variable]:
    """Return the Variables of a layer or batch norm by name, attributes of its own."""
    found = {name: vars(layer).get(name) for name in WEIGHTS}
    return {name: v for name, v in found.items() if isinstance(v, nnx.Variable)}


@dataclass(frozen=True, eq=False)
class _Place:
    """The path of a layer, and the recorder of its calls.

    An attribute of this kind belongs to the graph, and so survives nnx's transforms.
    """

    recorder: Recorder
    path: str


def record_calls(model: PyTree, recorder: Recorder, parent: Path = ()) -> None:
    """Make all layers and batch norms of a model record their calls."""
    for path, node in [*iterate(model)]:
        for kinds, recorded in ((LAYERS, _recorded_layer), (NORMS, _recorded_norm)):
            if isinstance(node, kinds) and uses_call_of(node, kinds):
                setattr(node, PLACE, _Place(recorder, join((*parent, *path))))
                replace_class(node, recorded(type(node)))


@cache
def _recorded_layer(kind: type[nnx.Module]) -> type[nnx.Module]:
    call = cast(Callable[..., Array], kind.__call__)

    def call_recorded(
        layer: nnx.Module, inputs: ArrayLike, *args: PyTree, **options: PyTree
    ) -> Array:
        place: _Place = getattr(layer, PLACE)
        plain = _plain_copy(layer, LAYERS)
        return place.recorder.call(
            place.path,
            lambda x: call(layer, x, *args, **options),
            inputs,
            _values(layer),
            lambda x, weights: _set(plain, weights)(x, *args, **options),
            _describe(plain, jnp.ndim(inputs)),
        )

    return type(kind.__name__, (kind,), {"__call__": call_recorded})


@cache
def _recorded_norm(kind: type[nnx.BatchNorm]) -> type[nnx.BatchNorm]:
    def call_recorded(
        norm: nnx.BatchNorm,
        x: ArrayLike,
        use_running_average: bool | None = None,
        **options: PyTree,
    ) -> Array:
        place: _Place = getattr(norm, PLACE)
        inference = use_running_average
        if inference is None:
            inference = check_running_average(norm.use_running_average)
        plain = _plain_copy(norm, NORMS)
        return place.recorder.call(
            place.path,
            lambda x: kind.__call__(norm, x, use_running_average, **options),
            x,
            _values(norm),
            lambda x, weights: _set(plain, weights)(x, use_running_average, **options),
            describe_norm(plain, x, train=not inference),
        )

    return type(kind.__name__, (kind,), {"__call__": call_recorded})


def _values(layer: nnx.Module) -> dict[str, Array]:
    return {name: variable[...] for name, variable in weights(layer).items()}


def _plain_copy(layer: nnx.Module, kinds: Collection[type[Kind]]) -> Kind:
    """Return a layer with the same attributes of the first of `kinds` that it is."""
    kind = next(kind for kind in type(layer).__mro__ if kind in kinds)
    copy = object.__new__(kind)
    vars(copy).update(vars(layer))
    return copy


def _set(plain: nnx.Module, weights: Weights) -> Callable[..., Array]:
    """Put the weights into a plain layer, and return its call."""
    for name, value in weights.items():
        vars(plain)[name] = type(vars(plain)[name])(value)
    return cast(Callable[..., Array], plain)


def _describe(layer: Layer, ndim: int) -> Linear:
    return _describe_kind(layer, ndim)._replace(refusal=describe_functions(layer))


def _describe_kind(layer: object, ndim: int) -> Linear:
    match layer:
        case nnx.ConvTranspose():
            return describe_transposed(layer.transpose_kernel)
        case nnx.Conv():
            return describe_convolution(
                layer.kernel_size, layer.padding, layer.input_dilation, layer.mask
            )
        case nnx.LinearGeneral():
            batched = bool(layer.batch_axis)
            return describe_general(layer.out_features, layer.axis, batched, ndim)
        case _:
            return DENSE
