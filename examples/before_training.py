"""What enters each layer before training, and the gradients, as depth grows.

Bjorck et al., "Understanding Batch Normalization", 2018, arXiv:1806.02375: without it
activations grow with depth. Here 32 layers of 100 ReLUs, He's weights, 64 digits, 5
seeds. These weights were made so that plain layers do not grow; layers that add to what
enters them (skips), as in residual networks, do. With batch norm all variances are 1 by
construction. Gradients are shown as well for Yang et al., "A Mean Field Theory of Batch
Normalization", 2019, arXiv:1902.08129: they explode, with it, in plain deep networks.
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
VARIANCES, GRADIENTS = "last variance / first", "largest gradient / median"
EXPLOSION = "second gradient / last"


@jax.jit(static_argnames="skips")
@partial(jax.vmap, in_axes=(0, None, None))
def at_start(model: lab.Model, batch: lab.Digits, skips: bool) -> tuple[Array, ...]:
    """By layer mean², variance, gradient's norm; |gradients| of the middle kernel."""
    *_, z = lab.network(*model, batch.images, True, skips=skips)
    grads, _ = jax.grad(lab.loss, has_aux=True)(*model, batch, skips=skips)
    kernels = grads[1][0]  # all but the first layer's
    norms, middle = (kernels**2).sum((1, 2)) ** 0.5, kernels[DEPTH // 2 - 1]
    return (z.mean(1) ** 2).mean(-1), z.var(1).mean(-1), norms, abs(middle).ravel()


def measure(seeds: int, batch: lab.Digits) -> dict[tuple[str, bool], list[np.ndarray]]:
    """By kind of network and batch norm what `at_start` says, seeds first."""
    found = {}
    for kind in lab.progress([*LINES], "Networks"):
        for norm in NAME:
            models = lab.inits(seeds, norm, DEPTH)
            found[kind, norm] = [
                *map(np.asarray, at_start(models, batch, kind == "skips"))
            ]
    return found


def growth(var: np.ndarray) -> np.ndarray:
    """By seed, the variance of the last layer in units of the first's."""
    return var[:, -1] / var[:, 0]


def explosion(norms: np.ndarray) -> np.ndarray:
    """By seed, the gradient of the second kernel in units of the last's."""
    return norms[:, 0] / norms[:, -1]


def relative(gradients: np.ndarray) -> np.ndarray:
    """Those that are not 0, in units of their median."""
    alive = gradients[gradients > 0]
    return alive / np.median(alive)


def tail(gradients: np.ndarray) -> np.ndarray:
    """By seed, the largest in units of the median of those that are not 0."""
    return np.array([relative(g).max() for g in gradients])


def draw(found: dict) -> Figure:
    """Means, variances and gradients against depth; the histogram of gradients."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    layers, norms, histogram = figure.subplots(1, 3)
    at, bins = 1 + np.arange(DEPTH), np.geomspace(0.01, 100, 41)
    for (kind, norm), (mean2, var, sizes, gradients) in found.items():
        style = {"ls": LINES[kind], "color": COLOR[norm]}
        band(layers, at, var, label=f"{kind}, {NAME[norm]}", **style)
        if not norm:  # with batch norm the mean is 0
            red = style | {"color": "C3"}
            band(layers, at, mean2, label=f"{kind}, mean² instead", **red)
        band(norms, at[1:], sizes / sizes[:, -1:], **style)
        sizes = np.concatenate([relative(g) for g in gradients])
        counts, edges = np.histogram(sizes, bins, density=True)
        histogram.stairs(counts, edges, **style)
    layers.set(yscale="log", xlabel="layer", ylabel="variance of what enters a ReLU")
    norms.set(yscale="log", xlabel="layer", ylabel="|gradient of kernel| / the last's")
    histogram.set(xscale="log", yscale="log", xlabel="|gradient| / median")
    histogram.set(ylabel=f"density, kernel of layer {DEPTH // 2 + 1}")
    layers.legend(fontsize=7)
    return figure


def main() -> None:
    """Plain networks and those with skips; a table and a picture of them."""
    args, (_, train) = lab.arguments(__doc__), lab.digits()
    batch = lab.Digits(train.images[:64], train.labels[:64])
    found = measure(args.pick(1, 5, 50), batch)
    table, findings = [["network", "batch norm", VARIANCES, GRADIENTS, EXPLOSION]], {}
    for (kind, norm), (_, var, norms, gradients) in found.items():
        cells = growth(var), tail(gradients), explosion(norms)
        row = [kind, "yes" if norm else "no", *(lab.spread(c, ".3g") for c in cells)]
        table.append(row)
    for kind in LINES:
        for what, of, part in ((VARIANCES, growth, 1), (GRADIENTS, tail, 3)):
            a, b = (of(found[kind, norm][part]) for norm in NAME)
            text = f"{kind}: {what} {a.mean():.3g}, with batch norm {b.mean():.3g}"
            findings[text] = a.min() > b.max()
    claim = (
        "without batch norm activations grow with depth, gradients have heavier tails."
    )
    lab.report(args, "before_training", draw(found), table, (claim, findings))


if __name__ == "__main__":
    main()
