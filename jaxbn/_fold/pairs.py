"""Which batch norms of a traced model can be folded, into which layers, and why not."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from .._core.axes import Axes
from .._core.dtypes import accumulation_dtype
from .checks import NotFoldableError
from .linear import Linear
from .marks import INPUT, OUTPUT, Mark
from .plain import PlainCall, check_computation
from .values import Dataflow, Value
from .weights import StackAxes, find_stacks

Options = TypeVar("Options")


class Norm(NamedTuple):
    """A call of a batch norm: its feature axes from the end, ascending.

    `epsilon` is `None` if it is computed in the call; `refusal` as in `Linear`.
    """

    axes: Axes
    epsilon: float | None
    train: bool
    refusal: str = ""


class Trace(NamedTuple):
    """The calls of all layers and batch norms by path, and the variables they read.

    `plain` has the plain layer for each call of a layer. `variables` has the number of
    each weight among the model's variables, and `dtypes` its dtype.
    """

    flow: Dataflow
    layers: Mapping[str, Collection[Linear]]
    norms: Mapping[str, Collection[Norm]]
    plain: Mapping[str, Sequence[PlainCall]]
    variables: Mapping[Mark, int]
    dtypes: Mapping[int, np.dtype]


class Fold(NamedTuple):
    """A batch norm, the layer to fold it into, and the options of `jaxbn.fold`.

    `stacks` has the axis of each weight along which layers are stacked, if they are.
    The layer then returns `returned`, with a kernel and bias that are cast to `dtype`,
    if it is not `None`.
    """

    layer: str
    norm: str
    epsilon: float
    axis: Axes
    input_axis: Axes | None
    stacks: StackAxes
    dtype: np.dtype | None
    returned: np.dtype


def choose_folds(
    trace: Trace, norms: Iterable[str]
) -> tuple[list[Fold], dict[str, str]]:
    """Return all folds, after the layer where there is a choice, and all reasons."""
    folds, reasons = [], {}
    for norm in norms:
        found, why_not = _find_folds(trace, norm)
        folds += found[0] if found else []
        if not found:
            reasons[norm] = why_not
    for norm in _mixed_dtypes(folds):
        folds = [fold for fold in folds if fold.norm != norm]
        reasons[norm] = "the layer after it includes a batch norm of another dtype"
    return folds, reasons


def _mixed_dtypes(folds: Sequence[Fold]) -> list[str]:
    """Return the norms before layers that also include one of another dtype."""
    after = {fold.layer: fold for fold in folds if fold.input_axis is None}
    before = [f for f in folds if f.input_axis is not None and f.layer in after]

    def dtypes(fold: Fold) -> tuple[np.dtype | None, np.dtype]:
        return fold.dtype, fold.returned

    mixed = [fold.norm for fold in before if dtypes(fold) != dtypes(after[fold.layer])]
    return [*dict.fromkeys(mixed)]


def check_pairs(trace: Trace, pairs: Iterable[tuple[str, str]]) -> list[Fold]:
    """Return the folds of these layers and norms, which the model must compute."""
    layers: dict[str, list[str]] = {}
    for layer, norm in pairs:
        layers.setdefault(norm, []).append(layer)
    return [
        fold
        for norm, named in layers.items()
        for fold in _check_norm_pairs(trace, norm, named)
    ]


def _check_norm_pairs(trace: Trace, norm: str, layers: list[str]) -> list[Fold]:
    found, why_not = _find_folds(trace, norm)
    for folds in found:
        if {fold.layer for fold in folds} == set(layers):
            return folds
    raise ValueError(
        "pairs must name a batch norm and the linear layer that the model calls "
        "directly before it, or directly after it, all of them if there are several; "
        f"got the batch norm {norm!r} with {_quote(layers)}. "
        + " ".join(map(_describe, found))
        + (f"It cannot be folded: {why_not}." if not found else "")
    )


def _describe(folds: list[Fold]) -> str:
    side = "before" if folds[0].input_axis is None else "after"
    return f"The layer directly {side} it is {_quote(f.layer for f in folds)}."


def _quote(paths: Iterable[str]) -> str:
    return ", ".join(map(repr, paths))


def _find_folds(trace: Trace, norm: str) -> tuple[list[list[Fold]], str]:
    """Return the folds after and before layers, as many as there are, and reasons."""
    found: list[list[Fold]] = []
    reasons: list[str] = []
    for find in (_fold_after, _fold_before):
        try:
            found.append(find(trace, norm, _check_norm(trace, norm)))
        except NotFoldableError as error:
            reasons.append(str(error))
    return found, "; ".join(dict.fromkeys(reasons))


def _check_norm(trace: Trace, norm: str) -> Norm:
    if not trace.norms.get(norm):
        raise NotFoldableError("the model does not call it with these arguments")
    call = _only(trace.norms[norm], norm)
    if call.train:
        raise NotFoldableError(
            "it normalizes by the batch in this call; pass the arguments of inference"
        )
    if call.epsilon is None:
        raise NotFoldableError("its epsilon is computed in the call")
    _check_options(call, norm)
    return call


def _check_options(call: Norm | Linear, path: str) -> None:
    if call.refusal:
        raise NotFoldableError(f"{path!r} {call.refusal}")


def _only(calls: Collection[Options], path: str) -> Options:
    if len(calls) > 1:
        raise NotFoldableError(f"the calls of {path!r} differ in their options")
    (call,) = calls
    return call


def _fold_after(trace: Trace, norm: str, call: Norm) -> list[Fold]:
    """Return the folds of a norm into the layers before it."""
    layers = _sources(trace.flow.inputs[norm])
    if not layers or not layers <= trace.layers.keys():
        raise NotFoldableError("its input is not the output of a linear layer itself")

    def axes(layer: str, linear: Linear) -> tuple[Axes, None]:
        outputs = trace.flow.outputs[layer]
        if any(use != norm for value in outputs for use, _ in value.uses):
            raise NotFoldableError(
                f"the output of {layer!r}, the layer before it, has another use"
            )
        _check_same_view(outputs, layer)
        last = len(call.axes)
        if call.axes != tuple(range(-last, 0)) or last > len(linear.outputs):
            raise NotFoldableError(
                f"its axis is not the output features of {layer!r}, before it"
            )
        return linear.outputs[-last:], None

    return _folds(trace, norm, call, layers, axes)


def _fold_before(trace: Trace, norm: str, call: Norm) -> list[Fold]:
    """Return the folds of a norm into the layers after it."""
    outputs = trace.flow.outputs[norm]
    layers = {use for value in outputs for use, _ in value.uses}
    if not layers or not layers <= trace.layers.keys():
        raise NotFoldableError("its output is not the input of a linear layer alone")

    def axes(layer: str, linear: Linear) -> tuple[Axes, Axes]:
        if _sources(trace.flow.inputs[layer]) != {norm}:
            raise NotFoldableError(
                f"{layer!r}, after it, is called on other arrays too"
            )
        _check_same_view(outputs, layer)
        if linear.obstacle:
            raise NotFoldableError(f"{layer!r}, the layer after it, {linear.obstacle}")
        inputs = dict(linear.inputs)
        if not inputs.keys() >= set(call.axes):
            raise NotFoldableError(
                f"its axis is not the input features of {layer!r}, after it"
            )
        return linear.outputs, tuple(inputs[a] for a in call.axes)

    return _folds(trace, norm, call, {str(layer) for layer in layers}, axes)


def _check_same_view(values: Iterable[Value], layer: str) -> None:
    """Check that both calls see the same axes of the array between them."""
    if any(seen != value.seen for value in values for _, seen in value.uses):
        raise NotFoldableError(
            f"it and {layer!r} are mapped along different axes of the array between"
        )


def _folds(
    trace: Trace,
    norm: str,
    call: Norm,
    layers: Iterable[str | None],
    axes: Callable[[str, Linear], tuple[Axes, Axes | None]],
) -> list[Fold]:
    folds = []
    for layer in sorted(map(str, layers)):
        linear = _only(trace.layers[layer], layer)
        axis, input_axis = axes(layer, linear)
        _check_options(linear, layer)
        stacks = find_stacks(trace.flow, trace.variables, layer, norm)
        check_computation(trace.flow, layer)
        check_computation(trace.flow, norm)
        dtypes = _find_dtypes(trace, layer, norm, stacks, after=input_axis is None)
        epsilon = call.epsilon or 0.0
        folds.append(Fold(layer, norm, epsilon, axis, input_axis, stacks, *dtypes))
    return folds


def _sources(values: Iterable[Value]) -> set[str | None]:
    return {value.source for value in values}


def _find_dtypes(
    trace: Trace, layer: str, norm: str, stacks: Iterable[Mark], after: bool
) -> tuple[np.dtype | None, np.dtype]:
    """Return the dtype to cast the new weights to, and the dtype of the output then."""
    dtypes = trace.flow.dtypes
    returned = _only_dtype(dtypes[Mark(OUTPUT, norm if after else layer)], norm)
    x = _only_dtype(dtypes[Mark(INPUT, layer if after else norm)], norm)
    weights = [trace.dtypes[trace.variables[mark]] for mark in stacks]
    # As in `jaxbn.fold`: a dtype below 16 bits widens nothing.
    wide = accumulation_dtype(*(d for d in weights if d.itemsize > 1))
    own = trace.dtypes[trace.variables[Mark("kernel", layer)]]
    for dtype in (None, own):
        cast = wide if dtype is None else dtype
        outputs = {call.output_dtype(x, cast) for call in trace.plain[layer]}
        if outputs == {returned}:
            return dtype, returned
    raise NotFoldableError(
        f"with it, {layer!r} would return {_quote(map(str, outputs))}, and the model "
        f"goes on with {returned}; give both layers the same dtype"
    )


def _only_dtype(dtypes: Collection[np.dtype], norm: str) -> np.dtype:
    if len(dtypes) > 1:
        raise NotFoldableError(f"the calls of {norm!r} differ in their dtypes")
    (dtype,) = dtypes
    return dtype
