"""Measure the noise of batch statistics, and compare statistics for inference.

A network of 3 × 100 ReLUs, SGD at rate 0.1, 16 epochs (--full: 64), 5 seeds: not tuned.
small_batches.py measures how small batches change the accuracy.

1. Batches of 64: running statistics and population statistics (an epoch of fresh
   batches with the current weights) versus the truth, all training images as one batch.
   Errors are |mean - mean*| / std* and |ln(var / var*)|, averaged over features.
2. After training, batches of m random images: the standard deviation of a layer's mean
   and variance, and of y for one image, in units of std*, var*, and the std of y.
   Theory: proportional to 1/√m; for the variance and y only if m is large.
"""

from typing import Any

import _experiment as lab
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from matplotlib.figure import Figure

import jaxbn

MOMENTA = {"momentum 0.9": 0.9, "momentum 0.99": 0.99, "all steps alike": None}
ESTIMATES = (*MOMENTA, "population")
NOISES = "mean, first layer", "variance, first layer", "y, first layer", "y, last layer"
SIZES = (2, 4, 8, 16, 64, 256)
CLAIM = (
    "The statistics of a batch are noisy, in proportion to 1/√m, and population "
    "statistics serve inference better than running statistics."
)


def by_layer(state: tuple) -> jaxbn.BatchNormState:
    """Stack the statistics of all layers, depth × width."""
    return jax.tree.map(lambda one, rest: jnp.concatenate([one[None], rest]), *state)


def errors(state: tuple, truth: tuple) -> Array:
    """Average |mean - mean*| / std* and |ln(var / var*)| over layers and features."""
    stats, true = by_layer(state), by_layer(truth)
    mean, ratio = (stats.mean - true.mean) / true.var**0.5, stats.var / true.var
    return jnp.abs(jnp.stack([mean, jnp.log(ratio)])).mean((1, 2))


@jax.jit
def follow(model: lab.Model, train: lab.Digits, chunks: Array, fresh: Array) -> tuple:
    """Train on `chunks` × steps × 64; return the model and errors by `ESTIMATES`."""

    def chunk(models: list, rows: Array) -> tuple[list, Array]:
        # The weights stay equal: running statistics have no effect in training.
        each = zip(models, MOMENTA.values(), strict=True)
        models = [lab.sgd(m, train, rows, 0.1, momentum=k)[0] for m, k in each]
        params, state = models[0]
        _, truth, _ = lab.network(params, state, train.images, True, momentum=0.0)
        # At rate 0 the weights stay: E(mean_B) and m/(m-1) E(var_B) of fresh batches.
        empty = params, jax.tree.map(jnp.zeros_like, state)
        population, _ = lab.sgd(empty, train, fresh, 0.0, momentum=None)
        return models, jnp.stack([errors(m[1], truth) for m in (*models, population)])

    models, found = lax.scan(chunk, [model] * len(MOMENTA), chunks)
    return models[0], found


@jax.jit
def noise(model: lab.Model, train: lab.Digits, image: Array, rows: Array) -> Array:
    """Return the four `NOISES` over batches × m, and the biased E(var_B) / var*."""

    def measure(x: Array) -> tuple[Array, Array, Array]:
        _, state, y = lab.network(*model, x, True, momentum=0.0, unbiased=False)
        return by_layer(state).mean, by_layer(state).var, y

    def of_batch(rows: Array) -> tuple[Array, Array, Array]:
        x = train.images[rows]
        return *measure(x)[:2], measure(x.at[0].set(image))[2][:, 0]

    batches, (_, true, y) = lax.map(of_batch, rows), measure(train.images)
    units = true**0.5, true, y.std(1)
    mean, var, y = ((b.std(0) / u).mean(1) for b, u in zip(batches, units, strict=True))
    return jnp.stack([mean[0], var[0], y[0], y[-1], (batches[1] / true)[:, 0].mean()])


def draw(tracks: np.ndarray, noises: np.ndarray) -> Figure:
    """Plot noise by m, and errors of the statistics during training."""
    figure = Figure(figsize=(9, 9), layout="constrained")
    panels = figure.subplot_mosaic("AA;BC")
    by_size, *by_time = panels.values()
    for k, name in enumerate(NOISES):
        lab.band(by_size, SIZES, noises[:, :, k], marker=".", label=name)
    by_size.plot(SIZES, np.power(SIZES, -0.5), ":", color="0.6", label="1/√m")
    by_size.set_xscale("log", base=2)
    by_size.set(yscale="log", xlabel="images m", title="Noise over batches")
    for i, what in enumerate(("mean", "variance")):
        axes, percent = by_time[i], np.arange(5, 101, 5)
        for k, name in enumerate(ESTIMATES):
            lab.band(axes, percent, tracks[:, :, k, i], marker=".", label=name)
        axes.set(yscale="log", xlabel="% of training", title=f"Error of the {what}")
    by_size.legend()
    figure.legend(handles=by_time[0].lines, loc="outside lower center", ncols=4)
    return figure


def judge(tracks: np.ndarray, noises: np.ndarray) -> dict[str, Any]:
    """Return the findings, with their figures, and whether each supports the claim."""
    logs = np.log(noises.mean(0)[-3:, :4])
    powers, _ = np.polyfit(np.log(SIZES[-3:]), logs, 1)
    exponents = ", ".join(f"{power:.2f}" for power in powers)
    nearer = (tracks[:, :, 3:] < tracks[:, :, :3]).mean()
    ends = zip(ESTIMATES, tracks[:, -1].mean(0), strict=True)
    end = "; ".join(f"{name}, {mean:.1%} and {var:.1%}" for name, (mean, var) in ends)
    ratio, theory = noises[:, 0, 4].mean(), 1 - 1 / SIZES[0]
    return {
        f"from {SIZES[-3]} images on, the four kinds of noise were proportional to m "
        f"to the power of {exponents}.": abs(powers + 0.5).max() < 0.05,
        f"the mean variance of batches of {SIZES[0]} images was {ratio:.2f} of the "
        f"true variance, versus {theory:.2f} in theory.": abs(ratio - theory) < 0.05,
        f"population statistics were nearer the truth in {nearer:.0%} of comparisons. "
        f"The last errors of mean and variance were: {end}.": nearer > 0.95,
    }


def main() -> None:
    """Train and measure for each seed; write a table and a picture."""
    args, data = lab.arguments(__doc__), lab.digits()
    runs, every = args.pick((1, 2), (5, 50), (5, 200))
    rng, tracks, noises = np.random.default_rng(0), [], []
    for seed in lab.progress(range(runs), "Seeds"):
        start = jax.jit(lambda key: lab.init(key, True, 3))(jax.random.key(seed))
        chunks = lab.draw_rows(seed, 20 * every, 64).reshape(20, every, 64)
        model, found = follow(start, data[1], chunks, lab.draw_rows(100 + seed, 62, 64))
        tracks.append(found)
        batches = [rng.integers(4000, size=(200, m)) for m in SIZES]
        noises.append([noise(model, data[1], data[0].images[0], b) for b in batches])
    arrays = _, noises = np.array(tracks), np.array(noises)
    head = ["Images m", *(f"Noise: {name}" for name in NOISES)]
    table = [[*head, "Mean batch variance / true variance"]]
    for m, n in zip(SIZES, noises.mean(0), strict=True):
        table.append([str(m), *(f"{std:.0%}" for std in n[:4]), f"{n[4]:.3f}"])
    claims = CLAIM, judge(*arrays)
    lab.report(args, "batch_noise_and_population", draw(*arrays), table, claims)


if __name__ == "__main__":
    main()
