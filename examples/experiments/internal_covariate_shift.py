"""Train layers whose input distributions shift, with and without batch norm.

First, two layers that only shift their input, y = (x + a) + b, learn to move the ink of
digits by 1: each makes the whole correction, and together they overshoot.
Then section 4.1 of Ioffe and Szegedy, arXiv:1502.03167: three layers of 100 sigmoids on
binary digits, 60 images per step. The paper does not state rate and initialization;
here: plain SGD, weights N(0, 0.1²), baseline rate 0.05, 4,000 images, 5 seeds.
"""

from functools import partial

import _experiment as lab
import jax
import jax.numpy as jnp
import numpy as np
from _experiment import COLOR, NAME, spread
from jax import Array, lax, nn
from matplotlib.figure import Figure

import jaxbn

RATE, EVERY = 0.05, 100  # of the baseline; steps between observations
TIMES = {1: "-", 5: "--", 30: ":", 100: "-."}  # multiples of RATE: line style
PAPER = {1: "2.3", 5: "15", 30: "11", 100: ""}  # times fewer than 31.0e6 steps
SHIFTS = {0.4: ":", 0.8: "--", 1.1: "-"}  # rates for the two layers: line style
FATES = ["straight", "zigzags", "diverges"]  # expected at these rates
HEAD = ["Batch norm", "Learning rate", "Best test accuracy"]
HEAD += ["Steps to the best of the first row", "Times fewer steps"]
HEAD += [
    "Times fewer in the paper",
    "Shift of the median input, in spreads",
    "Correlation",
]
CLAIM = (
    "Layers that learn at the same time overshoot. With batch norm they do not, and "
    "their inputs keep still; larger learning rates help only with it, training takes "
    "fewer steps, and the best accuracy is higher."
)


def shifts(rate: float, x: Array, norm: bool) -> Array:
    """Return the mean of y for 12 steps; the target is x + 1, thus a mean of 1."""
    params, state = jaxbn.init(1, use_scale=False, use_bias=False)

    def loss(shift: Array) -> tuple[Array, Array]:
        h = x + shift[0]
        y = shift[1] + (jaxbn.batch_norm(params, state, h, True)[0] if norm else h)
        return ((y - (x + 1)) ** 2).mean() / 2, y.mean()

    def step(shift: Array, _: None) -> tuple[Array, Array]:
        grad, mean = jax.grad(loss, has_aux=True)(shift)
        return shift - rate * grad, mean

    return lax.scan(step, jnp.zeros(2), length=12)[1]


def fate(way: Array) -> str:
    """Classify a path to 1: diverges, zigzags (passes 1.2) or straight."""
    passes = "zigzags" if way.max() > 1.2 else "straight"
    return "diverges" if abs(way[-1] - 1) > 1 else passes


@jax.jit
@partial(jax.vmap, in_axes=(None, 0, None))
def observe(test: lab.Digits, model: lab.Model, _: Array) -> tuple[Array, ...]:
    """Return accuracy; percentiles and mean |correlation| of the last inputs."""
    z = lab.network(*model, test.images, False, activation=nn.sigmoid)[2][-1]
    pairs = jnp.corrcoef(z.T)[jnp.triu_indices(z.shape[1], 1)]
    right = lab.accuracy(model, test, activation=nn.sigmoid)
    return right, jnp.percentile(z, jnp.array([15, 50, 85]), 0), abs(pairs).mean()


def train(data: tuple, norm: bool, rate: float, rows: np.ndarray) -> list[np.ndarray]:
    """Train one arm, one seed per line of `rows`; return observations, runs × times."""
    models = lab.inits(len(rows), norm, depth=3, std=lambda n_in: 0.1)
    look = partial(observe, data[0])
    return lab.fit(models, data[1], rows, rate, look, EVERY, nn.sigmoid)


def drift(percentiles: np.ndarray) -> np.ndarray:
    """Return, per run, the range of a median in units of the 15% to 85% range."""
    low, median, high = np.moveaxis(percentiles, 2, 0)
    return (np.ptp(median, axis=1) / (high - low)[:, -1]).mean(1)


