"""Train a small CNN in flax.nnx, with jaxbn's batch norm or with Flax's own.

--norm chooses the class; variables, first weights and batches remain the same.
"""

import argparse
import itertools
from pathlib import Path

import numpy as np
import optax
from _digits import load_digits
from flax import nnx
from jax import Array
from jax.typing import ArrayLike
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table

import jaxbn.nnx


class CNN(nnx.Module):
    """Convolution, batch norm and ReLU, repeated; the mean, the logits."""

    def __init__(
        self,
        norm: type[nnx.BatchNorm],
        rngs: nnx.Rngs,
        widths: tuple[int, ...] = (1, 16, 32, 32, 64, 64),
    ):
        layers = []
        for i, (n_in, n_out) in enumerate(itertools.pairwise(widths)):
            stride = 1 + i % 2
            conv = nnx.Conv(n_in, n_out, (3, 3), stride, use_bias=False, rngs=rngs)
            layers += [conv, norm(n_out, momentum=0.9, rngs=rngs), nnx.relu]
        self.layers = nnx.Sequential(*layers)
        self.head = nnx.Linear(widths[-1], 10, rngs=rngs)

    def __call__(self, x: ArrayLike) -> Array:
        """NHWC images to logits."""
        return self.head(self.layers(x).mean((1, 2)))


def loss(model: CNN, images: ArrayLike, labels: ArrayLike) -> Array:
    """The mean cross-entropy."""
    logits = model(images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@nnx.jit
def train_step(model: CNN, optimizer: nnx.Optimizer, *batch: ArrayLike) -> Array:
    """One step of training, which model and optimizer remember; the loss."""
    cost, grads = nnx.value_and_grad(loss)(model, *batch)
    optimizer.update(model, grads)
    return cost


@nnx.jit
def accuracy(model: CNN, images: ArrayLike, labels: ArrayLike) -> Array:
    """The share recognized."""
    return (model(images).argmax(-1) == labels).mean()


def fit(norm: type[nnx.BatchNorm], seed: int, steps: int) -> tuple:
    """One run: the trained model, losses, accuracies by step."""
    test, train = load_digits(seed)
    rng, losses, accuracies = np.random.default_rng(seed), [], {}
    model, rate = CNN(norm, nnx.Rngs(seed)), optax.cosine_decay_schedule(0.2, steps)
    optimizer = nnx.Optimizer(model, optax.sgd(rate, momentum=0.9), wrt=nnx.Param)
    for step in track(range(1, steps + 1), disable=not Console().is_terminal):
        rows = rng.choice(len(train[1]), 64, replace=False)
        model.train()  # this batch's statistics
        losses.append(float(train_step(model, optimizer, *(a[rows] for a in train))))
        if step % 20 == 0:
            model.eval()  # the running statistics
            accuracies[step] = float(accuracy(model, *test))
    return model, losses, accuracies


def draw(title: str, losses: list, accuracies: dict) -> Figure:
    """Loss and accuracy against steps."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.semilogy(range(1, len(losses) + 1), losses)
    right.plot(*zip(*accuracies.items(), strict=True), marker=".")
    left.set(xlabel="step", ylabel="training loss")
    right.set(xlabel="step", ylabel="test accuracy", xlim=left.get_xlim())
    figure.suptitle(title)
    return figure


def main() -> None:
    """One run; a table and a picture of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--norm", choices=("flax", "jaxbn"), default="jaxbn")
    parser.add_argument("--quick", action="store_true", help="60 steps instead of 400")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random")
    here = Path(__file__).parent / "output"
    parser.add_argument("--output", type=Path, default=here, help="where results go")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    norm = {"flax": nnx.BatchNorm, "jaxbn": jaxbn.nnx.BatchNorm}[args.norm]
    model, losses, accuracies = fit(norm, args.seed, 60 if args.quick else 400)
    name = f"flax_nnx_cnn-{args.norm}"
    table = Table("", name)
    for kind in (nnx.BatchStat, nnx.Param):
        flat = nnx.to_flat_state(nnx.state(model, kind))
        names = ", ".join(sorted({str(path[-1]) for path, _ in flat}))
        sizes = [variable.size for _, variable in flat]
        row = f"{sum(sizes):,} in {len(sizes)} arrays: {names}"
        table.add_row(kind.__name__, row)
    table.add_row("loss", f"{losses[0]:.5f}; last 20: {np.mean(losses[-20:]):.4f}")
    table.add_row("test accuracy", f"{[*accuracies.values()][-1]:.1%}")
    Console().print(table)
    draw(name, losses, accuracies).savefig(args.output / f"{name}.png", dpi=110)
    print(f"Picture: {args.output / name}.png")


if __name__ == "__main__":
    main()
