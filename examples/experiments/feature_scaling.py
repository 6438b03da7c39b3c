"""Compare learning rates for two features whose scales differ by a factor of 20.

A linear model recognizes the digit one from two features: its width in pixels, and its
correlation with itself upside down. Full-batch gradient descent on the squared error
starts at 0, once on raw features and once after batch norm. The bias is optimal at
every step, so that the loss has two parameters and can be drawn.
"""

import jax
import jax.numpy as jnp
import numpy as np
from _experiment import COLOR, NAME, arguments, digits, legend_below, report
from jax import Array, lax
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import jaxbn

PENALTY = 0.1
ROWS = (
    "Standard deviations of the two features",
    "Correlation of the two features",
    "Condition number of the loss",
    "Largest learning rate that converges",
    "Learning rates that come within 1% of the best loss",
    f"Share of each weight left by a penalty of {PENALTY / 2:g}·w²",
)
CLAIM = (
    "With unbalanced features no learning rate suits both weights, and a penalty "
    "shrinks them unequally; with normalized features many rates do, and it shrinks "
    "both alike."
)
Data = tuple[Array, Array]  # features and target


def features(images: np.ndarray) -> Array:
    """Return width in pixels, and correlation with the image turned by 180°."""
    width = (images.reshape(-1, 28, 28) > 0.5).any(1).sum(1)
    pixels = images - images.mean(1, keepdims=True)
    symmetry = (pixels * pixels[:, ::-1]).sum(1) / (pixels**2).sum(1)
    return jnp.stack([width, symmetry], 1)


def scaled(x: Array, norm: bool) -> Array:
    """Return the features, normalized if `norm`."""
    params, state = jaxbn.init(2, use_scale=False, use_bias=False)
    return jaxbn.batch_norm(params, state, x, train=True)[0] if norm else x


def loss(w: Array, x: Array, target: Array, norm: bool, penalty: float = 0.0) -> Array:
    """Compute ½ Var(target - w·x), the error with the best bias, + ½ penalty |w|²."""
    return (target - scaled(x, norm) @ w).var() / 2 + penalty * (w**2).sum() / 2


def descend(rate: Array | float, data: Data, norm: bool, steps: int) -> Array:
    """Return the weights before each step and after the last, steps + 1 × 2."""

    def step(w: Array, _: None) -> tuple[Array, Array]:
        return w - rate * jax.grad(loss)(w, *data, norm), w

    w, path = lax.scan(step, jnp.zeros(2), length=steps)
    return jnp.concatenate([path, w[None]])


def minimum(data: Data, norm: bool, penalty: float = 0.0) -> tuple[Array, Array]:
    """Return the best weights, by one Newton step, and the curvature."""
    at = jnp.zeros(2), *data, norm, penalty
    curvature = jax.hessian(loss)(*at)
    return -jnp.linalg.solve(curvature, jax.grad(loss)(*at)), curvature


def remaining(ws: Array, data: Data, norm: bool) -> Array:
    """Return the remaining share of the gain: 1 at w = 0, 0 at the best weights."""
    best, _ = minimum(data, norm)
    ws = jnp.concatenate([jnp.stack([0 * best, best]), ws])
    first, least, *_ = losses = jax.vmap(lambda w: loss(w, *data, norm))(ws)
    return (losses[2:] - least) / (first - least)


def measure(data: Data, norm: bool, rates: Array, steps: int) -> dict:
    """Return the numbers of one arm for the table and the picture."""
    (best, curvature), x = minimum(data, norm), scaled(data[0], norm)
    last = jax.vmap(lambda rate: descend(rate, data, norm, steps)[-1])(rates)
    left, kept = remaining(last, data, norm), minimum(data, norm, PENALTY)[0] / best
    found = {"best": best, "left": left, "good": rates[left < 0.01], "kept": kept}
    found["limit"] = 2 / jnp.linalg.eigvalsh(curvature)[-1]
    found["condition"] = jnp.linalg.cond(curvature)
    return found | {"std": x.std(0), "correlation": jnp.corrcoef(x.T)[0, 1]}