def draw(arms: dict, ways: dict) -> Figure:
    """Plot the zigzag, accuracies, and inputs of one sigmoid in both networks."""
    figure = Figure(figsize=(9, 9), layout="constrained")
    (zigzag, curves), units = figure.subplots(2, 2)
    for (norm, rate), way in ways.items():
        zigzag.plot(way, SHIFTS[rate], color=COLOR[norm], label=f"{rate}")
    for (norm, times), (accuracies, percentiles, _) in arms.items():
        steps = EVERY * np.arange(1, accuracies.shape[1] + 1)
        style = {"color": COLOR[norm], "linestyle": TIMES[times]}
        lab.band(curves, steps, accuracies, **style, label=f"{times * RATE:g}")
        if times == 1:
            title = f"{NAME[norm]}:\ninputs of a sigmoid, at 15, 50, 85%"
            units[int(norm)].plot(steps, percentiles[0, ..., 0], color=COLOR[norm])
            units[int(norm)].set(title=title, xlabel="step", ylim=(-2, 2))
    zigzag.set(ylim=(-1, 3), xlabel="step", title="Output of two layers (target: 1)")
    rates = "learning rate without, with batch norm"
    lab.legend_below(zigzag, title=rates, ncols=2)
    curves.set(xscale="log", ylim=(0.5, 1), xlabel="step", title="Test accuracy")
    lab.legend_below(curves, title=rates, ncols=2)
    return figure


def row(norm: bool, times: int, arm: list, steps: np.ndarray, fewer: float) -> list:
    """Format one row of the table."""
    accuracies, percentiles, correlation = arm
    cells = ["yes" if norm else "no", f"{times * RATE:g}", spread(accuracies.max(1))]
    cells += [spread(steps, ".0f"), f"{fewer:.1f}", PAPER[times] if norm else ""]
    last = drift(percentiles).mean(), correlation[:, -1].mean()
    return [*cells, *(f"{number:.2f}" for number in last)]


def claim(arms: dict, fewer: dict, ways: dict) -> tuple[str, dict]:
    """Return the claim, and the findings with whether each supports it."""
    raw, normed = ([fate(ways[norm, r]) for r in SHIFTS] for norm in NAME)
    moves = [drift(arms[norm, 1][1]).mean() for norm in NAME]
    best = [max(arms[n, t][0].max(1).mean() for t in TIMES) for n in NAME]
    alone, speed = ([fewer[norm, t] for t in (1, 5, 30)] for norm in NAME)
    paths = "the output of two layers took these paths at rates 0.4, 0.8 and 1.1"
    times = (
        "training took {:.1f}, {:.1f} and {:.1f} times fewer steps at learning rates "
        "of 0.05, 0.25 and 1.5."
    )
    moved = "shift of a sigmoid's median input in units of its spread"
    return CLAIM, {
        f"without batch norm, {paths}: {', '.join(raw)}.": raw == FATES,
        f"with batch norm, {paths}: {', '.join(normed)}.": set(normed) == {"straight"},
        lab.versus(moved, *moves, form=".2f"): moves[1] < moves[0],
        f"with batch norm, {times.format(*speed)}": min(speed) > 1,
        f"without batch norm, {times.format(*alone)}": max(alone) <= 1,
        lab.versus("accuracy at the best rate", *best, form=".1%"): best[1] > best[0],
    }


def main() -> None:
    """Train all arms; write a table and a picture."""
    args = lab.arguments(__doc__)
    data = lab.digits(lambda pixels: (pixels > 0.5).astype(np.float32))
    ink = nn.standardize(data[1].images.sum(1, keepdims=True), axis=0)
    ways = {(norm, r): shifts(r, ink, norm) for norm in NAME for r in SHIFTS}
    steps = args.pick(200, 5000, 50000)
    rows = np.stack([lab.draw_rows(seed, steps, 60) for seed in range(5)])
    keys = lab.progress([(norm, times) for norm in NAME for times in TIMES], "Sigmoids")
    arms = {(n, t): train(data, n, t * RATE, rows) for n, t in keys}
    goals = arms[False, 1][0].max(1)[:, None]
    reached = {a: EVERY * lab.reached(of[0], goals) for a, of in arms.items()}
    fewer = {arm: (reached[False, 1] / there).mean() for arm, there in reached.items()}
    table = [HEAD, *(row(*a, seen, reached[a], fewer[a]) for a, seen in arms.items())]
    result = draw(arms, ways), table, claim(arms, fewer, ways)
    lab.report(args, "internal_covariate_shift", *result)


if __name__ == "__main__":
    main()
