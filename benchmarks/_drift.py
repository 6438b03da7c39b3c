"""Drift: the error of the running mean after many batches far from zero.

It starts at the mean of the first batch, where only drift moves it away, or at 0, from
where a float32 average stalls once a step is less than half the distance to the next
number.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ._libraries import Layer
from ._session import Session
from ._shapes import Shape
from ._task import random_task

LIBRARIES = ("jaxbn", "flax.linen")
SHAPE = Shape("", (256, 16))
BATCHES = 64  # different ones, repeated in order
MOMENTA = (0.9, 0.99, 0.999, 0.9999)
STARTS = ("first batch", "0")
MEANS = (0.0, 1e2, 1e3, 3e4)


def run(session: Session) -> dict:
    """Return a row for each library, momentum and mean; x has deviation 1."""
    session, rows = session.only(*LIBRARIES), []
    momenta = MOMENTA[:2] if session.quick else MOMENTA
    cells = [
        (momentum, loc, start)
        for start in STARTS
        for momentum in momenta
        for loc in MEANS
    ]
    for momentum, loc, start in session.track(cells, "drift"):
        noise = session.rng.standard_normal((BATCHES, *SHAPE.dims))
        xs = (noise + loc).astype(np.float32)
        mean = xs[0].mean(0) if start == "first batch" else np.zeros_like(xs[0, 0])
        task = random_task(session.rng, SHAPE, "float32", momentum=momentum)
        task = task._replace(mean=mean)
        expected, steps = moving_average(xs, mean, momentum), num_steps(momentum)
        for name, library in session.libraries.items():
            got = running_mean(library.build(task), xs, steps)
            case = {"library": name, "momentum": momentum, "loc": loc, "start": start}
            error = float(np.abs(got - expected).max())
            rows.append(case | {"steps": steps, "error": error})
    return {"rows": rows, "dims": SHAPE.dims}


def num_steps(momentum: float) -> int:
    """Return enough steps to forget the first state: it keeps a share of e⁻²⁰."""
    return round(20 / (1 - momentum))


def moving_average(xs: np.ndarray, mean: np.ndarray, momentum: float) -> np.ndarray:
    """Return the running mean after `num_steps` in float64."""
    means = xs.mean(1, dtype=np.float64)
    average = mean.astype(np.float64)
    for step in range(num_steps(momentum)):
        average += (1 - momentum) * (means[step % len(means)] - average)
    return average


def running_mean(layer: Layer, xs: np.ndarray, steps: int) -> np.ndarray:
    """Return the layer's running mean after `steps` batches."""

    @partial(jax.jit, static_argnames="steps")
    def train(state: Any, xs: Array, steps: int) -> Any:
        def step(i: Array, state: Any) -> Any:
            return layer.train(layer.params, state, xs[i % len(xs)])[1]

        return jax.lax.fori_loop(0, steps, step, state)

    mean, _ = layer.read_state(train(layer.state, jnp.asarray(xs), steps))
    return np.asarray(mean, np.float64)
