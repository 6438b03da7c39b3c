"""Average a network's weights while it trains, and see what their statistics must be.

Running statistics belong to the weights that were trained, not to an average of them.
"""

import argparse
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import optax
from _digits import load_digits
from jax import Array
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table

import jaxbn.linen

ROWS = {
    "running": ("trained", "running"),
    "stale": ("averaged", "running, so of other weights"),
    "paper": ("averaged", "population, variance='paper'"),
    "total": ("averaged", "population, variance='total'"),
}


class CNN(nn.Module):
    """Three convolutions with batch norm, the mean, the logits."""

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """NHWC images to logits; without `train`, by `batch_stats`."""
        for width, stride in ((8, 2), (16, 2), (32, 1)):
            x = nn.Conv(width, (3, 3), stride, use_bias=False)(x)
            x = nn.relu(jaxbn.linen.BatchNorm(not train, momentum=0.9)(x))
        return nn.Dense(10)(x.mean((1, 2)))


MODEL = CNN()
OPTIMIZER, AVERAGE = optax.sgd(1.0, 0.9), optax.ema(0.99)


@jax.jit
def train_step(variables: dict, states: tuple, images: Array, labels: Array) -> tuple:
    """One step: the new variables, the averaged weights, the state of both averages."""

    def loss(params: dict) -> tuple:
        trained = variables | {"params": params}
        logits, new = MODEL.apply(trained, images, True, mutable="batch_stats")
        costs = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return costs.mean(), new

    grads, new = jax.grad(loss, has_aux=True)(variables["params"])
    updates, trace = OPTIMIZER.update(grads, states[0])
    params = optax.apply_updates(variables["params"], updates)
    averaged, average = AVERAGE.update(params, states[1])
    return {"params": params, **new}, averaged, (trace, average)


@jax.jit
def accuracy(variables: dict, images: Array, labels: Array) -> Array:
    """The share recognized, normalized by the statistics in `variables`."""
    return (MODEL.bind(variables)(images).argmax(-1) == labels).mean()


def evaluate(variables: dict, averaged: dict, images: np.ndarray, test: tuple) -> dict:
    """Test accuracies by row of the table; statistics of `images`, in batches of 64."""
    stale = variables | {"params": averaged}
    batches = np.split(images, range(64, len(images), 64))  # the last one is short
    candidates = {"running": variables, "stale": stale}
    for variance in ("paper", "total"):
        candidates[variance] = jaxbn.linen.population(
            MODEL, stale, batches, variance=variance
        )
    return {name: float(accuracy(c, *test)) for name, c in candidates.items()}


def fit(seed: int, steps: int) -> dict[int, dict]:
    """One run: test accuracies by step, of some batches but for the last: of all."""
    test, train = load_digits(seed)
    rng, accuracies = np.random.default_rng(seed), {}
    key = jax.random.key(seed, impl="rbg")  # compiles faster than the default one
    variables = jax.jit(MODEL.init)(key, test[0][:1])
    states = OPTIMIZER.init(variables["params"]), AVERAGE.init(variables["params"])
    hidden = not Console().is_terminal
    for step in track(range(1, steps + 1), f"Seed {seed}", disable=hidden):
        rows = rng.choice(len(train[1]), 64, replace=False)
        batch = [a[rows] for a in train]
        variables, averaged, states = train_step(variables, states, *batch)
        if step % 25 == 0:
            images = train[0] if step == steps else train[0][: 8 * 64]
            accuracies[step] = evaluate(variables, averaged, images, test)
    return accuracies


def draw(runs: list[dict[int, dict]]) -> Figure:
    """Test accuracy against steps, the mean of all runs and their range."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name in ("running", "stale", "paper"):
        each = np.array([[at[name] for at in run.values()] for run in runs])
        steps, label = list(runs[0]), ": ".join(ROWS[name])
        (line,) = axes.plot(steps, each.mean(0), marker=".", label=label)
        axes.fill_between(
            steps, each.min(0), each.max(0), color=line.get_color(), alpha=0.15
        )
    axes.set(xlabel="step", ylabel="test accuracy", ylim=(0, 1))
    axes.set_title("Weights, and the statistics they are normalized by")
    axes.legend(loc="lower right")
    return figure


def main() -> None:
    """Some runs; a table and a picture of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="1 run of 100 steps")
    parser.add_argument("--seed", type=int, default=0, help="of the first run")
    here = Path(__file__).parent / "output"
    parser.add_argument("--output", type=Path, default=here, help="where results go")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    seeds = range(args.seed, args.seed + (1 if args.quick else 3))
    runs = [fit(seed, 100 if args.quick else 300) for seed in seeds]
    last = [[*run.values()][-1] for run in runs]
    title = f"Test accuracy, mean of {len(runs)} run(s) and range"
    table = Table("Weights", "Statistics", "Accuracy", "Range", title=title)
    for name, row in ROWS.items():
        each = [run[name] for run in last]
        spread = f"{min(each):.1%} to {max(each):.1%}"
        table.add_row(*row, f"{np.mean(each):.1%}", spread)
    Console(width=88).print(table)
    draw(runs).savefig(args.output / "population_statistics.png", dpi=110)
    print(f"Picture: {args.output / 'population_statistics.png'}")


if __name__ == "__main__":
    main()
