"""Compiled programs that reuse the memory of their previous outputs.

The operating system maps a new output above 32 MiB page by page, which can take longer
than the computation. Each call therefore donates its outputs to the next call, so that
a benchmark times the passes over memory.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ._libraries import Layer
from ._task import Results, Task


class Split(NamedTuple):
    """Hold the computed outputs, and the position of every output."""

    computed: list[int]  # indices into the outputs
    where: list[int]  # index of each output in inputs + computed outputs


def split_outputs(jaxpr: Any) -> Split:
    """Separate computed outputs from forwarded inputs and repeated outputs.

    `jit` returns a forwarded input, for example the residual x, as the same buffer; if
    it were donated, the next call could not use it. An input with a name for
    `jax.checkpoint` would be copied, which it is not inside a larger program.
    """
    known, computed, where = list(jaxpr.invars), [], []
    names = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "name"]
    for position, out in enumerate(jaxpr.outvars):
        out = next((e.invars[0] for e in names if e.outvars[0] is out), out)
        index = next((i for i, var in enumerate(known) if var is out), None)
        if index is None:
            index = len(known)
            known.append(out)
            computed.append(position)
        where.append(index)
    return Split(computed, where)


class Program:
    """Compile `function(*args)`; each call reuses the outputs of the previous call."""

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

        # Flat lists of arrays: the time excludes each library's pytrees.
        def donating(spent: list[jax.Array], *inputs: jax.Array) -> list[jax.Array]:
            outputs = flat(*inputs)
            return [outputs[i] for i in computed]

        self._call = jax.jit(donating, donate_argnums=0, keep_unused=True)
        self._spent = [
            jnp.zeros(self.avals[i].shape, self.avals[i].dtype) for i in computed
        ]

    def set_inputs(self, *args: Any) -> None:
        """Replace `args`, for example by another program's latest results."""
        self._inputs = jax.tree.leaves(args)

    def start(self) -> list[jax.Array]:
        """Run once without waiting for the outputs."""
        self._spent = self._call(self._spent, *self._inputs)
        return self._spent

    def __call__(self) -> None:
        """Run once and wait for the outputs."""
        jax.block_until_ready(self.start())

    def result(self) -> Any:
        """Return the outputs of the last call, valid until the next call."""
        known = [*self._inputs, *self._spent]
        return jax.tree.unflatten(self._out_tree, [known[i] for i in self._where])

    def result_avals(self, position: int) -> list[Any]:
        """Return shape and dtype of each distinct array in the result at `position`."""
        indices = jax.tree.unflatten(self._out_tree, self._where)[position]
        avals = dict(zip(self._where, self.avals, strict=True))
        return [avals[index] for index in set(jax.tree.leaves(indices))]

    def compiled(self) -> Any:
        """Return the executable, for its text and its memory analysis."""
        return self._call.lower(self._spent, *self._inputs).compile()


def forward(layer: Layer, x: jax.Array) -> Program:
    """Compile `(y, new_state, vjp)`; the pytree `vjp` holds the residuals."""
    return Program(partial(_vjp, layer), layer.params, layer.state, x)


def _vjp(layer: Layer, params: Any, state: Any, x: jax.Array) -> tuple:
    def train(params: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        return layer.train(params, state, x)

    y, vjp, new_state = jax.vjp(train, params, x, has_aux=True)
    return y, new_state, vjp


def backward(vjp: Callable, dy: jax.Array) -> Program:
    """Compile `(dparams, dx)` from the residuals of a forward.

    Call `set_inputs` after each forward, which overwrites the previous residuals.
    """
    return Program(lambda vjp, dy: vjp(dy), vjp, dy)


def one_jit(layer: Layer) -> Callable[..., tuple]:
    """Return a layer's training step: `(y, new_state, dparams, dx)` in one program.

    The backward waits for y, as in a network: with a cotangent that is known before y,
    XLA could share passes over x between the two directions.
    """

    def step(params: Any, state: Any, x: jax.Array, dy: jax.Array) -> tuple:
        y, new_state, vjp = _vjp(layer, params, state, x)
        y, dy = jax.lax.optimization_barrier((y, dy))
        return y, new_state, *vjp(dy)

    return step


def inference(layer: Layer, x: jax.Array) -> Program:
    """Compile `y` from the running statistics."""
    return Program(layer.inference, layer.params, layer.state, x)


def copy(num_bytes: int) -> Program:
    """Compile an elementwise copy, which reads once and writes once."""
    x = jnp.arange(num_bytes // 4, dtype=jnp.float32)
    return Program(lambda x, factor: x * factor, x, jnp.float32(1.5))


def to_layer_layout(task: Task, layer: Layer, a: Any) -> jax.Array:
    """Transpose an array of the task to the layout of the layer."""
    return jnp.asarray(jnp.moveaxis(a, task.axis, 1) if layer.features_first else a)


def to_task_layout(task: Task, layer: Layer, a: jax.Array) -> jax.Array:
    """Transpose an array of the layer to the layout of the task."""
    return jnp.moveaxis(a, 1, task.axis) if layer.features_first else a


def step(task: Task, layer: Layer) -> tuple[Program, Program]:
    """Compile the forward and the backward of a layer, and run both once."""
    run_forward = forward(layer, to_layer_layout(task, layer, task.x))
    run_forward()
    _, _, vjp = run_forward.result()
    run_backward = backward(vjp, to_layer_layout(task, layer, task.dy))
    run_backward()
    return run_forward, run_backward


def run_step(
    task: Task, layer: Layer, run_forward: Program, run_backward: Program
) -> Results:
    """Compute the results of `task` by the two programs of `step`."""
    x, dy = (to_layer_layout(task, layer, a) for a in (task.x, task.dy))
    run_forward.set_inputs(layer.params, layer.state, x)
    run_forward()
    y, state, vjp = run_forward.result()
    run_backward.set_inputs(vjp, dy)
    run_backward()
    dparams, dx = run_backward.result()
    y, dx = (to_task_layout(task, layer, a) for a in (y, dx))
    return results_of(layer, y, state, dparams, dx)


def results_of(layer: Layer, y: Any, state: Any, dparams: Any, dx: Any) -> Results:
    """Copy the results of a step, because the next call overwrites them."""
    vectors = (*layer.read_params(dparams), *layer.read_state(state))
    return Results(*(np.array(a) for a in (y, dx, *vectors)))
