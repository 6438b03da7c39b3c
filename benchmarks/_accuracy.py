"""What a peer's speed is bought with: errors against float64, far from zero too."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from ._peers import Peer
from ._programs import rerun, step
from ._session import Session
from ._shapes import Shape
from ._task import Results, Task, error, random_task, truth

SHAPE = Shape("", (4096, 64))
# A bfloat16 has 8 bits: at 1e4 all values within a deviation of 1 are the same.
MEANS = {"float32": (0.0, 1e2, 1e4), "bfloat16": (0.0, 1e1)}


def run(session: Session) -> dict:
    """Rows of errors, by peer, dtype and mean; the deviation is 1."""
    session, rows = session.distinct(), []
    for dtype in ("float32",) if session.quick else MEANS:
        # Momentum 0: the running statistics are those of the batch.
        tasks = [
            random_task(session.rng, SHAPE, dtype, loc, momentum=0.0)
            for loc in MEANS[dtype]
        ]
        wanted = [truth(task) for task in tasks]
        for name, peer in session.track(peers(session, tasks[0]), f"accuracy {dtype}"):
            for loc, got, want in zip(MEANS[dtype], peer(tasks), wanted, strict=True):
                about = {"peer": name, "dtype": dtype, "loc": loc, "dims": SHAPE.dims}
                rows.append(about | errors(got, want))
    session.forget()
    return {"rows": rows}


def peers(session: Session, task: Task) -> list[tuple[str, Callable]]:
    """By name: what gives the results of many tasks."""
    return [
        *((name, partial(_by_jax, peer)) for name, peer in session.peers.items()),
        *((n, partial(_by_torch, session, n)) for n in session.torch_layouts(task)),
    ]


def _by_jax(peer: Peer, tasks: list[Task]) -> list[Results]:
    """Compiled once: the tasks differ in their numbers alone."""
    layers = [peer.build(task) for task in tasks]
    programs = step(tasks[0], layers[0])
    return [rerun(*pair, *programs) for pair in zip(tasks, layers, strict=True)]


def _by_torch(session: Session, name: str, tasks: list[Task]) -> list[Results]:
    return [session.torch.open(task, name) for task in tasks]


def errors(got: Results, want: Results) -> dict[str, Any]:
    """Largest errors: of the mean in deviations, of the variance relative to it."""
    mean, var = (np.asarray(a, np.float64) for a in (got.mean, got.var))
    return {
        "mean": float(np.abs((mean - want.mean) / np.sqrt(want.var)).max()),
        "var": float(np.abs(var / want.var - 1).max()),
        "dx": error(got.dx, want.dx),
        "dscale": error(got.dscale, want.dscale),
    }
