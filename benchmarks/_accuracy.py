"""Accuracy: errors against float64, for inputs centered at and far from zero."""

from collections.abc import Callable
from functools import partial

import numpy as np

from ._libraries import Library
from ._programs import run_step, step
from ._session import Session
from ._shapes import Shape
from ._task import Results, Task, max_error, random_task, reference

SHAPE = Shape("", (4096, 64))
# bfloat16 has 8 significant bits: near 1e4 it rounds away a standard deviation of 1.
MEANS = {"float32": (0.0, 1e2, 1e4), "bfloat16": (0.0, 1e1)}


def run(session: Session) -> dict:
    """Return a row of errors for each library, dtype and mean; x has deviation 1."""
    session, rows = session.without_duplicates(), []
    for dtype in ("float32",) if session.quick else MEANS:
        # With momentum 0 the running statistics are the batch statistics.
        tasks = [
            random_task(session.rng, SHAPE, dtype, loc, momentum=0.0)
            for loc in MEANS[dtype]
        ]
        references = [reference(task) for task in tasks]
        computed_by = by_library(session, tasks[0])
        for name, compute in session.track(computed_by, f"accuracy {dtype}"):
            for loc, got, expected in zip(
                MEANS[dtype], compute(tasks), references, strict=True
            ):
                case = {"library": name, "dtype": dtype, "loc": loc, "dims": SHAPE.dims}
                rows.append(case | errors(got, expected))
    session.release()
    return {"rows": rows}


def by_library(session: Session, task: Task) -> list[tuple[str, Callable]]:
    """Return each library's name and a function from tasks to results."""
    return [
        *((n, partial(_run_jax, library)) for n, library in session.libraries.items()),
        *((n, partial(_run_torch, session, n)) for n in session.torch_layouts(task)),
    ]


def _run_jax(library: Library, tasks: list[Task]) -> list[Results]:
    """Compile once: the tasks differ only in their numbers."""
    layers = [library.build(task) for task in tasks]
    programs = step(tasks[0], layers[0])
    return [run_step(*pair, *programs) for pair in zip(tasks, layers, strict=True)]


def _run_torch(session: Session, name: str, tasks: list[Task]) -> list[Results]:
    return [session.torch.open(task, name) for task in tasks]


def errors(got: Results, expected: Results) -> dict[str, float]:
    """Return the largest errors: mean in standard deviations, variance relative."""
    mean, var = (np.asarray(a, np.float64) for a in (got.mean, got.var))
    return {
        "mean": float(np.abs((mean - expected.mean) / np.sqrt(expected.var)).max()),
        "var": float(np.abs(var / expected.var - 1).max()),
        "dx": max_error(got.dx, expected.dx),
        "dscale": max_error(got.dscale, expected.dscale),
    }
