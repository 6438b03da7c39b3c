"""The layers and batch norms that a linen model calls, and how they are connected."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.core import meta
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import PyTree

from .._flax.paths import Path, join
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
from .._fold.weights import LAYER_WEIGHTS
from ._bridge import intercept_bridges
from ._intercept import NextCall, calling_plain, intercept_calls, plain_copy
from ._population import measuring
from ._skip import (
    LAYERS,
    NORMS,
    add_bias,
    has_only,
    is_folded,
    may_gain_bias,
    norm_variables,
    skip_in_trace,
)
from ._tree import Variables

STATISTICS = ("mean", "var")
WEIGHTS = {("params", name) for name in (*LAYER_WEIGHTS, "scale")}
WEIGHTS |= {("batch_stats", name) for name in STATISTICS}


def trace_model(
    model: nn.Module,
    variables: Variables,
    args: tuple[PyTree, ...],
    kwargs: dict[str, PyTree],
) -> tuple[Trace, set[str]]:
    """Trace one call of `model.apply`; return also the paths of norms of nnx."""
    recorder, of_nnx = Recorder(), set[str]()
    keyed, structure = jax.tree.flatten_with_path(variables)
    leaves = [leaf for _, leaf in keyed]
    paths = [names(keys) for keys, _ in keyed]
    returns_state = kwargs.get("mutable", False) is not False

    def apply(leaves: list[Array], *args: PyTree, **kwargs: PyTree) -> PyTree:
        y = model.apply(structure.unflatten(leaves), *args, **kwargs)
        return y if returns_state else (y, {})

    # `replace_batch_norm` then passes each call on.
    with measuring(True), _recording(recorder, of_nnx), skip_in_trace():
        program, state = trace_call(apply, leaves, args, kwargs)
    known = _weights_by_path(paths)
    trace = Trace(
        read_dataflow(program, paths, state),
        recorder.layers,
        recorder.norms,
        recorder.plain,
        known,
        {leaf: np.dtype(leaves[leaf].dtype) for leaf in known.values()},
    )
    return trace, of_nnx


def _weights_by_path(paths: list[Path]) -> dict[Mark, int]:
    return {
        Mark(str(path[-1]), join(path[1:-1])): leaf
        for leaf, path in enumerate(paths)
        if (path[0], path[-1]) in WEIGHTS
    }


@contextmanager
def _recording(recorder: Recorder, of_nnx: set[str]) -> Iterator[None]:
    layers = intercept_calls(LAYERS, partial(_call_layer, recorder))
    norms = intercept_calls(NORMS, partial(_call_norm, recorder))
    bridges = intercept_bridges(partial(_record_module, recorder, of_nnx))
    with layers, norms, bridges:
        yield


def _record_module(
    recorder: Recorder, of_nnx: set[str], bridge: nn.Module, module: object
) -> None:
    """Record the calls in an nnx module, in a `ToLinen`."""
    from ..nnx._bridge import all_statistics  # a circular import
    from ..nnx._trace import record_calls

    of_nnx.update(join((*bridge.path, *norm)) for norm in all_statistics(module))
    record_calls(module, recorder, bridge.path)


def _call_layer(
    recorder: Recorder,
    next_call: NextCall,
    layer: nn.Module,
    inputs: ArrayLike,
    **options: PyTree,
) -> Array:
    plain = plain_copy(layer, LAYERS)

    def call_plain(x: ArrayLike, weights: Weights) -> Array:
        own = {n: w for n, w in weights.items() if n == "kernel" or plain.use_bias}
        with calling_plain():
            y = cast(Array, plain.apply({"params": own}, x, **options))
        return y if plain.use_bias else add_bias(y, weights.get("bias"))

    return recorder.call(
        _path(layer),
        partial(next_call, **options),
        inputs,
        _weights(layer, "params", LAYER_WEIGHTS),
        call_plain,
        _describe(plain, jnp.ndim(inputs))._replace(refusal=_refusal(layer)),
    )


def _refusal(layer: nn.Module) -> str:
    if layer.use_bias or may_gain_bias(layer):
        return describe_functions(layer)
    return "has no bias, but code or variables of its own, which may have one"


def _call_norm(
    recorder: Recorder,
    next_call: NextCall,
    norm: nn.BatchNorm,
    x: ArrayLike,
    use_running_average: bool | None = None,
    **options: PyTree,
) -> Array:
    if is_folded(norm):
        return next_call(x, use_running_average, **options)
    inference = nn.merge_param(
        "use_running_average", norm.use_running_average, use_running_average
    )
    plain = plain_copy(norm, NORMS)
    stats = _weights(norm, "batch_stats", STATISTICS)

    def call_plain(x: ArrayLike, weights: Weights) -> Array:
        variables: dict[str, dict[str, Array]] = {"params": {}, "batch_stats": {}}
        for name, value in weights.items():
            variables["batch_stats" if name in stats else "params"][name] = value
        with calling_plain():
            y = plain.apply(variables, x, use_running_average, **options)
        return cast(Array, y)

    description = describe_norm(plain, x, train=not inference)
    if not has_only(norm, norm_variables(norm)):
        refusal = "has other variables than a batch norm's"
        description = description._replace(refusal=refusal)
    return recorder.call(
        _path(norm),
        partial(next_call, use_running_average=use_running_average, **options),
        x,
        _weights(norm, "params", ("scale", "bias")) | stats,
        call_plain,
        description,
    )


def _path(layer: nn.Module) -> str:
    """Return the path of a layer's variables, which it may share with its parent."""
    return join(layer.path if layer.scope is None else layer.scope.path)


def _weights(
    layer: nn.Module, collection: str, names: Iterable[str]
) -> dict[str, Array]:
    found = {name: meta.unbox(layer.get_variable(collection, name)) for name in names}
    return {name: value for name, value in found.items() if value is not None}


def _describe(layer: nn.Module, ndim: int) -> Linear:
    match layer:
        case nn.ConvTranspose():
            return describe_transposed(layer.transpose_kernel)
        case nn.ConvLocal():
            return DENSE._replace(obstacle="has a kernel for each position")
        case nn.Conv():
            return describe_convolution(
                layer.kernel_size, layer.padding, layer.input_dilation, layer.mask
            )
        case nn.DenseGeneral():
            return describe_general(
                layer.features, layer.axis, bool(layer.batch_dims), ndim
            )
        case _:
            return DENSE
