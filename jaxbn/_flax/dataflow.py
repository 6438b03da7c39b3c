"""Where arrays go in a traced model: from each layer's output to each layer's input."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from .._core.axes import Axes
from .marks import INPUT, OUTPUT, Mark, read_mark

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


def read_dataflow(program: Jaxpr, variables: int) -> Dataflow:
    """Read the marks in a program whose first inputs are a model's variables."""
    flow = Dataflow()
    inputs = [Value() for _ in program.invars]
    for leaf, var in enumerate(program.invars[:variables]):
        inputs[leaf] = Value(leaf=leaf, axes=tuple(range(_rank(var))))
    _use(_read(program, inputs, flow))
    return flow


def _use(values: Sequence[Value], layer: str | None = None) -> None:
    for value in values:
        value.uses.append(layer)


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
    for program in programs:
        _use(_read(program, _inner_inputs(equation, program, operands), flow))
    _use(operands[:1] if name == "cond" else operands)
    if name not in {"scan", "cond"} and flow.calling is None:
        flow.elsewhere.update(v.leaf for v in operands if v.leaf is not None)
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


def _inner_inputs(
    equation: JaxprEqn, program: Jaxpr, operands: list[Value]
) -> list[Value]:
    """Return the inputs of a program in an equation that is more than one call."""
    if equation.primitive.name == "cond":
        return operands[1:]
    if equation.primitive.name != "scan":
        return [Value() for _ in program.invars]
    # By rank, because the names of the parameters differ between versions of JAX.
    carried = _count_same_rank(equation.outvars, program.outvars)
    constants = _count_same_rank(equation.invars, program.invars) - carried
    stacked = operands[constants + carried :]
    return [
        *operands[:constants],
        *(Value() for _ in range(carried)),
        *map(_scan, stacked),
    ]


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
