"""Time layers and training steps on this machine's GPU or TPU, jaxbn versus Flax.

`python -m benchmarks.accelerator` times one layer at the shapes of ResNet-50, then
whole training steps of it, on JAX's default device. Each round runs every case once. It
prints two tables and writes their figures as JSON. PyTorch's batch norm joins the
layers if it sees the same GPU.
"""

import argparse
import importlib.util
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track

from . import _programs
from ._libraries import LIBRARIES
from ._machine import versions
from ._networks import NETWORKS, NORMS
from ._report import Table, write
from ._resnet import Kept, ResNet, step_arguments, train_step
from ._shapes import Shape
from ._task import EPSILON, Task
from ._timing import interleave, seconds_per_call, summarize

DTYPES = ("bfloat16", "float32")
# Batch 128: the arrays are larger than the caches of a GPU, but for the last.
SHAPES = (
    Shape("stem", (128, 112, 112, 64)),
    Shape("1 narrow", (128, 56, 56, 64)),
    Shape("1 wide", (128, 56, 56, 256)),
    Shape("2 wide", (128, 28, 28, 512)),
    Shape("3 wide", (128, 14, 14, 1024)),
    Shape("4 wide", (128, 7, 7, 2048)),
    Shape("dense", (65536, 1024)),
)
BATCH = 128
STEPS: tuple[tuple[str, Kept], ...] = (  # the norm, and what the backward pass keeps
    ("flax", "everything"),
    ("jaxbn", "everything"),
    ("jaxbn", "policy"),
)
SAMPLE_SECONDS = 0.05  # of calls that the device runs back to back

Run = Callable[[int], object]  # start so many calls, then wait for the last


def random_task(key: jax.Array, shape: Shape, dtype: str) -> Task:
    """Return random arrays, drawn on the device."""
    features = shape.dims[shape.axis]
    x_key, dy_key, key = jax.random.split(key, 3)
    scale, bias, mean, var = jax.random.uniform(key, (4, features), minval=0.5)
    x = jax.random.normal(x_key, shape.dims, dtype)
    dy = jax.random.normal(dy_key, shape.dims, dtype)
    arrays: Any = (x, dy, scale, bias, mean, var)
    return Task(shape, dtype, 0.99, *arrays)


def jax_layer(task: Task, library: str) -> Run:
    """Return a training step of one layer: forward, statistics and backward."""
    layer = LIBRARIES[library].build(task)
    step = _programs.one_jit(layer)
    program = _programs.Program(step, layer.params, layer.state, task.x, task.dy)
    return partial(_start_and_wait, program.start)


def copy(task: Task) -> Run:
    """Return an elementwise copy of an array of x's size."""
    return partial(_start_and_wait, _programs.copy(task.x.nbytes).start)


def _start_and_wait(start: Callable[[], Any], calls: int) -> None:
    for _ in range(calls - 1):
        start()
    jax.block_until_ready(start())


def torch_layer(task: Task, contiguous: bool) -> Run:
    """Return the same step in PyTorch, on features last or first."""
    import torch  # pyright: ignore[reportMissingImports]

    def tensor(a: Any) -> Any:
        a = torch.from_numpy(np.asarray(a, np.float32).copy()).cuda()
        return a if a.ndim == 1 else a.to(getattr(torch, task.dtype))

    x, dy = (tensor(a).movedim(-1, 1) for a in (task.x, task.dy))
    x, dy = (a.contiguous() if contiguous else a for a in (x, dy))
    scale, bias, mean, var = map(tensor, (task.scale, task.bias, task.mean, task.var))
    leaves = [a.detach().requires_grad_() for a in (x, scale, bias)]

    def run(calls: int) -> None:
        for _ in range(calls):
            y = torch.nn.functional.batch_norm(
                leaves[0], mean, var, *leaves[1:], True, 0.01, EPSILON
            )
            torch.autograd.grad(y, leaves, dy)
        torch.cuda.synchronize()

    return run


def has_torch() -> bool:
    """Return whether PyTorch is installed and sees a GPU that JAX runs on too."""
    if jax.default_backend() != "gpu" or importlib.util.find_spec("torch") is None:
        return False
    import torch  # pyright: ignore[reportMissingImports]

    return torch.cuda.is_available()


def time_layer(
    shape: Shape, dtype: str, rng: np.random.Generator
) -> list[dict[str, Any]]:
    """Return a row for each library; `floor` is 8 passes at the speed of the copy."""
    task = random_task(jax.random.key(0), shape, dtype)
    runs = {name: jax_layer(task, name) for name in ("jaxbn", "flax.linen")}
    runs["copy"] = copy(task)
    if has_torch():
        runs["torch channels-last"] = torch_layer(task, contiguous=False)
        runs["torch contiguous"] = torch_layer(task, contiguous=True)
    times = _interleave(runs, rng)
    floor = 4 * times.pop("copy").median
    case = {"shape": shape.name, "dims": list(shape.dims), "dtype": dtype}
    return [
        case | {"library": name, "floor": floor, **summary._asdict()}
        for name, summary in times.items()
    ]


