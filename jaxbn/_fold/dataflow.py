"""Where arrays go in a traced model: from each layer's output to each layer's input."""

from collections.abc import Hashable, Iterator, Sequence

import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from .._core.axes import Axes
from .._flax.paths import Path
from .marks import INPUT, OUTPUT, PLAIN_INPUT, PLAIN_OUTPUT, Mark, read_mark, seen_axes
from .values import VMAP, Call, Dataflow, Stacks, Value, Weight

# Calls of a function: its arguments and results are those of the equation.
CALLS = {
    *("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2"),
    *("custom_jvp_call", "custom_vjp_call", "RematTraced"),
}
Atom = Var | Literal
IDENTITIES = {"name", "CheckpointName", "sharding_constraint"}


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
    _use(outputs, flow)
    places = [None] * (len(outputs) - len(state)) + [*state]
    # A variable that stays in its own place in the state is not used by that.
    flow.elsewhere.update(
        value.leaf
        for value, place in zip(outputs, places, strict=True)
        if value.leaf is not None and variables[value.leaf] != place
    )
    return flow


def _use(values: Sequence[Value], flow: Dataflow) -> None:
    for value in values:
        value.uses.append((None, ()))
        if value.call is not None and value.call is not flow.calling:
            flow.leaking.add(value.call.path)


def _use_elsewhere(values: Sequence[Value], flow: Dataflow) -> None:
    _use(values, flow)
    if flow.calling is None:
        flow.elsewhere.update(v.leaf for v in values if v.leaf is not None)


def _read(jaxpr: Jaxpr, inputs: Sequence[Value], flow: Dataflow) -> list[Value]:
    """Read a program, and return its outputs."""
    # A new one for each call: a jitted function that is called twice is one object.
    values = dict(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Atom) -> Value:
        if isinstance(atom, Literal):
            return Value(term=_term_of_literal(atom))
        return values[atom] if atom in values else flow.constants[atom]

    for equation in _live_equations(jaxpr):
        operands = [read(atom) for atom in equation.invars]
        results = _read_equation(equation, operands, flow)
        if flow.calling is not None and read_mark(equation) is None:
            _name_results(equation, operands, results, flow)
        values.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _live_equations(jaxpr: Jaxpr) -> list[JaxprEqn]:
    """Return the equations that the outputs depend on, and the marks beside them."""
    needed = {atom for atom in jaxpr.outvars if isinstance(atom, Var)}
    live = []
    for equation in reversed(jaxpr.eqns):
        marked = read_mark(equation)
        passed_on = {INPUT, OUTPUT, PLAIN_INPUT}
        is_beside = marked is not None and marked.part not in passed_on
        if is_beside or equation.effects or not needed.isdisjoint(equation.outvars):
            live.append(equation)
            needed.update(atom for atom in equation.invars if isinstance(atom, Var))
    return live[::-1]


def _name_results(
    equation: JaxprEqn, operands: list[Value], results: list[Value], flow: Dataflow
) -> None:
    """Give the results within a call their terms: equal ones are computed alike."""
    terms = [_term_of(value) for value in operands]
    for i, value in enumerate(results):
        if value.term is None and value not in operands:
            term = (_name(equation), _options(equation), *terms, i)
            value.term = flow.terms.setdefault(term, len(flow.terms))
            value.call = flow.calling


def _term_of(value: Value) -> Hashable:
    return value if value.term is None else value.term


def _term_of_literal(literal: Literal) -> Hashable:
    value = np.asarray(literal.val)
    return str(literal.aval), value.tobytes()


def _options(equation: JaxprEqn) -> str:
    """Write the parameters of an equation; programs in them are the same objects."""
    known = {
        name: id(value) if _has_program(value) else value
        for name, value in equation.params.items()
    }
    return repr(sorted(known.items()))


def _name(equation: JaxprEqn) -> str:
    """Return the name of an equation's operation, of one in Python by its class."""
    written_in_python = equation.params.get("_prim")
    if written_in_python is not None:
        return type(written_in_python).__name__
    return equation.primitive.name


