"""Marks in a traced model: where each layer's input, output and weights are.

A mark is a `jax.ad_checkpoint.checkpoint_name`: it computes nothing, and survives
every transformation. `dataflow` reads the marks.
"""

from collections.abc import Mapping
from typing import NamedTuple

from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import PyTree

PREFIX = "jaxbn.fold"
INPUT, OUTPUT = "input", "output"


class Mark(NamedTuple):
    """The layer at this path, and the part of it: input, output or a weight's name."""

    part: str
    path: str


def mark(x: PyTree, part: str, path: str) -> PyTree:
    """Return `x` with a mark, which `read_mark` reads."""
    return checkpoint_name(x, f"{PREFIX}:{part}:{path}")


def mark_weights(weights: Mapping[str, Array], path: str) -> None:
    """Mark the weights of a layer as its call sees them, within all transformations.

    `rev` names the axes that the call sees: an axis added by `vmap` is not one of them.
    """
    for name, value in weights.items():
        mark(lax.rev(value, range(value.ndim)), name, path)


def read_mark(name: object) -> Mark | None:
    """Return the mark that a `checkpoint_name` is, if it is one."""
    prefix, *parts = str(name).split(":", 2)
    return Mark(*parts) if prefix == PREFIX and len(parts) == 2 else None
