"""Passes over x on an H100 and on a TPU v5e, jaxbn beside flax, counted without either.

`python -m benchmarks.aot --platform h100` compiles one layer at many shapes, then a
whole training step of ResNet-50, for a chip that this machine need not have. It prints
two tables and writes their figures as JSON.

One pass reads or writes as many bytes as x has: batch norm needs 3 of them forward
(read x for its statistics; read it again and write y) and 5 backward (read x and dy for
two sums; read both again and write dx).
"""

import argparse
import json
import math
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from rich.console import Console
from rich.progress import track

import jaxbn
import jaxbn.linen

from ._report import Table
from ._resnet import ResNet50, step_arguments, train_step
from ._topology import LIBRARY, Chip, describe

NORMS = {"jaxbn": jaxbn.linen.BatchNorm, "flax": nn.BatchNorm}
DTYPES = ("float32", "bfloat16")
SHAPES = (  # features last: layers of ResNet-50 at batch 32, then of perceptrons
    (32, 56, 56, 64),
    (32, 56, 56, 256),
    (32, 28, 28, 512),
    (32, 14, 14, 1024),
    (32, 7, 7, 2048),
    (32, 14, 14, 256),
    (65536, 1024),
    (4096, 1024),
    (4096, 256),
    (256, 1024),
)
LAYERS = (*((shape, -1) for shape in SHAPES), ((32, 64, 56, 56), 1))  # shape, features
BATCH = 32  # of the whole step


class Passes(NamedTuple):
    """One layer, in units of x: what it moves, and its temporary memory.

    `backward` is what the backward adds to a program that holds both; `apart` is a
    program of its own, which reads what the forward saved.
    """

    forward: float
    both: float
    backward: float
    apart: float
    forward_temporary: float
    both_temporary: float


def count_layer(
    chip: Chip,
    norm: type[nn.BatchNorm],
    shape: tuple,
    axis: int,
    dtype: str,
    relu: bool,
) -> Passes:
    """Compile a layer of `norm` three times: forward, both ways, and backward."""
    layer = norm(use_running_average=False, axis=axis, dtype=dtype)
    x = jax.ShapeDtypeStruct(shape, dtype)
    variables = jax.eval_shape(layer.init, jax.random.key(0), x)
    stats = variables["batch_stats"]

    def forward(params: Any, x: Array, stats: Any) -> tuple[Array, Any]:
        old = {"params": params, "batch_stats": stats}
        y, new = layer.apply(old, x, mutable=["batch_stats"])
        return nn.relu(y) if relu else y, new

    arguments = (variables["params"], x, stats)
    save = _saving(forward)
    _, saved, _ = jax.eval_shape(save, *arguments)
    costs = (
        chip.cost(forward, *arguments),
        chip.cost(_both_ways(save), *arguments, x),
        chip.cost(lambda vjp, dy: vjp(dy), saved, x),
    )
    size = math.prod(shape) * jnp.dtype(dtype).itemsize
    there, both, apart = (cost.traffic / size for cost in costs)
    held = (cost.temporary / size for cost in costs[:2])
    return Passes(there, both, both - there, apart, *held)


def _saving(forward: Callable) -> Callable:
    """The forward of training: y, what the backward needs, and the new statistics."""

    def save(params: Any, x: Array, stats: Any) -> tuple[Array, Callable, Any]:
        def of_gradients(params: Any, x: Array) -> tuple[Array, Any]:
            return forward(params, x, stats)

        return jax.vjp(of_gradients, params, x, has_aux=True)

    return save


def _both_ways(save: Callable) -> Callable:
    """Forward and backward in one program."""

    def both(params: Any, x: Array, stats: Any, dy: Array) -> tuple[Any, ...]:
        y, vjp, new = save(params, x, stats)
        # In a network dy depends on y. If it did not here, XLA would compute the sums
        # of both directions in the same pass over x.
        y, dy = lax.optimization_barrier((y, dy))
        return y, new, vjp(dy)

    return both


