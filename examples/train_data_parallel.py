"""Train a ResNet on N devices with 4 images each, with and without synchronization.

Compares four ways to compute the same steps; devices get random images, or images of
few digits.
"""

from functools import partial

import flax.linen as nn
import jax
import numpy as np
import optax
from _digits import load_digits
from _training import COLOR, make_parser
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table

import jaxbn.linen

STYLES = [  # of the four ways; the first is visible behind the lines that equal it
    {"color": "#BBBBBB", "lw": 5},
    {"color": COLOR[False], "lw": 1.3},
    {"color": COLOR[True], "lw": 1.3},
    {"color": "#000000", "lw": 1.3, "ls": ":"},
]


class ResNet(nn.Module):
    """Three blocks of decreasing resolution; `axis_name` synchronizes devices."""

    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """Map NHWC images to logits; without `train`, with the running statistics."""
        norm = partial(jaxbn.linen.BatchNorm, not train, axis_name=self.axis_name)
        for width in (8, 16, 32):
            conv = partial(nn.Conv, width, use_bias=False)
            y = nn.relu(norm(momentum=0.9)(conv((3, 3), 2)(x)))
            y = norm(momentum=0.9)(conv((3, 3))(y))
            x = nn.relu(conv((1, 1), 2)(x) + y)
        return nn.Dense(10)(x.mean((1, 2)))


def deal(labels: np.ndarray, size: int, steps: int, seed: int) -> dict[str, list]:
    """Return the row numbers of every batch, in random order and sorted by label."""
    rng = np.random.default_rng(seed)
    drawn = [rng.choice(len(labels), size, replace=False) for _ in range(steps)]
    return {"at random": drawn, "by digit": [r[labels[r].argsort()] for r in drawn]}


def train_step(
    model: ResNet, axis_name: str | None, state: tuple, batch: list, rate: float
) -> tuple[tuple, Array]:
    """Take one step, on one device of `axis_name` if given; return state and loss."""
    (params, stats, trace), (images, labels) = state, batch

    def loss(params: dict) -> tuple:
        variables = {"params": params, "batch_stats": stats}
        logits, new = model.apply(variables, images, True, mutable="batch_stats")
        costs = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        if axis_name is None:
            return costs.mean(), new["batch_stats"]
        # The gradient of shared parameters needs no pmean: shard_map sums it. The
        # statistics need one if each device has its own; synchronized, they are equal.
        return lax.pmean((costs.mean(), new["batch_stats"]), axis_name)

    (cost, stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
    updates, trace = optax.sgd(rate, momentum=0.9).update(grads, trace)
    return (optax.apply_updates(params, updates), stats, trace), cost


def ways(mesh: Mesh) -> dict[str, tuple]:
    """Return, by name, a compiled step and the shardings of its state and batches."""
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
    """Return the share of digits recognized, with the running statistics."""
    logits = ResNet().bind({"params": params, "batch_stats": stats})(images)
    return (logits.argmax(-1) == labels).mean()


def fit(way: tuple, start: tuple, digits: list, batches: list) -> tuple[list, dict]:
    """Train once at a rate falling to 0; return losses, and accuracies by step."""
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
    """Plot loss and accuracy by step: random images on top, sorted ones below."""
    figure = Figure(figsize=(8.5, 7.5), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True, sharey="col")
    for (left, right), (order, group) in zip(axes, runs.items(), strict=True):
        for (name, run), style in zip(group.items(), STYLES, strict=True):
            losses, accuracies = run
            smooth = np.convolve(losses, np.full(20, 0.05), "valid")
            left.semilogy(smooth, label=name, **style)
            right.plot(*zip(*accuracies.items(), strict=True), **style)
        title, xlabel = f"Images dealt {order}", "step"
        left.set(title=title, xlabel=xlabel, ylabel="training loss (mean of next 20)")
        right.set(title=title, xlabel=xlabel, ylabel="test accuracy", ylim=(0.5, 1))
    figure.legend(handles=axes[0, 0].lines, loc="outside lower center", ncols=2)
    return figure


def summarize(runs: dict[str, dict[str, tuple]]) -> Table:
    """Return a table of accuracies, last losses, and differences from one device."""
    header = ("Images\ndealt", "Way", "Test\naccuracy", "Loss of\nlast 20")
    table = Table(*header, "Difference in\nfirst 5 losses")
    for order, group in runs.items():
        first, _ = group["one device, all images"]
        for name, (losses, accuracies) in group.items():
            off = np.abs(np.subtract(losses, first))[:5].max()
            final = f"{accuracies[len(losses)]:.1%}"
            last = f"{np.mean(losses[-20:]):.4f}"
            table.add_row(order, name, final, last, f"{off:.1g}")
    return table


def conclude(runs: dict[str, dict[str, tuple]]) -> str:
    """Return a sentence on the changes in test accuracy relative to one device."""
    finals = [
        [list(accuracies.values())[-1] for _, accuracies in group.values()]
        for group in runs.values()
    ]
    one, unsynchronized, *synchronized = 100 * np.transpose(finals)
    at_random, by_digit = unsynchronized - one
    same = np.array(synchronized) - one
    return (
        f"Test accuracy relative to one device, in points: unsynchronized "
        f"{at_random:+.1f} dealt at random,\n{by_digit:+.1f} dealt by digit; "
        f"synchronized, both ways, {same.min():+.1f} to {same.max():+.1f}."
    )


def main() -> None:
    """Train eight times; print a table and write a picture."""
    quick = "40 steps instead of 400: only check that it runs, without a conclusion"
    parser = make_parser(__doc__, quick)
    devices = "largest number of devices (default: 8)"
    parser.add_argument("--devices", type=int, default=8, help=devices)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_num_cpu_devices", args.devices)  # does not affect GPUs
    mesh = Mesh(jax.devices()[: args.devices], ("data",))
    test, train = digits = load_digits(args.seed)
    dealt = deal(train[1], 4 * mesh.size, 40 if args.quick else 400, args.seed)
    key = jax.random.key(args.seed, impl="rbg")  # compiles faster than the default
    variables = jax.jit(ResNet().init)(key, test[0][:1])
    params, stats = variables["params"], variables["batch_stats"]
    start, steps = (params, stats, optax.sgd(0.0, 0.9).init(params)), ways(mesh)
    runs = {
        order: {name: fit(way, start, digits, batches) for name, way in steps.items()}
        for order, batches in dealt.items()
    }
    draw(runs).savefig(args.output / "train_data_parallel.png", dpi=150)
    Console(width=88).print(summarize(runs))
    print(f"Picture: {args.output / 'train_data_parallel.png'}")
    too_short = "Too short to say: --quick only checks that the example runs."
    print(too_short if args.quick else conclude(runs))


if __name__ == "__main__":
    main()
