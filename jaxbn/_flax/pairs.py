"""Which batch norms of a traced model can be folded, into which layers, and why not."""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NamedTuple, TypeVar

from .._core.axes import Axes
from .dataflow import Dataflow, Value
from .linear import Linear
from .marks import Mark

LAYER_WEIGHTS = ("kernel", "bias")
NORM_WEIGHTS = ("scale", "bias", "mean", "var")
Call = TypeVar("Call")


class Norm(NamedTuple):
    """A call of a batch norm: its feature axes from the end, ascending.

    `epsilon` is `None` if it is computed in the call; `custom` as in `Linear`.
    """

    axes: Axes
    epsilon: float | None
    train: bool
    custom: str = ""


class Trace(NamedTuple):
    """The calls of all layers and batch norms by path, and the variables they read.

    `variables` has the number of each weight among the model's variables, which have
    these `shapes`.
    """

    flow: Dataflow
    layers: Mapping[str, Collection[Linear]]
    norms: Mapping[str, Collection[Norm]]
    variables: Mapping[Mark, int]
    shapes: list[tuple[int, ...]]


class Fold(NamedTuple):
    """A batch norm, the layer to fold it into, and the options of `jaxbn.fold`.

    `stacks` has the axes of each weight along which layers are stacked.
    """

    layer: str
    norm: str
    epsilon: float
    axis: Axes
    input_axis: Axes | None
    stacks: dict[Mark, Axes]


class NotFoldableError(ValueError):
    """The reason why a batch norm cannot be folded."""


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
    return folds, reasons


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
    _check_linear(call, norm)
    return call


def _check_linear(call: Norm | Linear, path: str) -> None:
    if call.custom:
        raise NotFoldableError(
            f"{path!r} has a {call.custom} of its own, which may not be linear"
        )


def _only(calls: Collection[Call], path: str) -> Call:
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
        if any(use != norm for value in outputs for use in value.uses):
            raise NotFoldableError(
                f"the output of {layer!r}, the layer before it, has another use"
            )
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
    layers = {use for value in outputs for use in value.uses}
    if not layers or not layers <= trace.layers.keys():
        raise NotFoldableError("its output is not the input of a linear layer alone")

    def axes(layer: str, linear: Linear) -> tuple[Axes, Axes]:
        if _sources(trace.flow.inputs[layer]) != {norm}:
            raise NotFoldableError(
                f"{layer!r}, after it, is called on other arrays too"
            )
        if linear.obstacle:
            raise NotFoldableError(f"{layer!r}, the layer after it, {linear.obstacle}")
        inputs = dict(linear.inputs)
        if not inputs.keys() >= set(call.axes):
            raise NotFoldableError(
                f"its axis is not the input features of {layer!r}, after it"
            )
        return linear.outputs, tuple(inputs[a] for a in call.axes)

    return _folds(trace, norm, call, {str(layer) for layer in layers}, axes)


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
        along = axes(layer, linear)
        _check_linear(linear, layer)
        stacks = _stacks(trace, layer, norm)
        folds.append(Fold(layer, norm, call.epsilon or 0.0, *along, stacks))
    return folds


def _sources(values: Iterable[Value]) -> set[str | None]:
    return {value.source for value in values}


def _stacks(trace: Trace, layer: str, norm: str) -> dict[Mark, Axes]:
    """Return the axes of each weight along which the layers are stacked."""
    marks = [Mark(name, layer) for name in LAYER_WEIGHTS]
    marks += [Mark(name, norm) for name in NORM_WEIGHTS]
    calls = [(mark, value) for mark in marks for value in trace.flow.weights[mark]]
    scanned = {mark: _check_weight(trace, mark, value) for mark, value in calls}
    mapped = {mark: _mapped_axes(value) for mark, value in calls}
    stacks = {mark: scanned[mark] + mapped[mark] for mark in scanned}
    sizes = {
        tuple(trace.shapes[trace.variables[mark]][a] for a in axes)
        for mark, axes in stacks.items()
    }
    orders = {axes for axes in mapped.values() if len(axes) > 1}
    if len(sizes) > 1 or len(orders) > 1:
        raise NotFoldableError(f"it is not stacked along the same axes as {layer!r}")
    return stacks


def _check_weight(trace: Trace, mark: Mark, value: Value) -> Axes:
    """Return the axes of a variable that loops run along, if it is the model's own."""
    seen, leaf = value.seen, value.leaf
    if seen is None or leaf is None or leaf != trace.variables.get(mark):
        raise NotFoldableError(
            f"the {mark.part} of {mark.path!r} is computed in the call, and not a "
            "variable of the model itself"
        )
    if leaf in trace.flow.elsewhere:
        raise NotFoldableError(
            f"the {mark.part} of {mark.path!r} is used outside of its calls"
        )
    if seen != tuple(sorted(seen)):
        raise NotFoldableError(f"the {mark.part} of {mark.path!r} is transposed")
    return value.scanned


def _mapped_axes(value: Value) -> Axes:
    """Return the axes of a variable that `vmap` runs along."""
    return tuple(a for a in value.axes if a not in (value.seen or ()))
