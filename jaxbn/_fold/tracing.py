"""One abstract call of a model, and the calls of its layers within it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.extend.core import Jaxpr
from jax.tree_util import DictKey, KeyPath
from jax.typing import ArrayLike
from jaxtyping import PyTree

from .._flax.layer import Layer
from .._flax.paths import Path
from .linear import Linear, describe_functions
from .marks import INPUT, OUTPUT, PLAIN_INPUT, PLAIN_OUTPUT, mark
from .pairs import Norm
from .plain import PlainCall, Weights, describe_call

ARRAYS = (jax.Array, np.ndarray, jax.ShapeDtypeStruct)


@dataclass(eq=False)
class Recorder:
    """The calls of all layers and batch norms by path, as they are traced."""

    layers: dict[str, set[Linear]] = field(default_factory=dict)
    norms: dict[str, set[Norm]] = field(default_factory=dict)
    plain: dict[str, list[PlainCall]] = field(default_factory=dict)

    def call(
        self,
        path: str,
        call: Callable[[Array], Array],
        x: ArrayLike,
        weights: Weights,
        plain: Callable[[ArrayLike, Weights], Array],
        description: Linear | Norm,
    ) -> Array:
        """Call a layer or batch norm, marked, and the plain layer beside it."""
        if isinstance(description, Linear):
            self.layers.setdefault(path, set()).add(description)
            self.plain.setdefault(path, []).append(describe_call(plain, x, weights))
        else:
            self.norms.setdefault(path, set()).add(description)
        for name, value in weights.items():
            mark(value, name, path)
        y = mark(call(mark(x, INPUT, path)), OUTPUT, path)
        # Without it nothing shows that the layer can be folded.
        with suppress(Exception):
            mark(plain(mark(x, PLAIN_INPUT, path), weights), PLAIN_OUTPUT, path)
        return y


def describe_norm(layer: Layer, x: ArrayLike, train: bool) -> Norm:
    """Describe a call of a batch norm."""
    ndim, epsilon = jnp.ndim(x), layer.epsilon
    axes = tuple(sorted({int(a) % ndim - ndim for a in np.atleast_1d(layer.axis)}))
    known = None if isinstance(epsilon, Tracer) else float(epsilon)  # pyright: ignore[reportArgumentType]
    return Norm(axes, known, train, describe_functions(layer))


def trace_call(
    call: Callable[..., PyTree],
    variables: Sequence[ArrayLike],
    args: tuple[PyTree, ...],
    kwargs: Mapping[str, PyTree],
) -> tuple[Jaxpr, list[Path]]:
    """Trace `call(variables, *args, **kwargs)`, with all arrays abstract.

    It returns the model's output and state; return also the paths in this state.
    """
    leaves, structure = jax.tree.flatten((args, dict(kwargs)))
    arrays = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, ARRAYS)}

    def run(variables: Sequence[Array], arrays: Mapping[int, Array]) -> PyTree:
        given = [arrays.get(i, leaf) for i, leaf in enumerate(leaves)]
        args, kwargs = structure.unflatten(given)
        return call(variables, *args, **kwargs)

    with _add_note():
        trace = jax.make_jaxpr(run, return_shape=True)
        program, (_, state) = trace(list(variables), arrays)
    return program.jaxpr, [names(keys) for keys, _ in jax.tree.leaves_with_path(state)]


def names(keys: KeyPath) -> Path:
    """Return the names in a path of `jax.tree`, without the attributes of boxes."""
    found = [key.key for key in keys if isinstance(key, DictKey)]
    # nnx's SpectralNorm and WeightNorm have dicts whose keys are tuples.
    return tuple(k if isinstance(k, str | int) else str(k) for k in found)


@contextmanager
def _add_note() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        error.add_note(
            "While fold called the model, to see which layers follow each other: "
            "pass it the arguments of a call at inference, such as train=False."
        )
        raise
