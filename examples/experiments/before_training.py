"""Measure activations and gradients before training, by depth.

Bjorck et al., "Understanding Batch Normalization", 2018, arXiv:1806.02375: activations
grow with depth without batch norm. Here: 32 layers of 100 ReLUs, He's weights, 64
digits, 5 seeds. He's weights keep activations of plain layers from growing; with skip
connections, as in residual networks, they grow. Batch norm sets all variances to 1.
Yang et al., "A Mean Field Theory of Batch Normalization", 2019, arXiv:1902.08129:
gradients explode in plain deep networks with batch norm.
"""

from functools import partial

import _experiment as lab
import jax
import numpy as np
from _experiment import COLOR, NAME, band
from jax import Array
from matplotlib.figure import Figure

DEPTH = 32
LINES = {"plain": ":", "skips": "-"}
KINDS = {"plain": "in plain networks", "skips": "in networks with skips"}
VARIANCES = "Ratio of the last layer's variance to the first's"
GRADIENTS = "Ratio of the largest gradient to the median"
EXPLOSION = "Ratio of the second layer's gradient to the last's"
CLAIM = (
    "Without batch norm, activations grow with depth, and the gradients of a layer "
    "have heavier tails."
)


@jax.jit(static_argnames="skips")
@partial(jax.vmap, in_axes=(0, None, None))
def at_start(model: lab.Model, batch: lab.Digits, skips: bool) -> tuple[Array, ...]:
    """Return mean², variance and gradient norm by layer; |gradients| of one kernel."""
    *_, z = lab.network(*model, batch.images, True, skips=skips)
    grads, _ = jax.grad(lab.loss, has_aux=True)(*model, batch, skips=skips)
    kernels = grads[1][0]  # all but the first layer's
    norms, middle = (kernels**2).sum((1, 2)) ** 0.5, kernels[DEPTH // 2 - 1]
    return (z.mean(1) ** 2).mean(-1), z.var(1).mean(-1), norms, abs(middle).ravel()


def measure(seeds: int, batch: lab.Digits) -> dict[tuple[str, bool], list[np.ndarray]]:
    """Apply `at_start` to each kind of network, with and without batch norm."""
    found = {}
    for kind in lab.progress([*LINES], "Networks"):
        for norm in NAME:
            models = lab.inits(seeds, norm, DEPTH)
            found[kind, norm] = [
                *map(np.asarray, at_start(models, batch, kind == "skips"))
            ]
    return found


def growth(var: np.ndarray) -> np.ndarray:
    """Return, per seed, the variance of the last layer divided by the first."""
    return var[:, -1] / var[:, 0]


def explosion(norms: np.ndarray) -> np.ndarray:
    """Return, per seed, the gradient norm of the second kernel divided by the last."""
    return norms[:, 0] / norms[:, -1]


def relative(gradients: np.ndarray) -> np.ndarray:
    """Return the nonzero gradients divided by their median."""
    alive = gradients[gradients > 0]
    return alive / np.median(alive)


def tail(gradients: np.ndarray) -> np.ndarray:
    """Return, per seed, the largest gradient divided by the median of nonzero ones."""
    return np.array([relative(g).max() for g in gradients])


def draw(found: dict) -> Figure:
    """Plot means, variances and gradients by depth, and a histogram of gradients."""
    figure = Figure(figsize=(9, 8), layout="constrained")
    panels = figure.subplot_mosaic("AB;CL")
    layers, norms, histogram, key = panels.values()
    at, bins = 1 + np.arange(DEPTH), np.geomspace(0.01, 100, 41)
    for (kind, norm), (mean2, var, sizes, gradients) in found.items():
        style = {"ls": LINES[kind], "color": COLOR[norm]}
        band(layers, at, var, label=f"{kind}, {NAME[norm]}", **style)
        if not norm:  # with batch norm the mean is 0
            black = style | {"color": "black"}
            band(layers, at, mean2, label=f"{kind}, mean² instead", **black)
        band(norms, at[1:], sizes / sizes[:, -1:], **style)
        sizes = np.concatenate([relative(g) for g in gradients])
        counts, edges = np.histogram(sizes, bins, density=True)
        histogram.stairs(counts, edges, ls=LINES[kind], color=COLOR[norm])
    layers.set(yscale="log", xlabel="layer", title="Variance of a ReLU's input")
    norms.set(yscale="log", xlabel="layer", title="|gradient of kernel| / the last's")
    histogram.set(xscale="log", yscale="log", xlabel="|gradient| / median")
    histogram.set(title=f"Density of gradients, layer {DEPTH // 2 + 1}")
    key.legend(*layers.get_legend_handles_labels(), loc="center")
    key.set_axis_off()
    return figure


def main() -> None:
    """Measure networks with and without skips; write a table and a picture."""
    args, (_, train) = lab.arguments(__doc__), lab.digits()
    batch = lab.Digits(train.images[:64], train.labels[:64])
    found = measure(args.pick(1, 5, 50), batch)
    table, findings = [["Network", "Batch norm", VARIANCES, GRADIENTS, EXPLOSION]], {}
    for (kind, norm), (_, var, norms, gradients) in found.items():
        cells = growth(var), tail(gradients), explosion(norms)
        row = [kind, "yes" if norm else "no", *(lab.spread(c, ".3g") for c in cells)]
        table.append(row)
    for kind, where in KINDS.items():
        for quantity, of, part in ((VARIANCES, growth, 1), (GRADIENTS, tail, 3)):
            a, b = (of(found[kind, norm][part]) for norm in NAME)
            findings[f"{where}, {lab.versus(quantity, a, b)}"] = a.min() > b.max()
    lab.report(args, "before_training", draw(found), table, (CLAIM, findings))


if __name__ == "__main__":
    main()
