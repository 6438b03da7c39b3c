"""Where the weights of a pair are in the model, and along which axis it is stacked."""

from collections.abc import Iterable, Iterator, Mapping

from .checks import NotFoldableError
from .marks import Mark
from .values import VMAP, Dataflow, Stacks, Weight

LAYER_WEIGHTS = ("kernel", "bias")
NORM_WEIGHTS = ("scale", "bias", "mean", "var")
StackAxes = dict[Mark, int | None]


def find_stacks(
    flow: Dataflow, variables: Mapping[Mark, int], layer: str, norm: str
) -> StackAxes:
    """Return the axis of each weight along which the layers are stacked, if any is."""
    marks = [Mark(name, layer) for name in LAYER_WEIGHTS]
    marks += [Mark(name, norm) for name in NORM_WEIGHTS]
    seen = {mark: flow.weights[mark] for mark in marks if flow.weights[mark]}
    for mark, weights in seen.items():
        for weight in weights:
            _check_weight(flow, variables, mark, weight)
    stacks = {w.stacks for weights in seen.values() for w in weights}
    if any(len(stack) > 1 for stack in stacks):
        raise NotFoldableError(_NESTED.format(layer))
    loops = {frozenset(_loops(weights)) for weights in seen.values()}
    axes = {mark: {_axis(w.stacks) for w in weights} for mark, weights in seen.items()}
    if len(loops) > 1 or any(len(of_weight) > 1 for of_weight in axes.values()):
        raise NotFoldableError(f"it is not stacked along the same axes as {layer!r}")
    outputs = [*flow.outputs[layer], *flow.outputs[norm]]
    if (VMAP,) in next(iter(loops)) and any(y.mapped != 1 for y in outputs):
        raise NotFoldableError(_NESTED.format(layer))
    return {mark: axis for mark, (axis,) in axes.items()}


_NESTED = "it or {!r} is in nested stacks, which are not folded: one in the other"


def _loops(weights: Iterable[Weight]) -> Iterator[tuple[object, ...]]:
    """Yield the loops, or `VMAP`, that run along the stacks of a weight's calls."""
    return (tuple(loop for _, loop in weight.stacks) for weight in weights)


def _axis(stacks: Stacks) -> int | None:
    return next((axis for axis, _ in stacks), None)


def _check_weight(
    flow: Dataflow, variables: Mapping[Mark, int], mark: Mark, weight: Weight
) -> None:
    """Check that a weight is a variable of the model itself."""
    if weight.leaf is None or weight.leaf != variables.get(mark):
        raise NotFoldableError(
            f"the {mark.part} of {mark.path!r} is computed in the call, and not a "
            "variable of the model itself"
        )
    if weight.leaf in flow.elsewhere:
        raise NotFoldableError(
            f"the {mark.part} of {mark.path!r} is used outside of its calls"
        )
    if weight.seen != tuple(sorted(weight.seen)):
        raise NotFoldableError(f"the {mark.part} of {mark.path!r} is transposed")
