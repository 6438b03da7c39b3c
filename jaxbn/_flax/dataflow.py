"""Where arrays go in a traced model: from each layer's output to each layer's input."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from .._core.axes import Axes
from .marks import INPUT, OUTPUT, Mark, read_mark
from .paths import Path

# Calls of a function: its arguments and results are those of the equation.
CALLS = {
    *("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2"),
    *("custom_jvp_call", "custom_vjp_call"),
}
Atom = Var | Literal
IDENTITIES = {"name", "sharding_constraint"}


@dataclass(eq=False)
class Value:
    """An array in the program, the same one wherever it is passed unchanged.

    `source` is the layer that it is the output of, and `uses` has the layer that it is
    an input of, or `None`, for each of its uses. `leaf` is the number of the model's
    variable that it is, all of it or an element of a stack; `axes` has the variable's
    axis for each axis, `scanned` the axes that loops run along, and `seen` the axes
    that a layer's call sees, after `rev`.
    """

    source: str | None = None
    uses: list[str | None] = field(default_factory=list)
    leaf: int | None = None
    axes: Axes = ()
    scanned: Axes = ()
    seen: Axes | None = None


@dataclass(eq=False)
class Dataflow:
    """The inputs, outputs and weights of all layers, for each of their calls.

    `elsewhere` has the variables that are used outside of all these calls; `calling` is
    the layer whose call is being read.
    """

    inputs: dict[str, list[Value]] = field(default_factory=lambda: defaultdict(list))
    outputs: dict[str, list[Value]] = field(default_factory=lambda: defaultdict(list))
    weights: dict[Mark, list[Value]] = field(default_factory=lambda: defaultdict(list))
    elsewhere: set[int] = field(default_factory=set)
    calling: str | None = None


def read_dataflow(
    program: Jaxpr, variables: Sequence[Path], state: Sequence[Path]
) -> Dataflow:
    """Read the marks in a program from a model's variables to its output and state.

    The variables at these paths are the first inputs, the state's the last outputs.
    """
    flow = Dataflow()
    inputs = [Value() for _ in program.invars]
    for leaf, var in enumerate(program.invars[: len(variables)]):
        inputs[leaf] = Value(leaf=leaf, axes=tuple(range(_rank(var))))
    outputs = _read(program, inputs, flow)
    _use(outputs)
    places = [None] * (len(outputs) - len(state)) + [*state]
    # A variable that stays in its own place in the state is not used by that.
    flow.elsewhere.update(
        value.leaf
        for value, place in zip(outputs, places, strict=True)
        if value.leaf is not None and variables[value.leaf] != place
    )
    return flow


def _use(values: Sequence[Value], layer: str | None = None) -> None:
    for value in values:
        value.uses.append(layer)


def _use_elsewhere(values: Sequence[Value], flow: Dataflow) -> None:
    _use(values)
    if flow.calling is None:
        flow.elsewhere.update(v.leaf for v in values if v.leaf is not None)


def _read(jaxpr: Jaxpr, inputs: Sequence[Value], flow: Dataflow) -> list[Value]:
    """Read a program, and return its outputs."""
    # A new one for each call: a jitted function that is called twice is one object.
    values = dict(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Atom) -> Value:
        known = None if isinstance(atom, Literal) else values.get(atom)
        return Value() if known is None else known

    for equation in _live_equations(jaxpr):
        operands = [read(atom) for atom in equation.invars]
        results = _read_equation(equation, operands, flow)
        values.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _live_equations(jaxpr: Jaxpr) -> list[JaxprEqn]:
    """Return the equations that the outputs depend on, and the marks of weights."""
    needed = {atom for atom in jaxpr.outvars if isinstance(atom, Var)}
    live = []
    for equation in reversed(jaxpr.eqns):
        marked = _mark_of(equation)
        is_weight = marked is not None and marked.part not in {INPUT, OUTPUT}
        if is_weight or equation.effects or not needed.isdisjoint(equation.outvars):
            live.append(equation)
            needed.update(atom for atom in equation.invars if isinstance(atom, Var))
    return live[::-1]


def _mark_of(equation: JaxprEqn) -> Mark | None:
    is_name = equation.primitive.name == "name"
    return read_mark(equation.params["name"]) if is_name else None


def _read_equation(
    equation: JaxprEqn, operands: list[Value], flow: Dataflow
) -> list[Value]:
    name, marked = equation.primitive.name, _mark_of(equation)
    if marked is not None:
        return [_read_mark(marked, operands[0], flow)]
    if name in IDENTITIES:
        return operands
    programs = [*_programs(equation)]
    if name in CALLS and len(programs) == 1:
        return _read(programs[0], operands, flow)
    value = operands[0] if operands else Value()
    if name in _MOVES and value.leaf is not None and value.seen is None:
        return [_MOVES[name](value, equation)]
    if name == "cond":
        return _read_cond(programs, operands, flow)
    if name == "scan":
        return _read_scan(equation, programs[0], operands, flow)
    for program in programs:
        _use(_read(program, [Value() for _ in program.invars], flow))
    _use_elsewhere(operands, flow)
    return [Value() for _ in equation.outvars]


def _read_mark(marked: Mark, value: Value, flow: Dataflow) -> Value:
    if marked.part == INPUT:
        flow.calling = marked.path
        flow.inputs[marked.path].append(value)
        _use([value], marked.path)
        return Value()
    if marked.part == OUTPUT:
        flow.calling = None
        output = Value(source=marked.path)
        flow.outputs[marked.path].append(output)
        return output
    flow.weights[marked].append(value)
    return Value()


def _read_cond(
    branches: Sequence[Jaxpr], operands: list[Value], flow: Dataflow
) -> list[Value]:
    _use_elsewhere(operands[:1], flow)
    results = [_read(branch, operands[1:], flow) for branch in branches]
    return [_merge(values, flow) for values in zip(*results, strict=True)]


def _merge(values: Sequence[Value], flow: Dataflow) -> Value:
    """Return the variable that all branches return, or a new array."""
    first = values[0]
    if first.leaf is not None and all(value is first for value in values):
        return first
    _use_elsewhere(values, flow)
    return Value()


def _read_scan(
    equation: JaxprEqn, program: Jaxpr, operands: list[Value], flow: Dataflow
) -> list[Value]:
    # By rank, because the names of the parameters differ between versions of JAX.
    carried = _count_same_rank(equation.outvars, program.outvars)
    constants = _count_same_rank(equation.invars, program.invars) - carried
    carry = operands[constants : constants + carried]
    stacked = operands[constants + carried :]
    elements = [_scan(value) for value in stacked]
    _use(operands)
    lost = [v for v, e in zip(stacked, elements, strict=True) if e.leaf is None]
    _use_elsewhere(carry + lost, flow)
    inputs = [*operands[:constants], *(Value() for _ in carry), *elements]
    outputs = _read(program, inputs, flow)
    _use_elsewhere(outputs[:carried], flow)
    rest = [_stack(value, elements, flow) for value in outputs[carried:]]
    return [*(Value() for _ in carry), *rest]


def _stack(value: Value, elements: Sequence[Value], flow: Dataflow) -> Value:
    """Return the variable whose elements a loop returns as they came, or a new array.

    nnx returns all variables of a module from a loop over it.
    """
    known = {(e.leaf, e.scanned) for e in elements if e.leaf is not None}
    if value.seen is None and (value.leaf, value.scanned) in known:
        *scanned, first = value.scanned
        return _variable(value, (first, *value.axes), tuple(scanned))
    _use_elsewhere([value], flow)
    return Value()


def _count_same_rank(outer: Sequence[Atom], inner: Sequence[Atom]) -> int:
    pairs = zip(outer, inner, strict=True)
    return sum(_rank(a) == _rank(b) for a, b in pairs)


def _rank(atom: Atom) -> int:
    return len(getattr(atom.aval, "shape", ()))


def _scan(value: Value) -> Value:
    if value.leaf is None or value.seen is not None:
        return Value()
    first, *rest = value.axes
    return _variable(value, tuple(rest), (*value.scanned, first))


def _transpose(value: Value, equation: JaxprEqn) -> Value:
    order = equation.params["permutation"]
    return _variable(value, tuple(value.axes[a] for a in order), value.scanned)


def _rev(value: Value, equation: JaxprEqn) -> Value:
    seen = tuple(value.axes[a] for a in equation.params["dimensions"])
    return _variable(value, value.axes, value.scanned, seen)


def _variable(
    value: Value, axes: Axes, scanned: Axes, seen: Axes | None = None
) -> Value:
    return Value(leaf=value.leaf, axes=axes, scanned=scanned, seen=seen)


_MOVES = {"transpose": _transpose, "rev": _rev}


def _programs(equation: JaxprEqn) -> Iterator[Jaxpr]:
    for param in equation.params.values():
        for value in param if isinstance(param, tuple | list) else (param,):
            program = getattr(value, "jaxpr", value)
            if isinstance(program, Jaxpr):
                yield program
