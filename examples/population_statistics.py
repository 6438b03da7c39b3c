"""Average a network's weights during training, and recompute their statistics.

Running statistics belong to the trained weights, not to an average of them.
"""

import flax.linen as nn
import jax
import numpy as np
import optax
from _digits import load_digits, random_batches
from _training import make_parser
from jax import Array
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import jaxbn.linen

ROWS = {
    "running": ("trained", "running"),
    "stale": ("averaged", "running, of the trained weights"),
    "paper": ("averaged", "population, variance='paper'"),
    "total": ("averaged", "population, variance='total'"),
}
STYLES = {
    "running": ("black", "."),
    "stale": ("#CC79A7", "x"),
    "paper": ("#009E73", "^"),
}


class CNN(nn.Module):
    """Three convolutions with batch norm, the mean, the logits."""

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """Map NHWC images to logits; without `train`, with `batch_stats`."""
        for width, stride in ((8, 2), (16, 2), (32, 1)):
            x = nn.Conv(width, (3, 3), stride, use_bias=False)(x)
            x = nn.relu(jaxbn.linen.BatchNorm(not train, momentum=0.9)(x))
        return nn.Dense(10)(x.mean((1, 2)))


MODEL = CNN()
OPTIMIZER, AVERAGE = optax.sgd(1.0, 0.9), optax.ema(0.99)


@jax.jit
def train_step(variables: dict, states: tuple, images: Array, labels: Array) -> tuple:
    """Take one step; return the variables, averaged weights, and optimizer states."""

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
    """Return the share of digits recognized, with the statistics in `variables`."""
    return (MODEL.bind(variables)(images).argmax(-1) == labels).mean()


def evaluate(variables: dict, averaged: dict, images: np.ndarray, test: tuple) -> dict:
    """Return test accuracies by row; `images` give the population statistics."""
    stale = variables | {"params": averaged}
    batches = np.split(images, range(64, len(images), 64))  # the last one is short
    candidates = {"running": variables, "stale": stale}
    for variance in ("paper", "total"):
        candidates[variance] = jaxbn.linen.population(
            MODEL, stale, batches, variance=variance
        )
    return {name: float(accuracy(c, *test)) for name, c in candidates.items()}


def fit(seed: int, steps: int) -> dict[int, dict]:
    """Train once; return test accuracies by step, from all images at the last step."""
    test, train = load_digits(seed)
    accuracies = {}
    key = jax.random.key(seed, impl="rbg")  # compiles faster than the default
    variables = jax.jit(MODEL.init)(key, test[0][:1])
    states = OPTIMIZER.init(variables["params"]), AVERAGE.init(variables["params"])
    for step, batch in random_batches(train, seed, steps, f"Seed {seed}"):
        variables, averaged, states = train_step(variables, states, *batch)
        if step % 25 == 0:
            images = train[0] if step == steps else train[0][: 8 * 64]
            accuracies[step] = evaluate(variables, averaged, images, test)
    return accuracies


def draw(runs: list[dict[int, dict]]) -> Figure:
    """Plot test accuracy by step, the mean of all runs and their range."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, (color, marker) in STYLES.items():
        each = np.array([[at[name] for at in run.values()] for run in runs])
        steps, label = list(runs[0]), ": ".join(ROWS[name])
        axes.plot(steps, each.mean(0), color=color, marker=marker, label=label)
        axes.fill_between(steps, each.min(0), each.max(0), color=color, alpha=0.15)
    axes.set(xlabel="step", ylabel="test accuracy", ylim=(0, 1))
    axes.set_title("Weights, and the statistics that normalize")
    axes.legend(loc="lower right")
    return figure


def main() -> None:
    """Train several times; print a table and write a picture."""
    quick = "one run of 100 steps instead of three of 300"
    args = make_parser(__doc__, quick, seed="seed of the first run").parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    seeds = range(args.seed, args.seed + (1 if args.quick else 3))
    runs = [fit(seed, 100 if args.quick else 300) for seed in seeds]
    last = [[*run.values()][-1] for run in runs]
    title = f"Test accuracy, mean and range of {len(runs)} run(s)"
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
