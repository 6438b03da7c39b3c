"""Whole training steps of ResNets, compiled for a GPU or TPU and counted."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

import jaxbn.linen

from ._report import Table
from ._resnet import Kept, ResNet, step_arguments, train_step
from ._topology import Cost, describe

NORMS = {"jaxbn": jaxbn.linen.BatchNorm, "flax": nn.BatchNorm}
NETWORKS = {"ResNet-50": (3, 4, 6, 3), "stem + 2 bottlenecks": (2,)}


class Case(NamedTuple):
    """Hold one step to compile; `batch` is that of all chips together."""

    network: str
    batch: int
    chips: int
    dtype: str
    norm: str
    kept: Kept


def cases(chip: str) -> Iterator[Case]:
    """Yield the steps, jaxbn's and Flax's next to each other.

    At batch 32 most arrays of ResNet-50 fit into the fast memory of a TPU; the first
    layers at batch 128 fill the chip.
    """
    for dtype in ("float32", "bfloat16"):
        for batch in (32, 128):
            for norm in NORMS:
                yield Case("ResNet-50", batch, 1, dtype, norm, "everything")
            for kept in ("policy", "blocks"):
                yield Case("ResNet-50", batch, 1, dtype, "jaxbn", kept)
        for chips in (1, 4) if chip == "v5e" else (1,):
            for norm in NORMS:
                yield Case(
                    "stem + 2 bottlenecks", 128, chips, dtype, norm, "everything"
                )


def count(chip: str, case: Case) -> dict[str, Any]:
    """Compile the step of `case`, and return its figures."""
    on_chip = describe(chip, case.chips)
    dtype, blocks = jnp.dtype(case.dtype), NETWORKS[case.network]
    model = ResNet(NORMS[case.norm], dtype, blocks, case.kept)

    def step(*arguments: Any) -> tuple[Any, Array]:
        return train_step(model, *arguments)

    variables, *data = step_arguments(model, case.batch)
    cost = on_chip.cost(step, on_chip.place(variables), *on_chip.place(data, "data"))
    return {**case._asdict(), **cost._asdict()}


def table(rows: list[dict[str, Any]], chip: str) -> Table:
    """Return a line for each step."""
    columns = {
        "traffic": ("GB moved", 1e9),
        "temporary": ("GB temporary", 1e9),
        "convolutions": ("convolutions", 1),
        "all_reduces": ("all-reduces", 1),
        "accessed": ("GB accessed", 1e9),
        "cycles": ("Mcycles", 1e6),
        "fused": ("convolutions with a sum", 1),
    }
    known = [name for name in Cost._fields if rows[0][name] is not None]
    lines = [
        [str(row[name]) for name in Case._fields]
        + [_figure(row[name], columns[name][1]) for name in known]
        for row in rows
    ]
    header = [*Case._fields, *(columns[name][0] for name in known)]
    return Table(f"{chip}: one training step", header, lines)


def _figure(value: float, unit: float) -> str:
    return str(value) if unit == 1 else f"{value / unit:.2f}"
