"""Flax's layers, computed by jaxbn, in models whose code stays as it is."""

from collections.abc import Iterator
from contextlib import _GeneratorContextManager, contextmanager
from functools import partial
from typing import Literal

import jax
from flax import linen as nn
from jax import Array
from jaxtyping import PyTree

from .._core.options import Autodiff, check_autodiff
from ._batch_norm import apply_layer
from ._bridge import intercept_bridges
from ._intercept import NextCall, intercept_calls
from ._population import measuring


def replace_batch_norm(
    *, autodiff: Literal["custom_vjp", "jax"] = "custom_vjp"
) -> _GeneratorContextManager[None]:
    """Compute every `flax.linen.BatchNorm` with jaxbn, in unchanged models.

    A context manager, and a decorator. It acts on all code that is traced in this
    thread while it is entered; compiled functions are traced anew inside it, and again
    outside. Layers that inherit `__call__` from Flax's, or call it, are included, and
    so are layers of `flax.nnx.BatchNorm` in a `flax.nnx.bridge.ToLinen`.
    Parameters, statistics and gradients keep their places; the other differences are
    listed at `BatchNorm`, and so is `autodiff`.

    It replaces the call itself, so that interceptors entered inside it do not see the
    calls of `BatchNorm`: enter it last.

    **Raises** `ValueError` if `autodiff` is neither of the two.

    Source: `flax.linen.intercept_methods`, Flax's own mechanism for this purpose.

    >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxbn.linen
    >>> x = 1e4 + jax.random.normal(jax.random.key(0), (256, 1))
    >>> model = nn.BatchNorm(use_running_average=False)
    >>> variables = model.init(jax.random.key(1), x)
    >>> @jax.jit
    ... def std(variables, x):
    ...     y, _ = model.apply(variables, x, mutable=["batch_stats"])
    ...     return y.std().round(2)
    >>> with jaxbn.linen.replace_batch_norm():
    ...     print(std(variables, x))
    1.0
    """
    return _replace(check_autodiff(autodiff))


@contextmanager
def _replace(autodiff: Autodiff) -> Iterator[None]:
    replacement = partial(_apply_unless_measuring, autodiff)
    calls = intercept_calls([nn.BatchNorm], replacement)
    bridges = intercept_bridges(partial(_replace_in_module, autodiff))
    with _replaced(autodiff), calls, bridges:
        yield


def _replace_in_module(autodiff: Autodiff, _: nn.Module, module: object) -> None:
    from ..nnx import replace_batch_norm  # a circular import

    replace_batch_norm(module, autodiff=autodiff)


def _apply_unless_measuring(
    autodiff: Autodiff,
    next_call: NextCall,
    layer: nn.BatchNorm,
    *args: PyTree,
    **kwargs: PyTree,
) -> Array:
    """Apply the layer by jaxbn, except in a pass of `population`, which does so."""
    if measuring.value:
        return next_call(*args, **kwargs)
    return apply_layer(layer, *args, **kwargs, autodiff=autodiff)


# Part of the key of every jit cache: functions compiled outside are not reused inside.
_replaced = jax.make_user_context(None)
