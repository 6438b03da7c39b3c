"""Batch norm for Flax linen: the layer, models as they are, population statistics."""

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import unwrap
from typing import Any

import jax
from flax import linen as nn

from ._batch_norm import BatchNorm as BatchNorm
from ._batch_norm import call
from ._folding import fold as fold
from ._folding import skip_folded as skip_folded
from ._mask import batch_norm_mask as batch_norm_mask
from ._population import measuring
from ._population import population as population


@contextmanager
def replace_batch_norm(autodiff: str = "custom_vjp") -> Iterator[None]:
    """Compute every `flax.linen.BatchNorm` with jaxbn: models as they are.

    A context manager, and a decorator. It acts on what is traced in this thread while
    it is entered; compiled functions are traced anew inside it, and again outside.
    Layers that inherit `__call__` from Flax's, or call it, are served as well.
    Parameters, statistics and gradients keep their places; what else differs is at
    `BatchNorm`, and so is `autodiff`.

    It stands in for the call itself, so that interceptors entered inside it do not see
    the calls of `BatchNorm`: enter it last.

    Source: Flax's own mechanism for this, `flax.linen.intercept_methods`.

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

    def interceptor(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        # By function, not by class: so also where a subclass calls it through super.
        if context.orig_method.func is _FLAX_CALL and not measuring.value:
            return call(context.module, *args, **kwargs, autodiff=autodiff)
        return next_fun(*args, **kwargs)

    with _replaced(autodiff), nn.intercept_methods(interceptor):
        yield


_FLAX_CALL = unwrap(nn.BatchNorm.__call__)
# A part of the key of every jit cache: what was compiled without is not taken within.
_replaced = jax.make_user_context(None)
