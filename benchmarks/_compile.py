"""Compile time: CPU seconds to lower and to compile a network with many batch norms.

On a CPU the program depends on the size of x: a conditional chooses how to sum large x.

The network repeats a dense layer, a batch norm and a ReLU. JAX's caches are cleared
before each sample, so that it starts as a new process does.
"""

import time
from collections.abc import Callable
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
from ._timing import interleave, summarize

REFERENCE = "flax.linen"
LIBRARIES = (REFERENCE, "jaxbn.linen", "jaxbn")
SHAPES = (Shape("", (128, 32)), Shape("", (16384, 32)))
PROGRAMS = ("training step", "forward")
STAGES = ("lower", "compile", "together")


def run(session: Session) -> dict:
    """Return a row of CPU seconds for each library, shape, program and stage."""
    session = session.only(*LIBRARIES)
    depth, rounds = (5, 1) if session.quick else (50, 7)
    rows = []
    for shape in session.track(SHAPES[: 1 if session.quick else None], "compile"):
        cases = compilations(session, shape, depth)
        times = summarize_stages(interleave(cases, rounds, session.rng))
        rows += [{"dims": list(shape.dims)} | row for row in times]
    return {"rows": rows, "depth": depth}


def compilations(session: Session, shape: Shape, depth: int) -> dict:
    """Return a cold compilation for each (library, program)."""
    task = random_task(session.rng, shape, "float32")
    features = shape.dims[1]
    kernels = session.rng.normal(0, features**-0.5, (depth, features, features))
    layers = {name: lib.build(task) for name, lib in session.libraries.items()}
    return {
        (name, program): partial(
            cold_cpu_seconds,
            programs(layer)[program],
            network_arguments(layer, kernels.astype(np.float32), task.x),
        )
        for program in PROGRAMS
        for name, layer in layers.items()
    }


def network_arguments(layer: Layer, kernels: np.ndarray, x: np.ndarray) -> tuple:
    """Return (params, state, x) of the network; each layer has its own arrays."""
    params = [(jnp.asarray(kernel), layer.params) for kernel in kernels]
    return params, [layer.state] * len(kernels), jnp.asarray(x)


def programs(layer: Layer) -> dict[str, Callable]:
    """Return the training step and the training-mode forward, by name."""

    def forward(params: list, state: list, x: Array) -> tuple[Array, list]:
        new_state = []
        for (kernel, norm_params), norm_state in zip(params, state, strict=True):
            x, new = layer.train(norm_params, norm_state, x @ kernel)
            x = jax.nn.relu(x)
            new_state.append(new)
        return x, new_state

    def loss(params: list, state: list, x: Array) -> tuple[Array, list]:
        y, new_state = forward(params, state, x)
        return jnp.mean(y**2), new_state

    return dict(zip(PROGRAMS, (jax.grad(loss, has_aux=True), forward), strict=True))


def cold_cpu_seconds(function: Callable, arguments: tuple) -> dict[str, float]:
    """Clear JAX's caches, then time each stage."""
    jax.clear_caches()
    return cpu_seconds(function, arguments)


def cpu_seconds(function: Callable, arguments: tuple) -> dict[str, float]:
    """Return the CPU seconds, of all threads, to lower and to compile `function`."""

    def fresh(*arguments: Any) -> Any:  # `jit` reuses the trace of a known function
        return function(*arguments)

    start = time.process_time()
    lowered = jax.jit(fresh).lower(*arguments)
    middle = time.process_time()
    lowered.compile()
    end = time.process_time()
    return {"lower": middle - start, "compile": end - middle, "together": end - start}


def summarize_stages(samples: dict[Any, list[dict[str, float]]]) -> list[dict]:
    """Return a row per library, program and stage; `ratio` is over flax.linen."""
    rows = [
        {"library": library, "program": program, "stage": stage}
        | {"rounds": len(seconds)}
        | summarize([sample[stage] for sample in seconds])._asdict()
        for (library, program), seconds in samples.items()
        for stage in STAGES
    ]
    reference = {
        (row["program"], row["stage"]): row["median"]
        for row in rows
        if row["library"] == REFERENCE
    }
    for row in rows:
        base = reference.get((row["program"], row["stage"]))
        row["ratio"] = row["median"] / base if base else None
    return rows
