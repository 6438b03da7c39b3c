"""Memory: residual bytes of one layer, and of 16 layers in a `lax.scan`."""

from typing import Any

import jax
import jax.numpy as jnp

from . import _programs
from ._libraries import Layer
from ._session import Session
from ._shapes import Shape
from ._task import Task, random_task

LAYERS = 16


def run(session: Session) -> dict:
    """Return rows of bytes; `x` is the size of the input."""
    session = session.without_duplicates()
    shape = Shape("", (64, 8, 8, 64) if session.quick else (32, 28, 28, 128))
    dtypes = ("float32",) if session.quick else ("float32", "bfloat16")
    cells = [(name, dtype) for name in session.libraries for dtype in dtypes]
    rows = []
    for name, dtype in session.track(cells, "memory"):
        task = random_task(session.rng, shape, dtype)
        layer = session.libraries[name].build(task)
        x = _programs.to_layer_layout(task, layer, task.x)
        residuals, peak = residual_bytes(layer, x), scan_bytes(task, layer, x)
        case = {"library": name, "dtype": dtype, "dims": shape.dims, "x": x.nbytes}
        rows.append(case | {"residuals": residuals, "scan_peak": peak})
    return {"rows": rows, "layers": LAYERS}


def residual_bytes(layer: Layer, x: jax.Array) -> int:
    """Return the bytes that `jax.vjp` keeps; each array counts once, x included."""
    program = _programs.forward(layer, x)
    return sum(aval.size * aval.dtype.itemsize for aval in program.result_avals(2))


def scan_bytes(task: Task, layer: Layer, x: jax.Array) -> int:
    """Return the temporary memory of the gradient through `LAYERS` layers and ReLUs."""

    def stack(tree: Any) -> Any:
        return jax.tree.map(lambda a: jnp.broadcast_to(a, (LAYERS, *a.shape)), tree)

    def loss(params: Any, state: Any, x: jax.Array, dy: jax.Array) -> tuple:
        def body(x: jax.Array, variables: tuple) -> tuple:
            params, state = variables
            y, new_state = layer.train(params, state, x)
            return jax.nn.relu(y), new_state

        y, new_state = jax.lax.scan(body, x, (params, state))
        return jnp.vdot(y, dy).astype(jnp.float32), new_state

    gradient = jax.jit(jax.grad(loss, argnums=(0, 2), has_aux=True, allow_int=True))
    dy = _programs.to_layer_layout(task, layer, task.dy)
    arguments = (stack(layer.params), stack(layer.state), x, dy)
    analysis: Any = gradient.lower(*arguments).compile().memory_analysis()
    return analysis.temp_size_in_bytes
