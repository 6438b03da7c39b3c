"""From training to a server without Flax: statistics, folding, export, loading.

The CNN of `flax_nnx_cnn.py`, as one file for CPU, CUDA, TPU and batches of any size.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from _digits import load_digits
from _serve import measure
from flax import nnx
from flax_nnx_cnn import fit
from jax.stages import Wrapped
from rich.console import Console
from rich.table import Table

import jaxbn.nnx

PLATFORMS = ("cpu", "cuda", "tpu")


def predictor(model: nnx.Module) -> Wrapped:
    """The model at inference as a function of the images alone, with its weights."""
    model.eval()
    graph, state = nnx.split(nnx.clone(model))  # what comes changes it in place
    return jax.jit(lambda images: nnx.merge(graph, state)(images))


def export(predict: Wrapped, path: Path) -> None:
    """Write a program that JAX alone can read, for a batch of any size."""
    shape = jax.export.symbolic_shape("batch, 28, 28, 1")
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    exported = jax.export.export(predict, platforms=PLATFORMS)(images)
    path.write_bytes(exported.serialize())


def serve(images: np.ndarray, models: list[Path], folder: Path) -> dict:
    """What a new process makes of the files: it has never heard of the model."""
    given, results = folder / "images.npy", folder / "served.npz"
    np.save(given, images)
    server = Path(__file__).with_name("_serve.py")
    subprocess.run([sys.executable, server, given, results, *models], check=True)
    served = dict(np.load(results))
    if served["modules"].size:
        raise RuntimeError(f"the server imported {served['modules']}")
    return served


def prepare(seed: int, steps: int) -> dict[str, Wrapped]:
    """Train a model, and get it ready for inference: each version as a function."""
    model, *_ = fit(jaxbn.nnx.BatchNorm, seed, steps)
    versions = {"trained": predictor(model)}
    _, (images, _) = load_digits(seed)
    jaxbn.nnx.population(model, np.split(images, 40))
    versions["population statistics"] = predictor(model)
    versions["folded"] = predictor(jaxbn.nnx.fold(model))
    return versions


def compare(
    versions: dict, served: dict, images: np.ndarray, labels: np.ndarray
) -> Table:
    """A table: here, and where they were served, all of them but the first."""
    here = {name: np.asarray(predict(images)) for name, predict in versions.items()}
    times = measure([*versions.values()], images[:64])
    rows = [*zip(here, ["here"] * 3, here.values(), times, strict=True)]
    served_rows = [*here][1:], ["server"] * 2, served["logits"], served["milliseconds"]
    rows += zip(*served_rows, strict=True)
    table = Table("Model", "Process", title=f"Inference, {jax.devices()[0].platform}")
    for column in ("Accuracy", "Max. difference", "ms per 64"):
        table.add_column(column, justify="right")
    expected = here["population statistics"]
    for name, process, logits, time in rows:
        accuracy = f"{(logits.argmax(-1) == labels).mean():.1%}"
        difference = f"{np.abs(logits - expected).max():.1e}"
        table.add_row(name, process, accuracy, difference, f"{time:.2f}")
    table.caption = f"Logits are up to {np.abs(expected).max():.1f}."
    return table


def main() -> None:
    """One model, in this process and in another; a table of both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="40 steps instead of 300")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random")
    here = Path(__file__).parent / "output"
    parser.add_argument("--output", type=Path, default=here, help="where results go")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    (images, labels), _ = load_digits(args.seed)
    versions = prepare(args.seed, 40 if args.quick else 300)
    files = [args.output / name for name in ("batch_norm.jax", "folded.jax")]
    for file, name in zip(files, ("population statistics", "folded"), strict=True):
        export(versions[name], file)
    served = serve(images, files, args.output)
    Console(width=88).print(compare(versions, served, images, labels))
    for file in files:
        print(f"Exported: {file}, {file.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
