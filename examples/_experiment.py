"""What the experiments share: arguments, networks of dense layers, SGD, results.

Each experiment writes NAME.png and NAME.md, and prints a table whose last line states a
claim and whether it held. Its data are the digits of `_digits`.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _digits import load_digits
from jax import Array, lax
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table

import jaxbn

COLOR = {False: "C1", True: "C0"}  # without and with batch norm, in every picture
NAME = {False: "without batch norm", True: "with batch norm"}

Model = tuple[tuple, tuple]  # parameters and state


class Arguments(argparse.Namespace):
    """What the command line says."""

    quick: bool
    full: bool
    output: Path

    def pick(self, quick: Any, default: Any, full: Any) -> Any:
        """The one of three sizes that was asked for."""
        return quick if self.quick else full if self.full else default


def arguments(description: str | None) -> Arguments:
    """The options that all experiments have."""
    parser = argparse.ArgumentParser(description=description)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="seconds: does it run?")
    size.add_argument("--full", action="store_true", help="the long version")
    here = Path(__file__).parent / "output"
    parser.add_argument("--output", type=Path, default=here, help="where results go")
    return parser.parse_args(namespace=Arguments())


def progress(items: Sequence, title: str) -> Iterator:
    """`items` one by one, with a bar where somebody is looking."""
    return iter(track(items, title, disable=not Console().is_terminal))


class Digits(NamedTuple):
    """Images as rows of 784 pixels from 0 to 1, and what they show."""

    images: Array
    labels: Array


def digits(transform: Callable = lambda pixels: pixels) -> tuple[Digits, Digits]:
    """The 1,000 digits held out, and the 4,000 to train on."""
    parts = load_digits(seed=0)
    flat = [(transform(images.reshape(-1, 784)), labels) for images, labels in parts]
    test, train = (Digits(*map(jnp.asarray, part)) for part in flat)
    return test, train


def he(n_in: int) -> float:
    """The standard deviation of initial weights that keeps ReLUs' squares level."""
    return (2 / n_in) ** 0.5


def init(
    key: Array,
    norm: bool,
    depth: int,
    width: int = 100,
    std: Callable[[int], float] = he,
) -> Model:
    """Parameters and state of `depth` hidden layers; weights N(0, std(n_in)²).

    The weights are the same with and without `norm`. Without, a layer has a bias only.
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
    """`init` of several runs, side by side along a leading axis."""
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
    """Logits, new state, and what entered the activations: depth × rows × width.

    A layer: kernel, batch norm (or only a bias), noise if any, activation; with `skips`
    all but the first add that to what enters them. `noise` is laid out like the third
    result; `options` are those of `jaxbn.batch_norm`.
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
    # A loop in the program, which compiles as fast for 32 layers as for 2.
    x, (many_stats, zs) = lax.scan(layer, x, (many, many_stats, noises[1]))
    return x @ head, (stats, many_stats), jnp.concatenate([z[None], zs])


def loss(params: tuple, state: tuple, batch: Digits, **options: Any) -> tuple:
    """The mean cross-entropy in training and, beside it, the new state."""
    logits, state, _ = network(params, state, batch.images, True, **options)
    costs = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
    return costs.mean(), state


def sgd(
    model: Model, data: Digits, rows: Array, rate: Array | float, **options: Any
) -> tuple[Model, Array]:
    """Plain SGD, a step for each line of `rows`: the new model, and every loss."""
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
    """Runs side by side by `rows`, runs × steps × batch: what `observe` says of them.

    `rates`: one for all, or one for each. It is observed after `every` so many steps:
    the models and those steps' losses, runs × every, go in, and a tuple of arrays comes
    out, runs first. Of each of these the result has runs × times.
    """
    seen, rates = [], jnp.broadcast_to(jnp.float32(rates), len(rows))
    for start in range(0, rows.shape[1], every):
        some = rows[:, start : start + every]
        models, losses = _sgd_runs(models, data, some, rates, activation)
        seen.append(observe(models, losses))
    return [np.stack(values, 1) for values in zip(*seen, strict=True)]


def accuracy(model: Model, data: Digits, **options: Any) -> Array:
    """The share recognized, by the running statistics."""
    logits, *_ = network(*model, data.images, False, **options)
    return (logits.argmax(-1) == data.labels).mean()


def reached(curves: np.ndarray, goal: Any) -> np.ndarray:
    """At which of its points, from 1, a curve reaches the goal; infinity if never."""
    there = curves >= goal
    return np.where(there.any(-1), there.argmax(-1) + 1, np.inf)


def draw_rows(seed: int, steps: int, batch: int, population: int = 4000) -> np.ndarray:
    """Epoch after epoch, each in an order of its own: steps × batch."""
    rng, each = np.random.default_rng(seed), population // batch
    orders = [rng.permutation(population) for _ in range(-(-steps // each))]
    epochs = [order[: each * batch].reshape(each, batch) for order in orders]
    return np.concatenate(epochs)[:steps]


def band(axes: Axes, x: Any, runs: Any, **style: Any) -> None:
    """The mean of `runs` (runs × points) as a line, their range as a band."""
    runs = np.asarray(runs)
    (line,) = axes.plot(x, runs.mean(0), **style)
    axes.fill_between(
        x, runs.min(0), runs.max(0), color=line.get_color(), alpha=0.15, linewidth=0
    )


def spread(values: Any, form: str = ".1%") -> str:
    """Mean and range of some runs, as the tables show them; infinite: never reached."""
    if not np.isfinite(values).all():
        return f"reached by {np.isfinite(values).sum()} of {len(values)}"
    mean, low, high = (f(values) for f in (np.mean, np.min, np.max))
    return f"{mean:{form}} ({low:{form}} to {high:{form}})"


def report(
    args: Arguments, name: str, figure: Figure, table: list[list[str]], claim: tuple
) -> None:
    """Write the picture and the table; print the table, the claim its last line.

    `claim` is what is claimed and, by what was found (with its figures), whether that
    speaks for it.
    """
    args.output.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output / f"{name}.png", dpi=110)
    sentence, findings = verdict(*claim)
    sentence = "Too short to say: " * args.quick + sentence
    head, *rows = table
    lines = [f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows]]
    lines += ["", f"**{sentence}**", "", *(f"- {finding}" for finding in findings)]
    (args.output / f"{name}.md").write_text("\n".join(lines) + "\n")
    shown = Table(*head)
    for cells in rows:
        shown.add_row(*cells)
    print(f"Picture and table: {args.output / name}.png, .md")
    Console(width=110).print(shown)
    print(sentence, "; ".join(findings) + ".")


def verdict(claim: str, findings: dict[str, Any]) -> tuple[str, list[str]]:
    """The claim and whether all, some or none of the findings bear it out; these."""
    held = list(findings.values())
    word = "held" if all(held) else "held in part" if any(held) else "did not hold"
    answers = [f"{'yes' if h else 'no'}: {text}" for text, h in findings.items()]
    return f"Claim: {claim} It {word} here.", answers
