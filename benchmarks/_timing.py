"""Interleaved timing: every round runs each case once, in a new order.

A temporary disturbance of the machine then affects all cases equally.
"""

import math
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

import numpy as np

Case = TypeVar("Case")
Sample = TypeVar("Sample")
MIN_SAMPLE_SECONDS = 1e-3  # a sample repeats the call to take this long


class Summary(NamedTuple):
    """Hold the median and the quartiles in seconds."""

    median: float
    low: float
    high: float


def summarize(samples: list[float]) -> Summary:
    """Compute the median and the quartiles of `samples`."""
    low, median, high = np.percentile(samples, (25, 50, 75))
    return Summary(float(median), float(low), float(high))


def seconds_per_call(run: Callable[[], object], calls: int) -> float:
    """Return the mean time of a call."""
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def calls_for(seconds: float) -> int:
    """Return the number of calls per sample if one call takes `seconds`."""
    return max(1, math.ceil(MIN_SAMPLE_SECONDS / seconds))


def sampler(
    run: Callable[[], object], prepare: Callable[[], object] = lambda: None
) -> Callable[[], float]:
    """Return a function that times `run`; short calls are preceded by a warm-up."""
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
    cases: Mapping[Case, Callable[[], Sample]],
    rounds: int,
    rng: np.random.Generator,
    limit: float = math.inf,
) -> dict[Case, list[Sample]]:
    """Sample every case once a round; stop after 3 rounds and `limit` seconds."""
    names = list(cases)
    samples: dict[Case, list[Sample]] = {name: [] for name in names}
    start = time.perf_counter()
    for done in range(rounds):
        if done >= 3 and time.perf_counter() - start > limit:
            break
        for i in rng.permutation(len(names)):
            samples[names[i]].append(cases[names[i]]())
    return samples


def floor(copy_seconds: float, passes: int) -> float:
    """Return the time of `passes` over x at the speed of a copy, which makes two."""
    return copy_seconds * passes / 2


def geometric_mean(ratios: list[float]) -> float:
    """Return the geometric mean."""
    return math.exp(sum(map(math.log, ratios)) / len(ratios))