def _interleave(runs: dict[Any, Run], rng: np.random.Generator) -> dict[Any, Any]:
    samples = interleave({name: _sampler(run) for name, run in runs.items()}, 15, rng)
    return {name: summarize(seconds) for name, seconds in samples.items()}


def _sampler(run: Run) -> Callable[[], float]:
    """Return a function that times one of many calls that run back to back."""
    run(3)
    once = seconds_per_call(lambda: run(10), 1) / 10
    calls = max(5, round(SAMPLE_SECONDS / once))
    return lambda: seconds_per_call(lambda: run(calls), 1) / calls


def compile_step(dtype: str, norm: str, kept: Kept) -> tuple[Run, dict[str, Any]]:
    """Return a step of ResNet-50 that updates its variables, and its figures."""
    model = ResNet(NORMS[norm], jnp.dtype(dtype), NETWORKS["ResNet-50"], kept)
    _, image_shape, label_shape = step_arguments(model, BATCH)
    images = jax.random.normal(jax.random.key(1), image_shape.shape, dtype)
    labels = jnp.arange(label_shape.shape[0], dtype=label_shape.dtype)
    variables = jax.jit(model.init)(jax.random.key(0), images)
    step = jax.jit(partial(train_step, model), donate_argnums=0)
    start = time.perf_counter()
    program: Any = step.lower(variables, images, labels).compile()
    seconds = time.perf_counter() - start
    variables, loss = program(variables, images, labels)
    holder = [variables]

    def run(calls: int) -> None:
        for _ in range(calls):
            holder[0], _ = program(holder[0], images, labels)
        jax.block_until_ready(holder[0])

    figures = {
        "loss": float(loss),
        "temporary": program.memory_analysis().temp_size_in_bytes,
        "compile": seconds,
    }
    return run, figures


def time_steps(dtype: str, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Return a row for each step; all are resident while they are timed."""
    runs, figures = {}, {}
    for case in track(STEPS, f"compiling, {dtype}"):
        runs[case], figures[case] = compile_step(dtype, *case)
    return [
        {"dtype": dtype, "norm": case[0], "kept": case[1]}
        | figures[case]
        | summary._asdict()
        for case, summary in _interleave(runs, rng).items()
    ]


def layer_table(rows: list[dict[str, Any]], device: str) -> Table:
    """Return a line for each layer: milliseconds, and the ratio to the floor."""
    libraries = list(dict.fromkeys(row["library"] for row in rows))
    lines: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        dims = "x".join(map(str, row["dims"]))
        line = lines.setdefault((dims, row["dtype"]), [dims, row["dtype"]])
        line.append(f"{1e3 * row['median']:.3g} ({row['median'] / row['floor']:.2f})")
    title = f"{device}: a layer's training step, ms (over 8 passes at copy speed)"
    return Table(title, ["x", "dtype", *libraries], list(lines.values()))


def step_table(rows: list[dict[str, Any]], device: str) -> Table:
    """Return a line for each training step."""
    lines = [
        [
            *(row[name] for name in ("dtype", "norm", "kept")),
            f"{1e3 * row['median']:.2f}",
            f"{row['temporary'] / 1e9:.2f}",
            f"{row['loss']:.4f}",
        ]
        for row in rows
    ]
    header = ["dtype", "norm", "kept", "ms", "GB temporary", "first loss"]
    title = f"{device}: a training step of ResNet-50, batch {BATCH}"
    return Table(title, header, lines)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    name = "python -m benchmarks.accelerator"
    parser = argparse.ArgumentParser(name, description=__doc__)
    parser.add_argument("--quick", action="store_true", help="skip ResNet-50")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results"
    )
    return parser.parse_args()


def main() -> None:
    """Time, print the tables, and write `accelerator.json` and `.md`."""
    args, console, rng = parse_arguments(), Console(), np.random.default_rng(0)
    device = jax.devices()[0].device_kind
    console.print(f"On {device}: about {2 if args.quick else 4} minutes.")
    cells = [(shape, dtype) for dtype in DTYPES for shape in SHAPES]
    layers = [row for cell in track(cells, "layers") for row in time_layer(*cell, rng)]
    tables = [layer_table(layers, device)]
    console.print(tables[0].rich())
    dtypes = () if args.quick else DTYPES
    steps = [row for dtype in dtypes for row in time_steps(dtype, rng)]
    if steps:
        tables.append(step_table(steps, device))
        console.print(tables[1].rich())
    results = {"device": device, "versions": versions(), "layers": layers}
    write("accelerator", results | {"steps": steps}, tables, args.output)


if __name__ == "__main__":
    main()
