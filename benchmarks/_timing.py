"""Interleaved timing: every round runs each case once, in a new order.

What disturbs the machine for a while then disturbs all cases alike.
"""

import math
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

import numpy as np

Case = TypeVar("Case")
LEAST_SECONDS = 1e-3  # of a sample, which is as many calls as that takes


class Summary(NamedTuple):
    """Median and quartiles in seconds."""

    median: float
    low: float
    high: float


def summarize(samples: list[float]) -> Summary:
    """Median and quartiles of some samples."""
    low, median, high = np.percentile(samples, (25, 50, 75))
    return Summary(float(median), float(low), float(high))


def seconds_per_call(run: Callable[[], object], calls: int) -> float:
    """The mean time of a call."""
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def calls_for(seconds: float) -> int:
    """How many calls a sample needs if one takes so long."""
    return max(1, math.ceil(LEAST_SECONDS / seconds))


def sampler(
    run: Callable[[], object], prepare: Callable[[], object] = lambda: None
) -> Callable[[], float]:
    """A sample of `run`, warm: where it is short, one call goes before the clock."""
    prepare()
    run()
    calls = calls_for(seconds_per_call(run, 1))

    def sample() -> float:
        prepare()
        if calls > 1:
            run()
        return seconds_per_call(run, calls)

    return sample


def interleave(
    cases: Mapping[Case, Callable[[], float]],
    rounds: int,
    rng: np.random.Generator,
    limit: float = math.inf,
) -> dict[Case, list[float]]:
    """The samples of every case, one a round; at least 3 rounds, and else `limit` s."""
    names = list(cases)
    samples: dict[Case, list[float]] = {name: [] for name in names}
    start = time.perf_counter()
    for done in range(rounds):
        if done >= 3 and time.perf_counter() - start > limit:
            break
        for i in rng.permutation(len(names)):
            samples[names[i]].append(cases[names[i]]())
    return samples


def floor(copy_seconds: float, passes: int) -> float:
    """The time of so many passes over x, at the speed of a copy, which makes two."""
    return copy_seconds * passes / 2


def geometric_mean(ratios: list[float]) -> float:
    """The mean of factors: that of r and 1/r is 1."""
    return math.exp(sum(map(math.log, ratios)) / len(ratios))
