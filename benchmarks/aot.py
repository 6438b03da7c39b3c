"""Count passes over x on an H100 and a TPU v5e, jaxbn versus Flax, without either chip.

`python -m benchmarks.aot --platform h100` compiles one layer at many shapes, then whole
training steps of ResNets, for a chip that this machine need not have. It prints two
tables and writes their figures as JSON.

One pass reads or writes as many bytes as x has. Batch norm needs 3 passes forward
(read x for its statistics; read it again and write y) and 5 backward (read x and dy for
two sums; read both again and write dx).
"""

import argparse
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
from rich.console import Console
from rich.progress import track

import jaxbn
import jaxbn.linen

from . import _networks
from ._networks import NORMS
from ._report import Table, write
from ._topology import COMPILER_PACKAGES, Chip, describe

DTYPES = ("float32", "bfloat16")
SHAPES = (  # features last: layers of ResNet-50 at batch 32, then of dense networks
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
# On 2 cores; a layer is compiled three times.
SECONDS = {"h100": {"layer": 2, "network": 40}, "v5e": {"layer": 3, "network": 110}}


class Passes(NamedTuple):
    """Hold the traffic and the temporary memory of a layer, in units of x.

    `backward` is the traffic that the backward adds to a program with both; `separate`
    is the traffic of a separate program, which reads the residuals.
    """

    forward: float
    both: float
    backward: float
    separate: float
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
    """Compile a layer of `norm` three times: forward, both, and backward."""
    layer = norm(use_running_average=False, axis=axis, dtype=dtype)
    x = jax.ShapeDtypeStruct(shape, dtype)
    variables = jax.eval_shape(layer.init, jax.random.key(0), x)
    stats = variables["batch_stats"]

    def forward(params: Any, x: Array, stats: Any) -> tuple[Array, Any]:
        old = {"params": params, "batch_stats": stats}
        y, new = layer.apply(old, x, mutable=["batch_stats"])
        return nn.relu(y) if relu else y, new

    arguments = chip.place((variables["params"], x, stats))
    with_vjp, dy = _with_vjp(forward), chip.place(x)
    _, residuals, _ = jax.eval_shape(with_vjp, *arguments)
    costs = (
        chip.cost(forward, *arguments),
        chip.cost(_forward_and_backward(with_vjp), *arguments, dy),
        chip.cost(lambda vjp, dy: vjp(dy), chip.place(residuals), dy),
    )
    size = math.prod(shape) * jnp.dtype(dtype).itemsize
    alone, both, separate = (cost.traffic / size for cost in costs)
    temporary = (cost.temporary / size for cost in costs[:2])
    return Passes(alone, both, both - alone, separate, *temporary)


def _with_vjp(forward: Callable) -> Callable:
    """Return a forward that returns y, its vjp, and the new statistics."""

    def with_vjp(params: Any, x: Array, stats: Any) -> tuple[Array, Callable, Any]:
        def differentiable(params: Any, x: Array) -> tuple[Array, Any]:
            return forward(params, x, stats)

        return jax.vjp(differentiable, params, x, has_aux=True)

    return with_vjp


def _forward_and_backward(with_vjp: Callable) -> Callable:
    """Return forward and backward as one function."""

    def both(params: Any, x: Array, stats: Any, dy: Array) -> tuple[Any, ...]:
        y, vjp, new = with_vjp(params, x, stats)
        # In a network dy depends on y. Without that dependence XLA would compute the
        # sums of forward and backward in the same pass over x.
        y, dy = lax.optimization_barrier((y, dy))
        return y, new, vjp(dy)

    return both


def layer_cases() -> list[dict[str, Any]]:
    """Return each layer, dtype and library, with and without ReLU."""
    return [
        {"shape": shape, "axis": axis, "dtype": dtype, "relu": relu, "norm": norm}
        for shape, axis in LAYERS
        for dtype in DTYPES
        for relu in (False, True)
        for norm in NORMS
    ]


def count_layers(chip: Chip) -> list[dict[str, Any]]:
    """Return a row for each layer."""
    return [
        case | count_layer(chip, **case | {"norm": NORMS[case["norm"]]})._asdict()
        for case in _track(layer_cases(), "layers")
    ]


def count_networks(chip: str) -> list[dict[str, Any]]:
    """Return a row for each training step."""
    cases = list(_networks.cases(chip))
    return [_networks.count(chip, case) for case in _track(cases, "training steps")]


def _track(cases: list, name: str) -> Any:
    return track(cases, f"{len(cases)} {name}", disable=not Console().is_terminal)


def say_how_long(chip: str, quick: bool) -> str:
    """Return an estimate of the run's length."""
    seconds = SECONDS[chip]["layer"] * len(layer_cases())
    if not quick:
        seconds += SECONDS[chip]["network"] * len(list(_networks.cases(chip)))
    return f"Compiling for {chip}: about {round(seconds / 60)} minutes on 2 cores."


def layer_table(rows: list[dict[str, Any]], chip: str) -> Table:
    """Return a line for each layer; a cell holds jaxbn's figure, then Flax's."""
    columns = {
        "forward": "forward",
        "backward": "backward",
        "separate": "backward, separate program",
        "both_temporary": "temporary",
    }
    lines = [
        ["x".join(map(str, row["shape"])), row["dtype"], "yes" * row["relu"]]
        + [f"{row[column]:.2f} / {flax_row[column]:.2f}" for column in columns]
        for row, flax_row in zip(rows[::2], rows[1::2], strict=True)
    ]
    title = f"{chip}: passes over x, and temporary memory in units of x, jaxbn / flax"
    return Table(title, ["x", "dtype", "ReLU", *columns.values()], lines)


def versions(chip: str) -> dict[str, str]:
    """Return the versions that the figures depend on."""
    packages = ("jax", "jaxlib", "flax", COMPILER_PACKAGES[chip])
    found = {package: version(package) for package in packages}
    return {"python": platform.python_version(), "jaxbn": jaxbn.__version__, **found}


def main() -> None:
    """Count, print the tables, and write `aot-<platform>.json` and `.md`."""
    parser = argparse.ArgumentParser("python -m benchmarks.aot", description=__doc__)
    parser.add_argument("--platform", choices=tuple(COMPILER_PACKAGES), required=True)
    parser.add_argument("--quick", action="store_true", help="skip the networks")
    here = Path(__file__).parent / "results"
    parser.add_argument(
        "--output", type=Path, default=here, help="folder of the results"
    )
    args = parser.parse_args()
    chip, console = describe(args.platform), Console()
    console.print(say_how_long(args.platform, args.quick))
    layers = count_layers(chip)
    tables = [layer_table(layers, args.platform)]
    console.print(tables[0].rich())
    steps = [] if args.quick else count_networks(args.platform)
    if steps:
        tables.append(_networks.table(steps, args.platform))
        console.print(tables[1].rich())
    results = {"versions": versions(args.platform), "layers": layers, "steps": steps}
    write(f"aot-{args.platform}", results, tables, args.output)


if __name__ == "__main__":
    main()