def count_layers(chip: Chip) -> list[dict[str, Any]]:
    """A row of figures for each layer, dtype, with and without ReLU, and library."""
    cases = [
        {"shape": shape, "axis": axis, "dtype": dtype, "relu": relu, "norm": norm}
        for shape, axis in LAYERS
        for dtype in DTYPES
        for relu in (False, True)
        for norm in NORMS
    ]
    return [
        case | count_layer(chip, **case | {"norm": NORMS[case["norm"]]})._asdict()
        for case in _track(cases)
    ]


def count_steps(chip: Chip) -> list[dict[str, Any]]:
    """Gigabytes that a training step of ResNet-50 moves and holds, in rows."""
    cases = [(dtype, norm) for dtype in DTYPES for norm in NORMS]
    return [
        {"dtype": dtype, "norm": norm, **_count_step(chip, NORMS[norm], dtype)}
        for dtype, norm in _track(cases)
    ]


def _count_step(
    chip: Chip, norm: type[nn.BatchNorm], dtype: DTypeLike
) -> dict[str, float]:
    model = ResNet50(norm, jnp.dtype(dtype))

    def step(*arguments: Any) -> tuple[Any, Array]:
        return train_step(model, *arguments)

    cost = chip.cost(step, *step_arguments(model, BATCH))
    return {"traffic": cost.traffic / 1e9, "temporary": cost.temporary / 1e9}


def _track(cases: list) -> Any:
    return track(cases, "Compiling", disable=not Console().is_terminal)


def layer_table(rows: list[dict[str, Any]], chip: str) -> Table:
    """One line for a layer, jaxbn's figure before flax's in each cell."""
    columns = {
        "forward": "forward",
        "backward": "backward",
        "apart": "backward apart",
        "both_temporary": "temporary",
    }
    lines = [
        ["x".join(map(str, ours["shape"])), ours["dtype"], "yes" * ours["relu"]]
        + [f"{ours[column]:.2f} / {theirs[column]:.2f}" for column in columns]
        for ours, theirs in zip(rows[::2], rows[1::2], strict=True)
    ]
    title = f"{chip}: passes over x, and temporary memory in units of x, jaxbn / flax"
    return Table(title, ["x", "dtype", "ReLU", *columns.values()], lines)


def step_table(rows: list[dict[str, Any]], chip: str) -> Table:
    """One line for each step of ResNet-50."""
    lines = [
        [row["dtype"], row["norm"]]
        + [f"{row[name]:.2f}" for name in ("traffic", "temporary")]
        for row in rows
    ]
    title = f"{chip}: one training step of ResNet-50, batch {BATCH}"
    return Table(title, ["dtype", "batch norm", "GB moved", "GB temporary"], lines)


def versions(chip: str) -> dict[str, str]:
    """What the figures depend on."""
    packages = ("jax", "jaxlib", "flax", LIBRARY[chip])
    found = {package: version(package) for package in packages}
    return {"python": platform.python_version(), "jaxbn": jaxbn.__version__, **found}


def main() -> None:
    """Count, print, and write `aot-<platform>.json` and its tables."""
    parser = argparse.ArgumentParser("python -m benchmarks.aot", description=__doc__)
    parser.add_argument("--platform", choices=tuple(LIBRARY), required=True)
    parser.add_argument("--quick", action="store_true", help="without the ResNet-50")
    here = Path(__file__).parent / "results"
    parser.add_argument("--output", type=Path, default=here, help="where results go")
    args = parser.parse_args()
    chip, console = describe(args.platform), Console()
    layers = count_layers(chip)
    tables = [layer_table(layers, args.platform)]
    console.print(tables[0].rich())
    steps = [] if args.quick else count_steps(chip)
    if steps:
        tables.append(step_table(steps, args.platform))
        console.print(tables[1].rich())
    args.output.mkdir(parents=True, exist_ok=True)
    results = {"versions": versions(args.platform), "layers": layers, "steps": steps}
    name = f"aot-{args.platform}"
    (args.output / f"{name}.json").write_text(json.dumps(results, indent=1))
    page = "\n".join(table.markdown() for table in tables)
    (args.output / f"{name}.md").write_text(page)
    print(f"Figures: {name}.json and {name}.md in {args.output}")


if __name__ == "__main__":
    main()
