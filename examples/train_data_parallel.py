"""Train a ResNet on N devices with 4 images each, batch norm synchronized and not.

Four ways to compute the same steps; images dealt to devices at random, or by digit.
"""

import argparse
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import optax
from _digits import load_digits
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table

import jaxbn.linen


class ResNet(nn.Module):
    """Three blocks at falling resolution; `axis_name`: devices to normalize over."""

    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """NHWC images to logits; without `train`, by the running statistics."""
        norm = partial(jaxbn.linen.BatchNorm, not train, axis_name=self.axis_name)
        for width in (8, 16, 32):
            conv = partial(nn.Conv, width, use_bias=False)
            y = nn.relu(norm(momentum=0.9)(conv((3, 3), 2)(x)))
            y = norm(momentum=0.9)(conv((3, 3))(y))
            x = nn.relu(conv((1, 1), 2)(x) + y)
        return nn.Dense(10)(x.mean((1, 2)))


def deal(labels: np.ndarray, size: int, steps: int, seed: int) -> dict[str, list]:
    """The rows of every batch, as drawn and in order of their labels."""
    rng = np.random.default_rng(seed)
    drawn = [rng.choice(len(labels), size, replace=False) for _ in range(steps)]
    return {"at random": drawn, "by digit": [r[labels[r].argsort()] for r in drawn]}


def train_step(
    model: ResNet, axis_name: str | None, state: tuple, batch: list, rate: float
) -> tuple[tuple, Array]:
    """One step: the new state, and the loss; `axis_name`: as one device of several."""
    (params, stats, trace), (images, labels) = state, batch

    def loss(params: dict) -> tuple:
        variables = {"params": params, "batch_stats": stats}
        logits, new = model.apply(variables, images, True, mutable="batch_stats")
        costs = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        if axis_name is None:
            return costs.mean(), new["batch_stats"]
        # The gradient needs no pmean: shard_map adds it up for what devices share. The
        # statistics do where each device has its own; synchronized, they are equal.
        return lax.pmean((costs.mean(), new["batch_stats"]), axis_name)

    (cost, stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
    updates, trace = optax.sgd(rate, momentum=0.9).update(grads, trace)
    return (optax.apply_updates(params, updates), stats, trace), cost


def ways(mesh: Mesh) -> dict[str, tuple]:
    """By name: a compiled step, and where its state and its batches are to be put."""
    specs = {"in_specs": (P(), P("data"), P()), "out_specs": P()}
    mapped = partial(jax.shard_map, mesh=mesh, **specs)
    own = jax.jit(mapped(partial(train_step, ResNet(), "data")))
    synchronized = jax.jit(mapped(partial(train_step, ResNet("data"), "data")))
    whole = jax.jit(partial(train_step, ResNet(), None))
    places = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    return {
        "one device, all images": (whole, None, None),
        "shard_map, unsynchronized": (own, *places),
        "shard_map, synchronized": (synchronized, *places),
        "jit of sharded arrays": (whole, *places),
    }


@jax.jit
def accuracy(params: dict, stats: dict, images: Array, labels: Array) -> Array:
    """The share recognized, normalized by the running statistics."""
    logits = ResNet().bind({"params": params, "batch_stats": stats})(images)
    return (logits.argmax(-1) == labels).mean()


def fit(way: tuple, start: tuple, digits: list, batches: list) -> tuple[list, dict]:
    """One run, its rate falling to 0: losses, and test accuracies by step."""
    (test, train), (step, state_place, batch_place) = digits, way
    state, losses, accuracies = jax.device_put(start, state_place), [], {}
    for rows in track(batches, disable=not Console().is_terminal):
        batch = jax.device_put([a[rows] for a in train], batch_place)
        state, cost = step(state, batch, 0.3 * (1 - len(losses) / len(batches)))
        losses.append(float(cost))
        if len(losses) % 20 == 0:
            accuracies[len(losses)] = float(accuracy(*jax.device_get(state[:2]), *test))
    return losses, accuracies


def draw(runs: dict[str, dict[str, tuple]]) -> Figure:
    """Loss and accuracy against steps: above dealt at random, below by digit."""
    figure = Figure(figsize=(10, 7), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True, sharey="col")
    for (left, right), (order, group) in zip(axes, runs.items(), strict=True):
        for i, (name, (losses, accuracies)) in enumerate(group.items()):
            # One device is a wide line, to show behind those that equal it.
            style = {"label": name, "color": f"C{i}", "lw": 1.3 if i else 5}
            left.semilogy(np.convolve(losses, np.full(20, 0.05), "valid"), **style)
            right.plot(*zip(*accuracies.items(), strict=True), **style)
        title, xlabel = f"Images dealt {order}", "step"
        left.set(title=title, xlabel=xlabel, ylabel="training loss (mean of next 20)")
        right.set(title=title, xlabel=xlabel, ylabel="test accuracy", ylim=(0.5, 1))
    figure.legend(handles=axes[0, 0].lines, loc="outside lower center", ncols=4)
    return figure


def summarize(runs: dict[str, dict[str, tuple]]) -> tuple[Table, str]:
    """A table, and what each way changes in the test accuracy of one device."""
    header = ("Images\ndealt", "Way", "Test\naccuracy", "Loss of\nlast 20")
    table, points = Table(*header, "Off in the\nfirst 5 losses"), {}
    for order, group in runs.items():
        first, one = group["one device, all images"]
        for name, (losses, accuracies) in group.items():
            off = np.abs(np.subtract(losses, first))[:5].max()
            final = accuracies[len(losses)]
            last = f"{np.mean(losses[-20:]):.4f}"
            table.add_row(order, name, f"{final:.1%}", last, f"{off:.1g}")
            points.setdefault(name, []).append(100 * (final - one[len(losses)]))
    _, (at_random, by_digit), *same = points.values()
    return table, (
        f"Test accuracy against one device, in points: unsynchronized {at_random:+.1f} "
        f"dealt at random,\n{by_digit:+.1f} dealt by digit; synchronized, both ways, "
        f"{np.min(same):+.1f} to {np.max(same):+.1f}."
    )


def main() -> None:
    """Eight runs; a table and a picture of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, default=8, help="how many, at most")
    parser.add_argument("--quick", action="store_true", help="40 steps instead of 400")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random")
    here = Path(__file__).parent / "output"
    parser.add_argument("--output", type=Path, default=here, help="where results go")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_num_cpu_devices", args.devices)  # GPUs remain as they are
    mesh = Mesh(jax.devices()[: args.devices], ("data",))
    test, train = digits = load_digits(args.seed)
    dealt = deal(train[1], 4 * mesh.size, 40 if args.quick else 400, args.seed)
    key = jax.random.key(args.seed, impl="rbg")  # compiles faster than the default one
    variables = jax.jit(ResNet().init)(key, test[0][:1])
    params, stats = variables["params"], variables["batch_stats"]
    start, steps = (params, stats, optax.sgd(0.0, 0.9).init(params)), ways(mesh)
    runs = {
        order: {name: fit(way, start, digits, batches) for name, way in steps.items()}
        for order, batches in dealt.items()
    }
    draw(runs).savefig(args.output / "train_data_parallel.png", dpi=110)
    table, conclusion = summarize(runs)
    Console(width=88).print(table)
    print(f"Picture: {args.output / 'train_data_parallel.png'}")
    print(conclusion)


if __name__ == "__main__":
    main()
