"""Shared parts of the training examples: the command line, and the report of a run."""

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

# Without and with batch norm: of Okabe & Ito, for colour-blind readers too.
COLOR = {False: "#D55E00", True: "#0072B2"}


def make_parser(
    description: str | None, quick: str, seed: str = "seed of all random numbers"
) -> argparse.ArgumentParser:
    """Return a parser with the common options; `quick` and `seed` are help texts."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--seed", type=int, default=0, help=f"{seed} (default: 0)")
    parser.add_argument(
        "--output",
        type=lambda path: Path(path).resolve(),
        default=Path(__file__).resolve().parent / "output",
        help="folder for the results (default: examples/output)",
    )
    return parser


def report(
    name: str,
    arrays: Mapping[str, Iterable],
    losses: list,
    accuracies: dict,
    folder: Path,
) -> None:
    """Print a table of a run and write its picture.

    `arrays` holds pairs of path and array for each kind of variable.
    """
    table = Table("", name)
    for kind, flat in arrays.items():
        paths, leaves = zip(*flat, strict=True)
        names = ", ".join(sorted({str(path[-1]) for path in paths}))
        size = sum(leaf.size for leaf in leaves)
        table.add_row(kind, f"{size:,} in {len(leaves)} arrays: {names}")
    last = f"mean of the last 20: {np.mean(losses[-20:]):.4f}"
    table.add_row("training loss", f"first: {losses[0]:.5f}; {last}")
    table.add_row("test accuracy", f"{[*accuracies.values()][-1]:.1%}")
    Console().print(table)
    picture = folder / f"{name}.png"
    draw(name, losses, accuracies).savefig(picture, dpi=110)
    print(f"Picture: {picture}")


def draw(title: str, losses: list, accuracies: dict) -> Figure:
    """Plot loss and accuracy by step."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.semilogy(range(1, len(losses) + 1), losses)
    right.plot(*zip(*accuracies.items(), strict=True), marker=".")
    left.set(xlabel="step", ylabel="training loss")
    right.set(xlabel="step", ylabel="test accuracy", xlim=left.get_xlim())
    figure.suptitle(title)
    return figure
