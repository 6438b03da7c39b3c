"""Run exported models in a process that imports only JAX, flatbuffers and NumPy.

Usage: python _serve.py IMAGES.npy RESULTS.npz MODEL...
"""

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.export
import numpy as np


def measure(
    calls: Sequence[Callable], images: np.ndarray, repeats: int = 30
) -> list[float]:
    """Return the median milliseconds per call; calls alternate after a warm-up."""
    times = np.empty((repeats + 1, len(calls)))
    for row in times:
        for i, call in enumerate(calls):
            start = time.perf_counter()
            jax.block_until_ready(call(images))
            row[i] = time.perf_counter() - start
    return [float(t) for t in 1e3 * np.median(times[1:], axis=0)]


def main() -> None:
    """Write the logits of all images, and the time per model for 64 of them."""
    images, results, *models = map(Path, sys.argv[1:])
    x = np.load(images)
    loaded = [jax.export.deserialize(bytearray(m.read_bytes())) for m in models]
    calls = [jax.jit(each.call) for each in loaded]
    np.savez(
        results,
        logits=[call(x) for call in calls],
        milliseconds=measure(calls, x[:64]),
        modules=[name for name in ("flax", "jaxbn", "optax") if name in sys.modules],
    )


if __name__ == "__main__":
    main()
