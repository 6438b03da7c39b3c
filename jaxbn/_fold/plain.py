"""The layer of Flax or jaxbn that a layer of the model is compared with."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from .checks import NotFoldableError
from .values import Dataflow

Weights = Mapping[str, Array]


class PlainCall(NamedTuple):
    """A call of a layer without code of the user's, `call(x, weights)`.

    A class may change the weights before they are used, by a `param` of its own for
    instance: only a layer that computes what the plain one does can be folded.
    """

    call: Callable[[ArrayLike, Weights], Array]
    x: jax.ShapeDtypeStruct
    weights: Mapping[str, jax.ShapeDtypeStruct]

    def output_dtype(self, x: np.dtype, weights: np.dtype) -> np.dtype:
        """Return the output's dtype for an input and weights of these dtypes."""
        given = {
            n: jax.ShapeDtypeStruct(w.shape, weights) for n, w in self.weights.items()
        }
        with jax.numpy_dtype_promotion("standard"):
            return jax.eval_shape(
                self.call, jax.ShapeDtypeStruct(self.x.shape, x), given
            ).dtype


def describe_call(
    call: Callable[[ArrayLike, Weights], Array], x: ArrayLike, weights: Weights
) -> PlainCall:
    """Describe a call by its shapes."""
    shapes = {name: _shape(value) for name, value in weights.items()}
    return PlainCall(call, _shape(x), shapes)


def _shape(x: ArrayLike) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))


def check_computation(flow: Dataflow, path: str) -> None:
    """Check that the calls compute what the plain layer does with the variables."""
    if not flow.computed[path] <= flow.plain[path]:
        raise NotFoldableError(
            f"{path!r} computes something else than Flax's layer does with its "
            "variables"
        )
    if path in flow.leaking:
        raise NotFoldableError(f"an array in the call of {path!r} is used outside")
