"""Deploy a model to a server without Flax: statistics, folding, export, loading.

The CNN of flax_nnx_cnn.py becomes one file for CPU, CUDA, TPU and batches of any size.
"""

import subprocess
import sys
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from _digits import load_digits
from _serve import measure
from _training import make_parser
from flax import nnx
from flax_nnx_cnn import fit
from jax.stages import Wrapped
from rich.console import Console
from rich.table import Table

import jaxbn.nnx

PLATFORMS = ("cpu", "cuda", "tpu")


def predictor(model: nnx.Module) -> Wrapped:
    """Return the model in inference mode as a function of the images."""
    model.eval()
    graph, state = nnx.split(nnx.clone(model))  # later steps change it in place
    return jax.jit(lambda images: nnx.merge(graph, state)(images))


def export(predict: Wrapped, path: Path) -> None:
    """Write a program for any batch size; reading it needs only JAX."""
    shape = jax.export.symbolic_shape("batch, 28, 28, 1")
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    exported = jax.export.export(predict, platforms=PLATFORMS)(images)
    path.write_bytes(exported.serialize())


def serve(images: np.ndarray, models: list[Path], folder: Path) -> dict:
    """Run the files in a new process, without the code of the model."""
    given, results = folder / "images.npy", folder / "served.npz"
    np.save(given, images)
    server = Path(__file__).with_name("_serve.py")
    subprocess.run([sys.executable, server, given, results, *models], check=True)
    served = dict(np.load(results))
    if served["modules"].size:
        raise RuntimeError(f"the server imported {served['modules']}")
    return served


def prepare(seed: int, steps: int) -> dict[str, Wrapped]:
    """Train a model; return each version for inference as a function."""
    model, *_ = fit(jaxbn.nnx.BatchNorm, seed, steps)
    versions = {"trained": predictor(model)}
    _, (images, _) = load_digits(seed)
    jaxbn.nnx.population(model, np.split(images, 40))
    versions["population statistics"] = predictor(model)
    versions["folded"] = predictor(jaxbn.nnx.fold(model, images[:1]))
    return versions


def compare(
    versions: dict, served: dict, images: np.ndarray, labels: np.ndarray
) -> Table:
    """Return a table of all versions in this process and of the served ones."""
    here = {name: np.asarray(predict(images)) for name, predict in versions.items()}
    times = measure([*versions.values()], images[:64])
    rows = [*zip(here, ["training"] * 3, here.values(), times, strict=True)]
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
    table.caption = f"The largest absolute logit is {np.abs(expected).max():.1f}."
    return table


def main() -> None:
    """Run one model in this process and in another; print a table of both."""
    args = make_parser(__doc__, quick="train 40 steps instead of 300").parse_args()
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
