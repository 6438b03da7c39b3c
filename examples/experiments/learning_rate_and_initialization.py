"""Measure the largest learning rate, tolerance of initial weights, and epochs to 90%.

Layers of 100 ReLUs, He's weights, 4,000 digits, plain SGD on batches of 64, 5 seeds;
both networks use the same weights and batches. Chosen in advance: 8 layers unless depth
varies; a rate of 0.1 for both, and the best of RATES for each on the held-out digits.
A rate fails if, after two epochs, the mean loss of the last half epoch is at least 95%
of ln 10, the loss of guessing. Bisection between 0.01 (the result if no rate works) and
100 finds a rate that works and one a third larger that fails; a scan counts the rates
that contradict it. A finding is "yes" if the ranges over seeds do not overlap.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import _experiment as lab
import jax
import numpy as np
from _experiment import COLOR, NAME, band
from matplotlib.figure import Figure

BATCH, HALF, DEPTH, SAME = 64, 31, 8, 1  # half an epoch is 31 steps; RATES[SAME]
RATES, SCALES = (0.03, 0.1, 0.3, 1.0), (1 / 30, 0.2, 1.0, 5.0, 30.0)
SCAN, FAILED = np.geomspace(0.01, 100, 9), 0.95 * np.log(10)
STABLE, EPOCHS = "Largest stable learning rate", "Number of epochs to 90% accuracy"
CLAIM = (
    "With batch norm, networks train at larger learning rates, from worse initial "
    "weights, and in fewer epochs."
)
accuracies = jax.jit(jax.vmap(lab.accuracy, (0, None)))


def train(
    data: tuple, seeds: int, epochs: int, net: tuple, rates: Any, scale: float = 1.0
) -> list[np.ndarray]:
    """Return mean loss and accuracy by seed and half epoch; `net` is (norm, depth)."""
    models = lab.inits(seeds, *net, std=lambda n_in: scale * lab.he(n_in))
    rows = [lab.draw_rows(seed, 2 * HALF * epochs, BATCH) for seed in range(seeds)]

    def observe(models: lab.Model, losses: jax.Array) -> tuple:
        return losses.mean(1), accuracies(models, data[0])

    return lab.fit(models, data[1], np.stack(rows), rates, observe, HALF)


def bisect(works: Callable, seeds: int, halvings: int) -> np.ndarray:
    """Bisect rates on a log scale per seed; return the largest that worked."""
    low, high = np.full(seeds, SCAN[0]), np.full(seeds, SCAN[-1])
    for _ in range(halvings):
        middle = np.sqrt(low * high)
        good = works(middle)
        low, high = np.where(good, middle, low), np.where(good, high, middle)
    return low


def measure(args: lab.Arguments, data: tuple, norm: bool) -> dict[str, dict]:
    """Return the largest rate by depth, last loss by rate, accuracies by scale."""
    seeds, scales = args.pick(1, 5, 5), args.pick((1.0,), SCALES, SCALES)
    depths = args.pick((DEPTH,), (2, 8, 32, 64), (2, 4, 8, 16, 32, 64))
    few, more = (partial(train, data, seeds, args.pick(1, n, 2 * n)) for n in (2, 4))

    def last(depth: int, rates: float | np.ndarray) -> np.ndarray:
        return np.nan_to_num(few((norm, depth), rates)[0][:, -1], nan=np.inf)

    def largest(depth: int) -> np.ndarray:
        return bisect(lambda r: last(depth, r) < FAILED, seeds, args.pick(2, 5, 8))

    def ends(scale: float) -> np.ndarray:
        return np.stack([more((norm, DEPTH), rate, scale)[1] for rate in RATES])

    by_depth, by_scale = (lab.progress(n, NAME[norm]) for n in (depths, scales))
    return {
        "largest": {depth: largest(depth) for depth in by_depth},
        "scan": {rate: last(DEPTH, rate) for rate in SCAN[:: args.pick(8, 1, 1)]},
        "curves": {scale: ends(scale) for scale in by_scale},
    }


def best(scores: np.ndarray) -> int:
    """Return the index of the rate with the highest mean; scores are rates × seeds."""
    return int(scores.mean(1).argmax())


def quickest(curves: np.ndarray) -> int:
    """Return the index of the rate that reaches 90% first; never counts as last."""
    return best(-lab.reached(curves, 0.9).clip(max=curves.shape[-1] + 1))


def numbers(found: dict[str, dict]) -> dict[str, np.ndarray]:
    """Return the rows of the table, one number per seed."""
    stable, scan = found["largest"], found["scan"].items()
    rows = {f"{STABLE} for {depth} layers": rates for depth, rates in stable.items()}
    wrong = [(loss < FAILED) != (rate <= stable[DEPTH]) for rate, loss in scan]
    rows[f"Rates of a scan that contradict it, of {len(wrong)}"] = np.sum(wrong, 0)
    ends = [curves[..., -1] for curves in found["curves"].values()]
    epochs = lab.reached(found["curves"][1.0], 0.9) / 2
    mean = f"Mean accuracy for {len(ends)} scales of initial weights"
    rows[f"{mean} at rate 0.1"] = np.mean([end[SAME] for end in ends], 0)
    rows[f"{mean} at the best rates"] = np.mean([e[best(e)] for e in ends], 0)
    rows[f"{EPOCHS} at rate 0.1"] = epochs[SAME]
    return rows | {f"{EPOCHS} at the best rate": epochs[quickest(found["curves"][1.0])]}


def form(name: str) -> str:
    """Return the number format of a row."""
    return ".0%" if name.startswith("Mean accuracy") else ".2g"


def findings(without: dict, normed: dict) -> dict[str, bool]:
    """Return the findings, and whether each supports the claim."""
    found = {}
    for name, b in normed.items():
        a, fewer = without[name], name.startswith(EPOCHS)
        holds = b.max() < a.min() if fewer else b.min() > a.max()
        if "scan" not in name:
            found[lab.versus(name, a, b, form(name))] = holds
    return found


def draw(found: dict[bool, dict]) -> Figure:
    """Plot the largest rates, the scan, and accuracies by scale and by epoch."""
    figure = Figure(figsize=(9, 8), layout="constrained")
    (rates, scan), (by_scale, by_epoch) = figure.subplots(2, 2)
    for norm, of in found.items():
        curves, style = of["curves"], {"color": COLOR[norm]}
        for panel, part, most in ((rates, "largest", 100), (scan, "scan", 10)):
            runs = np.stack([*of[part].values()], 1).clip(max=most)
            band(panel, [*of[part]], runs, label=NAME[norm], marker="o", **style)
        first = quickest(curves[1.0])
        for line, same in (("-", True), ("--", False)):
            runs = [c[SAME if same else best(c[..., -1])] for c in curves.values()]
            band(by_scale, [*curves], np.stack(runs, 1)[..., -1], ls=line, **style)
            curve = curves[1.0][SAME if same else first]
            band(
                by_epoch, np.arange(1, curve.shape[1] + 1) / 2, curve, ls=line, **style
            )
    scan.axhline(FAILED, color="0.6", linestyle=":")
    rates.set(xlabel="layers", title="Largest rate that works", yscale="log")
    scan.set(xlabel="learning rate", title=f"Last losses, {DEPTH} layers (at most 10)")
    by_scale.set(xlabel="initial weights / He's", title="Accuracy after the last epoch")
    by_epoch.set(xlabel="epoch", title="Accuracy, He's weights")
    by_epoch.legend(by_epoch.lines[:2], ["rate 0.1", "the best rate"])
    for panel, base in ((rates, 2), (scan, 10), (by_scale, 10)):
        panel.set_xscale("log", base=base)
    named = rates.get_legend_handles_labels()
    figure.legend(*named, loc="outside lower center", ncols=2)
    return figure


def main() -> None:
    """Measure both networks; write a table and a picture."""
    args, data = lab.arguments(__doc__), lab.digits()
    found = {norm: measure(args, data, norm) for norm in NAME}
    rows, table = [numbers(of) for of in found.values()], [["", *NAME.values()]]
    for name in rows[0]:
        table.append([name, *(lab.spread(of[name], form(name)) for of in rows)])
    result = draw(found), table, (CLAIM, findings(*rows))
    lab.report(args, "learning_rate_and_initialization", *result)


if __name__ == "__main__":
    main()
