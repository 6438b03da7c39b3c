"""Parts of the example of reinforcement learning: the pendulums, replay, the report."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import gymnasium
import jax.numpy as jnp
import numpy as np
from _training import COLOR
from gymnasium.vector import SyncVectorEnv
from jax import Array
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

STEPS, TORQUE = 200, 2.0  # of an episode; largest
GOAL = -300  # the return of a policy that swings the pendulum up

Returns = dict[int, np.ndarray]  # by step: the test returns of all runs


class Transition(NamedTuple):
    """Steps of an environment; actions lie between -1 and 1."""

    obs: Array
    action: Array
    reward: Array
    next_obs: Array
    terminated: Array


def make_pendulums(count: int) -> SyncVectorEnv:
    """Return so many environments, which step together."""
    return SyncVectorEnv([lambda: gymnasium.make("Pendulum-v1")] * count)


def play(
    pendulums: SyncVectorEnv, seeds: int | list[int | None], policy: Callable
) -> Iterator[tuple[np.ndarray, ...]]:
    """Play an episode; yield the fields of a transition, with an axis of pendulums."""
    obs, _ = pendulums.reset(seed=seeds)
    for _ in range(STEPS):
        action = np.asarray(policy(obs))
        next_obs, reward, terminated, *_ = pendulums.step(TORQUE * action)
        yield obs, action, reward, next_obs, terminated
        obs = next_obs


def evaluate(pendulums: SyncVectorEnv, policy: Callable, runs: int) -> np.ndarray:
    """Return each run's mean return; all runs start from the same states."""
    seeds: list[int | None] = [*range(pendulums.num_envs // runs)]

    def flat(obs: np.ndarray) -> Array:
        return policy(obs.reshape(runs, -1, 3)).reshape(-1, 1)

    rewards = [reward for _, _, reward, *_ in play(pendulums, seeds * runs, flat)]
    return np.sum(rewards, axis=0).reshape(runs, -1).mean(1)


class ReplayBuffer:
    """The last transitions of several runs."""

    def __init__(self, capacity: int, runs: int, rng: np.random.Generator) -> None:
        shapes = (3,), (1,), (), (3,), ()  # of a transition's fields
        self.fields = [np.zeros((runs, capacity, *s), np.float32) for s in shapes]
        self.capacity, self.runs, self.added, self.rng = capacity, runs, 0, rng

    def add(self, *transition: np.ndarray) -> None:
        """Store one transition of each run, in place of the oldest if full."""
        for field, value in zip(self.fields, transition, strict=True):
            field[:, self.added % self.capacity] = value
        self.added += 1

    def sample(self, batches: int, size: int) -> Transition:
        """Return batches × runs × size transitions, drawn with equal chances."""
        stored = min(self.added, self.capacity)
        slots = self.rng.integers(stored, size=(batches, self.runs, size))
        runs = np.arange(self.runs)[:, None]
        return Transition(*(jnp.asarray(field[runs, slots]) for field in self.fields))


def verdict(scores: np.ndarray, baseline: np.ndarray) -> str:
    """Return "better" or "worse" if the ranges of two sets of scores do not overlap."""
    if scores.min() > baseline.max():
        return "better"
    return "worse" if scores.max() < baseline.min() else "no clear difference"


def steps_to_goal(returns: Returns) -> str:
    """Format the step from which each run's test returns stay above the goal."""
    steps, runs = [*returns, "never"], np.stack([*returns.values()], axis=1)
    slots = [max(np.flatnonzero(run <= GOAL), default=-1) + 1 for run in runs]
    return ", ".join(str(steps[i]) for i in slots)


def make_table(curves: dict[str, Returns]) -> Table:
    """Compare returns at the end and over all of training with the first critics'."""
    table = Table("Critics", "Last 3 tests", "All tests", f"Steps to {GOAL}")
    table.title = "Test return: mean (lowest, highest) of the seeds"
    table.caption = (
        f"Steps: from there on every test of a seed is above {GOAL}. "
        "Better, worse: every seed than every seed of the first row."
    )
    runs = [np.stack([*returns.values()]) for returns in curves.values()]
    scores = [(run[-3:].mean(0), run.mean(0)) for run in runs]
    for (name, returns), parts in zip(curves.items(), scores, strict=True):
        cells = [f"{s.mean():.0f} ({s.min():.0f}, {s.max():.0f})" for s in parts]
        if parts is not scores[0] and len(parts[0]) > 1:
            verdicts = map(verdict, parts, scores[0])
            cells = [f"{c}\n{v}" for c, v in zip(cells, verdicts, strict=True)]
        table.add_row(name, *cells, steps_to_goal(returns))
    return table


def draw(curves: dict[str, Returns]) -> Figure:
    """Plot test returns by step, the mean of all runs and their range."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for (name, returns), style in zip(
        curves.items(),
        ((COLOR[False], ":"), (COLOR[True], "-"), ("k", "--")),
        strict=True,
    ):
        steps, each, (color, line) = list(returns), np.stack([*returns.values()]), style
        axes.plot(steps, each.mean(1), color=color, ls=line, label=name)
        axes.fill_between(steps, each.min(1), each.max(1), color=color, alpha=0.15)
    axes.axhline(GOAL, color="0.6", linewidth=0.8)
    axes.set(xlabel="steps of the environment", ylabel="test return")
    axes.set_title("CrossQ on Pendulum-v1, by normalization of the critics")
    axes.legend(loc="lower right")
    return figure


def report(curves: dict[str, Returns], folder: Path) -> None:
    """Print the table and write the picture."""
    Console(width=88).print(make_table(curves))
    draw(curves).savefig(folder / "crossq.png", dpi=110)
    print(f"Picture: {folder / 'crossq.png'}")