def draw_paths(axes: Axes, data: Data, norm: bool, arm: dict, steps: int = 30) -> None:
    """Plot the loss and paths at three rates, fractions of the largest stable rate."""
    best, size = np.asarray(arm["best"]), 1.3 * np.abs(arm["best"]).max()
    x, y = (np.linspace(c - size, c + size, 200) for c in best / 2)
    ws = jnp.stack(np.meshgrid(x, y), -1).reshape(-1, 2)
    height = remaining(ws, data, norm).reshape(200, 200)
    axes.contour(x, y, height, np.geomspace(0.01, 1000, 11), colors="0.8")
    for share, color in ((1.03, "C2"), (0.97, "C3"), (0.5, "C0")):
        path = descend(share * arm["limit"], data, norm, steps)
        label = f"{share * arm['limit']:.3f}, {share:.0%} of the largest"
        axes.plot(*path.T, ".-", color=color, markersize=4, linewidth=0.8, label=label)
    axes.plot(*best, "k*")
    axes.set(xlim=x[[0, -1]], ylim=y[[0, -1]], aspect="equal", title=NAME[norm])
    axes.set(xlabel="weight of the width", ylabel="weight of the symmetry")
    legend_below(axes, title=f"learning rate, {steps} steps")


def draw(data: Data, arms: dict, rates: Array, steps: int) -> Figure:
    """Plot contours and paths of both arms, and the remaining gain by rate."""
    figure = Figure(figsize=(9, 9.5), layout="constrained")
    *paths, axes = figure.subplot_mosaic("AB;CC", height_ratios=(1.6, 1)).values()
    for panel, (norm, arm) in zip(paths, arms.items(), strict=True):
        draw_paths(panel, data, norm, arm)
        axes.loglog(rates, arm["left"], color=COLOR[norm], label=NAME[norm])
    axes.axhline(0.01, color="0.6", linestyle=":")
    axes.set(ylim=(1e-5, 10), xlabel="learning rate", ylabel="share")
    axes.set_title(f"Share of the possible gain that is left after {steps} steps")
    axes.legend(loc="lower left")
    return figure


def column(arm: dict) -> list[str]:
    """Format the numbers of one arm, in the order of `ROWS`."""
    good, std, kept = arm["good"], arm["std"], arm["kept"]
    rates = f"{good[0]:.2g} to {good[-1]:.2g}" if len(good) else "none"
    numbers = (f"{arm[name]:.3g}" for name in ("correlation", "condition", "limit"))
    stds, kept = f"{std[0]:.3g} and {std[1]:.3g}", f"{kept[0]:.0%} and {kept[1]:.0%}"
    return [stds, *numbers, rates, kept]


def main() -> None:
    """Measure both arms; write a table and a picture."""
    args = arguments(__doc__)
    _, train = digits()
    data = features(np.asarray(train.images)), (train.labels == 1) * 1.0
    steps, rates = args.pick(100, 100, 1000), jnp.geomspace(1e-4, 10, 400)
    arms = {norm: measure(data, norm, rates, steps) for norm in NAME}
    raw, normed = columns = [column(arm) for arm in arms.values()]
    table = [["", *NAME.values()], *map(list, zip(ROWS, *columns, strict=True))]
    good, alike = arms[True]["good"], [np.ptp(a["kept"]) < 0.05 for a in arms.values()]
    many = len(good) > 0 and good[-1] > 10 * good[0]
    near = f"these learning rates came within 1% of the best loss in {steps} steps"
    findings = {
        f"without batch norm, {near}: {raw[4]}.": raw[4] == "none",
        f"with batch norm, {near}: {normed[4]}.": many,
        f"without batch norm, a penalty left {raw[5]} of the weights.": not alike[0],
        f"with batch norm, a penalty left {normed[5]} of the weights.": alike[1],
    }
    figure = draw(data, arms, rates, steps)
    report(args, "feature_scaling", figure, table, (CLAIM, findings))


if __name__ == "__main__":
    main()
