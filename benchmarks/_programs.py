"""Compiled programs that write over their own last outputs.

A fresh output above 32 MiB is mapped and faulted in page by page at each call: then a
benchmark times the operating system. So the outputs of each call are donated to the
next, and what is timed are the passes over memory.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ._peers import Layer
from ._task import Results, Task


class Split(NamedTuple):
    """Which outputs a program must compute, and where every output then is."""

    computed: list[int]  # positions among the outputs
    where: list[int]  # of each output, in inputs + computed


def split_outputs(jaxpr: Any) -> Split:
    """Tell outputs that are computed from inputs handed on, and from repeats.

    `jit` hands such an input on as the very same buffer: donated, it would be gone
    for the next call. A residual that is x itself is one.
    """
    known, computed, where = list(jaxpr.invars), [], []
    for position, out in enumerate(jaxpr.outvars):
        place = next((i for i, known_one in enumerate(known) if known_one is out), None)
        if place is None:
            place = len(known)
            known.append(out)
            computed.append(position)
        where.append(place)
    return Split(computed, where)


class Program:
    """`function(*args)`, compiled; each call recycles the memory of the last."""

    def __init__(self, function: Callable, *args: Any):
        self._inputs, in_tree = jax.tree.flatten(args)
        self._out_tree: Any = None

        def flat(*inputs: jax.Array) -> list[jax.Array]:
            result = function(*jax.tree.unflatten(in_tree, inputs))
            outputs, self._out_tree = jax.tree.flatten(result)
            return outputs

        jaxpr = jax.make_jaxpr(flat)(*self._inputs)
        computed, self._where = split_outputs(jaxpr.jaxpr)
        self.avals: list[Any] = [var.aval for var in jaxpr.jaxpr.outvars]

        # Flat lists of arrays: no library pays for the look of its pytrees.
        def recycling(spent: list[jax.Array], *inputs: jax.Array) -> list[jax.Array]:
            outputs = flat(*inputs)
            return [outputs[i] for i in computed]

        self._call = jax.jit(recycling, donate_argnums=0, keep_unused=True)
        self._spent = [
            jnp.zeros(self.avals[i].shape, self.avals[i].dtype) for i in computed
        ]

    def feed(self, *args: Any) -> None:
        """Take other values for `args`: those a program before has made since."""
        self._inputs = jax.tree.leaves(args)

    def __call__(self) -> None:
        """Run once, to the end."""
        self._spent = jax.block_until_ready(self._call(self._spent, *self._inputs))

    def result(self) -> Any:
        """What the last call returned, valid until the next."""
        known = [*self._inputs, *self._spent]
        return jax.tree.unflatten(self._out_tree, [known[i] for i in self._where])

    def held(self, position: int) -> list[Any]:
        """Shapes and dtypes of the arrays in one of several results, each once."""
        places = jax.tree.unflatten(self._out_tree, self._where)[position]
        avals = dict(zip(self._where, self.avals, strict=True))
        return [avals[place] for place in set(jax.tree.leaves(places))]

    def compiled(self) -> Any:
        """The executable, for its text and its memory analysis."""
        return self._call.lower(self._spent, *self._inputs).compile()


def forward(layer: Layer, x: jax.Array) -> Program:
    """`(y, new_state, vjp)`: `vjp` is a pytree that holds the residuals."""

    def run(params: Any, state: Any, x: jax.Array) -> tuple:
        def train(params: Any, x: jax.Array) -> tuple[jax.Array, Any]:
            return layer.train(params, state, x)

        y, vjp, new_state = jax.vjp(train, params, x, has_aux=True)
        return y, new_state, vjp

    return Program(run, layer.params, layer.state, x)


def backward(vjp: Callable, dy: jax.Array) -> Program:
    """`(dparams, dx)` from what a forward kept: feed it, for the next one recycles."""
    return Program(lambda vjp, dy: vjp(dy), vjp, dy)


def inference(layer: Layer, x: jax.Array) -> Program:
    """Y by the running statistics."""
    return Program(layer.inference, layer.params, layer.state, x)


def copy(num_bytes: int) -> Program:
    """One pass that reads and one that writes: as fast as this machine's memory."""
    x = jnp.arange(num_bytes // 4, dtype=jnp.float32)
    return Program(lambda x, factor: x * factor, x, jnp.float32(1.5))


def place(task: Task, layer: Layer, a: Any) -> jax.Array:
    """An array of the task's as the layer wants it laid out."""
    return jnp.asarray(jnp.moveaxis(a, task.axis, 1) if layer.channels_first else a)


def take_back(task: Task, layer: Layer, a: jax.Array) -> jax.Array:
    """An array of the layer's as the task has it laid out."""
    return jnp.moveaxis(a, 1, task.axis) if layer.channels_first else a


def step(task: Task, layer: Layer) -> tuple[Program, Program]:
    """Forward and backward of a layer, having run."""
    there = forward(layer, place(task, layer, task.x))
    there()
    back = backward(there.result()[2], place(task, layer, task.dy))
    back()
    return there, back


def rerun(task: Task, layer: Layer, there: Program, back: Program) -> Results:
    """What the two programs of such a layer compute for this task."""
    there.feed(layer.params, layer.state, place(task, layer, task.x))
    there()
    y, state, vjp = there.result()
    back.feed(vjp, place(task, layer, task.dy))
    back()
    dparams, dx = back.result()
    y, dx = (take_back(task, layer, a) for a in (y, dx))
    vectors = (*layer.read_params(dparams), *layer.read_state(state))
    copies = [np.array(a) for a in (y, dx, *vectors)]  # the next call writes over them
    return Results(*copies)
