"""Probe the loss along its gradient: without batch norm, with it, and with added noise.

After Figure 4 of Santurkar et al., "How Does Batch Normalization Help Optimization?",
2018, arXiv:1805.11604, which trains VGG on CIFAR-10; here: SGD on 4,000 digits. Noise
after batch norm, with a new distribution at each step, restores covariate shift; its
size is chosen here. All train at the rate of RATES that is best without batch norm
(--full). If the smoothness exceeds 2 / rate, descent on a quadratic diverges.
"""

from itertools import product

import _experiment as lab
import jax
import jax.numpy as jnp
import numpy as np
from _experiment import COLOR, NAME
from jax import Array
from jax.flatten_util import ravel_pytree
from matplotlib.figure import Figure

DEPTH, WIDTH, BATCH, EVERY = 8, 100, 128, 5  # steps between probes
LENGTHS = np.geomspace(0.5, 4, 8).tolist()  # of a probe, in rates
RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
ARMS = {NAME[False]: (False, False), NAME[True]: (True, False), "noisy": (True, True)}
CLAIM = (
    "Batch norm at least halves the changes of loss and gradient along a step, and not "
    "by keeping distributions stable: with noise that shifts them, it trains as well."
)
LANDSCAPE = ("range of loss", "predictiveness", "smoothness")
SHIFTS = ("shift of means", "shift of log std")
MEASURES = {
    "training loss": "Training loss at the end",
    "test accuracy": "Test accuracy at the end",
    "range of loss": "Range of the loss along a step",
    "predictiveness": "Largest change of the gradient along a step",
    "smoothness": "Steepest change of the gradient along a step",
    "shift of means": "Shift of a layer's means per step",
    "shift of log std": "Shift of a layer's log deviations per step",
}
TITLES = {
    "losses": "Loss along the gradient:\nlowest to highest",
    "changes": "Gradient predictiveness |g(y) - g(x)|:\nleast to most",
    "smoothness": "Effective smoothness:\nmax |g(y) - g(x)| / |y - x|",
    "shift of means": "Means of a middle layer:\nmoved by a step, in std",
}
gradient = jax.jit(jax.value_and_grad(lab.loss, has_aux=True))
loss, accuracy = map(jax.jit, (lab.loss, lab.accuracy))


@jax.jit
def draw_noise(key: Array, step: int) -> Array:
    """Draw N(m, s²) per image; m ~ U(-1/2, 1/2), s ~ U(0, 1/2) by layer and unit."""
    of_units, of_images = jax.random.split(jax.random.fold_in(key, step))
    m, s = jax.random.uniform(of_units, (2, DEPTH, 1, WIDTH))
    return m - 1 / 2 + s / 2 * jax.random.normal(of_images, (DEPTH, BATCH, WIDTH))


@jax.jit
def descend(x: tuple, g: tuple, rate: float) -> tuple:
    """Return x - rate · g, where x holds all parameters."""
    return jax.tree.map(lambda x, g: x - rate * g, x, g)


@jax.jit
def distance(x: tuple, y: tuple) -> Array:
    """Return |x - y|, over all parameters."""
    return jnp.linalg.norm(ravel_pytree(x)[0] - ravel_pytree(y)[0])


def probe(model: lab.Model, g: tuple, batch: lab.Digits, rate: float, **noise) -> dict:
    """Return L(y), |g(y) - g(x)| and max |g(y) - g(x)| / |y - x| on the same batch."""
    points = []
    for length in LENGTHS:
        y = descend(model[0], g, length * rate)
        (cost, _), g_y = gradient(y, model[1], batch, **noise)
        points.append((cost, distance(g_y, g), distance(y, model[0])))
    losses, changes, ways = map(np.array, zip(*points, strict=True))
    found = losses, changes, np.ptp(losses), changes.max(), (changes / ways).max()
    return dict(zip(("losses", "changes", *LANDSCAPE), found, strict=True))


