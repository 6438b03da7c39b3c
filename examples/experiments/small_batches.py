"""Train with statistics of fewer images, at the same number of images per gradient.

A network of 3 × 100 ReLUs, SGD at rate 0.1, 200 steps (--full: 1000), 5 seeds: not
tuned. Each gradient averages 256 images, but only groups of m share statistics, as on
256/m devices, with averaged running statistics; or all groups are synchronized.
"""

from typing import Any

import _experiment as lab
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from matplotlib.figure import Figure

CLAIM = (
    "The more images share statistics, the better. Small groups need the factor "
    "m/(m-1), and train worse in spite of it; synchronized, they lose nothing."
)
KINDS = "running statistics", "biased variances", "statistics of all images"


@jax.jit(static_argnames="axis_name")
def fit(data: tuple, model: lab.Model, rows: Array, axis_name: Any = None) -> Array:
    """Train on `rows`, steps × groups × m; return accuracies by `KINDS` and two losses.

    Each group takes its own SGD step. The average of the resulting models equals one
    step along the gradient of the mean loss. The losses are the second and the last.
    """
    (test, train), (_, groups, m) = data, rows.shape
    sharing = m * groups if axis_name else m

    def step(model: lab.Model, rows: Array) -> tuple[lab.Model, Array]:
        def of_group(rows: Array) -> tuple[lab.Model, Array]:
            return lab.sgd(model, train, rows[None], 0.1, axis_name=axis_name)

        models, costs = jax.vmap(of_group, axis_name="groups")(rows)
        return jax.tree.map(lambda a: a.mean(0).astype(a.dtype), models), costs.mean()

    (params, running), costs = lax.scan(step, model, rows)
    _, whole, _ = lab.network(params, running, train.images, True, momentum=0.0)
    share = (sharing - 1) / sharing
    biased = tuple(stats._replace(var=share * stats.var) for stats in running)
    states = jax.tree.map(lambda *a: jnp.stack(a), running, biased, whole)
    accuracies = jax.vmap(lambda state: lab.accuracy((params, state), test))(states)
    return jnp.append(accuracies, jnp.stack([costs[1], costs[-20:].mean()]))


def draw(sizes: tuple, fits: np.ndarray) -> Figure:
    """Plot test errors by the number of images that share statistics."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for k, name in enumerate(KINDS):
        lab.band(axes, sizes, 1 - fits[:, :-1, k], marker=".", label=name)
    axes.axhline(1 - fits[:, -1, 0].mean(), color="0.4", ls=":", label="synchronized")
    axes.set(yscale="log", xlabel="images that share statistics", title="Test error")
    axes.set_xscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.yaxis.set_minor_formatter("{x:.0%}")
    axes.legend()
    return figure


def judge(sizes: tuple, fits: np.ndarray) -> dict[str, Any]:
    """Return the findings, with their figures, and whether each supports the claim."""
    small, large = sizes[0], sizes[-1]
    *by_size, synced = fits[..., 0].mean(0)
    low, biased, whole, _, last = fits[:, 0].mean(0)
    best, apart = np.argmax(by_size), np.ptp(fits[:, -2:, 3], 1).max()
    last_of_large = fits[:, -2, 4].mean()
    return {
        f"groups of {small} reached {low:.1%} accuracy, versus {by_size[-1]:.1%} for "
        f"groups of {large}.": fits[:, 0, 0].max() < fits[:, -2, 0].min(),
        f"groups of {sizes[best]} reached the best accuracy, {by_size[best]:.1%}.": (
            sizes[best] == large
        ),
        f"without the factor m/(m-1), groups of {small} reached {biased:.1%}, versus "
        f"{low:.1%} with it.": fits[:, 0, 1].max() < fits[:, 0, 0].min(),
        f"the training loss of groups of {small} ended at {last:.2f}, versus "
        f"{last_of_large:.2f} for groups of {large}; with the statistics of all "
        f"images at evaluation, their accuracy was {whole:.1%}.": (
            last > 2 * last_of_large and whole < (low + by_size[-1]) / 2
        ),
        f"synchronized, groups of {small} reached {synced:.1%}, versus "
        f"{by_size[-1]:.1%} for groups of {large}; after one step the losses differed "
        f"by {apart:.0e}.": (abs(synced - by_size[-1]) < 0.005 and apart < 1e-5),
    }


def main() -> None:
    """Train with all group sizes; write a table and a picture."""
    args, data = lab.arguments(__doc__), lab.digits()
    runs, steps = args.pick((1, 10), (5, 200), (5, 1000))
    sizes, fits = (2, 256) if args.quick else (2, 4, 8, 16, 64, 256), []
    for seed in lab.progress(range(runs), "Seeds"):
        start = jax.jit(lambda key: lab.init(key, True, 3))(jax.random.key(seed))
        rows = lab.draw_rows(seed, steps, 256)
        groups = [rows.reshape(steps, -1, m) for m in sizes]
        alone = [fit(data, start, some) for some in groups]
        fits.append([*alone, fit(data, start, groups[0], "groups")])
    fits, names = np.array(fits), [*map(str, sizes), f"{sizes[0]}, synchronized"]
    head = "Images that share statistics"
    table = [[head, *(f"Test accuracy with {kind}" for kind in KINDS)]]
    for i, name in enumerate(names):
        table.append([name, *(lab.spread(fits[:, i, k]) for k in range(len(KINDS)))])
    lab.report(
        args, "small_batches", draw(sizes, fits), table, (CLAIM, judge(sizes, fits))
    )


if __name__ == "__main__":
    main()
