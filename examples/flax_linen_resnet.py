"""Train a small ResNet in flax.linen, with jaxbn's batch norm or with Flax's own.

--norm chooses the class; variables, first weights and batches remain the same.
"""

import argparse
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import optax
from _digits import load_digits
from flax.training.train_state import TrainState
from flax.traverse_util import flatten_dict
from jax import Array
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table

import jaxbn.linen


class Block(nn.Module):
    """Two convolutions beside a shortcut, projected where the shape changes."""

    norm: type[nn.BatchNorm]
    width: int
    stride: int

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """Features to features; `train`: normalize by this batch's statistics."""
        norm = partial(self.norm, use_running_average=not train, momentum=0.9)
        conv = partial(nn.Conv, self.width, use_bias=False)
        y = nn.relu(norm()(conv((3, 3), self.stride)(x)))
        y = norm()(conv((3, 3))(y))
        if x.shape != y.shape:
            x = norm()(conv((1, 1), self.stride)(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """A convolution, three blocks at falling resolution, the mean, the logits."""

    norm: type[nn.BatchNorm]

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """NHWC images to logits; without `train`, by the running statistics."""
        x = nn.Conv(16, (3, 3), use_bias=False)(x)
        x = nn.relu(self.norm(use_running_average=not train, momentum=0.9)(x))
        for width, stride in ((16, 1), (32, 2), (64, 2)):
            x = Block(self.norm, width, stride)(x, train)
        return nn.Dense(10)(x.mean((1, 2)))


class State(TrainState):
    """Parameters and optimizer, and beside them the running statistics."""

    batch_stats: dict


@jax.jit
def train_step(state: State, images: Array, labels: Array) -> tuple[State, Array]:
    """One step of training: the new state, and the loss."""

    def loss(params: dict) -> tuple[Array, dict]:
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, new = state.apply_fn(variables, images, True, mutable="batch_stats")
        costs = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return costs.mean(), new["batch_stats"]

    (cost, stats), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, batch_stats=stats), cost


@jax.jit
def accuracy(state: State, images: Array, labels: Array) -> Array:
    """The share recognized, normalized by the running statistics."""
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    return (state.apply_fn(variables, images).argmax(-1) == labels).mean()


def fit(norm: type[nn.BatchNorm], seed: int, steps: int) -> tuple:
    """One run: the variables at its start, losses, accuracies by step."""
    test, train = load_digits(seed)
    rng, losses, accuracies = np.random.default_rng(seed), [], {}
    model, rate = ResNet(norm), optax.cosine_decay_schedule(0.3, steps)
    key = jax.random.key(seed, impl="rbg")  # compiles faster than the default one
    start = jax.jit(model.init)(key, test[0][:1])
    state = State.create(apply_fn=model.apply, tx=optax.sgd(rate, 0.9), **start)
    for step in track(range(1, steps + 1), disable=not Console().is_terminal):
        rows = rng.choice(len(train[1]), 64, replace=False)
        state, cost = train_step(state, *(a[rows] for a in train))
        losses.append(float(cost))
        if step % 20 == 0:
            accuracies[step] = float(accuracy(state, *test))
    return start, losses, accuracies


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
    parser.add_argument("--quick", action="store_true", help="40 steps instead of 300")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random")
    here = Path(__file__).parent / "output"
    parser.add_argument("--output", type=Path, default=here, help="where results go")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    norm = {"flax": nn.BatchNorm, "jaxbn": jaxbn.linen.BatchNorm}[args.norm]
    start, losses, accuracies = fit(norm, args.seed, 40 if args.quick else 300)
    name = f"flax_linen_resnet-{args.norm}"
    table = Table("", name)
    for collection, tree in start.items():
        names = ", ".join(sorted({path[-1] for path in flatten_dict(tree)}))
        sizes = [leaf.size for leaf in jax.tree.leaves(tree)]
        table.add_row(collection, f"{sum(sizes):,} in {len(sizes)} arrays: {names}")
    table.add_row("loss", f"{losses[0]:.5f}; last 20: {np.mean(losses[-20:]):.4f}")
    table.add_row("test accuracy", f"{[*accuracies.values()][-1]:.1%}")
    Console().print(table)
    draw(name, losses, accuracies).savefig(args.output / f"{name}.png", dpi=110)
    print(f"Picture: {args.output / name}.png")


if __name__ == "__main__":
    main()
