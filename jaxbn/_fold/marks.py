"""Marks in a traced model: where each layer's input, output and weights are.

A mark is an operation of its own, which computes nothing, survives every
transformation, and shows the axes that the layer's call sees. `dataflow` reads it.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import jax.numpy as jnp
from jax import Array
from jax.extend.core import JaxprEqn, Primitive
from jax.interpreters import ad, batching, mlir
from jax.typing import ArrayLike

from .._core.axes import Axes

INPUT, OUTPUT = "input", "output"
PLAIN_INPUT, PLAIN_OUTPUT = "plain input", "plain output"


class Mark(NamedTuple):
    """The layer at this path, and the part of it.

    The part is its input or output, those of the plain layer that it is compared with,
    or the name of a weight.
    """

    part: str
    path: str


def mark(x: ArrayLike, part: str, path: str) -> Array:
    """Return `x` with a mark, which `read_mark` reads."""
    x = jnp.asarray(x)
    return _mark.bind(x, part=part, path=path, axes=tuple(range(x.ndim)))


def read_mark(equation: JaxprEqn) -> Mark | None:
    """Return the mark that an equation is, if it is one."""
    if equation.primitive is not _mark:
        return None
    return Mark(equation.params["part"], equation.params["path"])


def seen_axes(equation: JaxprEqn) -> Axes:
    """Return the array's axis for each axis that the call sees; `vmap` adds others."""
    return equation.params["axes"]


Kind = TypeVar("Kind")  # an array, or its shape


def _return_itself(x: Kind, **_: object) -> Kind:
    return x


def _batch(
    arrays: Sequence[Array],
    mapped: Sequence[int],
    *,
    part: str,
    path: str,
    axes: Axes,
) -> tuple[Array, int]:
    (x,), (axis,) = arrays, mapped
    seen = tuple(a + (a >= axis) for a in axes)
    return _mark.bind(x, part=part, path=path, axes=seen), axis


def _differentiate(
    primals: Sequence[Array], tangents: Sequence[object], **params: object
) -> tuple[Array, object]:
    return _mark.bind(*primals, **params), tangents[0]


_mark = Primitive("jaxbn_mark")
_mark.def_impl(_return_itself)
_mark.def_abstract_eval(_return_itself)
batching.primitive_batchers[_mark] = _batch
ad.primitive_jvps[_mark] = _differentiate
# Flax may keep a traced function, with its marks, for later calls of the model.
mlir.register_lowering(_mark, lambda context, x, **_: [x])
