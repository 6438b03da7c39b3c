"""Switch a published model to jaxbn by one line, and follow it to a server.

The model is the ResNet of the package transformers, whose code stays as it is. It is
trained with Flax's batch norms, switched, trained further, measured, folded and
exported. A table shows which of the steps changed something, and which did not.
"""

import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import optax
from _digits import load_digits, random_batches
from _serve import measure
from _training import make_parser
from deploy import export, serve
from flax_linen_resnet import State, accuracy, train_step
from jax import Array
from jax.stages import Compiled, Wrapped
from jaxtyping import PyTree
from rich.console import Console
from rich.table import Table

import jaxbn.linen
from jaxbn.convert import layers_of

try:
    from transformers import (  # pyright: ignore[reportMissingImports]
        FlaxResNetForImageClassification,
        ResNetConfig,
    )
except ImportError as error:  # transformers 5 has no models in Flax
    print(f"{error}\nSkipped; it needs pip install -e '.[examples-models]'")
    sys.exit()  # without an error, as CI runs all examples and installs no models

# The blocks of ResNet-50, fewer and narrower.
SIZES = {"embedding_size": 16, "hidden_sizes": [64, 128, 256], "depths": [1, 1, 1]}


def add_difference(table: Table, name: str, before: PyTree, after: PyTree) -> None:
    """Add the largest difference, relative to the largest entry of its array."""
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    found = max(float(abs(a - b).max() / abs(a).max()) for a, b in pairs)
    change = "equal" if found == 0 else "rounding" if found < 1e-4 else "not equal"
    table.add_row(f"  {name}", "", f"{found:.0e} off", change)


def add_times(table: Table, name: str, before: float, after: float) -> None:
    """Add two times in milliseconds, and their ratio."""
    change = f"{before / after:.2f} times as fast"
    table.add_row(f"  {name}", f"{before:.2f} ms", f"{after:.2f} ms", change)


def add_accuracies(table: Table, before: State, after: State, test: Sequence) -> None:
    """Add two accuracies, and their difference in percentage points."""
    shares = [100 * float(accuracy(state, *test)) for state in (before, after)]
    change = f"{shares[1] - shares[0]:+.1f} points"
    table.add_row("  test accuracy", *(f"{share:.1f}%" for share in shares), change)


def load(seed: int) -> tuple[nn.Module, State]:
    """Return the published module, and its random variables with an optimizer."""
    config = ResNetConfig(num_channels=1, num_labels=10, **SIZES)
    shape = (1, 28, 28, 1)
    module = FlaxResNetForImageClassification(config, shape, _do_init=False).module
    key = jax.random.key(seed, impl="rbg")  # compiles faster than the default
    variables = jax.jit(module.init)(key, np.zeros(shape, np.float32))

    def classify(module: nn.Module, images: Array, train: bool = False) -> Array:
        return module(images, deterministic=not train).logits

    apply, optimizer = partial(module.apply, method=classify), optax.sgd(0.1, 0.9)
    return module, State.create(apply_fn=apply, tx=optimizer, **variables)


def variables_of(state: State) -> dict[str, PyTree]:
    """Return the variables of the model."""
    return {"params": state.params, "batch_stats": state.batch_stats}


def compile_steps(state: State, batch: Sequence[np.ndarray]) -> list[Compiled]:
    """Compile a training step by Flax, and the same step by jaxbn."""
    by_flax = train_step.lower(state, *batch).compile()
    with jaxbn.linen.replace_batch_norm():
        return [by_flax, train_step.lower(state, *batch).compile()]


@jax.jit
def call_both_modes(state: State, images: Array) -> tuple[PyTree, PyTree]:
    """Return the logits at inference, and the logits and statistics in training."""
    apply = partial(state.apply_fn, variables_of(state), images)
    return apply(), apply(True, mutable="batch_stats")


def switch(table: Table, state: State, images: np.ndarray) -> None:
    """Call the model by Flax and by jaxbn, with the same variables."""
    before = call_both_modes(state, images)
    with jaxbn.linen.replace_batch_norm() as replaced:  # the one line
        after = call_both_modes(state, images)
    norms = len(layers_of(variables_of(state)))
    table.add_row(f"2. switched: {len(replaced)} of {norms} norms")
    for name, *pair in zip(("inference", "training"), before, after, strict=True):
        add_difference(table, name, *pair)


