"""The arrays in a traced model, and what `dataflow` finds out about the layers."""

from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass, field

import numpy as np
from jax.extend.core import Var

from .._core.axes import Axes
from .marks import Mark

VMAP = "vmap"  # where a stack is not one of a loop
Stacks = tuple[tuple[int, object], ...]  # axes, each with its loop or `VMAP`


@dataclass(eq=False)
class Call:
    """A call of the layer at this path."""

    path: str


@dataclass(eq=False)
class Value:
    """An array in the program, the same one wherever it is passed unchanged.

    `source` is the layer that it is the output of, `seen` the axes of it that this
    layer's call sees, and `mapped` the number of the others. `uses` has the layer that
    it is an input of, or `None`, for each of its uses, with the axes seen there. `leaf`
    is the number of the model's variable that it is, all of it or an element of a
    stack; `axes` has the variable's axis for each axis, and `stacks` the axes that
    loops run along, each with its loop. `call` is the call that computes it, by the
    `term`.
    """

    source: str | None = None
    seen: Axes = ()
    mapped: int = 0
    uses: list[tuple[str | None, Axes]] = field(default_factory=list)
    leaf: int | None = None
    axes: Axes = ()
    stacks: Stacks = ()
    call: Call | None = None
    term: Hashable = None


@dataclass(frozen=True)
class Weight:
    """A weight as a call sees it: which variable, which axes of it, and of its stacks.

    A stack is an axis, and the loop or `VMAP` that runs along it.
    """

    leaf: int | None
    seen: Axes
    stacks: Stacks


@dataclass(eq=False)
class Dataflow:
    """The inputs, outputs and weights of all layers, for each of their calls.

    `dtypes` has those of inputs and outputs. `computed` has the terms of a layer's
    outputs, and `plain` those of the plain layer's. `elsewhere` has the variables that
    are used outside of all calls, and `leaking` the layers with an array in a call
    that is used outside of it; `calling` is the call that is being read.
    """

    inputs: dict[str, list[Value]] = field(default_factory=lambda: defaultdict(list))
    outputs: dict[str, list[Value]] = field(default_factory=lambda: defaultdict(list))
    weights: dict[Mark, set[Weight]] = field(default_factory=lambda: defaultdict(set))
    dtypes: dict[Mark, set[np.dtype]] = field(default_factory=lambda: defaultdict(set))
    computed: dict[str, set[Hashable]] = field(default_factory=lambda: defaultdict(set))
    plain: dict[str, set[Hashable]] = field(default_factory=lambda: defaultdict(set))
    elsewhere: set[int] = field(default_factory=set)
    leaking: set[str] = field(default_factory=set)
    calling: Call | None = None
    terms: dict[Hashable, int] = field(default_factory=dict)
    constants: dict[Var, Value] = field(default_factory=lambda: defaultdict(Value))