def _read_equation(
    equation: JaxprEqn, operands: list[Value], flow: Dataflow
) -> list[Value]:
    name, marked = _name(equation), read_mark(equation)
    if marked is not None:
        return [_read_mark(equation, marked, operands[0], flow)]
    if name in IDENTITIES:
        return operands
    programs = [*_programs(equation.params)]
    if name in CALLS and len(programs) == 1:
        return _read(programs[0], operands, flow)
    if name == "transpose" and operands[0].leaf is not None:
        return [_transpose(operands[0], equation)]
    if name == "cond":
        return _read_cond(programs, operands, flow)
    if name == "scan":
        return _read_scan(equation, programs[0], operands, flow)
    for program in programs:
        _use(_read(program, [Value() for _ in program.invars], flow), flow)
    _use_elsewhere(operands, flow)
    return [Value() for _ in equation.outvars]


def _read_mark(equation: JaxprEqn, marked: Mark, value: Value, flow: Dataflow) -> Value:
    (result,), axes = equation.outvars, seen_axes(equation)
    if marked.part in {INPUT, PLAIN_INPUT}:
        flow.calling = Call(marked.path)
        if marked.part == INPUT:
            flow.inputs[marked.path].append(value)
            flow.dtypes[marked].add(_dtype(result))
            value.uses.append((marked.path, axes))
        return Value(term=INPUT, call=flow.calling)
    if marked.part == OUTPUT:
        flow.calling = None
        flow.computed[marked.path].add(_term_of(value))
        flow.dtypes[marked].add(_dtype(result))
        output = Value(marked.path, axes, _rank(result) - len(axes))
        flow.outputs[marked.path].append(output)
        return output
    if marked.part == PLAIN_OUTPUT:
        flow.calling = None
        flow.plain[marked.path].add(_term_of(value))
    else:
        flow.weights[marked].add(_weight(value, axes))
    return Value()


def _weight(value: Value, axes: Axes) -> Weight:
    if value.leaf is None:
        return Weight(None, (), ())
    seen = tuple(value.axes[a] for a in axes)
    mapped = tuple((a, VMAP) for a in value.axes if a not in seen)
    return Weight(value.leaf, seen, value.stacks + mapped)


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
    elements = [_scan(value, equation) for value in stacked]
    _use(operands, flow)
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
    known = {(e.leaf, e.stacks) for e in elements if e.leaf is not None}
    if (value.leaf, value.stacks) in known:
        *stacks, (first, _) = value.stacks
        return _variable(value, (first, *value.axes), tuple(stacks))
    _use_elsewhere([value], flow)
    return Value()


def _count_same_rank(outer: Sequence[Atom], inner: Sequence[Atom]) -> int:
    pairs = zip(outer, inner, strict=True)
    return sum(_rank(a) == _rank(b) for a, b in pairs)


def _rank(atom: Atom) -> int:
    return len(getattr(atom.aval, "shape", ()))


def _dtype(atom: Atom) -> np.dtype:
    return np.dtype(getattr(atom.aval, "dtype", None))


def _scan(value: Value, loop: JaxprEqn) -> Value:
    if value.leaf is None:
        return Value()
    first, *rest = value.axes
    return _variable(value, tuple(rest), (*value.stacks, (first, loop)))


def _transpose(value: Value, equation: JaxprEqn) -> Value:
    order = equation.params["permutation"]
    return _variable(value, tuple(value.axes[a] for a in order), value.stacks)


def _variable(value: Value, axes: Axes, stacks: Stacks) -> Value:
    return Value(leaf=value.leaf, axes=axes, stacks=stacks)


def _programs(params: dict[str, object]) -> Iterator[Jaxpr]:
    for param in params.values():
        for value in param if isinstance(param, tuple | list) else (param,):
            program = getattr(value, "jaxpr", value)
            if isinstance(program, Jaxpr):
                yield program
            elif isinstance(inner := getattr(value, "params", None), dict):
                yield from _programs(inner)


def _has_program(param: object) -> bool:
    return any(True for _ in _programs({"": param}))
