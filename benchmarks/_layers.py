"""One layer at every shape and dtype: in one jit, forward, backward, both, inference.

In one jit a training step is compiled as a network is: the backward waits for y.
Forward and backward are also compiled separately, as in a network whose other layers
run between them: the residuals are written to memory and read again.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from . import _programs
from ._libraries import Library
from ._session import Session
from ._shapes import ALL, QUICK, Shape
from ._task import Task, find_mismatch, random_task, reference
from ._timing import Summary, floor, geometric_mean, interleave, sampler, summarize

# Passes over x that every method needs. Forward reads x for the statistics, then reads
# x and writes y. Backward reads x and dy for two sums, then reads both and writes dx.
PASSES = {"one jit": 8, "forward": 3, "backward": 5, "both": 8, "inference": 2}
PHASES = ("one jit", "forward", "backward", "inference")


def run(session: Session) -> dict:
    """Return rows of times, the rejected libraries, and the summary."""
    dtypes = ("float32",) if session.quick else ("float32", "bfloat16")
    shapes = QUICK if session.quick else ALL
    cells = [(shape, dtype) for dtype in dtypes for shape in shapes]
    rows, rejected = [], []
    for shape, dtype in session.track(cells, "layers"):
        more, wrong = measure(session, shape, dtype)
        rows += more
        rejected += wrong
    return {"rows": rows, "rejected": rejected, "summary": summary(rows)}


def measure(
    session: Session,
    shape: Shape,
    dtype: str,
    phases: Sequence[str] = PHASES,
) -> tuple[list[dict], list[dict]]:
    """Check all libraries on one shape, then time them in interleaved rounds."""
    task = random_task(session.rng, shape, dtype)
    cases, rejected = _cases(session, task, phases)
    rounds, limit = (5, 1) if session.quick else (40, 10)
    samples = interleave(cases, rounds, session.rng, limit)
    session.release()
    copy = summarize(samples.pop("copy")).median
    case = {"shape": shape.name, "dims": list(shape.dims), "dtype": dtype}
    return rows_of(samples, copy, case), [case | r for r in rejected]


def _cases(
    session: Session, task: Task, phases: Sequence[str]
) -> tuple[dict[Any, Callable[[], float]], list[dict]]:
    """Return a sampler by (library, phase), and the libraries with wrong results."""
    expected, rejected = reference(task), []
    cases: dict[Any, Callable[[], float]] = {
        "copy": sampler(_programs.copy(task.x.nbytes))
    }
    for name, library in session.libraries.items():
        samplers, got = _jax_samplers(task, library)
        if wrong := find_mismatch(task, got, expected):
            rejected.append({"library": name, "reason": wrong})
            continue
        cases |= {(name, phase): samplers[phase]() for phase in phases}
    for name in session.torch_layouts(task):
        if wrong := find_mismatch(task, session.torch.open(task, name), expected):
            rejected.append({"library": name, "reason": wrong})
            continue
        for phase in phases:
            if phase != "one jit":
                cases[name, phase] = session.torch.sampler(name, phase)
    return cases, rejected


def _jax_samplers(task: Task, library: Library) -> tuple[dict, Any]:
    """Return a sampler factory for each phase, and the library's results."""
    layer = library.build(task)
    forward, backward = _programs.step(task, layer)
    got = _programs.run_step(task, layer, forward, backward)
    dy = _programs.to_layer_layout(task, layer, task.dy)

    def set_residuals() -> None:
        *_, vjp = forward.result()
        backward.set_inputs(vjp, dy)

    def one_jit() -> Callable[[], float]:
        x = _programs.to_layer_layout(task, layer, task.x)
        step = _programs.one_jit(layer)
        return sampler(_programs.Program(step, layer.params, layer.state, x, dy))

    def inference() -> Callable[[], float]:
        x = _programs.to_layer_layout(task, layer, task.x)
        return sampler(_programs.inference(layer, x))

    return {
        "one jit": one_jit,
        "forward": partial(sampler, forward),
        "backward": partial(sampler, backward, set_residuals),
        "inference": inference,
    }, got


def rows_of(samples: dict, copy: float, case: dict) -> list[dict]:
    """Return a row for each library and phase; "both" sums the samples of a round.

    PyTorch has no jit here: its "one jit" is "both".
    """
    for name in [name for name, phase in samples if phase == "forward"]:
        pairs = zip(samples[name, "forward"], samples[name, "backward"], strict=True)
        samples[name, "both"] = [sum(pair) for pair in pairs]
        if name.startswith("torch"):
            samples[name, "one jit"] = samples[name, "both"]
    rows = []
    for (name, phase), seconds in samples.items():
        lower_bound = floor(copy, PASSES[phase])
        times: Summary = summarize(seconds)
        rows.append(
            case
            | {"library": name, "phase": phase, "rounds": len(seconds)}
            | times._asdict()
            | {"floor": lower_bound, "ratio": times.median / lower_bound}
        )
    return rows


def summary(rows: list[dict]) -> list[dict]:
    """Summarize each library's time over jaxbn's: geometric mean, shapes below 1."""
    times = {
        (r["library"], r["dtype"], r["phase"], r["shape"]): r["median"] for r in rows
    } | _faster_torch(rows)
    groups: dict[tuple, dict[str, float]] = {}
    for (library, dtype, phase, shape), median in times.items():
        jaxbn_time = times.get(("jaxbn", dtype, phase, shape))
        if jaxbn_time and library != "jaxbn":
            groups.setdefault((library, dtype, phase), {})[shape] = median / jaxbn_time
    return [
        {
            "library": library,
            "dtype": dtype,
            "phase": phase,
            "geometric_mean": geometric_mean(list(ratios.values())),
            "worst": min(ratios.values()),
            "worst_shape": min(ratios, key=lambda shape: ratios[shape]),
            "below_1": sum(ratio < 1 for ratio in ratios.values()),
            "shapes": len(ratios),
        }
        for (library, dtype, phase), ratios in groups.items()
    ]


def _faster_torch(rows: list[dict]) -> dict[tuple, float]:
    """Return PyTorch's times in its faster layout for each shape and phase."""
    best: dict[tuple, float] = {}
    for row in rows:
        if row["library"].startswith("torch"):
            key = ("torch, faster layout", row["dtype"], row["phase"], row["shape"])
            best[key] = min(row["median"], best.get(key, math.inf))
    return best
