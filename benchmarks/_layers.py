"""One layer, every shape and dtype: forward, backward, both, inference.

Forward and backward are compiled apart, as a network has them: between the two lies
the rest of it, and what the backward needs is written out and read again.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from . import _programs
from ._peers import Peer
from ._session import Session
from ._shapes import ALL, QUICK, Shape
from ._task import Task, disagreement, random_task, truth
from ._timing import Summary, floor, geometric_mean, interleave, sampler, summarize

# Passes over x that any method must make: forward reads it for the statistics, reads it
# and writes y; backward reads x and dy for two sums, reads both and writes dx.
PASSES = {"forward": 3, "backward": 5, "both": 8, "inference": 2}


def run(session: Session) -> dict:
    """Rows of times, and what was refused and why."""
    dtypes = ("float32",) if session.quick else ("float32", "bfloat16")
    shapes = QUICK if session.quick else ALL
    cells = [(shape, dtype) for dtype in dtypes for shape in shapes]
    rows, refused = [], []
    for shape, dtype in session.track(cells, "layers"):
        more, wrong = measure(session, shape, dtype)
        rows += more
        refused += wrong
    return {"rows": rows, "refused": refused, "summary": summary(rows)}


def measure(
    session: Session,
    shape: Shape,
    dtype: str,
    works: Sequence[str] = ("forward", "backward", "inference"),
) -> tuple[list[dict], list[dict]]:
    """Rows of one shape: checked first, then timed, one sample of each a round."""
    task = random_task(session.rng, shape, dtype)
    cases, refused = _cases(session, task, works)
    rounds, limit = (5, 1) if session.quick else (40, 10)
    samples = interleave(cases, rounds, session.rng, limit)
    session.forget()
    copy = summarize(samples.pop("copy")).median
    about = {"shape": shape.name, "dims": list(shape.dims), "dtype": dtype}
    return _rows(samples, copy, about), [about | r for r in refused]


def _cases(
    session: Session, task: Task, works: Sequence[str]
) -> tuple[dict[Any, Callable[[], float]], list[dict]]:
    """By (peer, work): a sample; and the peers that computed something else."""
    want, refused = truth(task), []
    cases: dict[Any, Callable[[], float]] = {
        "copy": sampler(_programs.copy(task.x.nbytes))
    }
    for name, peer in session.peers.items():
        made, got = _jax_samplers(task, peer)
        if wrong := disagreement(task, got, want):
            refused.append({"peer": name, "reason": wrong})
            continue
        cases |= {(name, work): made[work]() for work in works}
    for name in session.torch_layouts(task):
        if wrong := disagreement(task, session.torch.open(task, name), want):
            refused.append({"peer": name, "reason": wrong})
            continue
        for work in works:
            cases[name, work] = session.torch.sampler(name, work)
    return cases, refused


def _jax_samplers(task: Task, peer: Peer) -> tuple[dict, Any]:
    """What makes the sampler of each work, and what the peer computes."""
    layer = peer.build(task)
    forward, backward = _programs.step(task, layer)
    got = _programs.rerun(task, layer, forward, backward)
    dy = _programs.place(task, layer, task.dy)

    def feed() -> None:
        *_, vjp = forward.result()
        backward.feed(vjp, dy)

    def infer() -> Callable[[], float]:
        return sampler(_programs.inference(layer, _programs.place(task, layer, task.x)))

    return {
        "forward": partial(sampler, forward),
        "backward": partial(sampler, backward, feed),
        "inference": infer,
    }, got


def _rows(samples: dict, copy: float, about: dict) -> list[dict]:
    """A row for each peer and work; `both` is the sum of a round's two samples."""
    for name in [name for name, work in samples if work == "forward"]:
        pairs = zip(samples[name, "forward"], samples[name, "backward"], strict=True)
        samples[name, "both"] = [there + back for there, back in pairs]
    rows = []
    for (name, work), seconds in samples.items():
        least = floor(copy, PASSES[work])
        found: Summary = summarize(seconds)
        rows.append(
            about
            | {"peer": name, "work": work, "rounds": len(seconds)}
            | found._asdict()
            | {"floor": least, "ratio": found.median / least}
        )
    return rows


def summary(rows: list[dict]) -> list[dict]:
    """Every peer's time over that of `jaxbn`: geometric mean, and shapes below 1."""
    times = {
        (r["peer"], r["dtype"], r["work"], r["shape"]): r["median"] for r in rows
    } | _faster_torch(rows)
    groups: dict[tuple, dict[str, float]] = {}
    for (peer, dtype, work, shape), median in times.items():
        ours = times.get(("jaxbn", dtype, work, shape))
        if ours and peer != "jaxbn":
            groups.setdefault((peer, dtype, work), {})[shape] = median / ours
    return [
        {
            "peer": peer,
            "dtype": dtype,
            "work": work,
            "geometric_mean": geometric_mean(list(ratios.values())),
            "worst": min(ratios.values()),
            "worst_shape": min(ratios, key=lambda shape: ratios[shape]),
            "below_1": sum(ratio < 1 for ratio in ratios.values()),
            "shapes": len(ratios),
        }
        for (peer, dtype, work), ratios in groups.items()
    ]


def _faster_torch(rows: list[dict]) -> dict[tuple, float]:
    """PyTorch in whichever layout was faster for the shape and the work."""
    best: dict[tuple, float] = {}
    for row in rows:
        if row["peer"].startswith("torch"):
            key = ("torch, faster layout", row["dtype"], row["work"], row["shape"])
            best[key] = min(row["median"], best.get(key, math.inf))
    return best