@jax.jit
def shift(images: Array, *models: tuple[lab.Model, Array | None]) -> dict:
    """Average |Δ mean| / std and |Δ log std| over the inputs of a middle layer."""
    z = [lab.network(*m, images, True, noise=n)[2][DEPTH // 2] for m, n in models]
    (mean, std), (new_mean, new_std) = [(of.mean(0), of.std(0)) for of in z]
    moves = abs(new_mean - mean) / std, abs(jnp.log(new_std / std))
    return {name: move.mean() for name, move in zip(SHIFTS, moves, strict=True)}


def train(data: tuple, seed: int, rate: float, arm: str, steps: int) -> dict:
    """Train once; return the probes, and the final loss and accuracy without noise."""
    key, (test, digits), (norm, noisy) = jax.random.key(seed), data, ARMS[arm]
    model, seen = lab.init(key, norm, DEPTH, WIDTH), []
    for step, rows in enumerate(lab.draw_rows(seed, steps, BATCH)):
        batch = lab.Digits(digits.images[rows], digits.labels[rows])
        now, then = (draw_noise(key, step + i) if noisy else None for i in (0, 1))
        (_, state), g = gradient(*model, batch, noise=now)
        new = descend(model[0], g, rate), state
        if step % EVERY == 0:
            moves = shift(batch.images, (model, now), (new, then))
            seen.append(probe(model, g, batch, rate, noise=now) | moves)
        model = new
    ends = {"training loss": loss(*model, digits)[0]}
    ends["test accuracy"] = accuracy(model, test)
    return jax.tree.map(lambda *a: np.stack(a), *seen) | ends


def draw(runs: dict, rate: float) -> Figure:
    """Plot loss and gradient along the probes, smoothness and shifts by step."""
    figure = Figure(figsize=(9, 8), layout="constrained")
    panels = dict(zip(TITLES, figure.subplots(2, 2).flat, strict=True))
    for name, axes in panels.items():
        for arm, color in zip(ARMS, (*COLOR.values(), "black"), strict=True):
            values = np.stack([run[name] for run in runs[rate, arm]])
            values = values if values.ndim == 2 else np.median(values, 0).T  # points
            steps = EVERY * np.arange(values.shape[1])
            lab.band(axes, steps, values, color=color, label=arm)
        axes.set(yscale="log", xlabel="step", title=TITLES[name])
    axes = panels["smoothness"]
    axes.axhline(2 / rate, color="0.4", ls=":", label="2 / rate")
    axes.set(yscale="linear", ylim=0)
    figure.legend(handles=axes.lines, loc="outside lower center", ncols=4)
    return figure


def claim(arms: list[dict]) -> tuple[str, dict]:
    """Return the paper's claim, and the findings with whether each supports it."""
    a, b, c = ({name: values.mean() for name, values in arm.items()} for arm in arms)
    better = arms[2]["training loss"] < arms[0]["training loss"]
    found = {lab.versus(MEASURES[n], a[n], b[n]): b[n] < a[n] / 2 for n in LANDSCAPE}
    noisy = {n: lab.versus(MEASURES[n], a[n], c[n]) for n in SHIFTS}
    found |= {f"with noise, {text}": c[n] > a[n] for n, text in noisy.items()}
    right, other = c["test accuracy"], b["test accuracy"]
    same = f"with noise, test accuracy was {right:.1%}, versus {other:.1%} without it."
    less = "with noise, training loss was lower than without batch norm in "
    found[same] = right > other - 0.01
    found[f"{less}{better.sum()} of {better.size} runs."] = better.mean() > 0.5
    return CLAIM, found


def main() -> None:
    """Train all arms; write a table and a picture."""
    args, data = lab.arguments(__doc__), lab.digits()
    rates, seeds, steps = args.pick(((0.1,), 1, 20), ((0.1,), 5, 500), (RATES, 5, 500))
    runs = {at: [] for at in product(rates, ARMS)}
    for (rate, arm), seed in lab.progress([*product(runs, range(seeds))], "Training"):
        runs[rate, arm].append(train(data, seed, rate, arm, steps))
    sums = {
        at: jax.tree.map(lambda *by_seed: np.array([*map(np.median, by_seed)]), *some)
        for at, some in runs.items()
    }
    table = [["Rate", "Median over training", *NAME.values(), "and with noise"]]
    for rate, name in product(rates, MEASURES):
        form = ".1%" if name == "test accuracy" else ".3g"
        cells = [lab.spread(sums[rate, arm][name], form) for arm in ARMS]
        table.append([f"{rate:g}", MEASURES[name], *cells])
    losses = [np.median(sums[rate, NAME[False]]["training loss"]) for rate in rates]
    best = rates[np.nanargmin(losses)]
    found = claim([sums[best, arm] for arm in ARMS])
    lab.report(args, "loss_landscape", draw(runs, best), table, found)


if __name__ == "__main__":
    main()
