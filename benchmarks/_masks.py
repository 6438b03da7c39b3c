"""Masks: a layer's training step without a mask, and with three quarters kept.

A mask of examples is for a batch with padding, one of positions for padded sequences.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import _programs
from ._layers import rows_of, summary
from ._libraries import Layer
from ._session import Session
from ._shapes import QUICK, Shape
from ._task import Results, Task, find_mismatch, random_task
from ._timing import interleave, sampler, summarize

LIBRARIES = ("jaxbn", "flax.linen")
SHAPES = (
    Shape("ResNet-50 1 narrow", (32, 56, 56, 64)),
    Shape("ResNet-50 3 wide", (32, 14, 14, 1024)),
    Shape("CIFAR 2", (64, 16, 16, 32)),
    Shape("sequences", (32, 512, 256)),
    Shape("tall", (65536, 32)),
)
KINDS = ("no mask", "mask of examples", "mask of positions")


def run(session: Session) -> dict:
    """Return rows of times, and their summary."""
    session = session.only(*LIBRARIES)
    dtypes = ("float32",) if session.quick else ("float32", "bfloat16")
    shapes = QUICK[:1] if session.quick else SHAPES
    cells = [(shape, dtype) for dtype in dtypes for shape in shapes]
    rows = []
    for cell in session.track(cells, "masks"):
        rows += measure(session, *cell)
    return {"rows": rows, "summary": summary(rows)}


def measure(session: Session, shape: Shape, dtype: str) -> list[dict]:
    """Check that the libraries agree, then time them in interleaved rounds."""
    task = random_task(session.rng, shape, dtype)
    layers = {name: lib.build(task) for name, lib in session.libraries.items()}
    cases: dict = {"copy": sampler(_programs.copy(task.x.nbytes))}
    for kind in KINDS:
        mask = random_mask(session.rng, kind, shape)
        programs = {name: masked_step(task, layers[name], mask) for name in layers}
        check_agreement(task, layers, programs)
        cases |= {(kind, name): sampler(step) for name, step in programs.items()}
    rounds, limit = (5, 1) if session.quick else (30, 4)
    samples = interleave(cases, rounds, session.rng, limit)
    copy = summarize(samples.pop("copy")).median
    case = {"shape": shape.name, "dims": list(shape.dims), "dtype": dtype}
    return [
        row | {"phase": kind}
        for kind in KINDS
        for row in rows_of(
            {(name, "one jit"): samples[kind, name] for name in layers}, copy, case
        )
    ]


def random_mask(rng: np.random.Generator, kind: str, shape: Shape) -> np.ndarray | None:
    """Return a mask that keeps three quarters of x, `None` for "no mask"."""
    if kind == "no mask":
        return None
    positions = (*shape.dims[:-1], 1)
    examples = (shape.dims[0], *(1 for _ in shape.dims[1:]))
    return rng.random(positions if kind == "mask of positions" else examples) < 0.75


def masked_step(task: Task, layer: Layer, mask: np.ndarray | None) -> _programs.Program:
    """Compile the training step with the mask, an argument of the program."""

    def train(params: Any, arrays: tuple, x: jax.Array) -> tuple[jax.Array, Any]:
        state, mask = arrays
        return layer.train(params, state, x, mask=mask)

    step = _programs.one_jit(layer._replace(train=train))
    arrays = layer.params, (layer.state, mask), task.x, task.dy
    return _programs.Program(step, *jax.tree.map(jnp.asarray, arrays))


def check_agreement(
    task: Task, layers: dict[str, Layer], programs: dict[str, _programs.Program]
) -> None:
    """Run each step once, and raise `RuntimeError` if results differ."""
    results = [run_step(layers[name], programs[name]) for name in programs]
    for name, got in zip(programs, results, strict=True):
        if wrong := find_mismatch(task, got, results[0]):
            raise RuntimeError(f"{name} versus {next(iter(programs))}: {wrong}")


def run_step(layer: Layer, program: _programs.Program) -> Results:
    """Run the step once, and return its results."""
    program()
    return _programs.results_of(layer, *program.result())
