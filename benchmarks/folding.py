"""Time inference with and without folding: `python -m benchmarks.folding`.

A layer with batch norm versus the folded layer, compiled by `jax.jit` and run op by op.
Their results are compared first; then they run in turns, so that a disturbance of the
machine affects both equally. The compiled gain is small if XLA fuses the batch norm
into one pass, which the folded layer's bias needs as well.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import Array
from rich.console import Console
from rich.table import Table

import jaxbn.nnx


class Residual(nnx.Module):
    """Add two convolutions with batch norm to their input, as a ResNet does."""

    def __init__(self, features: int, rngs: nnx.Rngs):
        conv = partial(nnx.Conv, features, features, (3, 3), use_bias=False, rngs=rngs)
        norm = partial(jaxbn.nnx.BatchNorm, features, rngs=rngs)
        self.body = nnx.Sequential(conv(), norm(), nnx.relu, conv(), norm())

    def __call__(self, x: Array) -> Array:
        """Return the ReLU of the sum of x and the convolutions."""
        return nnx.relu(x + self.body(x))


def layer(make: Callable[..., Any], features: int, rngs: nnx.Rngs) -> nnx.Module:
    """Return a layer, built by `make`, with a batch norm after it."""
    norm = jaxbn.nnx.BatchNorm(features, rngs=rngs)
    return nnx.Sequential(make(use_bias=False, rngs=rngs), norm)


def models(rngs: nnx.Rngs) -> dict[str, tuple[nnx.Module, tuple[int, ...]]]:
    """Return models and the shapes of x, by name: three layers, then a stack."""
    conv, dense = partial(nnx.Conv, kernel_size=(3, 3)), partial(nnx.Linear, 1024, 1024)
    wide = partial(nnx.Conv, 64, 256, (1, 1))
    blocks = nnx.Sequential(*(Residual(32, rngs) for _ in range(10)))
    return {
        "conv 3x3, 64 to 64": (layer(partial(conv, 64, 64), 64, rngs), (8, 56, 56, 64)),
        "conv 1x1, 64 to 256": (layer(wide, 256, rngs), (8, 56, 56, 64)),
        "dense, 1024 to 1024": (layer(dense, 1024, rngs), (256, 1024)),
        "10 residual blocks of 32": (blocks, (1, 16, 16, 32)),
    }


def randomize(model: nnx.Module, seed: int) -> None:
    """Randomize the statistics: folding zeros and ones would test nothing."""
    rng, stats = np.random.default_rng(seed), nnx.state(model, nnx.BatchStat)
    nnx.update(
        model,
        jax.tree.map(lambda a: rng.uniform(0.5, 1.5, a.shape).astype(a.dtype), stats),
    )


def medians(calls: list[Callable[[], Array]], repeats: int) -> list[float]:
    """Return the median milliseconds of each call; the calls run in turns."""
    times = np.empty((repeats, len(calls)))
    for row in times:
        for i, call in enumerate(calls):
            start = time.perf_counter()
            call().block_until_ready()
            row[i] = time.perf_counter() - start
    return [float(t) for t in 1e3 * np.median(times, axis=0)]


def compare(model: nnx.Module, x: Array, compiled: bool, repeats: int) -> list[float]:
    """Return milliseconds with batch norm, and folded."""
    model.eval()
    calls = []
    for version in (model, jaxbn.nnx.fold(model, x)):
        graph, state = nnx.split(version)

        def run(state: nnx.State, x: Array, graph: nnx.GraphDef = graph) -> Array:
            return nnx.merge(graph, state)(x)

        eager = partial(version, x)
        calls.append(partial(jax.jit(run), state, x) if compiled else eager)
    expected, folded = (np.asarray(call()) for call in calls)
    size = np.abs(expected).max()
    np.testing.assert_allclose(folded, expected, rtol=0, atol=1e-5 * size)
    return medians(calls, repeats)


def main() -> None:
    """Print all comparisons in one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="seed of all random arrays")
    args = parser.parse_args()
    device = jax.devices()[0]
    table = Table(
        title=f"Inference, float32, {device.device_kind}, jax {jax.__version__}"
    )
    for name in ("model", "x", "how", "batch norm, ms", "folded, ms", "ratio"):
        table.add_column(name, justify="left" if name in ("model", "x") else "right")
    for name, (model, shape) in models(nnx.Rngs(args.seed)).items():
        randomize(model, args.seed)
        x = jax.random.normal(jax.random.key(args.seed), shape)
        for how in ("jit", "op by op"):
            norm, folded = compare(model, x, how == "jit", args.repeats)
            figures = f"{norm:.2f}", f"{folded:.2f}", f"{norm / folded:.2f}"
            table.add_row(name, " x ".join(map(str, shape)), how, *figures)
    Console().print(table)


if __name__ == "__main__":
    main()
