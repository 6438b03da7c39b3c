"""Ensembles: a training step of a layer under `vmap` over members.

Each member has a batch and variables of its own.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from . import _programs
from ._layers import rows_of, summary
from ._libraries import Layer
from ._session import Session
from ._shapes import ALL, QUICK, Shape
from ._task import Results, Task, find_mismatch, random_task, reference
from ._timing import interleave, sampler, summarize

LIBRARIES = ("jaxbn", "flax.linen")
MEMBERS = (4, 16)
MAX_BYTES = 2**26  # of x of all members; a step needs about five times as much


def run(session: Session) -> dict:
    """Return rows of times, and their summary."""
    session = session.only(*LIBRARIES)
    dtypes = ("float32",) if session.quick else ("float32", "bfloat16")
    cells = [
        (members, shape, dtype)
        for members in (MEMBERS[:1] if session.quick else MEMBERS)
        for dtype in dtypes
        for shape in (QUICK if session.quick else ALL)
        if num_bytes(members, shape, dtype) <= MAX_BYTES
    ]
    rows = []
    for cell in session.track(cells, "ensemble"):
        rows += measure(session, *cell)
    return {"rows": rows, "summary": summary(rows)}


def num_bytes(members: int, shape: Shape, dtype: str) -> int:
    """Return the size of x of all members."""
    return members * math.prod(shape.dims) * jnp.dtype(dtype).itemsize


def measure(session: Session, members: int, shape: Shape, dtype: str) -> list[dict]:
    """Check all libraries on one shape, then time them in interleaved rounds."""
    task = random_task(session.rng, shape, dtype)
    expected = reference(task)
    size = num_bytes(members, shape, dtype)
    cases: dict = {"copy": sampler(_programs.copy(size))}
    for name, library in session.libraries.items():
        layer = library.build(task)
        program = ensemble_step(task, layer, members)
        check_members(task, layer, program, expected, members)
        cases[name, "one jit"] = sampler(program)
    rounds, limit = (5, 1) if session.quick else (20, 2)
    samples = interleave(cases, rounds, session.rng, limit)
    copy = summarize(samples.pop("copy")).median
    case = {"shape": shape.name, "dims": [members, *shape.dims], "dtype": dtype}
    phase = {"phase": f"{members} members"}
    return [row | phase for row in rows_of(samples, copy, case)]


def ensemble_step(task: Task, layer: Layer, members: int) -> _programs.Program:
    """Compile the step of all members.

    The batch of member i is the task's, moved by i examples: its statistics are the
    task's, and its y and dx the task's, moved.
    """
    params, state = (
        jax.tree.map(lambda a: jnp.stack([a] * members), tree)
        for tree in (layer.params, layer.state)
    )
    x, dy = (
        jnp.stack([jnp.roll(a, i, 0) for i in range(members)])
        for a in (task.x, task.dy)
    )
    return _programs.Program(jax.vmap(_programs.one_jit(layer)), params, state, x, dy)


def check_members(
    task: Task,
    layer: Layer,
    program: _programs.Program,
    expected: Results,
    members: int,
) -> None:
    """Run the step once, and raise `RuntimeError` if a member's results are wrong."""
    program()
    results = program.result()
    for i in range(members):
        y, state, dparams, dx = jax.tree.map(lambda a, i=i: np.asarray(a[i]), results)
        y, dx = (np.roll(a, -i, 0) for a in (y, dx))
        got = _programs.results_of(layer, y, state, dparams, dx)
        if wrong := find_mismatch(task, got, expected):
            raise RuntimeError(f"member {i} of {members}: {wrong}")