def train_both(
    programs: Sequence[Compiled], state: State, digits: Sequence, seed: int, steps: int
) -> tuple[list[State], np.ndarray]:
    """Train by both programs in turns, on the same batches.

    Return both states, and the median milliseconds a step.
    """
    states, times = [state, state], np.empty((steps, 2))
    for step, batch in random_batches(digits, seed, steps, "Flax and jaxbn"):
        for i in (0, 1) if step % 2 else (1, 0):
            start = time.perf_counter()
            states[i], _ = jax.block_until_ready(programs[i](states[i], *batch))
            times[step - 1, i] = time.perf_counter() - start
    return states, 1e3 * np.median(times, axis=0)


def make_predictor(state: State, variables: Mapping[str, PyTree]) -> Wrapped:
    """Return the switched model at inference as a function of the images."""

    @jax.jit
    def predict(images: Array) -> Array:
        with jaxbn.linen.skip_folded(), jaxbn.linen.replace_batch_norm():
            return state.apply_fn(variables, images)

    return predict


def fold(
    table: Table, model: nn.Module, state: State, images: np.ndarray
) -> list[Wrapped]:
    """Return the model without and with its batch norms folded."""
    variables = variables_of(state)
    both = variables, jaxbn.linen.fold(model, variables, images[:1])
    predictors = [make_predictor(state, each) for each in both]
    norms, left = (len(layers_of(each)) for each in both)
    table.add_row(f"5. folded: {norms - left} of {norms} norms")
    add_difference(table, "logits", *(predict(images) for predict in predictors))
    for size in (1, 64):
        add_times(table, f"a batch of {size}", *measure(predictors, images[:size]))
    return predictors


def serve_both(
    table: Table, predictors: Sequence[Wrapped], images: np.ndarray, folder: Path
) -> None:
    """Export the models without and with folding; run the files in a new process."""
    table.add_row("6. exported, without and with folding")
    files = [folder / "switched.jax", folder / "switched_folded.jax"]
    for predict, file in zip(predictors, files, strict=True):
        export(predict, file)
    table.add_row("  file", *(f"{f.stat().st_size / 1e3:,.0f} kB" for f in files))
    served = [*serve(images, files, folder)["logits"]]
    here = [predict(images) for predict in predictors]
    add_difference(table, "logits of a server without Flax", here, served)


def follow(table: Table, seed: int, steps: int, folder: Path) -> None:
    """Take the model through all steps, and add each to the table."""
    test, digits = load_digits(seed)
    model, start = load(seed)
    first = [a[:64] for a in digits]
    programs = compile_steps(start, first)
    trained = start
    for _, batch in random_batches(digits, seed, steps, "As published"):
        trained, _ = programs[0](trained, *batch)
    table.add_row(f"1. trained {steps} steps as published")
    add_accuracies(table, start, trained, test)
    switch(table, trained, first[0])
    table.add_row(f"3. trained {steps} steps more, by both")
    once = [program(trained, *first)[0].params for program in programs]
    add_difference(table, "parameters after one", *once)
    states, times = train_both(programs, trained, digits, seed + 1, steps)
    by_flax, switched = states
    add_times(table, "a step", *times)
    add_accuracies(table, by_flax, switched, test)
    batches = np.split(digits[0], range(64, len(digits[0]), 64))
    variables = jaxbn.linen.population(model, variables_of(switched), batches)
    measured = switched.replace(**variables)
    table.add_row("4. population statistics")
    add_accuracies(table, switched, measured, test)
    predictors = fold(table, model, measured, test[0])
    serve_both(table, predictors, test[0], folder)


def main() -> None:
    """Take a published model through all steps; print the table."""
    args = make_parser(__doc__, quick="train 2 x 10 steps, not 2 x 150").parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    table = Table("What each step changed", "Before", "After", "Change")
    table.caption = "Differences are relative to the largest entry of an array."
    follow(table, args.seed, 10 if args.quick else 150, args.output)
    Console(width=88).print(table)


if __name__ == "__main__":
    main()
